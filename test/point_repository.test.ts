import { afterAll, afterEach, beforeAll, describe, expect, test } from "bun:test";
import { v7 as uuidv7 } from "uuid";
import { DatabaseError } from "../lib/database.ts";
import type { PointTransaction } from "../lib/point.ts";
import { addPointsIdempotent, findBalance, findLedgerEntry, reconcile } from "../lib/point_repository.ts";
import type { Reservation, ReservationStatus } from "../lib/reservation.ts";
import { markDone } from "../lib/reservation_repository.ts";
import { createTestDatabase, insertReservation, type TestDatabase, until } from "./harness.ts";

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

async function errorOf(work: Promise<unknown>): Promise<DatabaseError> {
  const error = await work.then(
    () => undefined,
    (thrown) => thrown,
  );
  expect(error).toBeInstanceOf(DatabaseError);
  return error;
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
    ["an amount of 0", { pointAmount: 0 }],
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

describe("reconcile()", () => {
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
    expect(await reconcile(db.database)).toEqual({
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
    expect(await reconcile(db.database)).toEqual({
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
    const right = await reconcile(db.database);
    expect(right.agree).toBe(true);
    await plant({ a, b });
    expect(await reconcile(db.database)).toEqual({ ...right, ...difference, agree: false });
  });

  test("accepts a grant at the very millisecond", async () => {
    const { executeAt } = await grant();
    await db.query("update point_transactions set created_at = ?", [executeAt]);
    expect(await reconcile(db.database)).toMatchObject({ early: 0, agree: true });
  });

  test("adds up balances beyond a BIGINT", async () => {
    await setBalance("a", MAX_BIGINT);
    await setBalance("b", MAX_BIGINT);
    expect(await reconcile(db.database)).toMatchObject({ balances: MAX_BIGINT * 2n, agree: false });
  });

  test("sees one moment: grants meanwhile are no difference", async () => {
    let isOver = false;
    const granting = (async () => {
      while (!isOver) await grant();
    })();
    const sums = new Set<bigint>();
    await until("20 states in the midst of grants were seen", async () => {
      const { ledger, agree } = await reconcile(db.database);
      expect(agree).toBe(true);
      sums.add(ledger);
      return sums.size === 20;
    }).finally(() => {
      isOver = true;
    });
    await granting;
  }, 20_000);
});
