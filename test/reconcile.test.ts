import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { aggregate } from "../lib/aggregate.ts";
import { type Difference, repairBalance } from "../lib/book_repository.ts";
import { changePoints } from "../lib/point_repository.ts";
import { describeDifference, type ReconcileOptions, reconcile } from "../lib/reconcile.ts";
import type { Reservation } from "../lib/reservation.ts";
import { createTestDatabase, errorOf, insertReservation, type TestDatabase } from "./harness.ts";
import { openAnother, processReservations } from "./pipeline.ts";

const ROOT = join(import.meta.dir, "..");
const LEASE_MS = 15_000;

let db: TestDatabase;
beforeEach(async () => {
  db = await createTestDatabase();
});
afterEach(() => db.drop());

/** Reserves and grants, as the program does. */
async function grant(fields: Partial<Reservation> = {}): Promise<Reservation> {
  const reservation = await insertReservation(db, { status: "PROCESSING", ...fields });
  expect(await processReservations([[reservation]], { database: db.database })).toEqual(["ack"]);
  return reservation;
}

function change(userId: string, pointAmount: number) {
  const idempotencyKey = `direct:${crypto.randomUUID()}`;
  return changePoints(db.database, [{ idempotencyKey, userId, pointAmount }]);
}

/** Some of everything, counted, all of it right, and so old that only a full run looks at it again. */
async function fill(): Promise<Reservation[]> {
  const granted: Reservation[] = [];
  for (const userId of ["Ann", "Bob", "Cat", "Ann"])
    granted.push(await grant({ userId, campaign: "spring" }));
  await change("Ann", 50);
  await change("Ann", -20);
  for (const status of ["PENDING", "FAILED", "CANCELLED"] as const) await insertReservation(db, { status });
  await db.query("update point_transactions set created_at = '2026-01-01 12:00:00'");
  await db.query(
    `update point_reservations set created_at = '2026-01-01', updated_at = '2026-01-01',
       execute_at = if(status = 'DONE', '2026-01-01 11:59:59', execute_at)`,
  );
  await db.query("update point_root set updated_at = '2026-01-01'");
  await aggregate(db.database, { timeZone: "UTC" });
  await db.query("update point_daily_totals set updated_at = '2026-01-01'");
  return granted;
}

/** What a run finds; it must say the same number. */
async function findAll(options: Partial<ReconcileOptions> = {}): Promise<Difference[]> {
  const found: Difference[] = [];
  const { differences } = await reconcile(db.database, {
    ...{ leaseMs: LEASE_MS, onDifference: (difference) => void found.push(difference), ...options },
  });
  expect(differences).toBe(found.length);
  return found;
}

function runCommand(args: string[] = []) {
  return Bun.spawn(["bun", "lib/reconcile.ts", ...args], {
    cwd: ROOT,
    env: { ...Bun.env, DATABASE_URL: db.url },
    stdout: "pipe",
    stderr: "pipe",
  });
}

async function outputOf(run: ReturnType<typeof runCommand>) {
  const text = await new Response(run.stdout).text();
  return { code: await run.exited, text };
}

/** A row of the ledger as only a bug or a hand makes it. */
async function insertEntry(
  userId: string,
  points: number,
  { key = crypto.randomUUID() as string, time = new Date() } = {},
) {
  const id = crypto.randomUUID();
  await db.query(
    "insert into point_transactions (id, idempotency_key, user_id, point_amount, created_at) values (?)",
    [[id, key, userId, points, time]],
  );
  return id;
}

/** Reserved an hour ago, due minutes ago, and still open. */
async function insertLate(fields: Parameters<typeof insertReservation>[1]) {
  const executeAt = new Date(Date.now() - 400_000);
  const { id } = await insertReservation(db, { userId: "Late", executeAt, ...fields });
  await db.query("update point_reservations set created_at = now(3) - interval 1 hour where id = ?", [id]);
}

type Plant = (granted: Reservation[]) => Promise<unknown>;
const [ANN, BOB, CAT] = ["Ann", "Bob", "Cat"];

/** Each with what must be found of it, and nothing else. */
const PLANTS: [name: string, plant: Plant, kinds: string[], says: RegExp][] = [
  [
    "a balance that is off by one",
    () => db.query("update point_root set point_num = point_num + 1 where user_id = 'Ann'"),
    ["balance"],
    /^balance of Ann: 231, but the ledger has 230 in 4 entries: /m,
  ],
  [
    "a balance that is not there",
    () => db.query("delete from point_root where user_id = 'Bob'"),
    ["balance"],
    /^balance of Bob: none, but the ledger has 100 in 1 entries: /m,
  ],
  [
    "a balance of somebody who has no ledger entry",
    () => db.query("insert into point_root (user_id, point_num) values ('zzz', 7)"),
    ["balance"],
    /^balance of zzz: 7, but the ledger has 0 in 0 entries$/m,
  ],
  [
    "a ledger entry that is missing",
    ([, bobs]) =>
      db.query("delete from point_transactions where idempotency_key = ?", [bobs?.idempotencyKey]),
    ["balance", "reservation", "total"],
    /^reservation \S+ is DONE: 100 for Bob must have one ledger entry, but there is none$/m,
  ],
  [
    "a ledger entry that stands twice, under another key",
    () => insertEntry("Cat", 100),
    ["balance", "entry"],
    /^ledger entry that no reservation made: no reservation has its key: \S+ \(100 for Cat, key /m,
  ],
  [
    "a ledger entry that stands twice, under its own key",
    async ([, , cats]) => {
      await db.query(
        "alter table point_transactions drop key point_transactions_idempotency_key, add key k (idempotency_key)",
      );
      await insertEntry("Cat", 100, { key: cats?.idempotencyKey as string });
    },
    ["balance", "reservation"],
    /^reservation \S+ is DONE: 100 for Cat must have one ledger entry, but there is: \S+ \(.*\), \S+ \(/m,
  ],
  [
    "a ledger entry of another amount",
    ([, bobs]) =>
      db.query("update point_transactions set point_amount = 101 where idempotency_key = ?", [
        bobs?.idempotencyKey,
      ]),
    ["balance", "reservation", "total"],
    /^reservation \S+ is DONE: 100 for Bob must have one ledger entry, but there is: \S+ \(101 for Bob/m,
  ],
  [
    "a ledger entry of another user",
    ([, bobs]) =>
      db.query("update point_transactions set user_id = 'Eve' where idempotency_key = ?", [
        bobs?.idempotencyKey,
      ]),
    ["balance", "balance", "reservation"],
    /^balance of Eve: none, but the ledger has 100 in 1 entries/m,
  ],
  [
    "DONE without a grant",
    () => insertReservation(db, { status: "DONE", userId: "Bob", pointAmount: 5 }),
    ["reservation"],
    /^reservation \S+ is DONE: 5 for Bob must have one ledger entry, but there is none$/m,
  ],
  [
    "a grant without DONE",
    ([, , cats]) => db.query("update point_reservations set status = 'CANCELLED' where id = ?", [cats?.id]),
    ["entry"],
    /^ledger entry that no reservation made: reservation \S+ of its key is CANCELLED: \S+ \(100 for Cat/m,
  ],
  [
    "a total that is wrong",
    () => db.query("update point_daily_totals set points = points - 1 where kind = 'sub'"),
    ["total"],
    /^total of \d{4}-\d\d-\d\d, sub, no campaign: 1 entries, -21 points, 1 users, .*, but the ledger has 1 entries, -20 points, 1 users/m,
  ],
  [
    "a total of users that is wrong",
    () => db.query("update point_daily_totals set users = users + 1 where kind = 'grant'"),
    ["total"],
    /^total of \d{4}-\d\d-\d\d, grant, campaign spring: 4 entries, 400 points, 4 users, /m,
  ],
  [
    "a total of nothing",
    () =>
      db.query(
        "insert into point_daily_totals (generation, day, kind, campaign, entries) values (1, '2026-02-03', 'add', '', 1)",
      ),
    ["total"],
    /^total of 2026-02-03, add, no campaign: 1 entries, .*, but the ledger has none$/m,
  ],
  [
    "a total that is not there",
    () => db.query("delete from point_daily_totals where kind = 'add'"),
    ["total"],
    /, add, no campaign: none, but the ledger has 1 entries, 50 points, 1 users/m,
  ],
  [
    "a reservation that nobody looks at",
    () => insertLate({}),
    ["overdue"],
    /^reservation \S+ of Late is overdue: PENDING since \d{4}-.*, 0 attempts$/m,
  ],
  [
    "a reservation that is claimed again and again",
    () => insertLate({ status: "PROCESSING", scanAt: new Date(Date.now() + LEASE_MS) }),
    ["overdue"],
    /^reservation \S+ of Late is overdue: PROCESSING since /m,
  ],
];

/** What leaves no row behind that says that it was changed since: a row that was deleted, or an old entry that was changed. */
const ONLY_FULL = [
  ...["a balance that is not there", "a ledger entry that is missing", "a total that is not there"],
  ...["a ledger entry of another amount", "a ledger entry of another user"],
];

describe("reconcile() finds and names", () => {
  test("nothing where all is right, and says how much it has checked", async () => {
    await fill();
    const found = await reconcile(db.database, { leaseMs: LEASE_MS });
    expect(found).toMatchObject({
      ...{ isFull: true, users: 3, reservations: 7, entries: 6, days: 1, differences: 0 },
    });
    // Nothing is looked at that was not changed since.
    expect(await reconcile(db.database, { leaseMs: LEASE_MS })).toMatchObject({
      ...{ isFull: false, users: 0, reservations: 0, entries: 0, days: 0, differences: 0 },
    });
  });

  test.each(PLANTS)("%s, in a full run", async (_, plant, kinds, says) => {
    const granted = await fill();
    expect(await findAll()).toEqual([]);
    await plant(granted);
    const found = await findAll({ isFull: true });
    expect(found.map(({ kind }) => kind)).toEqual(kinds as never);
    expect(found.map(describeDifference).join("\n")).toMatch(says);
    // And again, until it is mended: the next run is a full one too.
    expect(await findAll()).toHaveLength(kinds.length);
  });

  test.each(PLANTS.filter(([name]) => !ONLY_FULL.includes(name)))(
    "%s, where it happened since the last clean run",
    async (_, plant, kinds, says) => {
      const granted = await fill();
      expect(await findAll()).toEqual([]);
      await plant(granted);
      const found = await findAll();
      expect(found.map(describeDifference).join("\n")).toMatch(says);
      expect(new Set(found.map(({ kind }) => kind)).isSubsetOf(new Set(kinds))).toBe(true);
    },
  );

  test("an entry whose balance was forgotten, though nothing else of its user was changed lately", async () => {
    await fill();
    expect(await findAll()).toEqual([]);
    await insertEntry("Bob", 9, { key: "direct:forgotten" });
    expect(await findAll()).toMatchObject([{ kind: "balance", user_id: "Bob", balance: 100n, ledger: 109n }]);
  });

  test("a reservation that was DONE and is not any more, though its entry is old; once, though two pages come by it", async () => {
    const [first] = await fill();
    expect(await findAll()).toEqual([]);
    await db.query("update point_reservations set status = 'CANCELLED' where id = ?", [first?.id]);
    expect(await findAll()).toMatchObject([{ kind: "entry", reservation_id: first?.id }]);
    await db.query("update point_transactions set created_at = now(3) where idempotency_key = ?", [
      first?.idempotencyKey,
    ]);
    expect((await findAll()).filter(({ kind }) => kind === "entry")).toHaveLength(1);
  });

  test("nothing overdue in what was reserved, or is tried again, just now for a time long past", async () => {
    await fill();
    const longAgo = new Date("2026-01-01");
    await insertReservation(db, { executeAt: longAgo });
    for (const status of ["PENDING", "PROCESSING"] as const) {
      const { id } = await insertReservation(db, { executeAt: longAgo, status, scanAt: new Date() });
      await db.query("update point_reservations set created_at = ?, last_error = 'full' where id = ?", [
        longAgo,
        id,
      ]);
    }
    expect(await findAll()).toEqual([]);
  });

  test("what a full run has found in every run, until a full run has found it mended", async () => {
    await fill();
    expect(await findAll()).toEqual([]);
    await db.query(
      "update point_root set point_num = point_num + 1, updated_at = '2026-01-01' where user_id = 'Ann'",
    );
    // Nothing says that it was changed.
    expect(await findAll()).toEqual([]);
    expect(await findAll({ isFull: true })).toHaveLength(1);
    expect(await findAll()).toHaveLength(1);
    await db.query(
      "update point_root set point_num = point_num - 1, updated_at = '2026-01-01' where user_id = 'Ann'",
    );
    const { isFull, differences } = await reconcile(db.database, { leaseMs: LEASE_MS });
    expect([isFull, differences]).toEqual([true, 0]);
    expect(await reconcile(db.database, { leaseMs: LEASE_MS })).toMatchObject({
      isFull: false,
      differences: 0,
    });
  });

  test("differences beyond the first page of each kind", async () => {
    const users = Array.from({ length: 4_500 }, (_, index) => `U${String(index).padStart(5, "0")}`);
    await db.query("insert into point_root (user_id, point_num) values ?", [users.map((user) => [user, 3])]);
    const entries = users.map((user) => [crypto.randomUUID(), `direct:${user}`, user, 3]);
    await db.query("insert into point_transactions (id, idempotency_key, user_id, point_amount) values ?", [
      entries,
    ]);
    await aggregate(db.database, { timeZone: "Asia/Tokyo" });
    expect(await findAll()).toEqual([]);
    await db.query("update point_root set point_num = 4 where user_id in ('U00000', 'U02000', 'U04499')");
    for (const isFull of [true, false]) {
      const found = await findAll({ isFull });
      expect(found.map((difference) => "user_id" in difference && difference.user_id)).toEqual([
        ...["U00000", "U02000", "U04499"],
      ]);
    }
  });
});

test("reconcile() raises no false alarm while points are granted, added, subtracted and counted", async () => {
  await fill();
  let isOver = false;
  let failure: unknown;
  async function forever(work: () => Promise<unknown>) {
    try {
      while (!isOver) await work();
    } catch (error) {
      failure ??= error;
    }
  }
  await using another = openAnother(db);
  const busy = [
    forever(() => grant({ userId: "Ann" })),
    forever(() => grant({ userId: "Bob", campaign: "summer" })),
    forever(() => change("Ann", 3)),
    forever(() => change("Ann", -1)),
    forever(() => aggregate(another, { timeZone: "UTC" })),
  ];
  let checked = 0;
  for (let run = 0; run < 20; run++) {
    const found: Difference[] = [];
    const { entries } = await reconcile(db.database, {
      ...{ isFull: run % 2 === 0, leaseMs: LEASE_MS, onDifference: (one) => void found.push(one) },
    });
    checked = entries;
    expect(found).toEqual([]);
  }
  isOver = true;
  await Promise.all(busy);
  expect(failure).toBeUndefined();
  expect(checked).toBeGreaterThan(6);
}, 60_000);

describe("repairBalance()", () => {
  test("sets it to the ledger's sum while points come and go: none is lost, each repair is written down", async () => {
    await fill();
    let isOver = false;
    async function forever(work: () => Promise<unknown>) {
      while (!isOver) await work();
    }
    const busy = [forever(() => grant({ userId: "Ann" })), forever(() => change("Ann", 1))];
    let repairs = 0;
    for (let round = 0; round < 30; round++) {
      await db.query("update point_root set point_num = point_num + ? where user_id = 'Ann'", [1 + round]);
      const done = await repairBalance(db.database, "Ann", { repairedBy: "tester" });
      if (done) repairs++;
      expect((done?.before ?? 0n) - (done?.after ?? 0n)).toBe(BigInt(1 + round));
    }
    isOver = true;
    await Promise.all(busy);
    expect(await findAll({ isFull: true })).toEqual([]);
    const noted = await db.query(
      "select user_id from point_repairs where repaired_by like 'tester, MySQL user %@%'",
    );
    expect(noted).toEqual(Array(repairs).fill({ user_id: "Ann" }));
    expect(repairs).toBe(30);
  }, 60_000);

  test("does nothing where the two agree, and refuses a sum that is no balance", async () => {
    await fill();
    expect(await repairBalance(db.database, "Ann", { repairedBy: "tester" })).toBeUndefined();
    await insertEntry("Bob", -1_000, { key: "direct:too-much" });
    const error = await errorOf(repairBalance(db.database, "Bob", { repairedBy: "tester" }));
    expect(error.isOutage).toBe(false);
    expect(await db.query("select * from point_repairs")).toEqual([]);
    expect(await db.query("select point_num from point_root where user_id = 'Bob'")).toEqual([
      { point_num: 100 },
    ]);
  });
});

describe("bun run reconcile", () => {
  test("exits 0 and says what it has checked where all agree", async () => {
    await fill();
    const { code, text } = await outputOf(runCommand());
    expect(text).toMatch(
      /^3 users, 7 reservations, 6 ledger entries and 1 days checked in .* s \(everything; .*\): all agree\n$/,
    );
    expect(code).toBe(0);
    const second = await outputOf(runCommand());
    expect(second.text).toContain("(what was changed since the last clean run;");
    expect((await outputOf(runCommand(["--full"]))).text).toContain("(everything;");
  }, 30_000);

  test("exits 1 and names each difference, in lines and as JSON; --repair mends balances and nothing else", async () => {
    await fill();
    await db.query("update point_root set point_num = 9007199254740993 where user_id = 'Ann'");
    await db.query("delete from point_root where user_id = 'Bob'");
    await insertReservation(db, { status: "DONE", userId: "Cat", pointAmount: 5 });
    const lines = await outputOf(runCommand());
    expect(lines.code).toBe(1);
    expect(lines.text).toContain("balance of Ann: 9007199254740993, but the ledger has 230 in 4 entries");
    expect(lines.text).toContain("3 differences, 0 repaired\n  balance: where the ledger is right, --repair");
    expect(lines.text).toContain("\n  reservation: for people to decide");
    const json = await outputOf(runCommand(["--json", "--full"]));
    expect(json.code).toBe(1);
    expect(json.text).toContain('"balance":9007199254740993');
    expect(JSON.parse(json.text)).toMatchObject({
      differences: [
        { kind: "balance", user_id: ANN, ledger: 230, entry_count: 4 },
        {
          kind: "balance",
          user_id: BOB,
          balance: null,
          ledger: 100,
          entries: [{ user_id: BOB, point_amount: 100 }],
        },
        { kind: "reservation", user_id: CAT, point_amount: 5, entries: [] },
      ],
      ...{ is_full: true, difference_count: 3, repaired: 0 },
      checked: { users: 2, reservations: 8, entries: 6, days: 1 },
    });
    const repair = await outputOf(runCommand(["--repair"]));
    expect(repair.code).toBe(1);
    expect(repair.text).toContain(" - repaired: 9007199254740993 -> 230\n");
    expect(repair.text).toContain(" - repaired: none -> 100\n");
    expect(
      await db.query("select user_id, point_num_before, point_num_after from point_repairs order by user_id"),
    ).toEqual([
      { user_id: "Ann", point_num_before: "9007199254740993", point_num_after: 230 },
      { user_id: "Bob", point_num_before: null, point_num_after: 100 },
    ]);
    await db.query("delete from point_reservations where point_amount = 5");
    expect((await outputOf(runCommand(["--full"]))).code).toBe(0);
  }, 30_000);

  test("exits 0 where --repair has mended all that there was", async () => {
    await fill();
    await db.query("update point_root set point_num = 0 where user_id = 'Ann'");
    const { code, text } = await outputOf(runCommand(["--repair", "--json"]));
    expect(JSON.parse(text)).toMatchObject({
      differences: [{ repaired: true }],
      difference_count: 1,
      repaired: 1,
    });
    expect(code).toBe(0);
  }, 30_000);

  test("exits 3 where MySQL does not answer, 2 where it does not know an option", async () => {
    const away = Bun.spawn(["bun", "lib/reconcile.ts"], {
      ...{ cwd: ROOT, stdout: "ignore", stderr: "pipe" },
      env: { ...Bun.env, DATABASE_URL: "mysql://u:S3cret@127.0.0.1:1/d" },
    });
    expect(await away.exited).toBe(3);
    const said = await new Response(away.stderr).text();
    expect(said).toStartWith("Cannot reconcile: ");
    expect(said).not.toContain("S3cret");
    const unknown = runCommand(["--fix"]);
    expect(await unknown.exited).toBe(2);
    expect(await new Response(unknown.stderr).text()).toContain("Usage: bun run reconcile");
  }, 30_000);
});
