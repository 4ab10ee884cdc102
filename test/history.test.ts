import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { drizzle } from "drizzle-orm/mysql2";
import { v7 as uuidv7 } from "uuid";
import { type Connection, type Database, openDatabase } from "../lib/database.ts";
import {
  findBalanceAt,
  findHoldings,
  findReservation,
  findReservationByKey,
  type ListOptions,
  listReservations,
  listTransactions,
} from "../lib/history.ts";
import type { Position } from "../lib/page.ts";
import { DIRECT } from "../lib/point.ts";
import { changePoints, findBalance } from "../lib/point_repository.ts";
import { RESERVATION_STATUSES, type Reservation, type ReservationStatus } from "../lib/reservation.ts";
import {
  cancelCampaign,
  cancelReservation,
  createReservations,
  patchReservation,
  retryReservation,
} from "../lib/reservation_repository.ts";
import { countReads, createTestDatabase, reservationOf, type TestDatabase, until } from "./harness.ts";
import { insertReservations, processReservations } from "./pipeline.ts";

let db: TestDatabase;
/** One connection: the server counts what each session reads. */
let single: Database;

/** Some of many: their plans must be as good for one who has little as for one who has much. */
const ORDINARY = "User3";
/** Has 3,000 reservations of all kinds. */
const WHALE = "Whale";
/** All of whose 900 reservations are of one campaign, which nobody else is in. */
const LOYAL = "Loyal";
/** Has more entries than all others in the ledger. */
const SPENDER = "Spender";
/** A campaign of more than half of all reservations, 24,000, and more than two pages of its cancel. */
const BIG = "big";
const BIG_ROWS = 24_000;
const BALANCES = 2_000;

type Row = Reservation & { status: ReservationStatus };
const rows: Row[] = [];
const BASE = Date.parse("2020-01-01T00:00:00.000Z");
const CAMPAIGNS = ["summer", "winter", null, null] as const;

beforeAll(async () => {
  db = await createTestDatabase();
  single = openDatabase(db.url, { connections: 1 });
  for (let user = 0; user < 12; user++)
    addRows(`User${user}`, 300, (index) => CAMPAIGNS[index % 4] as string | null);
  addRows(WHALE, 3_000, (index) => CAMPAIGNS[index % 4] as string | null);
  addRows(LOYAL, 900, () => "loyalty");
  for (let user = 0; user < 40; user++) addRows(`Big${user}`, BIG_ROWS / 40, () => BIG);
  await insertMany(
    "point_reservations (id, user_id, point_amount, execute_at, status, scan_at, idempotency_key, campaign)",
    rows.map(({ id, userId, pointAmount, executeAt, status, idempotencyKey, campaign }) => [
      ...[id, userId, pointAmount, executeAt, status],
      ...[status === "PENDING" || status === "PROCESSING" ? executeAt : null, idempotencyKey, campaign],
    ]),
  );
  const grants = rows.filter(({ status }) => status === "DONE");
  await insertMany("point_transactions (id, idempotency_key, user_id, point_amount, created_at)", [
    ...grants.map(({ idempotencyKey, userId, executeAt }) => [
      uuidv7(),
      idempotencyKey,
      userId,
      100,
      executeAt,
    ]),
    ...[...Array(10_000).keys()].map((index) => {
      const userId = index % 5 ? SPENDER : `User${(index / 5) % 12}`;
      return [
        uuidv7(),
        DIRECT + uuidv7(),
        userId,
        index % 2 ? 1 : -1,
        new Date(BASE + Math.floor(index / 3) * 1_000),
      ];
    }),
  ]);
  const users = new Set([...rows.map(({ userId }) => userId), SPENDER]);
  for (let user = 0; users.size < BALANCES; user++) users.add(`Other${user}`);
  await insertMany(
    "point_root (user_id, point_num)",
    [...users].map((userId) => [userId, 1_000_000]),
  );
  await db.query("analyze table point_reservations, point_transactions, point_root");
}, 60_000);
afterAll(async () => {
  await single?.close();
  await db?.drop();
});

/** Of all statuses, three at the same millisecond each time. */
function addRows(userId: string, count: number, campaignOf: (index: number) => string | null) {
  for (let index = 0; index < count; index++) {
    const status = RESERVATION_STATUSES[(index * 7 + userId.length) % 5] as ReservationStatus;
    const executeAt = new Date(BASE + Math.floor(index / 3) * 1_000);
    rows.push({ ...reservationOf({ userId, executeAt, campaign: campaignOf(index) }), status });
  }
}

async function insertMany(into: string, values: unknown[][]) {
  for (let at = 0; at < values.length; at += 2_000) {
    await db.query(`insert into ${into} values ?`, [values.slice(at, at + 2_000)]);
  }
}

function rowsOf(userId: string, matches: (row: Row) => boolean = () => true): Row[] {
  return rows.filter((row) => row.userId === userId && matches(row));
}

function someRow(status: ReservationStatus): Row {
  return rowsOf(ORDINARY, (row) => row.status === status)[0] as Row;
}

interface Statement {
  sql: string;
  params: unknown[];
}

/** What some work really sends, without the bounds of its transaction. */
async function statementsOf(work: (database: Database) => Promise<unknown>): Promise<Statement[]> {
  const statements: Statement[] = [];
  const note = (sql: string, params: unknown[] = []) => statements.push({ sql, params });
  /** The same connection, and within the same transaction: only the ears are new. */
  const heard = (connection: Connection): Connection => ({
    drizzle: drizzle({
      client: (connection.drizzle as unknown as { $client: never }).$client,
      logger: { logQuery: note },
    }) as never,
    execute(sql, values) {
      note(sql, values);
      return connection.execute(sql, values);
    },
    select(sql, values) {
      note(sql, values);
      return connection.select(sql, values);
    },
  });
  await work({
    ...db.database,
    run: (inner) => db.database.run((connection) => inner(heard(connection))),
    transaction: (inner) => db.database.transaction((connection) => inner(heard(connection))),
  });
  return statements;
}

/** One table of a plan. */
interface Step {
  table: string | null;
  type: string | null;
  key: string | null;
  rows: number | string | null;
  Extra: string | null;
}

/** `traditional` gives a table on any server; later versions of MySQL draw a tree unless told. */
function explain({ sql, params }: Statement): Promise<Step[]> {
  return db.query<Step>(`explain format=traditional ${sql}`, params);
}

/** A plan may reach its rows by a key in these ways; the others read a whole table or a whole index. */
const BY_KEY = ["const", "eq_ref", "ref", "range"];

/** Not "Using index condition", which is another thing. */
const FROM_INDEX_ALONE = /Using index(;|$)/;

interface Expected {
  /** For each table the indexes that may serve it. */
  keys: Record<string, string[]>;
  /** The most rows that the server may expect to read of one table. */
  maxRows: number;
  /** The most rows in a temporary table, which may be sorted; no such table unless told. */
  maxTemporary?: number;
}

/** Checks that every table is read by its index, in the index's order. */
async function expectServed(
  statement: Statement,
  { keys, maxRows, maxTemporary = 0 }: Expected,
): Promise<Step[]> {
  const plan = await explain(statement);
  const faults = plan.flatMap((step) => {
    const { table, type, key, rows, Extra } = step;
    const isTemporary = table?.startsWith("<");
    const expected = Number.parseInt(String(rows ?? 0), 10);
    const isServed =
      BY_KEY.includes(type ?? "") &&
      keys[table ?? ""]?.includes(key ?? "") &&
      !/filesort|temporary/.test(Extra ?? "") &&
      expected <= maxRows;
    return (isTemporary ? expected <= maxTemporary : isServed) ? [] : [step];
  });
  expect(faults).toEqual([]);
  const tables = new Set(plan.map(({ table }) => table ?? "none").filter((table) => !table.startsWith("<")));
  expect(tables).toEqual(new Set(Object.keys(keys)));
  if (maxTemporary === 0) expect(plan.filter(({ table }) => table?.startsWith("<"))).toEqual([]);
  return plan;
}

function readsOf(work: (database: Database) => Promise<unknown>): Promise<number> {
  return countReads(single, work);
}

const USER = "point_reservations_user";
const CAMPAIGN = "point_reservations_campaign";

/** Where a page of this list starts that has about this share of the list before it. */
function positionOf(list: readonly Row[], share: number): Position | undefined {
  if (share === 0) return undefined;
  const { executeAt, id } = list[Math.floor(list.length * share)] as Row;
  return { time: executeAt, id };
}

const SHARES: [string, number][] = [
  ["the first page", 0],
  ["a page near the start", 0.1],
  ["a page in the middle", 0.5],
  ["a page near the end", 0.9],
];

const FILTERS: [string, Pick<ListOptions, "status" | "campaign">, string[]][] = [
  ["without a filter", {}, [USER]],
  ["of DONE", { status: "DONE" }, [USER]],
  // Two that the index takes for one.
  ["of PENDING", { status: "PENDING" }, [USER]],
  ["of PROCESSING", { status: "PROCESSING" }, [USER]],
  ["of one campaign", { campaign: "summer" }, [CAMPAIGN]],
  ["of one status and campaign", { status: "DONE", campaign: "summer" }, [CAMPAIGN]],
  ["of PENDING and one campaign", { status: "PENDING", campaign: "summer" }, [CAMPAIGN]],
];

describe.each(FILTERS)("listReservations() %s", (_, filter, keys) => {
  // Then four lists come together in a temporary table.
  const isUnion = filter.status === undefined;
  const matches = (row: Row) =>
    (!filter.status || row.status === filter.status) &&
    (!filter.campaign || row.campaign === filter.campaign);

  describe.each(SHARES)("reads %s", (_, share) => {
    test.each([
      [ORDINARY, 10],
      [ORDINARY, 100],
      [ORDINARY, 1_000],
      [WHALE, 10],
      [WHALE, 100],
      [WHALE, 1_000],
    ])("of %s, %d at most, by the index, in its order", async (user, limit) => {
      const after = positionOf(rowsOf(user, matches), share);
      const statements = await statementsOf((database) =>
        listReservations(database, user, { ...filter, limit, after }),
      );
      expect(statements).toHaveLength(1);
      await expectServed(statements[0] as Statement, {
        keys: { point_reservations: keys },
        // All of the user's, or some more, where the server estimates by the average user.
        maxRows: Math.max(1.5 * rowsOf(user).length, rows.length / 10),
        ...(isUnion && { maxTemporary: 4 * (limit + 1) }),
      });
    });
  });

  // Where the index leaves some to be passed over, it depends on how many.
  if (filter.status === "PENDING" || filter.status === "PROCESSING") return;

  test.each(SHARES)("costs the same for %s: one read for each row", async (_, share) => {
    const all = rowsOf(WHALE, matches);
    const after = positionOf(all, share);
    for (const limit of filter.status && filter.campaign ? [5, 10] : [10, 50]) {
      expect(all.length * 0.1).toBeGreaterThan(limit);
      const reads = await readsOf(async (database) => {
        expect(await listReservations(database, WHALE, { ...filter, limit, after })).toHaveLength(limit + 1);
      });
      expect(reads).toBeGreaterThan(limit);
      // MariaDB fills a temporary table for each list of a union, one by one.
      expect(reads).toBeLessThanOrEqual(isUnion ? 16 * (limit + 1) + 20 : limit + 5);
    }
  });
});

describe("listReservations()", () => {
  test.each(SHARES)(
    "reads %s of a campaign by its index also where it has all of the user's reservations",
    async (_, share) => {
      const after = positionOf(rowsOf(LOYAL), share);
      for (const limit of [10, 100, 1_000]) {
        const [statement] = await statementsOf((database) =>
          listReservations(database, LOYAL, { campaign: "loyalty", limit, after }),
        );
        await expectServed(statement as Statement, {
          keys: { point_reservations: [CAMPAIGN] },
          maxRows: 1_350,
          maxTemporary: 4 * (limit + 1),
        });
      }
    },
  );
});

describe("listTransactions()", () => {
  async function positionIn(user: string, share: number): Promise<Position | undefined> {
    if (share === 0) return undefined;
    const entries = await db.query<{ id: string; time: Date }>(
      "select id, created_at time from point_transactions where user_id = ? order by created_at desc, id desc",
      [user],
    );
    return entries[Math.floor(entries.length * share)];
  }

  describe.each(SHARES)("reads %s", (_, share) => {
    test.each([
      [ORDINARY, 10],
      [ORDINARY, 100],
      [ORDINARY, 1_000],
      [WHALE, 10],
      [WHALE, 100],
      [WHALE, 1_000],
      [SPENDER, 10],
      [SPENDER, 100],
      [SPENDER, 1_000],
    ])(
      "of %s, %d at most, by the index, newest first, and each one's reservation by its key",
      async (user, limit) => {
        const after = await positionIn(user, share);
        const statements = await statementsOf((database) =>
          listTransactions(database, user, { limit, after }),
        );
        expect(statements).toHaveLength(1);
        const [all] = await db.query<{ n: number }>(
          "select count(*) n from point_transactions where user_id = ?",
          [user],
        );
        await expectServed(statements[0] as Statement, {
          keys: {
            point_transactions: ["point_transactions_user"],
            point_reservations: ["point_reservations_idempotency_key"],
          },
          maxRows: 1.5 * Number(all?.n),
        });
      },
    );
  });

  test.each(SHARES)("costs the same for %s: two reads for each entry", async (_, share) => {
    for (const user of [ORDINARY, WHALE, SPENDER]) {
      const after = await positionIn(user, share);
      const reads = await readsOf(async (database) => {
        expect(await listTransactions(database, user, { limit: 10, after })).toHaveLength(11);
      });
      expect(reads).toBeGreaterThan(10);
      expect(reads).toBeLessThanOrEqual(2 * 11 + 5);
    }
  });
});

describe("findHoldings()", () => {
  test("reads the balance by its key, and what is to come from the index alone", async () => {
    const statements = await statementsOf((database) => findHoldings(database, ORDINARY));
    expect(statements).toHaveLength(1);
    const plan = await expectServed(statements[0] as Statement, {
      keys: { point_reservations: [USER], point_root: ["PRIMARY"] },
      maxRows: 180,
      // One row; the server does not know it.
      maxTemporary: 300,
    });
    expect(plan.find(({ table }) => table === "point_reservations")?.Extra).toMatch(FROM_INDEX_ALONE);
    const reads = await readsOf((database) => findHoldings(database, ORDINARY));
    expect(reads).toBeLessThanOrEqual(120 + 6);
  });

  test("sees a grant in one of its two sums, never in both or in none", async () => {
    const userId = "Snapshot";
    const reservations = Array.from({ length: 100 }, () => reservationOf({ userId, pointAmount: 7 }));
    await insertReservations(db, { reservations, status: "PROCESSING" });
    let isOver = false;
    const granting = (async () => {
      for (const reservation of reservations) {
        await processReservations([[reservation]], db);
      }
    })().finally(() => {
      isOver = true;
    });
    const balances = new Set<bigint>();
    await until("all is granted", async () => {
      for (let look = 0; look < 20; look++) {
        const holdings = await findHoldings(db.database, userId);
        expect((holdings?.pointNum ?? 0n) + (holdings?.reservedPointNum ?? 0n)).toBe(700n);
        balances.add(holdings?.pointNum ?? 0n);
      }
      return isOver;
    });
    await granting;
    // It was looked at in the midst of them.
    expect(balances.size).toBeGreaterThan(10);
  }, 30_000);
});

describe("findBalanceAt()", () => {
  test("adds up the ledger until then from the index alone", async () => {
    const at = new Date(BASE + 100_000);
    const statements = await statementsOf((database) => findBalanceAt(database, WHALE, at));
    const statement = statements.find(({ sql }) => sql.includes("point_transactions")) as Statement;
    const plan = await expectServed(statement, {
      keys: { point_transactions: ["point_transactions_user"] },
      maxRows: 100,
    });
    expect(plan[0]?.Extra).toMatch(FROM_INDEX_ALONE);
    expect(statements).toHaveLength(2);
  });

  test("asks whether it knows the user without adding up what is to come", async () => {
    const statements = await statementsOf((database) => findBalanceAt(database, WHALE, new Date(0)));
    const known = statements.find(({ sql }) => sql.includes("point_root")) as Statement;
    await expectServed(known, {
      keys: { point_reservations: [USER], point_root: ["PRIMARY"] },
      maxRows: Math.max(1.5 * rowsOf(WHALE).length, rows.length / 10),
      maxTemporary: 2,
    });
    expect(await readsOf((database) => findBalanceAt(database, WHALE, new Date(0)))).toBeLessThanOrEqual(10);
  });
});

describe("findReservation()", () => {
  test("reads one row by its id, and its ledger entry by its key", async () => {
    const [statement] = await statementsOf((database) => findReservation(database, someRow("DONE").id));
    await expectServed(statement as Statement, {
      keys: { point_reservations: ["PRIMARY"], point_transactions: ["point_transactions_idempotency_key"] },
      maxRows: 1,
    });
  });
});

describe("findReservationByKey()", () => {
  test("reads one row by its key, and its ledger entry by the same", async () => {
    const { id, idempotencyKey } = someRow("DONE");
    const [statement] = await statementsOf(async (database) => {
      expect((await findReservationByKey(database, idempotencyKey))?.id).toBe(id);
    });
    await expectServed(statement as Statement, {
      keys: {
        point_reservations: ["point_reservations_idempotency_key"],
        point_transactions: ["point_transactions_idempotency_key"],
      },
      maxRows: 1,
    });
  });

  test("takes keys that differ only in case for two", async () => {
    const key = someRow("DONE").idempotencyKey.toUpperCase();
    expect(await findReservationByKey(db.database, key)).toBeUndefined();
  });
});

describe("findBalance()", () => {
  test("reads one row by its key", async () => {
    const [statement] = await statementsOf((database) => findBalance(database, ORDINARY));
    await expectServed(statement as Statement, { keys: { point_root: ["PRIMARY"] }, maxRows: 1 });
  });
});

describe.each<[string, ReservationStatus, number, (database: Database, id: string) => Promise<boolean>]>([
  ["patchReservation()", "PENDING", 2, (database, id) => patchReservation(database, id, { pointAmount: 7 })],
  ["cancelReservation()", "PENDING", 1, cancelReservation],
  ["retryReservation()", "FAILED", 2, retryReservation],
])("%s", (_, status, count, work) => {
  test("takes and locks one row by its id", async () => {
    const { id } = someRow(status);
    const statements = await statementsOf(async (database) => expect(await work(database, id)).toBe(true));
    expect(statements).toHaveLength(count);
    for (const statement of statements) {
      await expectServed(statement, { keys: { point_reservations: ["PRIMARY"] }, maxRows: 1 });
    }
  });
});

describe("createReservations()", () => {
  test.each([[1], [3], [1_000]])("finds the first %d reservations of taken keys by these", async (count) => {
    const batch = rows.slice(-count).map((row) => ({ ...row, id: uuidv7() }));
    const statements = await statementsOf((database) =>
      database.run(async (connection) => {
        const outcomes = await createReservations(connection, batch);
        expect(new Set(outcomes.map(({ kind }) => kind))).toEqual(new Set(["replayed"]));
      }),
    );
    expect(statements).toHaveLength(2);
    await expectServed(statements[1] as Statement, {
      keys: { point_reservations: ["point_reservations_idempotency_key"] },
      maxRows: count,
    });
  });
});

describe("changePoints()", () => {
  test.each([[1], [3], [400]])(
    "of %d users locks and changes their balances by their keys",
    async (count) => {
      const batch = Array.from({ length: count }, (_, index) => ({
        ...{ idempotencyKey: DIRECT + uuidv7(), userId: `Other${index}`, pointAmount: -1 },
      }));
      const statements = await statementsOf(async (database) => {
        expect(new Set(await changePoints(database, batch))).toEqual(new Set(["changed"]));
      });
      const [balances, entries, insert, update] = statements;
      expect(statements).toHaveLength(4);
      expect(insert?.sql).toStartWith("insert into point_transactions");
      await expectServed(balances as Statement, { keys: { point_root: ["PRIMARY"] }, maxRows: count });
      await expectServed(update as Statement, { keys: { point_root: ["PRIMARY"] }, maxRows: count });
      // A key that is not there yet: a server that looks it up while it plans has nothing left to plan.
      const [lookup] = await explain(entries as Statement);
      if (count > 1 || lookup?.table) {
        await expectServed(entries as Statement, {
          keys: { point_transactions: ["point_transactions_idempotency_key"] },
          maxRows: count,
        });
      }
    },
  );

  test("that shall not wait looks for balances that are held by their keys, too", async () => {
    const batch = ["Other1", "Newcomer"].map((userId) => ({
      ...{ idempotencyKey: DIRECT + uuidv7(), userId, pointAmount: 1 },
    }));
    const statements = await statementsOf((database) => changePoints(database, batch, { wait: false }));
    const [balances, held] = statements.filter(({ sql }) => /^select.*point_root/.test(sql));
    await expectServed(balances as Statement, { keys: { point_root: ["PRIMARY"] }, maxRows: 2 });
    await expectServed(held as Statement, { keys: { point_root: ["PRIMARY"] }, maxRows: 1 });
  });
});

// Last, as it changes many rows.
describe("cancelCampaign()", () => {
  test("finds what is open and counts what is not by the campaign's index, and cancels by ids", async () => {
    const statements = await statementsOf((database) =>
      cancelCampaign(database, BIG, { untilMs: Number.POSITIVE_INFINITY }),
    );
    const updates = statements.filter(({ sql }) => sql.startsWith("update"));
    expect(updates.length).toBeGreaterThan(2);
    for (const update of updates) {
      await expectServed(update, { keys: { point_reservations: ["PRIMARY"] }, maxRows: 1_000 });
    }
    const finds = statements.filter(({ sql }) => sql.includes(" limit "));
    expect(finds).toHaveLength(updates.length + 1);
    const [count, ...others] = statements.filter((one) => !updates.includes(one) && !finds.includes(one));
    expect(others).toEqual([]);
    for (const statement of [finds[0], count] as Statement[]) {
      const plan = await expectServed(statement, {
        keys: { point_reservations: [CAMPAIGN] },
        maxRows: 1.5 * BIG_ROWS,
      });
      expect(plan[0]?.Extra).toMatch(FROM_INDEX_ALONE);
    }
  }, 30_000);
});
