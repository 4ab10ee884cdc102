import { v7 as uuidv7 } from "uuid";
import type { Connection, Database } from "./database.ts";
import { boundsOf } from "./day.ts";
import { DIRECT, type EntryKind } from "./point.ts";
import type { ReservationStatus } from "./reservation.ts";

// What must agree, a page at a time. A page is compared in one statement, hence in one snapshot: a grant is in all that it
// reads, or in nothing of it.

/** Balances, or reservations, or ledger entries of one page. */
const PAGE = 2_000;
/** Rows of one page of which only those are checked that were changed lately. */
const WALK_PAGE = 20_000;
/** How long one page may take, in milliseconds; a day with millions of entries is one. */
const WORK_MS = 600_000;
/** The most ledger entries that a difference shows. */
const MAX_SHOWN = 10;
/** What is open for so long after its time is overdue, in milliseconds: longer than a burst of a million takes. */
export const OVERDUE_MS = 300_000;
/** The longest wait after a failure of a reservation's own, in milliseconds: what `RETRY` of worker.ts says. */
const RETRY_MS = 3_600_000;
/** Sorts behind every user id. */
const AFTER_ALL = "~";

/** A ledger entry, as a difference shows it. */
export interface ShownEntry {
  transaction_id: string;
  user_id: string;
  point_amount: number;
  idempotency_key: string;
  created_at: Date;
}

/** What the entries of a day, kind and campaign add up to, as a difference shows it. */
export interface ShownTotal {
  entries: bigint;
  points: bigint;
  users: bigint;
  late_ms_sum: bigint;
  late_ms_max: bigint;
}

/** Two figures that must agree and do not, or a reservation that should be over. */
export type Difference =
  | {
      /** A balance is not the sum of the user's ledger entries. */
      kind: "balance";
      user_id: string;
      /** Null where the user has none. */
      balance: bigint | null;
      ledger: bigint;
      /** How many entries the user has, and the newest of them. */
      entry_count: number;
      entries: ShownEntry[];
    }
  | {
      /** A reservation is DONE and has not the one ledger entry of its user and amount. */
      kind: "reservation";
      reservation_id: string;
      user_id: string;
      point_amount: number;
      idempotency_key: string;
      entries: ShownEntry[];
    }
  | {
      /** A ledger entry came from no reservation that is DONE. */
      kind: "entry";
      entries: [ShownEntry];
      /** Null where no reservation has its key. */
      reservation_id: string | null;
      reservation_status: ReservationStatus | null;
    }
  | {
      /** A daily total is not what the entries that it counts add up to. */
      kind: "total";
      day: string;
      of: EntryKind;
      campaign: string | null;
      /** Null where there is none. */
      total: ShownTotal | null;
      ledger: ShownTotal | null;
    }
  | {
      /** A reservation is open, and should have been granted minutes ago. */
      kind: "overdue";
      reservation_id: string;
      user_id: string;
      status: ReservationStatus;
      execute_at: Date;
      attempts: number;
      last_error: string | null;
    };

/** What a page gives: where the next one begins, or undefined after the last; how many it has checked. */
export interface Checked<Position> {
  next: Position | undefined;
  count: number;
  differences: Difference[];
}

/** Runs the statements of one page. */
function onPage<T>(database: Database, work: (connection: Connection) => Promise<T>): Promise<T> {
  return database.run(work, { workMs: WORK_MS });
}

/**
 * Every balance against the sum of its user's entries, users without a balance included.
 *
 * @param options.since only the balances that were changed since then
 */
export function checkBalances(
  database: Database,
  { after, since }: { after: string; since: Date | undefined },
): Promise<Checked<string>> {
  return onPage(database, async (connection) => {
    const limit = since ? WALK_PAGE : PAGE;
    const [page] = await connection.select<{ last: string | null; count: number }>(
      `select max(user_id) last, count(*) count
       from (select user_id from point_root where user_id > ? order by user_id limit ?) page`,
      [after, limit],
    );
    const isLast = !page?.last || page.count < limit;
    const last = isLast ? AFTER_ALL : page.last;
    const next = isLast ? undefined : (last ?? undefined);
    if (!since) {
      const differences = await findApart(connection, "user_id > ? and user_id <= ?", [after, last]);
      return { next, count: Number(page?.count ?? 0), differences };
    }
    const touched = await connection.select<{ userId: string }>(
      "select user_id userId from point_root where user_id > ? and user_id <= ? and updated_at >= ?",
      [after, last, since],
    );
    const differences = await findApartOf(
      connection,
      touched.map(({ userId }) => userId),
    );
    return { next, count: touched.length, differences };
  });
}

/** Those of some users whose balance is not the sum of their entries. */
async function findApartOf(connection: Connection, userIds: readonly string[]): Promise<Difference[]> {
  const differences: Difference[] = [];
  for (let at = 0; at < userIds.length; at += PAGE) {
    differences.push(...(await findApart(connection, "user_id in (?)", [userIds.slice(at, at + PAGE)])));
  }
  return differences;
}

async function findApart(connection: Connection, where: string, values: unknown[]): Promise<Difference[]> {
  type Row = { userId: string; hasBalance: number; balance: string; ledger: string; entryCount: number };
  const rows = await connection.select<Row>(
    `select user_id userId, max(has_balance) hasBalance, sum(balance) balance, sum(ledger) ledger,
       sum(entries) entryCount
     from (
       select user_id, 1 has_balance, point_num balance, 0 ledger, 0 entries from point_root where ${where}
       union all
       select user_id, 0, 0, sum(point_amount), count(*)
       from point_transactions force index (point_transactions_user) where ${where} group by user_id
     ) both_sides group by user_id having sum(balance) <> sum(ledger) order by user_id`,
    [...values, ...values],
  );
  const differences: Difference[] = [];
  for (const { userId, hasBalance, balance, ledger, entryCount } of rows) {
    differences.push({
      ...{ kind: "balance", user_id: userId },
      balance: Number(hasBalance) === 1 ? BigInt(balance) : null,
      ledger: BigInt(ledger),
      entry_count: Number(entryCount),
      entries: await findShown(connection, "user_id = ? order by created_at desc, id desc limit ?", [
        userId,
        MAX_SHOWN,
      ]),
    });
  }
  return differences;
}

function findShown(connection: Connection, where: string, values: unknown[]): Promise<ShownEntry[]> {
  return connection.select<ShownEntry>(
    `select id transaction_id, user_id, point_amount, idempotency_key, created_at
     from point_transactions where ${where}`,
    values,
  );
}

/**
 * Every reservation that is DONE against its ledger entry.
 *
 * @param options.since only the reservations that were changed since then
 */
export function checkReservations(
  database: Database,
  { after, since }: { after: string; since: Date | undefined },
): Promise<Checked<string>> {
  return onPage(database, async (connection) => {
    const limit = since ? WALK_PAGE : PAGE;
    const [page] = await connection.select<{ last: string | null; walked: number; count: number }>(
      `select max(id) last, count(*) walked, cast(coalesce(sum(updated_at >= ?), 0) as signed) count
       from (select id, updated_at from point_reservations where id > ? order by id limit ?) page`,
      [since ?? new Date(0), after, limit],
    );
    if (!page?.last) return { next: undefined, count: 0, differences: [] };
    const next = page.walked < limit ? undefined : page.last;
    // Nothing of most pages has changed.
    if (page.count === 0) return { next, count: 0, differences: [] };
    const where = "r.id > ? and r.id <= ? and r.updated_at >= ?";
    const differences = await findUngranted(connection, where, [after, page.last, since ?? new Date(0)]);
    if (since) {
      // What was DONE once: its entry may be too old for checkRecentEntries().
      differences.push(
        ...(await findStray(connection, {
          from: `point_reservations r force index (primary)
            join point_transactions t on t.idempotency_key = r.idempotency_key`,
          where,
          values: [after, page.last, since],
        })),
      );
    }
    return { next, count: page.count, differences };
  });
}

/** Reservations that are DONE and have not the one entry of their user and amount. */
async function findUngranted(
  connection: Connection,
  where: string,
  values: unknown[],
): Promise<Difference[]> {
  type Row = { id: string; userId: string; pointAmount: number; idempotencyKey: string };
  const rows = await connection.select<Row>(
    `select r.id, r.user_id userId, r.point_amount pointAmount, r.idempotency_key idempotencyKey
     from point_reservations r
     left join point_transactions t on t.idempotency_key = r.idempotency_key
     where ${where} and r.status = 'DONE'
     group by r.id
     having count(t.id) <> 1 or sum(t.user_id = r.user_id and t.point_amount = r.point_amount) <> 1`,
    values,
  );
  const differences: Difference[] = [];
  for (const { id, userId, pointAmount, idempotencyKey } of rows) {
    differences.push({
      ...{ kind: "reservation", reservation_id: id, user_id: userId, point_amount: pointAmount },
      idempotency_key: idempotencyKey,
      entries: await findShown(connection, "idempotency_key = ? limit ?", [idempotencyKey, MAX_SHOWN]),
    });
  }
  return differences;
}

/** Every ledger entry that a reservation made, against a reservation that is DONE. */
export function checkEntries(database: Database, { after }: { after: string }): Promise<Checked<string>> {
  return onPage(database, async (connection) => {
    const [page] = await connection.select<{ last: string | null; count: number }>(
      `select max(id) last, count(*) count
       from (select id from point_transactions where id > ? order by id limit ?) page`,
      [after, PAGE],
    );
    if (!page?.last) return { next: undefined, count: 0, differences: [] };
    const differences = await findStray(connection, {
      ...{ from: FROM_ENTRIES, where: "t.id > ? and t.id <= ?", values: [after, page.last] },
    });
    return { next: page.count < PAGE ? undefined : page.last, count: page.count, differences };
  });
}

/** Where a walk over the newest ledger entries stands. */
export interface RecentPosition {
  aggregatedIn: number;
  createdAt: Date;
  id: string;
}

/**
 * The ledger entries since a time with their reservations, and the balances of their users where these were not changed since
 * then, or are not there: `checkBalances()` does not come by them.
 */
export function checkRecentEntries(
  database: Database,
  { after, since }: { after: RecentPosition; since: Date },
): Promise<Checked<RecentPosition>> {
  return onPage(database, async (connection) => {
    const { aggregatedIn, createdAt, id } = after;
    const page = await connection.select<{ id: string; createdAt: Date; idempotencyKey: string }>(
      `select id, created_at createdAt, idempotency_key idempotencyKey
       from point_transactions force index (point_transactions_aggregated)
       where aggregated_in = ? and created_at >= ? and (created_at > ? or id > ?)
       order by created_at, id limit ?`,
      [aggregatedIn, createdAt, createdAt, id, PAGE],
    );
    const differences: Difference[] = [];
    if (page.length > 0) {
      const ids = page.map((entry) => entry.id);
      const keys = page.map(({ idempotencyKey }) => idempotencyKey);
      const isOne = { from: FROM_ENTRIES, where: "t.id in (?)", values: [ids] };
      differences.push(...(await findStray(connection, isOne)));
      differences.push(...(await findUngranted(connection, "r.idempotency_key in (?)", [keys])));
      const unmoved = await connection.select<{ userId: string }>(
        `select distinct t.user_id userId from point_transactions t left join point_root b on b.user_id = t.user_id
         where t.id in (?) and (b.user_id is null or b.updated_at < ?)`,
        [ids, since],
      );
      differences.push(
        ...(await findApartOf(
          connection,
          unmoved.map(({ userId }) => userId),
        )),
      );
    }
    const last = page.at(-1);
    if (last && page.length === PAGE) {
      return {
        next: { aggregatedIn, createdAt: last.createdAt, id: last.id },
        count: page.length,
        differences,
      };
    }
    const [other] = await connection.select<{ aggregatedIn: number | null }>(
      "select min(aggregated_in) aggregatedIn from point_transactions where aggregated_in > ?",
      [aggregatedIn],
    );
    const isThere = other?.aggregatedIn !== null && other?.aggregatedIn !== undefined;
    const next = isThere
      ? { aggregatedIn: other.aggregatedIn as number, createdAt: since, id: "" }
      : undefined;
    return { next, count: page.length, differences };
  });
}

const FROM_ENTRIES = `point_transactions t force index (primary)
  left join point_reservations r on r.idempotency_key = t.idempotency_key`;

/** Entries that look like grants, and came from no reservation that is DONE. */
async function findStray(
  connection: Connection,
  { from, where, values }: { from: string; where: string; values: unknown[] },
): Promise<Difference[]> {
  type Row = ShownEntry & { reservation_id: string | null; reservation_status: ReservationStatus | null };
  const rows = await connection.select<Row>(
    `select t.id transaction_id, t.user_id, t.point_amount, t.idempotency_key, t.created_at,
       r.id reservation_id, r.status reservation_status
     from ${from}
     where ${where} and t.idempotency_key not like ? and (r.id is null or r.status <> 'DONE')`,
    [...values, `${DIRECT}%`],
  );
  return rows.map(({ reservation_id, reservation_status, ...entry }) => ({
    ...{ kind: "entry", reservation_id, reservation_status },
    entries: [entry],
  }));
}

/** The first day at or after one that has totals of a generation, or entries that they count; nulls after the last. */
export async function findDay(
  database: Database,
  { generation, from, day, since }: { generation: number; from: Date; day: string; since: Date | undefined },
): Promise<{ day: string | null; createdAt: Date | null }> {
  const [row] = await onPage(database, ({ select }) =>
    select<{ day: string | null; createdAt: Date | null }>(
      `select
         (select date_format(min(t.day), '%Y-%m-%d') from point_daily_totals t
           where t.generation = ? and t.day >= ? and t.updated_at >= ?) day,
         (select min(t.created_at) from point_transactions t
           where t.aggregated_in = ? and t.created_at >= ?) createdAt`,
      [generation, day, since ?? new Date(0), generation, from],
    ),
  );
  return { day: row?.day ?? null, createdAt: row?.createdAt ?? null };
}

/** The totals of a day against the entries that they count; nothing where the generation does not count any more. */
export async function checkDay(
  database: Database,
  day: string,
  { generation, timeZone }: { generation: number; timeZone: string },
): Promise<Difference[]> {
  const { from, until } = boundsOf(day, timeZone);
  type Row = { side: "total" | "ledger"; of: EntryKind; campaign: string } & Record<
    keyof ShownTotal,
    string | number
  >;
  const rows = await onPage(database, ({ select }) =>
    select<Row>(
      `select 'total' side, t.kind \`of\`, t.campaign, t.entries, t.points, t.users, t.late_ms_sum, t.late_ms_max
       from point_aggregation a join point_daily_totals t on t.generation = a.generation
       where a.id = 1 and a.generation = ? and t.day = ?
       union all
       select 'ledger', kind, campaign, count(*), sum(point_amount), count(distinct user_id), sum(late_ms),
         greatest(0, max(late_ms))
       from (
         select t.user_id, t.point_amount, coalesce(r.campaign, '') campaign,
           if(t.idempotency_key like ?, if(t.point_amount < 0, 'sub', 'add'), 'grant') kind,
           coalesce(timestampdiff(microsecond, r.execute_at, t.created_at) div 1000, 0) late_ms
         from point_aggregation a
         join point_transactions t force index (point_transactions_aggregated) on t.aggregated_in = a.generation
         left join point_reservations r on r.idempotency_key = t.idempotency_key
         where a.id = 1 and a.generation = ? and t.created_at >= ? and t.created_at < ?
       ) entries group by kind, campaign`,
      [generation, day, `${DIRECT}%`, generation, from, until],
    ),
  );
  const pairs = new Map<string, { total?: Row; ledger?: Row }>();
  for (const row of rows) {
    const name = `${row.of} ${row.campaign}`;
    pairs.set(name, { ...pairs.get(name), [row.side]: row });
  }
  return [...pairs.values()].flatMap(({ total, ledger }): Difference[] => {
    const one = total ?? ledger;
    const [kept, right] = [total && shownOf(total), ledger && shownOf(ledger)];
    const isRight = kept && right && TOTAL_FIELDS.every((field) => kept[field] === right[field]);
    if (!one || isRight) return [];
    const names = { day, of: one.of, campaign: one.campaign || null };
    return [{ kind: "total", ...names, total: kept ?? null, ledger: right ?? null }];
  });
}

const TOTAL_FIELDS = ["entries", "points", "users", "late_ms_sum", "late_ms_max"] as const;

function shownOf(row: Record<keyof ShownTotal, string | number>): ShownTotal {
  return Object.fromEntries(
    TOTAL_FIELDS.map((field) => [field, BigInt(row[field])]),
  ) as unknown as ShownTotal;
}

/** Where a walk over what is open stands. */
export interface OpenPosition {
  scanAt: Date;
  id: string;
}

/** Reservations that are open minutes after their time. */
export function checkOverdue(
  database: Database,
  { after, leaseMs }: { after: OpenPosition; leaseMs: number },
): Promise<Checked<OpenPosition>> {
  return onPage(database, async ({ select }) => {
    type Row = Omit<Extract<Difference, { kind: "overdue" }>, "kind"> & { scanAt: Date };
    const rows = await select<Row>(
      `select id reservation_id, user_id, status, execute_at, attempts, last_error, scan_at scanAt
       from point_reservations force index (point_reservations_scan_at)
       where scan_at >= ? and (scan_at > ? or id > ?) and scan_at <= now(3) + interval ? microsecond
         and greatest(execute_at, created_at) <= now(3) - interval ? microsecond
         -- not what was FAILED, and somebody has just told to try again
         and not (attempts = 0 and last_error is not null and status = 'PROCESSING')
         and not (attempts = 0 and status = 'PENDING' and scan_at > now(3) - interval ? microsecond)
       order by scan_at, id limit ?`,
      [
        after.scanAt,
        after.scanAt,
        after.id,
        (leaseMs + RETRY_MS) * 1_000,
        OVERDUE_MS * 1_000,
        OVERDUE_MS * 1_000,
        PAGE,
      ],
    );
    const last = rows.at(-1);
    return {
      next: last && rows.length === PAGE ? { scanAt: last.scanAt, id: last.reservation_id } : undefined,
      count: rows.length,
      differences: rows.map(({ scanAt: _, ...row }) => ({ kind: "overdue", ...row })),
    };
  });
}

/** What a repair has changed. */
export interface Repair {
  /** Null where there was no balance. */
  before: bigint | null;
  after: bigint;
}

/**
 * Sets a user's balance to the sum of the ledger entries, never the other way, and writes down that it did: one transaction.
 *
 * @param options.repairedBy who answers for it
 * @returns undefined where the two agree by now
 * @throws {DatabaseError} where the sum is none that a balance can hold
 */
export function repairBalance(
  database: Database,
  userId: string,
  { repairedBy }: { repairedBy: string },
): Promise<Repair | undefined> {
  return database.transaction(
    async ({ select, execute }) => {
      const { affectedRows } = await execute(
        "insert into point_root (user_id, point_num) values (?, 0) on duplicate key update user_id = values(user_id)",
        [userId],
      );
      // Who adds a ledger entry changes the balance before it commits: while we hold that, the sum stands still.
      const [balance] = await select<{ points: string | number }>(
        "select point_num points from point_root where user_id = ? for update",
        [userId],
      );
      const [ledger] = await select<{ points: string }>(
        "select coalesce(sum(point_amount), 0) points from point_transactions where user_id = ?",
        [userId],
      );
      const before = affectedRows === 1 ? null : BigInt(balance?.points ?? 0);
      const after = BigInt(ledger?.points ?? 0);
      if (before === after) return undefined;
      await execute("update point_root set point_num = ? where user_id = ?", [String(after), userId]);
      await execute(
        `insert into point_repairs (id, user_id, point_num_before, point_num_after, repaired_by)
         values (?, ?, ?, ?, concat(?, ', MySQL user ', current_user()))`,
        [uuidv7(), userId, before === null ? null : String(before), String(after), repairedBy],
      );
      return { before, after };
    },
    { workMs: WORK_MS },
  );
}

/** What one run has checked and found. */
export interface Reconciliation {
  isFull: boolean;
  /** When it began, by MySQL's clock. */
  startedAt: Date;
  users: number;
  reservations: number;
  entries: number;
  days: number;
  differences: number;
}

/**
 * MySQL's clock, and when the last run began that found nothing amiss; null where there was none, or where a full run has found
 * something since that no full run has found mended: what it saw may be older than all that another one looks at.
 */
export async function findLastRuns(database: Database): Promise<{ now: Date; cleanAt: Date | null }> {
  const [row] = await database.run(({ select }) =>
    select<{ now: Date; cleanAt: Date | null }>(
      `select now(3) now, if(
         coalesce(max(if(is_full and differences > 0, started_at, null)), '1000-01-01')
           > coalesce(max(if(is_full and differences = 0, started_at, null)), '1000-01-01'),
         null, max(if(differences = 0, started_at, null))
       ) cleanAt from point_reconciliations`,
    ),
  );
  if (!row) throw new Error("A SELECT without a table gave no row");
  return row;
}

/** Writes down what a run has found, once it is through. */
export async function recordReconciliation(database: Database, found: Reconciliation): Promise<void> {
  const { isFull, startedAt, users, reservations, entries, days, differences } = found;
  await database.run(({ execute }) =>
    execute(
      `insert into point_reconciliations
         (id, started_at, is_full, users, reservations, entries, days, differences) values (?)`,
      [[uuidv7(), startedAt, isFull, users, reservations, entries, days, differences]],
    ),
  );
}

/** What a monitoring system asks for: how the last run ended, and when. */
export interface BooksState {
  /** What the last run found amiss; null before the first. */
  differences: number | null;
  reconciledAt: Date | null;
  aggregatedAt: Date | null;
}

export async function findBooksState(database: Database): Promise<BooksState> {
  const [row] = await database.run(({ select }) =>
    select<BooksState>(
      `select r.differences, r.finished_at reconciledAt, a.aggregated_at aggregatedAt
       from point_aggregation_turns a left join (
         select differences, finished_at from point_reconciliations order by finished_at desc, id desc limit 1
       ) r on true where a.id = 1`,
    ),
  );
  return row ?? { differences: null, reconciledAt: null, aggregatedAt: null };
}

/** About how many rows there are to check, as far as MySQL knows without counting. */
export async function estimateRows(database: Database): Promise<number> {
  const [row] = await database.run(({ select }) =>
    select<{ count: number | null }>(
      `select cast(sum(table_rows) as signed) count from information_schema.tables
       where table_schema = database()
         and table_name in ('point_root', 'point_reservations', 'point_transactions')`,
    ),
  );
  return Number(row?.count ?? 0);
}
