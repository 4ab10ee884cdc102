import { beforeEach, describe, expect, test } from "bun:test";
import { hostname } from "node:os";
import { type Connection, type DatabaseOptions, openDatabase } from "../../lib/database.ts";
import { type DatabaseErrorKind, databaseErrorOf } from "../../lib/database_errors.ts";
import {
  NEEDED_PACKET,
  openSession,
  openSessionEnder,
  refuseSettings,
  type ServerSettings,
} from "../../lib/database_session.ts";
import { pointRoot } from "../../lib/schema.ts";
import { emptyTables, openTestDatabase, untilRunning } from "../harness/database.ts";
import { command } from "../harness/fault_points.ts";
import { errorOf, until } from "../harness/harness.ts";
import { recordStatements } from "../harness/plans.ts";
import { type Moment, startProxy } from "../harness/proxy.ts";

const db = await openTestDatabase();
beforeEach(() => emptyTables(db));

/** A pool of its own; `await using` closes it. */
function openPool({ url = db.url, ...options }: DatabaseOptions & { url?: string } = {}) {
  const database = openDatabase(url, options);
  return Object.assign(database, { [Symbol.asyncDispose]: () => database.close() });
}

function urlWith(parts: Partial<URL>): string {
  return Object.assign(new URL(db.url), parts).href;
}

const one = ({ select }: Connection) => select<{ one: number }>("select 1 one");
const ADD = "/* add_one */ update point_root set point_num = point_num + 1 where user_id = ?";

function insert({ execute }: Connection, userId: string, points: number) {
  return execute("insert into point_root (user_id, point_num) values (?, ?)", [userId, points]);
}

/** The points of every user. */
async function balances(): Promise<Record<string, number>> {
  const rows = await db.query<{ user_id: string; point_num: number }>(
    "select user_id, point_num from point_root",
  );
  return Object.fromEntries(rows.map((row) => [row.user_id, row.point_num]));
}

/** Kills a connection from another one, as an operator or a failing server would. */
async function killMe({ select }: Connection): Promise<void> {
  const [me] = await select<{ id: number }>("select connection_id() id");
  await db.query(`kill ${me?.id}`);
}

describe("openDatabase() tells errors apart, and shows no SQL and no parameter:", () => {
  const secret = "S3cretUser";

  test.each<[string, DatabaseErrorKind, (connection: Connection) => Promise<unknown>]>([
    ["a duplicate", "duplicate", (connection) => insert(connection, secret, 1)],
    [
      "a duplicate through Drizzle",
      "duplicate",
      ({ drizzle }) =>
        drizzle("insert")
          .insert(pointRoot)
          .values({ userId: secret, pointNum: 1n, createdAt: new Date(0), updatedAt: new Date(0) }),
    ],
    [
      "an overflow",
      "out_of_range",
      ({ execute }) => execute("update point_root set point_num = point_num + 9223372036854775807"),
    ],
    ["a broken check", "other", ({ execute }) => execute("update point_root set point_num = ?", [-1])],
    ["text that is too long", "other", (connection) => insert(connection, secret.repeat(3), 1)],
    ["no SQL", "other", ({ select }) => select("selct ?", [secret])],
    ["a table that is gone", "unavailable", ({ select }) => select("select ? from gone", [secret])],
  ])("%s is %s", async (_, kind, work) => {
    await db.database.run((connection) => insert(connection, secret, 1));
    for (const way of ["run", "transaction"] as const) {
      const error = await errorOf(db.database[way](work));
      expect([error.kind, error.isOutage]).toEqual([kind, kind === "unavailable"]);
      const shown = [Bun.inspect(error), String(error), JSON.stringify(error), String(error.cause)];
      expect(shown.join("\n")).not.toContain(secret);
      expect(error.message).not.toMatch(/select|insert into|update|selct/i);
    }
    expect(await balances()).toEqual({ [secret]: 1 });
  });

  test("what is no error of MySQL comes back as it is", async () => {
    const own = new TypeError("own");
    expect(await db.database.run(() => Promise.reject(own)).catch((thrown) => thrown)).toBe(own);
    expect(databaseErrorOf(own)).toBe(own);
    expect(databaseErrorOf("text")).toBe("text");
  });

  test.each<[string, Partial<URL>, string]>([
    ["a wrong password", { password: secret }, "MySQL failed with ER_ACCESS_DENIED_ERROR (1045): "],
    ["an unknown database", { pathname: "/gone" }, "MySQL failed with ER_"],
    ["a MySQL that is not there", { port: "1" }, "MySQL failed with ECONNREFUSED"],
  ])("%s is an outage, not the fault of a row", async (_, parts, message) => {
    await using database = openPool({ url: urlWith(parts) });
    const error = await errorOf(database.run(one));
    expect(error.kind).toBe("unavailable");
    expect(error.message).toStartWith(message);
    expect(error.message).not.toContain(secret);
  });
});

describe("Database.transaction()", () => {
  test("commits all of it, and gives what the work gives", async () => {
    const work = db.database.transaction(async (transaction) => {
      await insert(transaction, "a", 1);
      await insert(transaction, "b", 2);
      return "done";
    });
    expect(await work).toBe("done");
    expect(await balances()).toEqual({ a: 1, b: 2 });
  });

  test.each<[string, (connection: Connection) => Promise<unknown>]>([
    ["of its own", () => Promise.reject(new Error("own"))],
    ["of MySQL", (connection) => insert(connection, "a", 2)],
  ])("rolls everything back on an error %s, and leaves nothing to the next one", async (_, fail) => {
    await using database = openPool({ connections: 1 });
    const work = database.transaction(async (transaction) => {
      await insert(transaction, "a", 1);
      await fail(transaction);
    });
    await expect(work).rejects.toThrow();
    await database.run((connection) => insert(connection, "b", 1));
    expect(await balances()).toEqual({ b: 1 });
  });

  test("of a process that hangs is ended by MySQL, which lets others at its rows, and runs again", async () => {
    await db.query("insert into point_root (user_id, point_num) values ('a', 0)");
    let attempts = 0;
    await db.database.transaction(async ({ execute, select }) => {
      expect(await select("select @@session.wait_timeout s")).toEqual([{ s: 15 }]);
      await execute("set wait_timeout = 1");
      await execute(ADD, ["a"]);
      // Waits for the row that the first attempt has changed; fails if nobody lets it go. Longer than a second, which a wait lasts.
      if (++attempts === 1) await until("MySQL lets it go", () => db.query(ADD, ["a"]).catch(() => false));
      await execute("set wait_timeout = 15");
    });
    expect(attempts).toBe(2);
    expect(await balances()).toEqual({ a: 2 });
  });

  test("runs again from BEGIN after a deadlock, and both succeed (fault 23)", async () => {
    await db.query("insert into point_root (user_id, point_num) values ('a', 0), ('b', 0)");
    const retries: string[] = [];
    await using database = openPool({ onRetry: ({ kind }) => retries.push(kind) });
    let second: Promise<void> | undefined;
    await database.transaction(async ({ execute }) => {
      await execute(ADD, ["a"]);
      second ??= database.transaction(async (another) => {
        await another.execute(ADD, ["b"]);
        await another.execute(ADD.replace("add_one", "add_last"), ["a"]);
      });
      if (retries.length === 0) await untilRunning(db, "add_last");
      await execute(ADD, ["b"]);
    });
    await second;
    expect(retries).toEqual(["deadlock"]);
    expect(await balances()).toEqual({ a: 2, b: 2 });
  });

  test.each<[string, Moment]>([
    ["insert", "unsent"],
    ["insert", "answered"],
    ["commit", "unsent"],
  ])("runs again if its connection is lost at its %s (%s), and does nothing twice", async (name, moment) => {
    await using proxy = await startProxy(db.url);
    const retries: string[] = [];
    await using database = openPool({ url: proxy.url, onRetry: ({ kind }) => retries.push(kind) });
    proxy.trap({ command: command(name), moment, spring: () => proxy.cut() });
    await database.transaction((transaction) => insert(transaction, "a", 1));
    expect(retries).toEqual(["lost"]);
    expect(await balances()).toEqual({ a: 1 });
  });

  test("gives up after five tries, as an outage", async () => {
    let attempts = 0;
    const work = db.database.transaction(async (transaction) => {
      attempts++;
      await killMe(transaction);
      await insert(transaction, "a", 1);
    });
    expect((await errorOf(work)).isOutage).toBe(true);
    expect(attempts).toBe(5);
  });

  test("reads what others commit meanwhile: READ COMMITTED", async () => {
    const count = "select count(*) n from point_root";
    await db.database.transaction(async ({ select }) => {
      expect(await select(count)).toEqual([{ n: 0 }]);
      await db.database.run((other) => insert(other, "a", 1));
      expect(await select(count)).toEqual([{ n: 1 }]);
    });
  });
});

describe("Database.run()", () => {
  test("runs again if its connection has died in the pool", async () => {
    await using database = openPool({ connections: 1 });
    await database.run(killMe);
    expect(await database.run(one)).toEqual([{ one: 1 }]);
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
    await db.database.run(async ({ execute }) => {
      const set = "update point_root set point_num = ? where user_id = 'a'";
      const upsert =
        "insert into point_root (user_id, point_num) values ('a', ?) on duplicate key update user_id = user_id";
      expect((await execute(upsert, [1])).affectedRows).toBe(1);
      expect((await execute(set, [1])).affectedRows).toBe(0);
      expect((await execute(set, [2])).affectedRows).toBe(1);
      expect((await execute(upsert, [2])).affectedRows).toBe(0);
    });
  });

  test("sends each statement with its name in front", async () => {
    const statements = await recordStatements(db, (database) =>
      database.run(async ({ drizzle, execute }) => {
        for (const name of ["first", "second"])
          await drizzle(name).select({ id: pointRoot.userId }).from(pointRoot);
        await execute(ADD, ["a"]);
      }),
    );
    expect(statements.map(({ name }) => name)).toEqual(["first", "second", "add_one"]);
    expect(statements[1]?.sql).toBe("/* second */ select `user_id` from `point_root`");
  });
});

describe("openDatabase() sets every session:", () => {
  test("UTC, whatever the zone of the server and of this process (fault 7)", async () => {
    const time = new Date("2029-02-22T13:59:00.123Z");
    await db.database.run(async ({ execute, select }) => {
      await execute("insert into point_root (user_id, point_num, created_at) values ('a', 1, ?)", [time]);
      const [row] = await select(
        `select cast(created_at as char) text, created_at time, @@session.time_zone zone,
           timestampdiff(second, utc_timestamp(3), now(3)) clock_offset from point_root`,
      );
      expect(row).toEqual({ text: "2029-02-22 13:59:00.123", time, zone: "+00:00", clock_offset: 0 });
    });
  });

  test("strict mode: a user id that is too long fails, and is not cut to somebody else's (fault 27)", async () => {
    const error = await errorOf(db.database.run((connection) => insert(connection, "x".repeat(21), 1)));
    expect([error.kind, error.message]).toEqual(["other", "MySQL failed with ER_DATA_TOO_LONG (1406)"]);
    expect(await balances()).toEqual({});
  });

  test("short lock waits, so that a lock ends as a retry and not as a client's timeout", async () => {
    const waits = "select @@session.innodb_lock_wait_timeout row_lock, @@session.lock_wait_timeout metadata";
    expect(await db.query(waits)).toEqual([{ row_lock: 1, metadata: 5 }]);
  });

  test("with the name of the program, its host and process", async () => {
    await using database = openPool({ program: "pointservice-test" });
    const attributes = await database.run(({ select }) =>
      select<{ name: string; value: string }>(
        `select attr_name name, attr_value value from performance_schema.session_connect_attrs
         where processlist_id = connection_id() and attr_name in ('program_name', 'pid', 'host')`,
      ),
    );
    const isOn = await db.query("select 1 from performance_schema.threads limit 1");
    expect(attributes.toSorted((a, b) => (a.name < b.name ? -1 : 1))).toEqual(
      isOn.length === 0
        ? []
        : [
            { name: "host", value: hostname() },
            { name: "pid", value: String(process.pid) },
            { name: "program_name", value: "pointservice-test" },
          ],
    );
  });

  test("openSession() gives a connection of one's own the same settings", async () => {
    const session = await openSession(db.url, { connectMs: 5_000 });
    const [rows] = await session.query("select @@session.time_zone zone, @@session.wait_timeout s");
    expect(rows as unknown).toEqual([{ zone: "+00:00", s: 15 }]);
    session.destroy();
    const refused = openSession(urlWith({ port: "1" }), { connectMs: 5_000 });
    expect((await errorOf(refused)).kind).toBe("unavailable");
  });
});

describe("openDatabase() waits no longer than told:", () => {
  test("work beyond workMs, its own or that of all, is a timeout, and its connection is not used again", async () => {
    await using database = openPool({ connections: 1, workMs: 200 });
    for (const [workMs, ms] of [
      [undefined, 200],
      [100, 100],
    ] as const) {
      const error = await errorOf(database.run(({ select }) => select("select sleep(20)"), { workMs }));
      expect([error.kind, error.message]).toEqual(["timeout", `MySQL did not answer within ${ms} ms`]);
    }
    expect(await database.run(one, { workMs: 20_000 })).toEqual([{ one: 1 }]);
  });

  test("the sessions of work beyond workMs are ended on the server, with their locks, even if no connection is free", async () => {
    await db.query("insert into point_root (user_id, point_num) values ('a', 0), ('b', 0)");
    await using database = openPool({ connections: 2, workMs: 300 });
    const works = ["a", "b"].map((userId) =>
      errorOf(
        database.transaction(async ({ execute, select }) => {
          await execute(ADD, [userId]);
          // Unlike SLEEP(), this does not notice that the client has gone.
          await select("/* endless */ select benchmark(1000000000000, sha2('1', 256))");
        }),
      ),
    );
    expect((await Promise.all(works)).map(({ kind }) => kind)).toEqual(["timeout", "timeout"]);
    await until("both have ended", async () => {
      const left = await db.query(
        "select 1 from information_schema.processlist where info like '/* endless%'",
      );
      return left.length === 0;
    });
    await until("their locks are free", () =>
      db
        .query(ADD, ["a"])
        .then(() => db.query(ADD, ["b"]))
        .catch(() => false),
    );
    expect(await balances()).toEqual({ a: 1, b: 1 });
  });

  test("a session with the same id, but of another server or database, is not ended", async () => {
    await using another = openPool({ connections: 1 });
    const read = ({ select }: Connection) =>
      select<{ id: number; server: string }>(
        "select connection_id() id, concat_ws(' ', @@hostname, @@port, @@server_id) server",
      );
    const [session = { id: 0, server: "" }] = await another.run(read);
    const elsewhere = openSessionEnder(db.url, {});
    elsewhere.end({ ...session, server: "elsewhere 3306 1" });
    await elsewhere.settled();
    const other = openSessionEnder(urlWith({ pathname: "/information_schema" }), {});
    other.end(session);
    await other.settled();
    expect(await another.run(read)).toEqual([session]);
    const ender = openSessionEnder(db.url, {});
    ender.end(session);
    await ender.settled();
    expect(await another.run(read)).not.toEqual([session]);
  });

  test("ending sessions never throws, and takes no longer than 2 s, whatever the server does", async () => {
    await using proxy = await startProxy(db.url);
    proxy.hold();
    for (const url of [proxy.url, urlWith({ port: "1" })]) {
      const ender = openSessionEnder(url, {});
      ender.end({ id: 1, server: "" });
      await ender.settled();
    }
  });

  test("a pool without a free connection is unavailable after acquireMs, and serves again after it", async () => {
    await using database = openPool({ connections: 1, acquireMs: 500 });
    await database.run(async () => {
      const error = await errorOf(database.run(one));
      expect([error.kind, error.message]).toEqual(["unavailable", "No connection to MySQL within 500 ms"]);
    });
    expect(await database.run(one)).toEqual([{ one: 1 }]);
  });

  test("more than 1,000 who wait for a connection are refused at once", async () => {
    await using database = openPool({ connections: 1 });
    const { promise: gate, resolve: open } = Promise.withResolvers<void>();
    const work = Array.from({ length: 1_001 }, () => database.run(() => gate));
    const error = await errorOf(database.run(() => gate));
    expect([error.kind, error.message]).toEqual(["unavailable", "Queue limit reached."]);
    open();
    await Promise.all(work);
  });

  test("a closed pool is unavailable", async () => {
    const database = openDatabase(db.url);
    await database.run(one);
    await database.close();
    expect((await errorOf(database.run(one))).kind).toBe("unavailable");
  });
});

describe("openDatabase() refuses a server by its settings:", () => {
  const SOUND: ServerSettings = {
    flush: 1,
    log_bin: 1,
    sync: 1,
    format: "ROW",
    next_format: "MIXED",
    read_only: 0,
    packet: NEEDED_PACKET,
  };

  const LOSSY = "Cannot promise points on a MySQL that may lose commits";
  const LOSSY_ADVICE = "Change that in MySQL, or set ALLOW_LOSSY_DATABASE=true to run anyway";
  const FLUSH = "innodb_flush_log_at_trx_commit must be 1: it is";
  const SYNC = "sync_binlog must be 1: it is";
  const STATEMENT = "binlog_format must be ROW or MIXED: it is STATEMENT";
  test.each<[Partial<ServerSettings>, string]>([
    [{ flush: 2, log_bin: 0, sync: 0 }, `${LOSSY}: ${FLUSH} 2. ${LOSSY_ADVICE}`],
    [{ sync: 0 }, `${LOSSY}: ${SYNC} 0. ${LOSSY_ADVICE}`],
    [{ flush: 0, sync: 1000 }, `${LOSSY}: ${FLUSH} 0; ${SYNC} 1000. ${LOSSY_ADVICE}`],
    [{ format: "STATEMENT" }, `Cannot work with this MySQL: ${STATEMENT}. Change that in MySQL`],
    [{ next_format: "STATEMENT" }, `Cannot work with this MySQL: ${STATEMENT}. Change that in MySQL`],
    [
      { packet: 1_048_576 },
      "Cannot work with this MySQL: max_allowed_packet must be at least 4194304: it is 1048576. Change that in MySQL",
    ],
  ])("%j is unsafe", async (broken, message) => {
    const refuse = async (allowLossy: boolean) => refuseSettings({ ...SOUND, ...broken }, { allowLossy });
    const error = await errorOf(refuse(false));
    expect([error.kind, error.isOutage, error.message]).toEqual(["unsafe", true, message]);
    if (message.startsWith(LOSSY)) expect(await refuse(true)).toBeUndefined();
    else expect(await errorOf(refuse(true))).toEqual(error);
  });

  test.each([1, "ON"])("read_only = %p is an outage to wait for (fault 50)", async (read_only) => {
    const error = await errorOf((async () => refuseSettings({ ...SOUND, read_only }, {}))());
    expect([error.kind, error.reason]).toEqual(["unavailable", "MySQL is read-only"]);
  });

  test("what is sound, or has no binary log, is accepted", () => {
    for (const settings of [{}, { log_bin: 0, sync: 0, format: "STATEMENT" }, { read_only: "OFF" }]) {
      refuseSettings({ ...SOUND, ...settings }, { allowLossy: false });
    }
  });
});
