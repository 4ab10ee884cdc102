import { beforeEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { aggregate } from "../../lib/accounting/aggregate.ts";
import { type Difference, describeDifference } from "../../lib/accounting/difference.ts";
import { type ReconcileOptions, reconcile } from "../../lib/accounting/reconcile.ts";
import { repairBalance } from "../../lib/accounting/repair.ts";
import { findAccountingState, type Reconciliation } from "../../lib/accounting/run_repository.ts";
import { startGeneration } from "../../lib/accounting/total_repository.ts";
import { analyze, fill as fillIn } from "../bench/fill.ts";
import { emptyTables, openTestDatabase } from "../harness/database.ts";
import { insertReservation } from "../harness/fixtures.ts";
import { errorOf } from "../harness/harness.ts";
import { insertEntries } from "../harness/ledger.ts";
import { recordStatements } from "../harness/plans.ts";
import { beforeStatements } from "../harness/statements.ts";
import { change, fill, grant, LEASE_MS } from "./filled.ts";

setDefaultTimeout(60_000);

const db = await openTestDatabase();
beforeEach(() => emptyTables(db));

/** What a run finds; it must say the same number. */
async function findAll(options: Partial<ReconcileOptions> = {}): Promise<Difference[]> {
  const found: Difference[] = [];
  const onDifference = (difference: Difference) => void found.push(difference);
  const { differences } = await reconcile(db.database, { leaseMs: LEASE_MS, onDifference, ...options });
  expect(differences).toBe(found.length);
  return found;
}

/** Counts the whole ledger again. */
async function aggregateAgain(): Promise<void> {
  await startGeneration(db.database, "UTC");
  await aggregate(db.database, { timeZone: "UTC" });
}

function linesOf(found: readonly Difference[]): string {
  return found.map(describeDifference).join("\n");
}

/** An open reservation of Late, reserved an hour ago and due minutes ago. */
const LATE = `insert into point_reservations
  (id, user_id, point_amount, execute_at, idempotency_key, created_at, status, scan_at)
  values (uuid(), 'Late', 1, now(3) - interval 400 second, uuid(), now(3) - interval 1 hour`;

type Plant = [name: string, sql: string, kinds: Difference["kind"][], says: RegExp];

/** What is wrong with which kinds of differences, and nothing else. */
const SEEN: Plant[] = [
  [
    "a balance that is off by one",
    "update point_root set point_num = point_num + 1 where user_id = 'Ann'",
    ["balance"],
    /^balance mismatch: Ann has 231, but the ledger has 230 in 4 entries: /m,
  ],
  [
    "a balance of somebody who has no ledger entry",
    "insert into point_root (user_id, point_num) values ('zzz', 7)",
    ["balance"],
    /^balance mismatch: zzz has 7, but the ledger has 0 in 0 entries$/m,
  ],
  [
    "a second ledger entry, of no reservation",
    `insert into point_transactions (id, idempotency_key, user_id, point_amount, kind, reservation_id)
          values (uuid(), uuid(), 'Cat', 100, 'grant', uuid())`,
    ["balance", "entry"],
    /^orphan entry: there is no reservation \S+: \S+ \(100 for Cat, key /m,
  ],
  [
    "DONE without a grant",
    `insert into point_reservations (id, user_id, point_amount, execute_at, idempotency_key, status)
          values (uuid(), 'Bob', 5, now(3), uuid(), 'DONE')`,
    ["reservation"],
    /^reservation mismatch: .* exactly one ledger entry of 5 for Bob: it has none$/m,
  ],
  [
    "a grant without DONE",
    "update point_reservations set status = 'CANCELLED' where user_id = 'Cat'",
    ["entry"],
    /^orphan entry: its reservation \S+ is CANCELLED: \S+ \(100 for Cat/m,
  ],
  [
    "a total that is wrong",
    "update point_daily_totals set points = points - 1 where kind = 'sub'",
    ["total"],
    /^total mismatch: 2026-01-01, sub, no campaign: the total has 1 entry, -21 points, 1 user, .*, but the ledger has 1 entry, -20 points, 1 user/m,
  ],
  [
    "a total of users that is wrong",
    "update point_daily_totals set users = users + 1 where kind = 'grant'",
    ["total"],
    /^total mismatch: 2026-01-01, grant, campaign spring: the total has 4 entries, 400 points, 4 users, /m,
  ],
  [
    "a total of nothing",
    `insert into point_daily_totals (generation, day, kind, campaign, entries)
          values (1, '2026-02-03', 'add', '', 1)`,
    ["total"],
    /^total mismatch: 2026-02-03, add, no campaign: the total has 1 entry, .*, but the ledger has no/m,
  ],
  [
    "a balance that is not there",
    "delete from point_root where user_id = 'Bob'",
    ["balance"],
    /^balance mismatch: Bob has no balance, but the ledger has 100 in 1 entry: /m,
  ],
  [
    "a total that is not there",
    "delete from point_daily_totals where kind = 'add'",
    ["total"],
    /, add, no campaign: there is no total, but the ledger has 1 entry, 50 points, 1 user/m,
  ],
  [
    "a reservation that nobody looks at",
    `${LATE}, 'PENDING', now(3) - interval 400 second)`,
    ["overdue"],
    /^overdue reservation: \S+ of Late was due at \d{4}-.*Z and is still PENDING after 0 failed attempts$/m,
  ],
  [
    "a reservation that is claimed again and again",
    `${LATE}, 'PROCESSING', now(3) + interval 15 second)`,
    ["overdue"],
    /^overdue reservation: \S+ of Late was due at .* is still PROCESSING after /m,
  ],
  [
    "a reservation that a clock ahead of time has put aside",
    `${LATE}, 'PROCESSING', now(3) + interval 1 day)`,
    ["overdue"],
    /^overdue reservation: \S+ of Late was due at .* is still PROCESSING after /m,
  ],
];

/** The same for what only a full run can see: an entry that was changed after it was counted. */
const UNSEEN: Plant[] = [
  [
    "a ledger entry that is missing",
    "delete from point_transactions where user_id = 'Bob'",
    ["balance", "reservation", "total"],
    /^reservation mismatch: \S+ is DONE, but does not have exactly one ledger entry of 100 for Bob: it has none$/m,
  ],
  [
    "a ledger entry of another reservation",
    "update point_transactions set reservation_id = uuid() where user_id = 'Bob'",
    ["reservation", "entry", "total", "total"],
    /^orphan entry: there is no reservation \S+: \S+ \(100 for Bob/m,
  ],
  [
    "a ledger entry of another amount",
    "update point_transactions set point_amount = 101 where user_id = 'Bob'",
    ["balance", "reservation", "total"],
    /^reservation mismatch: .* exactly one ledger entry of 100 for Bob: \S+ \(101 for Bob/m,
  ],
  [
    "a ledger entry of another user",
    "update point_transactions set user_id = 'Eve' where user_id = 'Bob'",
    ["balance", "balance", "reservation"],
    /^balance mismatch: Eve has no balance, but the ledger has 100 in 1 entry/m,
  ],
];

describe("reconcile() finds and names", () => {
  test("nothing if all is right, and says how much it has checked", async () => {
    await fill(db);
    const nothing = { users: 0, reservations: 0, entries: 0, days: 0, differences: 0 };
    expect(await reconcile(db.database, { leaseMs: LEASE_MS })).toMatchObject({
      ...nothing,
      isFull: true,
      users: 3,
      reservations: 7,
      entries: 6,
      days: 1,
    });
    // It looks only at what differs from the sums.
    expect(await reconcile(db.database, { leaseMs: LEASE_MS })).toMatchObject({ ...nothing, isFull: false });
  });

  async function expectFound(sql: string, kinds: Difference["kind"][], says: RegExp) {
    await fill(db);
    expect(await findAll()).toEqual([]);
    await db.query(sql);
    const soon = await findAll();
    const found = await findAll({ isFull: true });
    expect(linesOf(found)).toMatch(says);
    expect(found.map(({ kind }) => kind)).toEqual(kinds);
    // And again, until it is repaired: the next run is a full one too.
    expect(await findAll()).toEqual(found);
    return soon;
  }

  test.each(SEEN)("%s, in the next run and in a full one", async (_, sql, kinds, says) => {
    const soon = await expectFound(sql, kinds, says);
    expect(linesOf(soon)).toMatch(says);
    expect(soon.filter(({ kind }) => !kinds.includes(kind))).toEqual([]);
  });

  test.each(UNSEEN)("%s, in a full run", async (_, sql, kinds, says) => {
    await expectFound(sql, kinds, says);
  });

  test("a ledger entry that is there twice, under its own key", async () => {
    await fill(db);
    const [unique, plain] = ["unique key", "key"].map(
      (key) => `alter table point_transactions drop key point_transactions_idempotency_key,
        add ${key} point_transactions_idempotency_key (idempotency_key, is_grant)`,
    );
    await db.query(plain as string);
    await db.query(
      `insert into point_transactions (id, idempotency_key, user_id, point_amount, kind, reservation_id)
       select uuid(), idempotency_key, user_id, point_amount, kind, reservation_id
       from point_transactions where user_id = 'Cat'`,
    );
    const found = await findAll();
    expect(found.map(({ kind }) => kind)).toEqual(["balance", "reservation"]);
    expect(linesOf(found)).toMatch(
      /^reservation mismatch: .* exactly one ledger entry of 100 for Cat: \S+ \(.*\), \S+ \(/m,
    );
    await db.query("delete from point_transactions where user_id = 'Cat'");
    await db.query(unique as string);
  });

  test("an entry whose balance was forgotten, though nothing else of its user was changed lately", async () => {
    await fill(db);
    expect(await findAll()).toEqual([]);
    await insertEntries(db, [{ userId: "Bob", pointAmount: 9 }]);
    expect(await findAll()).toMatchObject([{ kind: "balance", user_id: "Bob", balance: 100n, ledger: 109n }]);
  });

  test("a reservation that was DONE and is not any more, though its entry is old; once, though two pages hold it", async () => {
    await fill(db);
    expect(await findAll()).toEqual([]);
    await db.query("update point_reservations set status = 'CANCELLED' where user_id = 'Bob'");
    expect(await findAll()).toMatchObject([{ kind: "entry", entries: [{ user_id: "Bob" }] }]);
    await db.query("update point_transactions set created_at = now(3) where user_id = 'Bob'");
    expect((await findAll()).filter(({ kind }) => kind === "entry")).toHaveLength(1);
  });

  test("nothing overdue in what was reserved, or changed, just now for a time long past", async () => {
    await fill(db);
    const executeAt = new Date("2026-01-01");
    await insertReservation(db, { executeAt });
    for (const status of ["PENDING", "PROCESSING"] as const) {
      const { id } = await insertReservation(db, { executeAt, status, scanAt: new Date() });
      await db.query("update point_reservations set created_at = ?, changed_at = now(3) where id = ?", [
        executeAt,
        id,
      ]);
    }
    expect(await findAll()).toEqual([]);
  });

  test("what is overdue from where open reservations begin, and in a full run from the very beginning", async () => {
    expect(await findAll()).toEqual([]);
    await db.query(`${LATE}, 'PENDING', now(3) - interval 400 second)`);
    const openSince = (seconds: number | null) =>
      db.query("update point_scan_state set open_from = now(3) - interval ? second", [seconds]);
    await openSince(300);
    expect(await findAll()).toEqual([]);
    await openSince(500);
    expect(await findAll()).toMatchObject([{ kind: "overdue" }]);
    await openSince(300);
    expect(await findAll({ isFull: true })).toMatchObject([{ kind: "overdue" }]);
    await openSince(null);
  });

  test("what a full run has found in every run, until a full run has found it repaired", async () => {
    await fill(db);
    expect(await findAll()).toEqual([]);
    const moveUnseen = (key: string) =>
      db.query(`update point_transactions set idempotency_key = ${key} where user_id = 'Bob'`);
    await moveUnseen("'another'");
    expect(await findAll()).toEqual([]);
    expect(await findAll({ isFull: true })).toHaveLength(2);
    expect(await findAll()).toHaveLength(2);
    await moveUnseen("reservation_id");
    for (const isFull of [true, false]) {
      expect(await reconcile(db.database, { leaseMs: LEASE_MS })).toMatchObject({ isFull, differences: 0 });
    }
  });

  test("an entry that did not fit when it was counted, until it fits or is gone", async () => {
    await fill(db);
    expect(await findAll()).toEqual([]);
    const wrong = await insertReservation(db, { userId: "Bob", status: "DONE", pointAmount: 7 });
    await insertEntries(db, [
      { userId: "Bob", pointAmount: 8, reservation: wrong },
      { userId: "Bob", pointAmount: 9, reservation: { id: crypto.randomUUID(), idempotencyKey: "orphan" } },
    ]);
    await db.query("update point_root set point_num = point_num + 17 where user_id = 'Bob'");
    await aggregate(db.database, { timeZone: "UTC" });
    for (let run = 0; run < 2; run++) {
      expect(await findAll()).toMatchObject([{ kind: "reservation" }, { kind: "entry" }]);
    }
    await db.query("update point_reservations set point_amount = 8 where id = ?", [wrong.id]);
    expect(await findAll()).toMatchObject([{ kind: "entry" }]);
    await db.query("delete from point_transactions where idempotency_key = 'orphan'");
    await db.query("update point_root set point_num = point_num - 9 where user_id = 'Bob'");
    await aggregateAgain();
    expect(await findAll()).toEqual([]);
    expect(await db.query("select * from point_suspects")).toEqual([]);
  });

  test("a balance, a total and a reservation that were moved by as much as a swap of two", async () => {
    await fill(db);
    await grant(db, { userId: "Bob", pointAmount: 200 });
    await aggregate(db.database, { timeZone: "UTC" });
    expect(await findAll()).toEqual([]);
    // The sum of all, the number of rows and the XOR of their checksums stay the same.
    await db.query(
      `update point_reservations set point_amount = 300 - point_amount where user_id = 'Bob' and status = 'DONE'`,
    );
    expect(await findAll()).toMatchObject([{ kind: "reservation" }, { kind: "reservation" }]);
  });

  test("differences beyond the first page of each kind", async () => {
    const users = Array.from({ length: 4_500 }, (_, index) => `U${String(index).padStart(5, "0")}`);
    await db.query("insert into point_root (user_id, point_num) values ?", [users.map((user) => [user, 3])]);
    await insertEntries(
      db,
      users.map((userId) => ({ userId, pointAmount: 3 })),
    );
    await aggregate(db.database, { timeZone: "UTC" });
    expect(await findAll()).toEqual([]);
    const wrong = ["U00000", "U02000", "U04499"];
    await db.query("update point_root set point_num = 4 where user_id in (?)", [wrong]);
    for (const isFull of [true, false]) {
      expect(await findAll({ isFull })).toMatchObject(wrong.map((user_id) => ({ user_id })));
    }
  });
});

test.each([true, false])(
  "reconcile() raises no false alarm if points move between any two of its statements (isFull %p)",
  async (isFull) => {
    await fill(db);
    expect(await findAll()).toEqual([]);
    let statement = 0;
    const busy = beforeStatements(db.database, async () => {
      await grant(db, { userId: "Ann" });
      await grant(db, { userId: "Bob", campaign: "summer" });
      await change(db, "Ann", 3);
      await change(db, "New", 1);
      await change(db, "Ann", -1);
      // Between two of these, there are entries that are not counted yet.
      if (statement++ % 2 === 0) await aggregate(db.database, { timeZone: "UTC" });
    });
    const found: Difference[] = [];
    const onDifference = (difference: Difference) => void found.push(difference);
    const { entries } = await reconcile(busy, { isFull, leaseMs: LEASE_MS, onDifference });
    expect(found).toEqual([]);
    expect(entries).toBeGreaterThan(isFull ? 6 : 0);
    expect(await findAll({ isFull: true })).toEqual([]);
  },
);

test("an incremental run reads every table by an index, and only what differs from the sums", async () => {
  const users = 300;
  await fillIn(db, { count: 3_000, users, prefix: "finished", at: "past", isDone: true });
  await fillIn(db, { count: 1_000, users, prefix: "future", at: { inMs: 86_400_000 } });
  await aggregate(db.database, { timeZone: "UTC" });
  expect(await findAll()).toEqual([]);
  // Something for each of its statements: entries that are not counted, a balance, a suspect, and what was put aside.
  await fillIn(db, { count: 10, users: 1, prefix: "warm", at: { inMs: 0 }, isDone: true });
  await db.query("update point_root set point_num = point_num + 1 where user_id = 'User7'");
  await db.query("insert into point_suspects select max(id) from point_transactions");
  await db.query("update point_reservations set execute_at = '2020-01-01' where status = 'PENDING' limit 1");
  await analyze(db);
  const found: Reconciliation[] = [];
  const statements = await recordStatements(db, async (database) => {
    found.push(await reconcile(database, { leaseMs: LEASE_MS }));
  });
  expect(found).toMatchObject([{ isFull: false, users: 2, reservations: 10, entries: 11, differences: 2 }]);
  const names = new Set(statements.map(({ name }) => name));
  for (const name of ["find_moved_balances", "find_changed_reservations", "page_of_suspects", "list_days"]) {
    expect(names).toContain(name);
  }
  const read = statements.filter(({ sql }) => /\bselect\b/.test(sql));
  for (const { name, sql } of read) {
    type Step = { table: string | null; type: string | null; key: string | null };
    const steps = await db.query<Step>(`explain format=traditional ${sql}`);
    const scans = steps.filter(({ table, type, key }) => {
      const isStored = table !== null && !table.startsWith("<") && table !== "point_aggregation";
      return isStored && (key === null || type === "ALL");
    });
    expect({ name, scans }).toEqual({ name, scans: [] });
  }
});

test("reconcile() numbers runs that end at the same time: the last one is the one with the greatest number", async () => {
  await fill(db);
  await Promise.all(Array.from({ length: 5 }, () => findAll()));
  await db.query("update point_root set point_num = 0 where user_id = 'Ann'");
  await db.query("update point_reconciliations set finished_at = now(3) + interval 1 day");
  expect(await findAll()).toHaveLength(1);
  const runs = await db.query<{ number: number }>("select number from point_reconciliations order by number");
  expect(runs.map(({ number }) => number)).toEqual([1, 2, 3, 4, 5, 6]);
  expect(await findAccountingState(db.database)).toMatchObject({ differences: 1 });
});

describe("repairBalance()", () => {
  test("sets it to the ledger's sum while points come and go: none is lost, each repair is recorded", async () => {
    await fill(db);
    const changes: Promise<unknown>[] = [];
    // They wait for the balance while the repair holds it.
    const busy = beforeStatements(db.database, () => {
      changes.push(grant(db, { userId: "Ann" }), change(db, "Ann", 1));
    });
    for (const points of [1, 2, 3, 4, 5]) {
      await db.query("update point_root set point_num = point_num + ? where user_id = 'Ann'", [points]);
      const { before, after } = (await repairBalance(busy, "Ann", { repairedBy: "tester" })) ?? {};
      expect((before ?? 0n) - (after ?? 0n)).toBe(BigInt(points));
      await Promise.all(changes.splice(0));
    }
    expect(await findAll({ isFull: true })).toEqual([]);
    expect(
      await db.query("select user_id from point_repairs where repaired_by like 'tester, MySQL user %@%'"),
    ).toEqual(Array(5).fill({ user_id: "Ann" }));
  });

  test("does nothing if the two agree, and refuses a sum that no balance can hold", async () => {
    await fill(db);
    expect(await repairBalance(db.database, "Ann", { repairedBy: "tester" })).toBeUndefined();
    await insertEntries(db, [{ userId: "Bob", pointAmount: -1_000 }]);
    const error = await errorOf(repairBalance(db.database, "Bob", { repairedBy: "tester" }));
    expect(error.isOutage).toBe(false);
    expect(await db.query("select * from point_repairs")).toEqual([]);
    expect(await db.query("select point_num from point_root where user_id = 'Bob'")).toEqual([
      { point_num: 100 },
    ]);
  });
});
