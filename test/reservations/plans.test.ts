import { afterAll, describe, expect, test } from "bun:test";
import { type Database, openDatabase } from "../../lib/database.ts";
import type { Page, Position } from "../../lib/page.ts";
import {
  findBalance,
  findBalanceAt,
  findHoldings,
  listTransactions,
} from "../../lib/points/balance_queries.ts";
import { changePoints } from "../../lib/points/change_repository.ts";
import { newPointChange } from "../../lib/points/point.ts";
import { lockFree, lockReservations } from "../../lib/reservations/claim_repository.ts";
import type { Reservation } from "../../lib/reservations/reservation.ts";
import {
  findReservation,
  findReservationByKey,
  type ListOptions,
  listReservations,
} from "../../lib/reservations/reservation_queries.ts";
import {
  cancelCampaign,
  cancelReservation,
  createBesideLocks,
  createReservations,
  patchReservation,
  retryReservation,
} from "../../lib/reservations/reservation_repository.ts";
import { claimDue, findNextScan } from "../../lib/reservations/scan_repository.ts";
import { releaseSetAside } from "../../lib/reservations/scan_state_repository.ts";
import { RESERVATION_STATUSES, type ReservationStatus } from "../../lib/schema.ts";
import { countReads, openTestDatabase } from "../harness/database.ts";
import { reservationOf } from "../harness/fixtures.ts";
import { insertEntries } from "../harness/ledger.ts";
import { expectServed, type Plan, recordStatements } from "../harness/plans.ts";

// Every statement reads what it needs by an index, and no more, however much there is.

const db = await openTestDatabase();
/** One connection: the server counts what each session reads. */
const single = openDatabase(db.url, { connections: 1 });
afterAll(() => single.close());

/** Some of many: their plans must be as good for one who has little as for one who has much. */
const ORDINARY = "User3";
/** Has 3,000 reservations of all kinds. */
const WHALE = "Whale";
/** All of whose 900 reservations are of one campaign, which nobody else is in. */
const LOYAL = "Loyal";
/** Has more entries than all others in the ledger. */
const SPENDER = "Spender";
/** A campaign of more than half of all reservations, and more than two pages of its cancel. */
const BIG = "big";
const BIG_ROWS = 24_000;

type Row = Reservation & { status: ReservationStatus };
const rows: Row[] = [];
const BASE = Date.parse("2020-01-01T00:00:00.000Z");
const CAMPAIGNS = ["summer", "winter", null, null] as const;

/** Of all statuses, three at the same millisecond each time. */
function addRows(userId: string, count: number, campaignOf: (index: number) => string | null | undefined) {
  for (let index = 0; index < count; index++) {
    const status = RESERVATION_STATUSES[(index * 7 + userId.length) % 5] as ReservationStatus;
    const executeAt = new Date(BASE + Math.floor(index / 3) * 1_000);
    rows.push({ ...reservationOf({ userId, executeAt, campaign: campaignOf(index) ?? null }), status });
  }
}

async function inParts<T>(all: readonly T[], insert: (part: T[]) => Promise<unknown>) {
  for (let at = 0; at < all.length; at += 2_000) await insert(all.slice(at, at + 2_000));
}

for (let user = 0; user < 12; user++) addRows(`User${user}`, 300, (index) => CAMPAIGNS[index % 4]);
addRows(WHALE, 3_000, (index) => CAMPAIGNS[index % 4]);
addRows(LOYAL, 900, () => "loyalty");
for (let user = 0; user < 40; user++) addRows(`Big${user}`, BIG_ROWS / 40, () => BIG);
await inParts(rows, (part) =>
  db.query(
    `insert into point_reservations
       (id, user_id, point_amount, execute_at, status, scan_at, idempotency_key, campaign) values ?`,
    [
      part.map(({ id, userId, pointAmount, executeAt, status, idempotencyKey, campaign }) => {
        const scanAt = status === "PENDING" || status === "PROCESSING" ? executeAt : null;
        return [id, userId, pointAmount, executeAt, status, scanAt, idempotencyKey, campaign];
      }),
    ],
  ),
);
const granted = rows.filter(({ status }) => status === "DONE");
const entries = granted.map((one) => ({ ...one, reservation: one, createdAt: one.executeAt }));
const changes = Array.from({ length: 10_000 }, (_, index) => ({
  userId: index % 5 ? SPENDER : `User${(index / 5) % 12}`,
  pointAmount: index % 2 ? 1 : -1,
  createdAt: new Date(BASE + Math.floor(index / 3) * 1_000),
}));
await inParts([...entries, ...changes], (part) => insertEntries(db, part));
const users = new Set([...rows.map(({ userId }) => userId), SPENDER]);
for (let user = 0; users.size < 2_000; user++) users.add(`Other${user}`);
await db.query("insert into point_root (user_id, point_num) values ?", [
  [...users].map((id) => [id, 1_000_000]),
]);
await db.query("analyze table point_reservations, point_transactions, point_root");

function rowsOf(userId: string, matches: (row: Row) => boolean = () => true): Row[] {
  return rows.filter((row) => row.userId === userId && matches(row));
}

function someRow(status: ReservationStatus): Row {
  return rowsOf(ORDINARY, (row) => row.status === status)[0] as Row;
}

/** Where a page starts that has about this share of a list before it. */
const SHARES = [0, 0.1, 0.5, 0.9];

/** All pages of these sizes from those places on. */
function pagesOf(list: readonly Position[], limits: readonly number[]): Page[] {
  return SHARES.flatMap((share) => {
    const after = share === 0 ? undefined : list[Math.floor(list.length * share)];
    return limits.map((limit) => ({ limit, after }));
  });
}

function positionsOf(list: readonly Row[]): Position[] {
  return list.map(({ executeAt, id }) => ({ time: executeAt, id }));
}

const USER_INDEX = { point_reservations: "point_reservations_user", point_root: "PRIMARY" };
const BY_ID: Plan = { keys: { point_reservations: "PRIMARY" }, maxRows: 1 };
const BY_SCAN_AT: Plan = {
  keys: { point_reservations: "point_reservations_scan_at" },
  maxRows: rows.length,
};
const BY_USER: Plan = { keys: { point_root: "PRIMARY" }, maxRows: 400 };
const ENTRY_KEY = { point_transactions: "point_transactions_idempotency_key" };
const OF_CAMPAIGN: Plan = {
  keys: { point_reservations: "point_reservations_campaign" },
  maxRows: 1.5 * BIG_ROWS,
  fromIndexAlone: "point_reservations",
};

/** How each statement must be served; those of lists are further down. */
const PLANS: Record<string, Plan | "reads nothing"> = {
  find_balance: { ...BY_USER, maxRows: 1 },
  // One row in the temporary table; the server does not know it.
  find_holdings: { keys: USER_INDEX, maxRows: 180, maxTemporary: 300, fromIndexAlone: "point_reservations" },
  find_balance_at: {
    keys: { point_transactions: "point_transactions_user" },
    maxRows: 100,
    fromIndexAlone: "point_transactions",
  },
  is_known: { keys: USER_INDEX, maxRows: rows.length / 10, maxTemporary: 2 },
  find_details: { keys: { point_reservations: "PRIMARY", ...ENTRY_KEY }, maxRows: 1 },
  patch_reservation: BY_ID,
  cancel_reservation: BY_ID,
  retry_reservation: BY_ID,
  lock_reservation: BY_ID,
  create_reservations: "reads nothing",
  find_by_idempotency_keys: {
    keys: { point_reservations: "point_reservations_idempotency_key" },
    maxRows: 1_001,
  },
  lock_balances: BY_USER,
  read_uncommitted: "reads nothing",
  find_taken_balances: { ...BY_USER, maxRows: 1 },
  find_taken_keys: {
    keys: { point_reservations: "point_reservations_idempotency_key" },
    maxRows: 1,
  },
  find_changes: { keys: ENTRY_KEY, maxRows: 400 },
  insert_ledger_entries: "reads nothing",
  add_to_known: BY_USER,
  upsert_balances: "reads nothing",
  // The count and the clock are in temporary tables.
  find_next_scan: { ...BY_SCAN_AT, maxTemporary: 500, fromIndexAlone: "point_reservations" },
  claim_due: BY_SCAN_AT,
  find_set_aside: BY_SCAN_AT,
  release_set_aside: { ...BY_ID, maxRows: 500 },
  mark_processing: { ...BY_ID, maxRows: 500 },
  lock_reservations: { keys: { r: "PRIMARY" }, maxRows: 500 },
  lock_free: { keys: { r: "PRIMARY", b: "PRIMARY" }, maxRows: 502 },
  find_existing: { ...BY_ID, maxRows: 2 },
  lock_open_of_campaign: { ...OF_CAMPAIGN, fromIndexAlone: undefined },
  count_campaign: OF_CAMPAIGN,
  cancel_reservations: { ...BY_ID, maxRows: 1_000 },
};

/** Checks that each statement that some work sends is served as its plan says; resolves to their names. */
async function expectAllServed(
  work: (database: Database) => Promise<unknown>,
  plans = PLANS,
): Promise<string[]> {
  const statements = await recordStatements(db, work);
  for (const statement of statements) {
    const plan = plans[statement.name];
    if (!plan) throw new Error(`There is no plan for ${statement.name}`);
    if (plan !== "reads nothing") await expectServed(db, statement, plan);
  }
  return statements.map(({ name }) => name);
}

const FILTERS: [string, Pick<ListOptions, "status" | "campaign">][] = [
  ["without a filter", {}],
  ["of DONE", { status: "DONE" }],
  // Two that the index takes for one.
  ["of PENDING", { status: "PENDING" }],
  ["of PROCESSING", { status: "PROCESSING" }],
  ["of one campaign", { campaign: "summer" }],
  ["of one status and campaign", { status: "DONE", campaign: "summer" }],
  ["of PENDING and one campaign", { status: "PENDING", campaign: "summer" }],
];

describe.each(FILTERS)("listReservations() %s", (_, filter) => {
  // Then four lists come together in a temporary table.
  const isUnion = filter.status === undefined;
  const key = filter.campaign ? "point_reservations_campaign" : "point_reservations_user";
  const matches = (row: Row) =>
    (!filter.status || row.status === filter.status) &&
    (!filter.campaign || row.campaign === filter.campaign);

  test.each([ORDINARY, WHALE])("reads every page of %s by the index, in its order", async (user) => {
    for (const page of pagesOf(positionsOf(rowsOf(user, matches)), [10, 100, 1_000])) {
      const list_reservations = {
        keys: { point_reservations: key },
        // All of the user's, or some more if the server estimates by the average user.
        maxRows: Math.max(1.5 * rowsOf(user).length, rows.length / 10),
        maxTemporary: isUnion ? 4 * (page.limit + 1) : 0,
      };
      const work = (database: Database) => listReservations(database, user, { ...filter, ...page });
      // One statement, hence one snapshot.
      expect(await expectAllServed(work, { list_reservations })).toHaveLength(1);
    }
  });

  // If the index leaves some to be skipped, it depends on how many.
  if (filter.status === "PENDING" || filter.status === "PROCESSING") return;

  test("costs the same for every page: one read for each row", async () => {
    const list = positionsOf(rowsOf(WHALE, matches));
    for (const page of pagesOf(list, filter.status && filter.campaign ? [5, 10] : [10, 50])) {
      const reads = await countReads(single, async (database) => {
        const found = await listReservations(database, WHALE, { ...filter, ...page });
        expect(found).toHaveLength(page.limit + 1);
      });
      // MariaDB fills a temporary table for each list of a union, one by one.
      expect(reads).toBeWithin(page.limit + 1, isUnion ? 16 * (page.limit + 1) + 21 : page.limit + 6);
    }
  });
});

test("listReservations() reads a campaign by its index also if it has all of the user's reservations", async () => {
  for (const page of pagesOf(positionsOf(rowsOf(LOYAL)), [10, 100, 1_000])) {
    const keys = { point_reservations: "point_reservations_campaign" };
    await expectAllServed((database) => listReservations(database, LOYAL, { campaign: "loyalty", ...page }), {
      list_reservations: { keys, maxRows: 1_350, maxTemporary: 4 * (page.limit + 1) },
    });
  }
});

test.each([ORDINARY, WHALE, SPENDER])(
  "listTransactions() reads every page of %s by the index, newest first, two reads for each entry",
  async (user) => {
    const list = await db.query<Position>(
      "select id, created_at time from point_transactions where user_id = ? order by created_at desc, id desc",
      [user],
    );
    const keys = { point_transactions: "point_transactions_user", point_reservations: "PRIMARY" };
    for (const page of pagesOf(list, [10, 100, 1_000])) {
      await expectAllServed((database) => listTransactions(database, user, page), {
        list_transactions: { keys, maxRows: 1.5 * list.length },
      });
    }
    for (const page of pagesOf(list, [10])) {
      const reads = await countReads(single, async (database) => {
        expect(await listTransactions(database, user, page)).toHaveLength(11);
      });
      expect(reads).toBeWithin(11, 2 * 11 + 6);
    }
  },
);

function changesOf(...userIds: string[]) {
  return userIds.map((user_id) => newPointChange({ user_id, point_num: 1 }, { kind: "add" }));
}

test("every other statement reads and locks by its index, and no more than it must", async () => {
  const other = Array.from({ length: 400 }, (_, index) => `Other${index}`);
  const again = rows.slice(-1_000).map((row) => ({ ...row, id: crypto.randomUUID() }));
  const ids = rows.slice(0, 500).map(({ id }) => id);
  const unknown = [crypto.randomUUID(), crypto.randomUUID()];
  const { executeAt, id } = someRow("PENDING");
  const from = { scanAt: executeAt, id };
  const works: ((database: Database) => Promise<unknown>)[] = [
    (database) => findHoldings(database, ORDINARY),
    (database) => findBalanceAt(database, WHALE, new Date(BASE + 100_000)),
    (database) => findBalance(database, ORDINARY),
    (database) => findReservation(database, someRow("DONE").id),
    (database) => patchReservation(database, someRow("PENDING").id, { pointAmount: 7 }),
    (database) => cancelReservation(database, someRow("PROCESSING").id),
    (database) => retryReservation(database, someRow("FAILED").id),
    (database) => database.run((connection) => createReservations(connection, again)),
    (database) => changePoints(database, changesOf(...other)),
    (database) => changePoints(database, changesOf("Other1", "Newcomer")),
    (database) => createBesideLocks(database, [...again, reservationOf()]),
    (database) => database.transaction((transaction) => lockFree(transaction, [...ids, ...unknown])),
    (database) => findNextScan(database, { from, withinMs: 10_000, limit: 500 }),
    (database) => claimDue(database, { from, limit: 500, leaseMs: 60_000 }),
    (database) => releaseSetAside(database, { leaseMs: 1_000, wasAheadMs: 0 }),
    (database) => database.transaction((transaction) => lockReservations(transaction, ids)),
    (database) => cancelCampaign(database, BIG, { untilMs: Number.POSITIVE_INFINITY }),
  ];
  const served: string[] = [];
  for (const work of works) served.push(...(await expectAllServed(work)));
  expect(new Set(served)).toEqual(new Set(Object.keys(PLANS)));
});

test("findReservationByKey() reads one row by its key, and its entry by the same", async () => {
  const keys = { point_reservations: "point_reservations_idempotency_key", ...ENTRY_KEY };
  await expectAllServed((database) => findReservationByKey(database, someRow("DONE").idempotencyKey), {
    find_details: { keys, maxRows: 1 },
  });
});

test("findHoldings() and findBalanceAt() read no more than they must", async () => {
  expect(await countReads(single, (database) => findHoldings(database, ORDINARY))).toBeWithin(100, 127);
  const before = (database: Database) => findBalanceAt(database, WHALE, new Date(0));
  expect(await countReads(single, before)).toBeWithin(1, 11);
});
