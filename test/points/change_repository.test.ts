import { beforeEach, describe, expect, test } from "bun:test";
import type { Database, Transaction } from "../../lib/database.ts";
import { DatabaseError } from "../../lib/database_errors.ts";
import { type ChangeOutcome, changePoints } from "../../lib/points/change_repository.ts";
import { addPointsIdempotent } from "../../lib/points/ledger_repository.ts";
import { MAX_POINT_NUM, type PointTransaction } from "../../lib/points/point.ts";
import { emptyTables, openTestDatabase, untilRunning } from "../harness/database.ts";
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
  const first = changeOf("key", "a", -10);

  test.each<[string, PointTransaction, string, ChangeOutcome]>([
    ["the same change", first, "lock_balances", "replayed"],
    ["too few points are left for another", changeOf("k2", "a", -6), "lock_balances", "too_few"],
    ["another of the same key", changeOf("key", "a", 10), "lock_balances", "conflict"],
    ["another user's of the same key", changeOf("key", "b", 1), "insert_ledger_entries", "conflict"],
  ])(
    "waits for a change that has begun, and finds what it has left: %s",
    async (_, second, waitsAt, outcome) => {
      await setBalance(db, "a", 15n);
      const outcomes = await inOrder(db, {
        first: (database) => changePoints(database, [first]),
        heldAt: "add_to_known",
        second: (database) => changePoints(database, [second, changeOf("k3", "c", 1)]),
        waitsAt,
      });
      expect(outcomes).toEqual([["changed"], [outcome, "changed"]]);
      expect(await pointsOf(db, "a", "b", "c")).toEqual([5n, undefined, 1n]);
    },
  );

  test.each<[string, boolean, string, ChangeOutcome, bigint]>([
    ["the same", true, "lock_balances", "replayed", 5n],
    ["another", true, "lock_balances", "changed", 7n],
    ["another", false, "upsert_balances", "changed", 7n],
  ])(
    "waits for a new user's balance that is being made, and goes on from there: %s change (wait: %p)",
    async (which, wait, waitsAt, outcome, points) => {
      const gift = changeOf("gift", "new", 5);
      const second = which === "the same" ? gift : changeOf("more", "new", 2);
      const outcomes = await inOrder(db, {
        first: (database) => changePoints(database, [gift]),
        heldAt: "upsert_balances",
        second: (database) => changePoints(database, [second], { wait }),
        waitsAt,
      });
      expect(outcomes).toEqual([["changed"], [outcome]]);
      expect(await pointsOf(db, "new")).toEqual([points]);
    },
  );

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
          second: change,
          waitsAt: "lock_balances",
        });
      }
      expect(await pointsOf(db, "a")).toEqual([105n]);
    },
  );

  test("locks balances in the order of their users, as the grant does: neither deadlocks", async () => {
    for (const userId of ["A", "B"]) await setBalance(db, userId, 0n);
    const { changed } = await whileLocked(["A"], async ({ select }) => {
      const changed = change(changeOf("1", "B", 1), changeOf("2", "A", 1));
      await untilRunning(db, "lock_balances");
      // It has not locked B meanwhile.
      const free = await select("select user_id from point_root where user_id = 'B' for update skip locked");
      expect(free).toHaveLength(1);
      return { changed };
    });
    expect(await changed).toEqual(["changed", "changed"]);
  });

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

  test("that must not wait calls busy what somebody holds, whatever its key, and does the rest at once", async () => {
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
    const changing = () => changePoints(db.database, batch, { wait: false });
    expect(await whileLocked(["held"], changing)).toEqual(["busy", "changed", "busy", "busy", "changed"]);
    expect(await pointsOf(db, "held", "free", "new")).toEqual([6n, 9n, 7n]);
    // Released, nothing of it was done, and all of it can be.
    expect(await changing()).toEqual(["replayed", "replayed", "changed", "conflict", "replayed"]);
    expect(await pointsOf(db, "held", "free", "new")).toEqual([11n, 9n, 7n]);
  });
});
