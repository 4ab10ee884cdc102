import { afterAll, afterEach, beforeAll, describe, expect, test } from "bun:test";
import { v7 as uuidv7 } from "uuid";
import { type Database, DatabaseError } from "../lib/database.ts";
import { DIRECT, type PointTransaction } from "../lib/point.ts";
import {
  addPointsIdempotent,
  type ChangeOutcome,
  changePoints,
  compareSums,
  findBalance,
  findLedgerEntry,
} from "../lib/point_repository.ts";
import type { Reservation, ReservationStatus } from "../lib/reservation.ts";
import { markDone } from "../lib/reservation_repository.ts";
import { createTestDatabase, errorOf, insertReservation, type TestDatabase, until } from "./harness.ts";

let db: TestDatabase;
beforeAll(async () => {
  db = await createTestDatabase();
});
afterAll(() => db.drop());
afterEach(async () => {
  for (const table of ["point_root", "point_transactions", "point_reservations"])
    await db.query(`delete from ${table}`);
});

const MAX_BIGINT = 9_223_372_036_854_775_807n;

function entryOf(fields: Partial<PointTransaction> = {}): PointTransaction {
  return { idempotencyKey: uuidv7(), userId: "TestUser01", pointAmount: 100, ...fields };
}

function add(...entries: PointTransaction[]): Promise<void> {
  return db.database.transaction((connection) => addPointsIdempotent(connection, entries));
}

function setBalance(userId: string, points: bigint) {
  return db.query("insert into point_root (user_id, point_num) values (?, ?)", [userId, points.toString()]);
}

async function pointsOf(userId: string): Promise<bigint | undefined> {
  return (await findBalance(db.database, userId))?.pointNum;
}

function ledger() {
  return db.query<{ idempotencyKey: string; userId: string; pointAmount: number }>(
    "select idempotency_key idempotencyKey, user_id userId, point_amount pointAmount from point_transactions order by id",
  );
}

describe("addPointsIdempotent()", () => {
  test("adds the ledger's entries in their order, and each user's sum to the balance", async () => {
    const entries = [
      entryOf({ userId: "b", pointAmount: 1 }),
      entryOf({ userId: "a", pointAmount: 20 }),
      entryOf({ userId: "b", pointAmount: 300 }),
      entryOf({ userId: "B", pointAmount: 4_000 }),
    ];
    await setBalance("a", 5n);
    await add(...entries);
    expect(await ledger()).toEqual(entries);
    expect(await Promise.all(["a", "b", "B"].map(pointsOf))).toEqual([25n, 301n, 4_000n]);
  });

  test("adds the largest amounts without loss, far beyond 2^53", async () => {
    await setBalance("rich", 9_007_199_254_740_993n);
    await add(
      ...Array.from({ length: 1_000 }, () => entryOf({ userId: "rich", pointAmount: 2_147_483_647 })),
    );
    expect(await pointsOf("rich")).toBe(9_007_199_254_740_993n + 2_147_483_647_000n);
  });

  test.each<[string, Partial<PointTransaction>]>([
    ["the same content", {}],
    ["another amount", { pointAmount: 7 }],
    ["another user", { userId: "other" }],
  ])(
    "refuses a key that has its entry with %s as a duplicate, and grants nothing to its batch",
    async (_, other) => {
      const first = entryOf({ idempotencyKey: "order-42" });
      await add(first);
      const error = await errorOf(add(entryOf({ userId: "innocent" }), { ...first, ...other }));
      expect(error.kind).toBe("duplicate");
      expect(error.message).not.toContain("order-42");
      expect(await ledger()).toEqual([first]);
      expect(await pointsOf("TestUser01")).toBe(100n);
      expect(await pointsOf("innocent")).toBeUndefined();
      expect(await pointsOf("other")).toBeUndefined();
    },
  );

  test("refuses one key twice in a batch", async () => {
    const entry = entryOf();
    expect((await errorOf(add(entry, entry))).kind).toBe("duplicate");
    expect(await ledger()).toEqual([]);
    expect(await pointsOf(entry.userId)).toBeUndefined();
  });

  test("takes keys that differ only in case for two", async () => {
    await add(entryOf({ idempotencyKey: "Order" }), entryOf({ idempotencyKey: "order" }));
    expect(await pointsOf("TestUser01")).toBe(200n);
  });

  test("fills a balance up to the last point of a BIGINT", async () => {
    await setBalance("rich", MAX_BIGINT - 100n);
    await add(entryOf({ userId: "rich" }));
    expect(await pointsOf("rich")).toBe(MAX_BIGINT);
  });

  test("refuses one point more as out_of_range, and rolls the ledger back", async () => {
    await setBalance("rich", MAX_BIGINT - 99n);
    const error = await errorOf(add(entryOf({ userId: "innocent" }), entryOf({ userId: "rich" })));
    expect(error.kind).toBe("out_of_range");
    expect(error.isOutage).toBe(false);
    expect(await ledger()).toEqual([]);
    expect(await pointsOf("rich")).toBe(MAX_BIGINT - 99n);
    expect(await pointsOf("innocent")).toBeUndefined();
  });

  test.each([
    ["a user id that would be cut", { userId: "x".repeat(21) }],
    ["a key that would be cut", { idempotencyKey: "k".repeat(121) }],
    ["an empty user id", { userId: "" }],
  ])("leaves nothing behind of %s: the table refuses it", async (_, wrong) => {
    expect((await errorOf(add(entryOf(), entryOf(wrong)))).kind).toBe("other");
    expect(await ledger()).toEqual([]);
    expect(await pointsOf("TestUser01")).toBeUndefined();
  });

  test("by transactions that bring the same users in opposite orders never deadlocks", async () => {
    const users = Array.from({ length: 40 }, (_, index) => `user${index}`);
    for (const user of users) await setBalance(user, 0n);
    let attempts = 0;
    const grantAll = (order: readonly string[]) =>
      db.database.transaction(async (connection) => {
        attempts++;
        await addPointsIdempotent(
          connection,
          order.map((userId) => entryOf({ userId, pointAmount: 1 })),
        );
      });
    const grants = Array.from({ length: 30 }, (_, index) => grantAll(index % 2 ? users : users.toReversed()));
    await Promise.all(grants);
    expect(new Set(await Promise.all(users.map(pointsOf)))).toEqual(new Set([30n]));
    expect(await ledger()).toHaveLength(30 * 40);
    // A transaction that deadlocks starts again; one that locks in order never does.
    expect(attempts).toBe(30);
  }, 20_000);

  test("by transactions that bring new users in opposite orders grants all", async () => {
    const users = Array.from({ length: 40 }, (_, index) => `new${index}`);
    const entries = (order: readonly string[]) => order.map((userId) => entryOf({ userId, pointAmount: 1 }));
    await Promise.all([add(...entries(users)), add(...entries(users.toReversed()))]);
    expect(new Set(await Promise.all(users.map(pointsOf)))).toEqual(new Set([2n]));
  });
});

/** An entry that no reservation made: its key, its user, its points. */
function changeOf(key: string, userId: string, pointAmount: number): PointTransaction {
  return { idempotencyKey: DIRECT + key, userId, pointAmount };
}

describe("changePoints()", () => {
  function change(...batch: PointTransaction[]): Promise<ChangeOutcome[]> {
    return changePoints(db.database, batch);
  }

  test("adds and subtracts, new users among those that are known, and writes the ledger in its order", async () => {
    await setBalance("a", 100n);
    await setBalance("b", 50n);
    const batch = [
      changeOf("1", "b", -50),
      changeOf("2", "new", 7),
      changeOf("3", "a", 2_147_483_647),
      changeOf("4", "a", -2_147_483_647),
      changeOf("5", "B", 1),
      changeOf("6", "a", -99),
    ];
    expect(await change(...batch)).toEqual(batch.map(() => "changed"));
    expect(await Promise.all(["a", "b", "B", "new"].map(pointsOf))).toEqual([1n, 0n, 1n, 7n]);
    expect(await ledger()).toEqual(batch);
  });

  test("lets each see what those before it have left, also where the user was nobody before", async () => {
    const batch: [PointTransaction, ChangeOutcome][] = [
      [changeOf("1", "new", -1), "unknown_user"],
      [changeOf("2", "new", 5), "changed"],
      [changeOf("3", "new", -6), "too_few"],
      [changeOf("4", "new", -5), "changed"],
      [changeOf("5", "new", -1), "too_few"],
      [changeOf("6", "new", 3), "changed"],
    ];
    const [changes, outcomes] = [batch.map(([one]) => one), batch.map(([, outcome]) => outcome)];
    expect(await change(...changes)).toEqual(outcomes);
    expect(await pointsOf("new")).toBe(3n);
    expect(await ledger()).toEqual(changes.filter((_, index) => outcomes[index] === "changed"));
  });

  test("leaves a balance of 0 to a new user who spends all at once", async () => {
    expect(await change(changeOf("1", "new", 5), changeOf("2", "new", -5))).toEqual(["changed", "changed"]);
    expect(await pointsOf("new")).toBe(0n);
    expect(await change(changeOf("3", "new", -1))).toEqual(["too_few"]);
  });

  test("writes nothing where all are refused", async () => {
    await setBalance("a", 1n);
    expect(await change(changeOf("1", "a", -2), changeOf("2", "nobody", -1))).toEqual([
      "too_few",
      "unknown_user",
    ]);
    expect(await ledger()).toEqual([]);
    expect(await pointsOf("a")).toBe(1n);
    expect(await pointsOf("nobody")).toBeUndefined();
  });

  test("refuses what a BIGINT cannot hold, takes what it can, and goes on after it", async () => {
    await setBalance("rich", MAX_BIGINT - 10n);
    const batch = [11, 10, 1, -1, 1].map((points, index) => changeOf(String(index), "rich", points));
    expect(await change(...batch)).toEqual(["too_many", "changed", "too_many", "changed", "changed"]);
    expect(await pointsOf("rich")).toBe(MAX_BIGINT);
  });

  test("takes a key once, in one batch as in several: the same again is replayed, other content is refused", async () => {
    await setBalance("a", 100n);
    await setBalance("b", 100n);
    const first = changeOf("key", "a", -60);
    const others = [changeOf("key", "a", 60), changeOf("key", "a", -61), changeOf("key", "b", -60)];
    const outcomes = ["replayed", "conflict", "conflict", "conflict"] as const;
    expect(await change(first, first, ...others)).toEqual(["changed", ...outcomes]);
    // There are fewer than 60 now: what was done is not refused afterwards.
    expect(await change(first, ...others)).toEqual([...outcomes]);
    expect(await ledger()).toEqual([first]);
    expect(await Promise.all(["a", "b"].map(pointsOf))).toEqual([40n, 100n]);
  });

  test("knows what was done after an answer that was lost: the same batch again changes nothing", async () => {
    const batch = [changeOf("1", "a", 5), changeOf("2", "a", -5), changeOf("3", "b", 1)];
    await change(...batch);
    expect(await change(...batch)).toEqual(batch.map(() => "replayed"));
    expect(await ledger()).toEqual(batch);
  });

  test("does not use up the key of what it refuses, also within a batch", async () => {
    await setBalance("rich", MAX_BIGINT);
    const [wish, hope] = [changeOf("wish", "a", -5), changeOf("hope", "rich", 1)];
    const batch: [PointTransaction, ChangeOutcome][] = [
      [wish, "unknown_user"],
      [changeOf("1", "a", 4), "changed"],
      [wish, "too_few"],
      [changeOf("2", "a", 1), "changed"],
      [wish, "changed"],
      [wish, "replayed"],
      [hope, "too_many"],
      [changeOf("3", "rich", -1), "changed"],
      [hope, "changed"],
    ];
    expect(await change(...batch.map(([one]) => one))).toEqual(batch.map(([, outcome]) => outcome));
    expect(await Promise.all(["a", "rich"].map(pointsOf))).toEqual([0n, MAX_BIGINT]);
  });

  test("takes keys and users that differ only in case for two (fault 4)", async () => {
    const batch = [changeOf("k", "User1", 1), changeOf("K", "User1", 20), changeOf("l", "user1", 300)];
    await change(...batch);
    const again = [changeOf("m", "user1", -300), changeOf("n", "User1", -21)];
    expect(await change(...again)).toEqual(["changed", "changed"]);
    expect(await Promise.all(["User1", "user1"].map(pointsOf))).toEqual([0n, 0n]);
  });

  test("changes updated_at of those whose balance it changes, and nothing else of anybody", async () => {
    await setBalance("a", 1n);
    await setBalance("b", 1n);
    await db.query("update point_root set created_at = '2020-01-01', updated_at = '2020-01-01'");
    await change(changeOf("1", "a", 1), changeOf("2", "b", -2));
    const [a, b] = await Promise.all(["a", "b"].map((user) => findBalance(db.database, user)));
    const old = new Date("2020-01-01T00:00:00Z");
    expect(b).toEqual({ userId: "b", pointNum: 1n, createdAt: old, updatedAt: old });
    expect(a).toMatchObject({ pointNum: 2n, createdAt: old });
    // Which takes any two dates for the same.
    expect(a?.createdAt).toEqual(old);
    expect(Math.abs((a?.updatedAt.getTime() ?? 0) - Date.now())).toBeLessThan(60_000);
  });

  test("called ten times at once with one key changes once, and says replayed nine times", async () => {
    for (let round = 0; round < 10; round++) {
      const one = changeOf(`key-${round}`, `new${round}`, 5);
      const outcomes = await Promise.all(Array.from({ length: 10 }, () => change(one)));
      expect(outcomes.flat().toSorted()).toEqual(["changed", ...Array(9).fill("replayed")]);
      expect(await pointsOf(one.userId)).toBe(5n);
    }
  }, 20_000);

  test("called thirty times at once for the last ten points gives them to ten, and refuses the others", async () => {
    for (let round = 0; round < 5; round++) {
      const user = `poor${round}`;
      await setBalance(user, 10n);
      const outcomes = await Promise.all(
        Array.from({ length: 30 }, (_, index) => change(changeOf(`${round}-${index}`, user, -1))),
      );
      const expected = [...Array(10).fill("changed"), ...Array(20).fill("too_few")];
      expect(outcomes.flat().toSorted()).toEqual(expected);
      expect(await pointsOf(user)).toBe(0n);
    }
  }, 20_000);

  test("called at once with one key for ten users changes one of them, and refuses the nine others", async () => {
    for (let round = 0; round < 10; round++) {
      const batches = Array.from({ length: 10 }, (_, user) =>
        change(changeOf(`key-${round}`, `u${user}`, 5)),
      );
      expect((await Promise.all(batches)).flat().toSorted()).toEqual([
        "changed",
        ...Array(9).fill("conflict"),
      ]);
    }
    const sum = (await ledger()).reduce((total, { pointAmount }) => total + pointAmount, 0);
    expect(sum).toBe(50);
    expect(await compareSums(db.database)).toMatchObject({ direct: 50n, agree: true });
  }, 20_000);

  test("starts again where somebody has used a key since it was looked up, and finds it then", async () => {
    await setBalance("a", 10n);
    const one = changeOf("key", "a", -5);
    const transactions: number[] = [];
    const late: Database = {
      ...db.database,
      transaction: (work) => {
        const attempt = transactions.push(1);
        return db.database.transaction((connection) =>
          work({
            ...connection,
            async execute(sql, values) {
              // Another key's entry under the same key, as if it had come between the look-up and the INSERT.
              if (attempt === 1 && sql.startsWith("insert into point_transactions"))
                await add(entryOf({ idempotencyKey: one.idempotencyKey, userId: "other" }));
              return connection.execute(sql, values);
            },
          }),
        );
      },
    };
    const innocent = changeOf("innocent", "a", -1);
    expect(await changePoints(late, [one, innocent])).toEqual(["conflict", "changed"]);
    expect(transactions).toHaveLength(2);
    expect(await pointsOf("a")).toBe(9n);
  });

  test("gives up after three tries, with the error of the last", async () => {
    let tries = 0;
    const never: Database = {
      ...db.database,
      transaction: async () => {
        throw new DatabaseError("duplicate", `try ${++tries}`);
      },
    };
    const error = await errorOf(changePoints(never, [changeOf("key", "a", 1)]));
    expect(error.message).toBe("try 3");
  });

  test("does not try again what no second try mends", async () => {
    let tries = 0;
    const never: Database = {
      ...db.database,
      transaction: async () => {
        throw new DatabaseError("unavailable", `try ${++tries}`);
      },
    };
    expect((await errorOf(changePoints(never, [changeOf("key", "a", 1)]))).message).toBe("try 1");
  });

  test.each([
    [1, 2],
    [30, 31],
    [90, 100],
    [400, 2_000],
  ])(
    "of %d of %d users waits for nobody else's balance",
    async (count, all) => {
      const userIds = Array.from({ length: all }, (_, index) => `User${index}`);
      await db.query("insert into point_root (user_id, point_num) values ?", [userIds.map((id) => [id, 10])]);
      await db.query("analyze table point_root");
      const other = userIds.at(-1) as string;
      const batch = userIds.slice(0, count).map((id, index) => changeOf(String(index), id, -1));
      await db.database.transaction(async ({ select }) => {
        await select("select point_num from point_root where user_id = ? for update", [other]);
        // Another one's lock would hold it up until MySQL gives up waiting, and then refuse all of the batch.
        expect(new Set(await change(...batch))).toEqual(new Set(["changed"]));
      });
      expect(await pointsOf(other)).toBe(10n);
    },
    20_000,
  );

  test("that shall not wait calls busy what somebody holds, whatever its key, and does the rest at once", async () => {
    await setBalance("held", 10n);
    await setBalance("free", 10n);
    const known = changeOf("known", "held", -4);
    await change(known);
    const batch = [
      known,
      changeOf("1", "free", -1),
      changeOf("2", "held", 5),
      changeOf("known", "held", 4),
      changeOf("3", "new", 7),
      changeOf("4", "held", -7),
    ];
    await db.database.transaction(async ({ select }) => {
      await select("select point_num from point_root where user_id = 'held' for update");
      const outcomes = await changePoints(db.database, batch, { wait: false });
      expect(outcomes).toEqual(["busy", "changed", "busy", "busy", "changed", "busy"]);
    });
    expect(await Promise.all(["held", "free", "new"].map(pointsOf))).toEqual([6n, 9n, 7n]);
    expect(await ledger()).toHaveLength(3);
    // Let go, nothing of it was done, and all of it can be.
    expect(await changePoints(db.database, batch, { wait: false })).toEqual([
      ...(["replayed", "replayed", "changed", "conflict", "replayed", "changed"] as const),
    ]);
    expect(await Promise.all(["held", "free", "new"].map(pointsOf))).toEqual([4n, 9n, 7n]);
  });

  test("that may wait does, until the balance is let go, and goes by what is there then", async () => {
    await setBalance("held", 10n);
    let changed: Promise<ChangeOutcome[]> | undefined;
    await db.database.transaction(async ({ execute }) => {
      await execute("update point_root set point_num = 3 where user_id = 'held'");
      changed = change(changeOf("1", "held", -4), changeOf("2", "held", -3));
      await untilWaiting();
    });
    expect(await changed).toEqual(["too_few", "changed"]);
    expect(await pointsOf("held")).toBe(0n);
  });

  test.each([true, false])("adds to a balance that somebody is just making (wait: %p)", async (wait) => {
    let changed: Promise<ChangeOutcome[]> | undefined;
    await db.database.transaction(async (connection) => {
      await addPointsIdempotent(connection, [entryOf({ userId: "new", pointAmount: 5 })]);
      changed = changePoints(db.database, [changeOf("1", "new", 2)], { wait });
      await untilWaiting();
    });
    expect(await changed).toEqual(["changed"]);
    expect(await pointsOf("new")).toBe(7n);
    expect(await compareSums(db.database)).toMatchObject({ usersApart: 0 });
  });

  /** Waits until another statement on the balances is under way: it waits for a lock, as it does nothing long. */
  async function untilWaiting(): Promise<void> {
    await until("a change waits for a lock", async () => {
      const [waiting] = await db.query(
        "select id from information_schema.processlist where db = ? and info like '%point_root%' and id <> connection_id()",
        [db.name],
      );
      return waiting !== undefined;
    });
  }

  test("by batches that bring the same users in opposite orders, beside grants, ends at the exact sums", async () => {
    const known = Array.from({ length: 20 }, (_, index) => `known${index}`);
    const fresh = Array.from({ length: 20 }, (_, index) => `new${index}`);
    for (const user of known) await setBalance(user, 0n);
    await add(...known.map((userId) => entryOf({ userId, pointAmount: 1_000 })));
    const users = [...known, ...fresh];
    const work = Array.from({ length: 24 }, (_, turn) => {
      const order = turn % 2 ? users : users.toReversed();
      if (turn % 3 === 0) return add(...order.map((userId) => entryOf({ userId, pointAmount: 5 })));
      const batch = order.flatMap((userId) => [
        changeOf(`${turn}-${userId}-a`, userId, 7),
        changeOf(`${turn}-${userId}-b`, userId, -3),
      ]);
      return change(...batch).then((outcomes) => expect(new Set(outcomes)).toEqual(new Set(["changed"])));
    });
    await Promise.all(work);
    // Eight grants of 5, sixteen times 7 - 3.
    expect(new Set(await Promise.all(known.map(pointsOf)))).toEqual(new Set([1_104n]));
    expect(new Set(await Promise.all(fresh.map(pointsOf)))).toEqual(new Set([104n]));
    expect(await compareSums(db.database)).toMatchObject({ usersApart: 0 });
  }, 30_000);

  test("takes 500 of one batch, of which each third is refused", async () => {
    const batch = Array.from({ length: 500 }, (_, index) =>
      changeOf(String(index), `u${index % 50}`, index % 3 === 2 ? -1_000_000 : 10),
    );
    const outcomes = await change(...batch);
    expect(outcomes.filter((outcome) => outcome === "changed")).toHaveLength(334);
    expect(new Set(outcomes.filter((_, index) => index % 3 === 2))).toEqual(
      new Set<ChangeOutcome>(["too_few", "unknown_user"]),
    );
    expect((await ledger()).length).toBe(334);
    expect(await compareSums(db.database)).toMatchObject({ direct: 3_340n, agree: true });
  });
});

describe("findBalance()", () => {
  test.each([[0n], [1n], [9_007_199_254_740_993n], [MAX_BIGINT]])(
    "keeps all digits of %p",
    async (points) => {
      await setBalance("a", points);
      const balance = await findBalance(db.database, "a");
      expect(balance).toEqual({
        userId: "a",
        pointNum: points,
        createdAt: expect.any(Date),
        updatedAt: expect.any(Date),
      });
      expect(Math.abs((balance?.updatedAt.getTime() ?? 0) - Date.now())).toBeLessThan(60_000);
    },
  );

  test("gives undefined for a user without points, and for one whose name differs in case", async () => {
    await setBalance("User1", 5n);
    expect(await findBalance(db.database, "nobody")).toBeUndefined();
    expect(await findBalance(db.database, "user1")).toBeUndefined();
  });
});

describe("findLedgerEntry()", () => {
  test("gives the entry of exactly this key, or undefined", async () => {
    const entry = entryOf({ idempotencyKey: "Order-42" });
    await add(entry, entryOf());
    await db.database.run(async (connection) => {
      expect(await findLedgerEntry(connection, "Order-42")).toMatchObject(entry);
      expect(await findLedgerEntry(connection, "order-42")).toBeUndefined();
    });
  });
});

describe("compareSums()", () => {
  /** Reserves and grants as the program does. */
  async function grant(fields: Partial<Reservation> = {}): Promise<Reservation> {
    const reservation = await insertReservation(db, { ...fields, status: "PROCESSING" });
    await db.database.transaction(async (connection) => {
      await addPointsIdempotent(connection, [reservation]);
      await markDone(connection, [reservation.id]);
    });
    return reservation;
  }

  async function setStatus({ id }: Reservation, status: ReservationStatus) {
    const scanAt = status === "PENDING" || status === "PROCESSING" ? new Date() : null;
    await db.query("update point_reservations set status = ?, scan_at = ? where id = ?", [
      status,
      scanAt,
      id,
    ]);
  }

  test("agrees on nothing at all", async () => {
    expect(await compareSums(db.database)).toEqual({
      reservations: 0n,
      direct: 0n,
      ledger: 0n,
      balances: 0n,
      usersApart: 0,
      reservationsApart: 0,
      early: 0,
      agree: true,
    });
  });

  test("agrees on what the program grants, and leaves out what is not granted", async () => {
    for (const fields of [{ userId: "a" }, { userId: "a", pointAmount: 2_147_483_647 }, { userId: "A" }]) {
      await grant(fields);
    }
    for (const status of ["PENDING", "PROCESSING", "FAILED", "CANCELLED"] as const) {
      await insertReservation(db, { userId: "a", status });
    }
    const sum = 2_147_483_847n;
    expect(await compareSums(db.database)).toEqual({
      reservations: sum,
      direct: 0n,
      ledger: sum,
      balances: sum,
      usersApart: 0,
      reservationsApart: 0,
      early: 0,
      agree: true,
    });
  });

  test("agrees on grants beside direct changes, also where a key is both", async () => {
    await grant({ userId: "a", pointAmount: 100, idempotencyKey: "key" });
    await changePoints(db.database, [
      changeOf("key", "a", 100),
      changeOf("2", "a", -150),
      changeOf("3", "b", 1),
      changeOf("4", "nobody", -1),
    ]);
    expect(await compareSums(db.database)).toEqual({
      ...{ reservations: 100n, direct: -49n, ledger: 51n, balances: 51n },
      ...{ usersApart: 0, reservationsApart: 0, early: 0, agree: true },
    });
  });

  test.each<[string, (keys: { direct: string }) => Promise<unknown>, object]>([
    [
      "a direct change that is gone",
      ({ direct }) => db.query("delete from point_transactions where idempotency_key = ?", [direct]),
      { direct: 0n, ledger: 100n, usersApart: 1 },
    ],
    [
      "a direct change with another amount",
      ({ direct }) =>
        db.query("update point_transactions set point_amount = -31 where idempotency_key = ?", [direct]),
      { direct: -31n, ledger: 69n, usersApart: 1 },
    ],
    [
      "a direct change that is in no balance",
      () => db.query("insert into point_transactions set ?", [rowOf(changeOf("more", "a", 5))]),
      { direct: -25n, ledger: 75n, usersApart: 1 },
    ],
    [
      "a direct change under the key of a grant that is missing",
      ({ direct }) =>
        db.query("update point_transactions set idempotency_key = 'x' where idempotency_key = ?", [direct]),
      { direct: 0n },
    ],
    [
      "a grant under the key of a direct change",
      () =>
        db.query(
          "update point_transactions set idempotency_key = 'direct:x' where idempotency_key = 'granted'",
        ),
      { direct: 70n, reservationsApart: 1 },
    ],
  ])("catches %s", async (_, plant, difference) => {
    await grant({ userId: "a", pointAmount: 100, idempotencyKey: "granted" });
    const direct = changeOf("direct", "a", -30);
    await changePoints(db.database, [direct]);
    const right = await compareSums(db.database);
    expect(right).toMatchObject({ direct: -30n, agree: true });
    await plant({ direct: direct.idempotencyKey });
    expect(await compareSums(db.database)).toEqual({ ...right, ...difference, agree: false });
  });

  function rowOf({ idempotencyKey, userId, pointAmount }: PointTransaction) {
    return { id: uuidv7(), idempotency_key: idempotencyKey, user_id: userId, point_amount: pointAmount };
  }

  // Each difference alone: one that hides behind another one would go unseen.
  test.each<[string, (granted: { a: Reservation; b: Reservation }) => Promise<unknown>, object]>([
    [
      "a balance that is off by one",
      () => db.query("update point_root set point_num = point_num + 1 where user_id = 'a'"),
      { balances: 301n, usersApart: 1 },
    ],
    [
      "two balances that are off by one against each other",
      () => db.query("update point_root set point_num = point_num + if(user_id = 'a', 1, -1)"),
      { balances: 300n, usersApart: 2 },
    ],
    [
      "a balance that is gone",
      () => db.query("delete from point_root where user_id = 'b'"),
      { balances: 100n, usersApart: 1 },
    ],
    [
      "a balance of nobody in the ledger",
      () => setBalance("stranger", 5n),
      { balances: 305n, usersApart: 1 },
    ],
    [
      "a ledger entry that is gone",
      ({ b }) => db.query("delete from point_transactions where idempotency_key = ?", [b.idempotencyKey]),
      { ledger: 100n, usersApart: 1, reservationsApart: 1 },
    ],
    [
      "a grant without a reservation",
      () => add(entryOf({ userId: "a", pointAmount: 7 })),
      { ledger: 307n, balances: 307n },
    ],
    [
      "DONE without a grant",
      () => insertReservation(db, { userId: "a", status: "DONE" }),
      { reservations: 400n, reservationsApart: 1 },
    ],
    ...(["PENDING", "PROCESSING", "FAILED", "CANCELLED"] as const).map(
      (status): [string, (granted: { a: Reservation; b: Reservation }) => Promise<unknown>, object] => [
        `a grant of one that is ${status}`,
        ({ b }) => setStatus(b, status),
        { reservations: 100n, reservationsApart: 1 },
      ],
    ),
    [
      "two grants with each other's amount",
      async ({ a, b }) => {
        const swap = "update point_transactions set point_amount = ? where idempotency_key = ?";
        await db.query(swap, [b.pointAmount, a.idempotencyKey]);
        await db.query(swap, [a.pointAmount, b.idempotencyKey]);
        await db.query("update point_root set point_num = 300 - point_num");
      },
      { reservationsApart: 2 },
    ],
    [
      "a grant to another user",
      async ({ b }) => {
        await db.query("update point_transactions set user_id = 'a' where idempotency_key = ?", [
          b.idempotencyKey,
        ]);
        await db.query("delete from point_root where user_id = 'b'");
        await db.query("update point_root set point_num = 300 where user_id = 'a'");
      },
      { reservationsApart: 1 },
    ],
    [
      "a grant one millisecond early",
      ({ b }) =>
        db.query("update point_transactions set created_at = ? where idempotency_key = ?", [
          new Date(b.executeAt.getTime() - 1),
          b.idempotencyKey,
        ]),
      { early: 1 },
    ],
  ])("catches %s", async (_, plant, difference) => {
    const a = await grant({ userId: "a", pointAmount: 100 });
    const b = await grant({ userId: "b", pointAmount: 200 });
    const right = await compareSums(db.database);
    expect(right.agree).toBe(true);
    await plant({ a, b });
    expect(await compareSums(db.database)).toEqual({ ...right, ...difference, agree: false });
  });

  test("accepts a grant at the very millisecond", async () => {
    const { executeAt } = await grant();
    await db.query("update point_transactions set created_at = ?", [executeAt]);
    expect(await compareSums(db.database)).toMatchObject({ early: 0, agree: true });
  });

  test("adds up balances beyond a BIGINT", async () => {
    await setBalance("a", MAX_BIGINT);
    await setBalance("b", MAX_BIGINT);
    expect(await compareSums(db.database)).toMatchObject({ balances: MAX_BIGINT * 2n, agree: false });
  });

  test("sees one moment: grants meanwhile are no difference", async () => {
    let isOver = false;
    const granting = (async () => {
      while (!isOver) await grant();
    })();
    const sums = new Set<bigint>();
    await until("20 states in the midst of grants were seen", async () => {
      const { ledger, agree } = await compareSums(db.database);
      expect(agree).toBe(true);
      sums.add(ledger);
      return sums.size === 20;
    }).finally(() => {
      isOver = true;
    });
    await granting;
  }, 20_000);
});
