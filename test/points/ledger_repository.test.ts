import { beforeEach, describe, expect, test } from "bun:test";
import { addPointsIdempotent, findGrantEntry } from "../../lib/points/ledger_repository.ts";
import { MAX_POINT_NUM, type PointTransaction } from "../../lib/points/point.ts";
import { emptyTables, openTestDatabase } from "../harness/database.ts";
import { errorOf } from "../harness/harness.ts";
import { ledgerOf, pointsOf, setBalance } from "./balances.ts";

const db = await openTestDatabase();
beforeEach(() => emptyTables(db));

function grantOf(fields: Partial<PointTransaction> = {}): PointTransaction {
  const id = crypto.randomUUID();
  const entry = { idempotencyKey: id, userId: "TestUser01", pointAmount: 100 };
  return { ...entry, kind: "grant", reservationId: id, ...fields };
}

function add(...entries: PointTransaction[]): Promise<void> {
  return db.database.transaction((transaction) => addPointsIdempotent(transaction, entries));
}

describe("addPointsIdempotent()", () => {
  test("adds the entries in their order, and each user's sum to the balance", async () => {
    const entries = [
      grantOf({ userId: "b", pointAmount: 1 }),
      grantOf({ userId: "a", pointAmount: 20 }),
      grantOf({ userId: "b", pointAmount: 300 }),
      grantOf({ userId: "B", pointAmount: 4_000 }),
    ];
    await setBalance(db, "a", 5n);
    await add(...entries);
    expect(await ledgerOf(db)).toEqual(entries);
    expect(await pointsOf(db, "a", "b", "B")).toEqual([25n, 301n, 4_000n]);
  });

  test("adds the largest amounts without loss, far beyond 2^53", async () => {
    await setBalance(db, "rich", 9_007_199_254_740_993n);
    await add(
      ...Array.from({ length: 1_000 }, () => grantOf({ userId: "rich", pointAmount: 2_147_483_647 })),
    );
    expect(await pointsOf(db, "rich")).toEqual([9_007_199_254_740_993n + 2_147_483_647_000n]);
  });

  test.each<[string, Partial<PointTransaction>]>([
    ["the same content", {}],
    ["another amount", { pointAmount: 7 }],
    ["another user", { userId: "other" }],
    ["another reservation", { reservationId: crypto.randomUUID() }],
  ])(
    "refuses a key that has its grant with %s as a duplicate, and adds nothing of its batch",
    async (_, other) => {
      const first = grantOf({ idempotencyKey: "order-42" });
      await add(first);
      const error = await errorOf(add(grantOf({ userId: "innocent" }), { ...first, ...other }));
      expect(error.kind).toBe("duplicate");
      expect(error.message).not.toContain("order-42");
      expect(await ledgerOf(db)).toEqual([first]);
      expect(await pointsOf(db, "TestUser01", "innocent", "other")).toEqual([100n, undefined, undefined]);
    },
  );

  test("takes keys for two that differ in case, or are of a grant and of a direct change", async () => {
    const entries = [grantOf({ idempotencyKey: "Order" }), grantOf({ idempotencyKey: "order" })];
    const change = { ...grantOf({ idempotencyKey: "order" }), kind: "add", reservationId: null } as const;
    await add(...entries, change);
    expect(await pointsOf(db, "TestUser01")).toEqual([300n]);
    expect((await errorOf(add({ ...change, kind: "sub", pointAmount: -1 }))).kind).toBe("duplicate");
  });

  test("fills a balance up to the last point of a BIGINT, and refuses one more as out_of_range", async () => {
    await setBalance(db, "rich", MAX_POINT_NUM - 100n);
    await add(grantOf({ userId: "rich" }));
    expect(await pointsOf(db, "rich")).toEqual([MAX_POINT_NUM]);
    const more = grantOf({ userId: "rich", pointAmount: 1 });
    expect((await errorOf(add(grantOf({ userId: "innocent" }), more))).kind).toBe("out_of_range");
    expect(await ledgerOf(db)).toHaveLength(1);
    expect(await pointsOf(db, "rich", "innocent")).toEqual([MAX_POINT_NUM, undefined]);
  });

  test.each<[string, Partial<PointTransaction>]>([
    ["a user id that would be cut", { userId: "x".repeat(21) }],
    ["a key that would be cut", { idempotencyKey: "k".repeat(101) }],
    ["an empty user id", { userId: "" }],
    ["a grant without a reservation", { reservationId: null }],
    ["a direct change of a reservation", { kind: "add" }],
    ["a grant of no points", { pointAmount: 0 }],
    ["a grant of negative points", { pointAmount: -1 }],
    ["a subtraction of positive points", { kind: "sub", reservationId: null }],
    ["another kind", { kind: "gift" as never, reservationId: null }],
  ])("leaves nothing behind of %s: the table refuses it", async (_, wrong) => {
    expect((await errorOf(add(grantOf(), grantOf(wrong)))).kind).toBe("other");
    expect(await ledgerOf(db)).toEqual([]);
    expect(await pointsOf(db, "TestUser01")).toEqual([undefined]);
  });
});

test("findGrantEntry() gives the grant of exactly this key, and not a direct change", async () => {
  const grant = grantOf({ idempotencyKey: "Order" });
  const change = { ...grant, kind: "add", reservationId: null, pointAmount: 1 } as const;
  await add(grant, change, { ...change, idempotencyKey: "change" });
  await db.database.transaction(async (transaction) => {
    expect(await findGrantEntry(transaction, "Order")).toMatchObject(grant);
    for (const key of ["order", "change"]) expect(await findGrantEntry(transaction, key)).toBeUndefined();
  });
});
