import { afterAll, afterEach, beforeAll, describe, expect, test } from "bun:test";
import {
  type Connection,
  checkDurability,
  type Database,
  type DatabaseErrorKind,
  type DatabaseOptions,
  databaseErrorOf,
  openDatabase,
} from "../lib/database.ts";
import { freePorts } from "../lib/dev/servers.ts";
import { pointRoot } from "../lib/schema.ts";
import { createTestDatabase, errorOf, type TestDatabase } from "./harness.ts";

let db: TestDatabase;
beforeAll(async () => {
  db = await createTestDatabase();
});
afterAll(() => db.drop());
afterEach(() => db.query("delete from point_root"));

/** Gives `work` a pool of its own, and closes it. */
async function withDatabase<T>(
  options: DatabaseOptions & { url?: string },
  work: (database: Database) => Promise<T>,
): Promise<T> {
  const database = openDatabase(options.url ?? db.url, options);
  return work(database).finally(() => database.close());
}

function insert({ execute }: Connection, userId: string, points: number) {
  return execute("insert into point_root (user_id, point_num) values (?, ?)", [userId, points]);
}

function balances() {
  return db.query<{ user_id: string; point_num: number }>(
    "select user_id, point_num from point_root order by user_id",
  );
}

/** Kills a connection from another one, as an operator or a failing server would. */
async function killMe({ select }: Connection): Promise<void> {
  const [me] = await select<{ id: number }>("select connection_id() id");
  await db.query(`kill ${me?.id}`);
}

/** Opens for all once `count` have come. */
function barrier(count: number) {
  const { promise, resolve } = Promise.withResolvers<void>();
  let came = 0;
  return () => {
    if (++came >= count) resolve();
    return promise;
  };
}

function urlWith(change: (url: URL) => void): string {
  const url = new URL(db.url);
  change(url);
  return url.href;
}

describe("openDatabase() tells errors apart, and shows no SQL and no parameter:", () => {
  const secret = "S3cretUser";

  test.each<[string, DatabaseErrorKind, (connection: Connection) => Promise<unknown>]>([
    ["a duplicate", "duplicate", (connection) => insert(connection, secret, 1)],
    [
      "a duplicate through Drizzle",
      "duplicate",
      ({ drizzle }) =>
        drizzle
          .insert(pointRoot)
          .values({ userId: secret, pointNum: 1n, createdAt: new Date(0), updatedAt: new Date(0) }),
    ],
    [
      "an overflow",
      "out_of_range",
      ({ execute }) =>
        execute("update point_root set point_num = point_num + 9223372036854775807 where user_id = ?", [
          secret,
        ]),
    ],
    ["a broken check", "other", ({ execute }) => execute("update point_root set point_num = ?", [-1])],
    ["text that is too long", "other", (connection) => insert(connection, secret.repeat(3), 1)],
    ["no SQL", "other", ({ select }) => select("selct ?", [secret])],
    ["a table that is gone", "unavailable", ({ select }) => select("select ? from gone", [secret])],
  ])("%s is %s", async (_, kind, work) => {
    await db.database.run((connection) => insert(connection, secret, 1));
    for (const way of ["run", "transaction"] as const) {
      const error = await errorOf(db.database[way](work));
      expect(error.kind).toBe(kind);
      expect(error.isOutage).toBe(kind === "unavailable");
      const shown = [Bun.inspect(error), String(error), JSON.stringify(error), String(error.cause)].join(
        "\n",
      );
      expect(shown).not.toContain(secret);
      expect(error.message).not.toMatch(/select|insert into|update|selct/i);
    }
    expect(await balances()).toEqual([{ user_id: secret, point_num: 1 }]);
  });

  test("what is no error of MySQL comes back as it is", async () => {
    const own = new TypeError("own");
    expect(await db.database.run(() => Promise.reject(own)).catch((thrown) => thrown)).toBe(own);
    expect(databaseErrorOf(own)).toBe(own);
    expect(databaseErrorOf("text")).toBe("text");
  });

  test.each<[string, (url: URL) => void]>([
    ["a wrong password", (url) => (url.password = "S3cretUser")],
    ["an unknown database", (url) => (url.pathname = "/gone")],
  ])("%s is an outage, not the fault of a row", async (_, change) => {
    const error = await withDatabase({ url: urlWith(change) }, (database) =>
      errorOf(database.run(({ select }) => select("select 1"))),
    );
    expect(error.kind).toBe("unavailable");
    expect(error.message).not.toContain(secret);
  });

  test("a MySQL that is not there is unavailable", async () => {
    const port = String(await freePorts(1));
    const url = urlWith((parsed) => {
      parsed.port = port;
    });
    const error = await withDatabase({ url }, (database) =>
      errorOf(database.run(({ select }) => select("select 1"))),
    );
    expect(error.kind).toBe("unavailable");
    expect(error.message).toStartWith("MySQL failed with ECONNREFUSED");
  });
});

describe("Database.transaction()", () => {
  test("commits all of it", async () => {
    const result = await db.database.transaction(async (connection) => {
      await insert(connection, "a", 1);
      await insert(connection, "b", 2);
      return "done";
    });
    expect(result).toBe("done");
    expect(await balances()).toHaveLength(2);
  });

  test.each<[string, (connection: Connection) => Promise<unknown>]>([
    ["of its own", () => Promise.reject(new Error("own"))],
    ["of MySQL", (connection) => insert(connection, "a", 2)],
    [
      "thrown at once",
      () => {
        throw new Error("own");
      },
    ],
  ])("rolls everything back on an error %s, and leaves nothing to the next one", async (_, fail) => {
    await withDatabase({ connections: 1 }, async (database) => {
      const work = database.transaction(async (connection) => {
        await insert(connection, "a", 1);
        await fail(connection);
      });
      await expect(work).rejects.toThrow();
      await database.run((connection) => insert(connection, "b", 1));
    });
    expect(await balances()).toEqual([{ user_id: "b", point_num: 1 }]);
  });

  test("of a process that hangs is ended by MySQL, which lets others at its rows, and starts again", async () => {
    await db.query("insert into point_root (user_id, point_num) values ('a', 0)");
    const hangs = { ms: 0 };
    let attempts = 0;
    const add = "update point_root set point_num = point_num + 1 where user_id = 'a'";
    await db.database.transaction(async ({ execute, select }) => {
      const [session] = await select<{ s: number }>("select @@session.wait_timeout s");
      expect(session).toEqual({ s: 15 });
      await execute("set wait_timeout = 1");
      await execute(add);
      if (++attempts === 1) {
        const startedAt = performance.now();
        // Waits for the row that the first attempt has changed.
        await db.query(add);
        hangs.ms = performance.now() - startedAt;
      }
      await execute(add);
      await execute("set wait_timeout = 15");
    });
    expect(hangs.ms).toBeGreaterThan(500);
    expect(attempts).toBe(2);
    expect(await balances()).toEqual([{ user_id: "a", point_num: 3 }]);
  });

  test("starts again from BEGIN after a deadlock, and both who fought succeed (fault 23)", async () => {
    await db.query("insert into point_root (user_id, point_num) values ('a', 0), ('b', 0)");
    const bothHoldOne = barrier(2);
    let attempts = 0;
    const addToBoth = (first: string, second: string) => {
      let isFirst = true;
      return db.database.transaction(async ({ execute }) => {
        attempts++;
        const add = "update point_root set point_num = point_num + 1 where user_id = ?";
        await execute(add, [first]);
        if (isFirst) await bothHoldOne();
        isFirst = false;
        await execute(add, [second]);
      });
    };
    await Promise.all([addToBoth("a", "b"), addToBoth("b", "a")]);
    expect(attempts).toBeGreaterThan(2);
    expect(await balances()).toEqual([
      { user_id: "a", point_num: 2 },
      { user_id: "b", point_num: 2 },
    ]);
  }, 20_000);

  test("starts again after its connection was killed, and what it had done before is not done twice", async () => {
    let attempts = 0;
    await db.database.transaction(async (connection) => {
      await insert(connection, "a", 1);
      if (++attempts === 1) await killMe(connection);
      await insert(connection, "b", 1);
    });
    expect(attempts).toBe(2);
    expect(await balances()).toEqual([
      { user_id: "a", point_num: 1 },
      { user_id: "b", point_num: 1 },
    ]);
  });

  test("gives up on what can never succeed, as an outage", async () => {
    let attempts = 0;
    const work = db.database.transaction(async (connection) => {
      attempts++;
      await killMe(connection);
      await insert(connection, "a", 1);
    });
    expect((await errorOf(work)).isOutage).toBe(true);
    expect(attempts).toBe(5);
  }, 20_000);

  test("reads what others commit meanwhile: READ COMMITTED", async () => {
    const counts = await db.database.transaction(async (connection) => {
      const before = await connection.select("select * from point_root");
      await db.database.run((other) => insert(other, "a", 1));
      return [before.length, (await connection.select("select * from point_root")).length];
    });
    expect(counts).toEqual([0, 1]);
  });
});

describe("Database.run()", () => {
  test("runs again where its connection was killed", async () => {
    let attempts = 0;
    const rows = await db.database.run(async (connection) => {
      if (++attempts === 1) await killMe(connection);
      return connection.select<{ one: number }>("select 1 one");
    });
    expect(rows).toEqual([{ one: 1 }]);
    expect(attempts).toBe(2);
  });

  test("runs again where a connection died in the pool", async () => {
    await withDatabase({ connections: 1 }, async (database) => {
      await database.run(killMe);
      expect(await database.run(({ select }) => select("select 1 one"))).toEqual([{ one: 1 }]);
    });
  });

  test("does not run again what failed for another reason", async () => {
    let attempts = 0;
    const work = db.database.run(({ select }) => {
      attempts++;
      return select("selct 1");
    });
    expect((await errorOf(work)).kind).toBe("other");
    expect(attempts).toBe(1);
  });

  test("counts the rows that changed, not those that matched (fault 26)", async () => {
    await db.database.run(async (connection) => {
      expect((await insert(connection, "a", 1)).affectedRows).toBe(1);
      const set = "update point_root set point_num = ? where user_id = 'a'";
      expect((await connection.execute(set, [1])).affectedRows).toBe(0);
      expect((await connection.execute(set, [2])).affectedRows).toBe(1);
      const same =
        "insert into point_root (user_id, point_num) values ('a', 2) on duplicate key update user_id = user_id";
      expect((await connection.execute(same)).affectedRows).toBe(0);
    });
  });
});

describe("openDatabase() sets every session:", () => {
  test("UTC, whatever the zone of the server and of this process (fault 7)", async () => {
    const time = new Date("2029-02-22T13:59:00.123Z");
    await db.database.run(async ({ execute, select }) => {
      await execute("insert into point_root (user_id, point_num, created_at) values ('a', 1, ?)", [time]);
      expect(await select("select cast(created_at as char) text, created_at time from point_root")).toEqual([
        { text: "2029-02-22 13:59:00.123", time },
      ]);
      const [clock] = await select<{ zone: string; apart: string }>(
        "select @@session.time_zone zone, timestampdiff(second, utc_timestamp(3), now(3)) apart",
      );
      expect(clock).toEqual({ zone: "+00:00", apart: expect.anything() });
      expect(Number(clock?.apart)).toBe(0);
    });
  });

  test("strict mode: a user id that is too long fails, and is not cut to somebody else's (fault 27)", async () => {
    const error = await errorOf(db.database.run((connection) => insert(connection, "x".repeat(21), 1)));
    expect(error.kind).toBe("other");
    expect(error.message).toBe("MySQL failed with ER_DATA_TOO_LONG");
    expect(await balances()).toEqual([]);
    const [mode] = await db.query<{ mode: string }>("select @@session.sql_mode mode");
    expect(mode?.mode).toContain("STRICT_ALL_TABLES");
  });

  test("lock waits of 5 s, so that a lock ends as a retry and not as a client's timeout", async () => {
    const [session] = await db.query("select @@session.innodb_lock_wait_timeout seconds");
    expect(session).toEqual({ seconds: 5 });
  });

  test("integers beyond 2^53 keep their digits", async () => {
    expect(await db.query("select 9223372036854775807 big, 9007199254740993 odd")).toEqual([
      { big: "9223372036854775807", odd: "9007199254740993" },
    ]);
  });
});

describe("openDatabase() waits no longer than told:", () => {
  test("work beyond workMs is unavailable, and its connection is not used again", async () => {
    await withDatabase({ connections: 1, workMs: 200 }, async (database) => {
      const startedAt = performance.now();
      const error = await errorOf(database.run(({ select }) => select("select sleep(20)")));
      expect(performance.now() - startedAt).toBeLessThan(3_000);
      expect([error.kind, error.message]).toEqual(["unavailable", "MySQL did not answer within 200 ms"]);
      expect(await database.run(({ select }) => select("select 1 one"))).toEqual([{ one: 1 }]);
    });
  });

  test("a pool without a free connection is unavailable after acquireMs, and serves again after it", async () => {
    await withDatabase({ connections: 1, acquireMs: 200 }, async (database) => {
      const { promise: gate, resolve: open } = Promise.withResolvers<void>();
      const held = Promise.withResolvers<void>();
      const holder = database.run(async ({ select }) => {
        await select("select 1");
        held.resolve();
        await gate;
      });
      await held.promise;
      const startedAt = performance.now();
      const error = await errorOf(database.run(({ select }) => select("select 1")));
      expect(performance.now() - startedAt).toBeWithin(150, 3_000);
      expect([error.kind, error.message]).toEqual(["unavailable", "No connection to MySQL within 200 ms"]);
      open();
      await holder;
      expect(await database.run(({ select }) => select("select 1 one"))).toEqual([{ one: 1 }]);
    });
  });

  test("more than 1,000 who wait for a connection are refused at once", async () => {
    await withDatabase({ connections: 1 }, async (database) => {
      const { promise: gate, resolve: open } = Promise.withResolvers<void>();
      const work = Array.from({ length: 1_001 }, () => database.run(() => gate));
      const error = await errorOf(database.run(() => gate));
      expect([error.kind, error.message]).toEqual(["unavailable", "Queue limit reached."]);
      open();
      await Promise.all(work);
    });
  }, 20_000);

  test("a closed pool is unavailable", async () => {
    const database = openDatabase(db.url);
    await database.run(({ select }) => select("select 1"));
    await database.close();
    expect((await errorOf(database.run(({ select }) => select("select 1")))).kind).toBe("unavailable");
  });
});

describe("checkDurability()", () => {
  // A stub, for once: these settings are the server's own, and to change them would put other runs on it at risk.
  function serverWith(settings: { flush: number; log_bin: number; sync: number }): Database {
    const connection = { select: async () => [settings] } as unknown as Connection;
    const run = <T>(work: (connection: Connection) => Promise<T>) => work(connection);
    return { run, transaction: run, close: async () => {} };
  }

  test("accepts the server of these tests, as its settings are the right ones", async () => {
    const [settings] = await db.query<{ flush: number; log_bin: number; sync: number }>(
      "select @@global.innodb_flush_log_at_trx_commit flush, @@global.log_bin log_bin, @@global.sync_binlog sync",
    );
    const isSafe = settings?.flush === 1 && (settings.log_bin === 0 || settings.sync === 1);
    const error = await checkDurability(db.database).catch((thrown) => thrown);
    expect(error === undefined).toBe(isSafe);
  });

  test.each([[{ flush: 1, log_bin: 1, sync: 1 }], [{ flush: 1, log_bin: 0, sync: 0 }]])(
    "accepts %j",
    async (settings) => {
      expect(await checkDurability(serverWith(settings))).toBeUndefined();
    },
  );

  test.each([
    [{ flush: 2, log_bin: 0, sync: 0 }, "innodb_flush_log_at_trx_commit must be 1: it is 2"],
    [{ flush: 0, log_bin: 1, sync: 1 }, "innodb_flush_log_at_trx_commit must be 1: it is 0"],
    [{ flush: 1, log_bin: 1, sync: 0 }, "sync_binlog must be 1: it is 0"],
    [{ flush: 1, log_bin: 1, sync: 1000 }, "sync_binlog must be 1: it is 1000"],
    [
      { flush: 2, log_bin: 1, sync: 0 },
      "innodb_flush_log_at_trx_commit must be 1: it is 2; sync_binlog must be 1: it is 0",
    ],
  ])("refuses %j with setting, rule and value, and not as an outage to wait for", async (settings, rule) => {
    const error = await errorOf(checkDurability(serverWith(settings)));
    expect(error.message).toBe(
      `Cannot promise points on a MySQL that may lose commits: ${rule}. Set it in MySQL, or ALLOW_LOSSY_DATABASE=true to run all the same`,
    );
    expect(error.isOutage).toBe(false);
  });
});
