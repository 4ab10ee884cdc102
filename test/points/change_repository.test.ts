import { beforeEach, describe, expect, test } from "bun:test";
import type { Database, Transaction } from "../../lib/database.ts";
import { DatabaseError } from "../../lib/database_errors.ts";
import { type ChangeOutcome, changePoints } from "../../lib/points/change_repository.ts";
import { addPointsIdempotent } from "../../lib/points/ledger_repository.ts";
import { MAX_POINT_NUM, type PointTransaction } from "../../lib/points/point.ts";
import { emptyTables, openTestDatabase } from "../harness/database.ts";
import { reservationOf } from "../harness/fixtures.ts";
import { errorOf } from "../harness/harness.ts";
import { inOrder } from "../harness/orders.ts";
import { ledgerOf, pointsOf, setBalance } from "./balances.ts";

const db = await openTestDatabase();
beforeEach(() => emptyTables(db));

/** A direct change: its key, its user, its points. */
function changeOf(idempotencyKey: string, userId: string, pointAmount: number): PointTransaction {
  const kind = pointAmount < 0 ? "sub" : "add";
  return { idempotencyKey, userId, pointAmount, kind, reservationId: null };
}

function change(...batch: PointTransaction[]): Promise<ChangeOutcome[]> {
  return changePoints(db.database, batch);
}

/** Locks balances as somebody else does, for as long as `work` takes. */
function whileLocked<T>(userIds: string[], work: (transaction: Transaction) => Promise<T>): Promise<T> {
  return db.database.transaction(async (transaction) => {
    await transaction.select("select * from point_root where user_id in (?) for update", [userIds]);
    return work(transaction);
  });
}

describe("changePoints()", () => {
  test("adds and subtracts, new users among those that are known, and writes the ledger in its order", async () => {
    await setBalance(db, "a", 100n);
    await setBalance(db, "b", 50n);
    const batch = [
      changeOf("1", "b", -50),
      changeOf("2", "new", 7),
      changeOf("3", "a", 2_147_483_647),
      changeOf("4", "a", -2_147_483_647),
      changeOf("5", "B", 1),
      changeOf("6", "a", -99),
    ];
    expect(await change(...batch)).toEqual(batch.map(() => "changed"));
    expect(await pointsOf(db, "a", "b", "B", "new")).toEqual([1n, 0n, 1n, 7n]);
    expect(await ledgerOf(db)).toEqual(batch);
  });

  test("lets each change see what those before it have left, and does not use up the key of a refused one", async () => {
    await setBalance(db, "rich", MAX_POINT_NUM - 10n);
    const [wish, hope] = [changeOf("wish", "new", -6), changeOf("hope", "rich", 11)];
    const batch: [PointTransaction, ChangeOutcome][] = [
      [wish, "unknown_user"],
      [changeOf("1", "new", 5), "changed"],
      [wish, "too_few"],
      [changeOf("2", "new", 1), "changed"],
      [wish, "changed"],
      [wish, "replayed"],
      [changeOf("3", "new", -1), "too_few"],
      [hope, "too_many"],
      [changeOf("4", "rich", 10), "changed"],
      [changeOf("5", "rich", 1), "too_many"],
      [changeOf("6", "rich", -11), "changed"],
      [hope, "changed"],
    ];
    const [changes, outcomes] = [batch.map(([one]) => one), batch.map(([, outcome]) => outcome)];
    expect(await change(...changes)).toEqual(outcomes);
    expect(await pointsOf(db, "new", "rich")).toEqual([0n, MAX_POINT_NUM]);
    expect(await ledgerOf(db)).toEqual(changes.filter((_, index) => outcomes[index] === "changed"));
  });

  test("takes a key once, in one batch as in several: the same again is replayed, other content is refused", async () => {
    await setBalance(db, "a", 100n);
    await setBalance(db, "b", 100n);
    const first = changeOf("key", "a", -60);
    const others = [changeOf("key", "a", 60), changeOf("key", "a", -61), changeOf("key", "b", -60)];
    const outcomes = ["replayed", "conflict", "conflict", "conflict"] as const;
    expect(await change(first, first, ...others)).toEqual(["changed", ...outcomes]);
    // There are fewer than 60 now: what was done is not refused afterwards.
    expect(await change(first, ...others)).toEqual([...outcomes]);
    expect(await ledgerOf(db)).toEqual([first]);
    expect(await pointsOf(db, "a", "b")).toEqual([40n, 100n]);
  });

  test("takes keys and users that differ only in case for two, and keys of grants for others (fault 4)", async () => {
    const id = crypto.randomUUID();
    const grant = { ...changeOf("k", "User1", 1), kind: "grant", reservationId: id } as const;
    await db.database.transaction((transaction) => addPointsIdempotent(transaction, [grant]));
    await change(changeOf("k", "User1", 1), changeOf("K", "User1", 20), changeOf("l", "user1", 300));
    const again = [changeOf("m", "user1", -300), changeOf("n", "User1", -22)];
    expect(await change(...again)).toEqual(["changed", "changed"]);
    expect(await pointsOf(db, "User1", "user1")).toEqual([0n, 0n]);
  });

  test("changes updated_at of those whose balance it changes, and nothing else of anybody", async () => {
    await setBalance(db, "a", 1n);
    await setBalance(db, "b", 1n);
    await db.query("update point_root set created_at = '2020-01-01', updated_at = '2020-01-01'");
    await change(changeOf("1", "a", 1), changeOf("2", "b", -2));
    const balances = await db.query(
      `select user_id, created_at = '2020-01-01' is_same, timestampdiff(minute, updated_at, now(3)) = 0 is_new
       from point_root order by user_id`,
    );
    expect(balances).toEqual([
      { user_id: "a", is_same: 1, is_new: 1 },
      { user_id: "b", is_same: 1, is_new: 0 },
    ]);
  });

  test("tries three times if others use its keys, and not again what no second try mends", async () => {
    let tries = 0;
    function failing(kind: "duplicate" | "unavailable"): Database {
      const transaction = () => Promise.reject(new DatabaseError(kind, `try ${++tries}`));
      return { ...db.database, transaction };
    }
    const one = changeOf("key", "a", 1);
    expect((await errorOf(changePoints(failing("duplicate"), [one]))).message).toBe("try 3");
    expect((await errorOf(changePoints(failing("unavailable"), [one]))).message).toBe("try 4");
  });
});

describe("changePoints() beside others", () => {
  // Users and keys of their own: MySQL also locks the places of deleted rows that it has not cleared away yet.
  let strangers = 0;
  const ofStranger = () => changeOf(crypto.randomUUID(), `Stranger${++strangers}`, 1);

  test.each<[string, Partial<PointTransaction>, ChangeOutcome]>([
    ["the same change", {}, "replayed"],
    ["too few points are left for another", { idempotencyKey: "k2", pointAmount: -6 }, "too_few"],
    ["another of the same key", { pointAmount: 10, kind: "add" }, "conflict"],
  ])(
    "is busy beside a change that has begun, and then finds what it has left: %s",
    async (_, other, outcome) => {
      await setBalance(db, "a", 15n);
      const first = changeOf(crypto.randomUUID(), "a", -10);
      const second = { ...first, ...other };
      const stranger = ofStranger();
      const changeBoth = (database: Database) => changePoints(database, [second, stranger]);
      const outcomes = await inOrder(db, {
        first: (database) => changePoints(database, [first]),
        heldAt: "add_to_known",
        second: changeBoth,
      });
      expect(outcomes).toEqual([["changed"], ["busy", "changed"]]);
      expect(await changeBoth(db.database)).toEqual([outcome, "replayed"]);
      expect(await pointsOf(db, "a", stranger.userId)).toEqual([5n, 1n]);
    },
  );

  test("waits for a change of another user with the same key, and finds it", async () => {
    await setBalance(db, "a", 15n);
    await setBalance(db, "b", 0n);
    const first = changeOf(crypto.randomUUID(), "a", -10);
    const outcomes = await inOrder(db, {
      first: (database) => changePoints(database, [first]),
      heldAt: "add_to_known",
      second: (database) => changePoints(database, [changeOf(first.idempotencyKey, "b", 1), ofStranger()]),
      waitsAt: "insert_ledger_entries",
    });
    expect(outcomes).toEqual([["changed"], ["conflict", "changed"]]);
    expect(await pointsOf(db, "a", "b")).toEqual([5n, 0n]);
  });

  test.each<[string, ChangeOutcome, bigint]>([
    ["the same", "replayed", 5n],
    ["another", "changed", 7n],
  ])(
    "is busy beside a new user's balance that is being made, and goes on from there: %s change",
    async (which, outcome, points) => {
      const gift = { ...ofStranger(), pointAmount: 5 };
      const second = which === "the same" ? gift : changeOf(crypto.randomUUID(), gift.userId, 2);
      const outcomes = await inOrder(db, {
        first: (database) => changePoints(database, [gift]),
        heldAt: "upsert_balances",
        second: (database) => changePoints(database, [second, ofStranger()]),
      });
      expect(outcomes).toEqual([["changed"], ["busy", "changed"]]);
      expect(await change(second)).toEqual([outcome]);
      expect(await pointsOf(db, gift.userId)).toEqual([points]);
    },
  );

  test("does not let the place of a new balance, which somebody has locked, hold up the others", async () => {
    await setBalance(db, "a", 10n);
    await setBalance(db, "z", 0n);
    const batch = [changeOf("1", "a", -1), changeOf("2", "new", 5)];
    const outcomes = await db.database.run(async ({ execute, select }) => {
      await execute("set session transaction isolation level repeatable read");
      await execute("begin");
      await select("select * from point_root where user_id = 'new' for update");
      const outcomes = await change(...batch);
      await execute("rollback");
      await execute("set session transaction isolation level read committed");
      return outcomes;
    });
    expect(outcomes).toEqual(["changed", "busy"]);
    expect(await change(...batch)).toEqual(["replayed", "changed"]);
  });

  test.each(["a change", "a grant"])(
    "adds to what the other one leaves if %s comes first (fault 8)",
    async (which) => {
      await setBalance(db, "a", 15n);
      const { id } = reservationOf();
      const grant = { ...changeOf(id, "a", 100), kind: "grant", reservationId: id } as const;
      const change = (database: Database) => changePoints(database, [changeOf("key", "a", -10)]);
      const give = (database: Database) =>
        database.transaction((transaction) => addPointsIdempotent(transaction, [grant]));
      if (which === "a change") {
        await inOrder(db, {
          first: change,
          heldAt: "add_to_known",
          second: give,
          waitsAt: "upsert_balances",
        });
      } else {
        await inOrder(db, {
          first: give,
          heldAt: "upsert_balances",
          second: async (database) => expect(await change(database)).toEqual(["busy"]),
        });
        expect(await change(db.database)).toEqual(["changed"]);
      }
      expect(await pointsOf(db, "a")).toEqual([105n]);
    },
  );

  test.each([
    [1, 2],
    [30, 31],
    [90, 100],
    [400, 2_000],
  ])("of %d of %d users waits for nobody else's balance", async (count, all) => {
    const userIds = Array.from({ length: all }, (_, index) => `User${index}`);
    await db.query("insert into point_root (user_id, point_num) values ?", [userIds.map((id) => [id, 10])]);
    await db.query("analyze table point_root");
    const batch = userIds.slice(0, count).map((id, index) => changeOf(String(index), id, -1));
    const outcomes = await whileLocked([userIds.at(-1) as string], () => change(...batch));
    expect(new Set(outcomes)).toEqual(new Set(["changed"]));
  });

  test("calls busy what somebody holds, whatever its key, and does the rest at once", async () => {
    for (const userId of ["held", "free"]) await setBalance(db, userId, 10n);
    const known = changeOf("known", "held", -4);
    await change(known);
    const batch = [
      known,
      changeOf("1", "free", -1),
      changeOf("2", "held", 5),
      changeOf("known", "held", 4),
      changeOf("3", "new", 7),
    ];
    const changing = () => change(...batch);
    expect(await whileLocked(["held"], changing)).toEqual(["busy", "changed", "busy", "busy", "changed"]);
    expect(await pointsOf(db, "held", "free", "new")).toEqual([6n, 9n, 7n]);
    // Released, nothing of it was done, and all of it can be.
    expect(await changing()).toEqual(["replayed", "replayed", "changed", "conflict", "replayed"]);
    expect(await pointsOf(db, "held", "free", "new")).toEqual([11n, 9n, 7n]);
  });
});
