import type { Connection, Database } from "../database.ts";
import type { ReservationStatus } from "../schema.ts";
import { findBalanceMismatches } from "./balance_check.ts";
import { type CheckedPage, findShownEntries, PAGE, runPage, SHOWN_COLUMNS, WALK_PAGE } from "./check.ts";
import type { Difference, OrphanEntry, ReservationMismatch, ShownEntry } from "./difference.ts";

// Every DONE reservation has exactly one ledger entry, and every grant in the ledger has a DONE reservation. An incorrect grant
// may have the wrong reservation id or the wrong key, so both are compared.

/**
 * Compares each DONE reservation of a page with its ledger entry.
 *
 * @param options.since checks only reservations that have changed since this time
 */
export function checkReservations(
  database: Database,
  { after, since }: { after: string; since: Date | undefined },
): Promise<CheckedPage<string>> {
  return runPage(database, async (connection) => {
    const limit = since ? WALK_PAGE : PAGE;
    const [page] = await connection.select<{ last: string | null; walked: number; count: number }>(
      `/* page_of_reservations */ select max(id) last, count(*) walked,
         cast(coalesce(sum(updated_at >= ?), 0) as signed) count
       from (select id, updated_at from point_reservations where id > ? order by id limit ?) page`,
      [since ?? new Date(0), after, limit],
    );
    if (!page?.last) return { next: undefined, count: 0, differences: [] };
    const next = page.walked < limit ? undefined : page.last;
    // Most pages have no changes.
    if (page.count === 0) return { next, count: 0, differences: [] };
    const where = "r.id > ? and r.id <= ? and r.updated_at >= ?";
    const values = [after, page.last, since ?? new Date(0)];
    const differences: Difference[] = await findReservationMismatches(connection, where, values);
    if (since) {
      // If a reservation is no longer DONE, its entry may be too old for checkRecentEntries().
      const from = `point_reservations r force index (primary)
        join point_transactions t on t.idempotency_key = r.idempotency_key and t.is_grant = 1`;
      differences.push(...(await findOrphanEntries(connection, { from, where, values })));
    }
    return { next, count: page.count, differences };
  });
}

/** The DONE reservations that do not have exactly one grant of their id, key, user and amount. */
async function findReservationMismatches(
  connection: Connection,
  where: string,
  values: unknown[],
): Promise<ReservationMismatch[]> {
  type Row = { id: string; userId: string; pointAmount: number; idempotencyKey: string };
  const rows = await connection.select<Row>(
    `/* find_reservation_mismatches */ select r.id, r.user_id userId, r.point_amount pointAmount,
       r.idempotency_key idempotencyKey
     from point_reservations r
     left join point_transactions t on t.idempotency_key = r.idempotency_key and t.is_grant = 1
     where ${where} and r.status = 'DONE'
     group by r.id
     having count(t.id) <> 1
       or sum(t.user_id = r.user_id and t.point_amount = r.point_amount and t.reservation_id <=> r.id) <> 1`,
    values,
  );
  const found: ReservationMismatch[] = [];
  for (const { id, userId, pointAmount, idempotencyKey } of rows) {
    found.push({
      kind: "reservation",
      reservation_id: id,
      user_id: userId,
      point_amount: pointAmount,
      idempotency_key: idempotencyKey,
      entries: await findShownEntries(connection, "t.idempotency_key = ? and t.is_grant = 1", idempotencyKey),
    });
  }
  return found;
}

/** Compares each grant among a page of ledger entries with its reservation. */
export function checkEntries(database: Database, { after }: { after: string }): Promise<CheckedPage<string>> {
  return runPage(database, async (connection) => {
    const [page] = await connection.select<{ last: string | null; count: number }>(
      `/* page_of_entries */ select max(id) last, count(*) count
       from (select id from point_transactions where id > ? order by id limit ?) page`,
      [after, PAGE],
    );
    if (!page?.last) return { next: undefined, count: 0, differences: [] };
    const where = "t.id > ? and t.id <= ?";
    const values = [after, page.last];
    const differences = await findOrphanEntries(connection, { from: ENTRIES, where, values });
    return { next: page.count < PAGE ? undefined : page.last, count: page.count, differences };
  });
}

/** A position in a walk over the newest ledger entries. */
export interface RecentPosition {
  aggregatedIn: number;
  createdAt: Date;
  id: string;
}

/**
 * Compares a page of the ledger entries since a time with their reservations. Also compares the balances of their users that have
 * not changed since then, or do not exist: `checkBalances()` skips those.
 */
export function checkRecentEntries(
  database: Database,
  { after, since }: { after: RecentPosition; since: Date },
): Promise<CheckedPage<RecentPosition>> {
  return runPage(database, async (connection) => {
    const { aggregatedIn, createdAt, id } = after;
    const page = await connection.select<{ id: string; createdAt: Date; idempotencyKey: string }>(
      `/* page_of_recent_entries */ select id, created_at createdAt, idempotency_key idempotencyKey
       from point_transactions force index (point_transactions_aggregated)
       where aggregated_in = ? and created_at >= ? and (created_at > ? or id > ?)
       order by created_at, id limit ?`,
      [aggregatedIn, createdAt, createdAt, id, PAGE],
    );
    const differences = page.length > 0 ? await compareEntries(connection, page, since) : [];
    const last = page.at(-1);
    const next =
      last && page.length === PAGE
        ? { aggregatedIn, createdAt: last.createdAt, id: last.id }
        : await findNextGeneration(connection, { aggregatedIn, createdAt: since });
    return { next, count: page.length, differences };
  });
}

async function compareEntries(
  connection: Connection,
  page: readonly { id: string; idempotencyKey: string }[],
  since: Date,
): Promise<Difference[]> {
  const ids = page.map(({ id }) => id);
  const keys = page.map(({ idempotencyKey }) => idempotencyKey);
  const unmoved = await connection.select<{ userId: string }>(
    `/* find_unmoved_balances */ select distinct t.user_id userId
     from point_transactions t left join point_root b on b.user_id = t.user_id
     where t.id in (?) and (b.user_id is null or b.updated_at < ?)`,
    [ids, since],
  );
  return [
    ...(await findOrphanEntries(connection, { from: ENTRIES, where: "t.id in (?)", values: [ids] })),
    ...(await findReservationMismatches(connection, "r.idempotency_key in (?)", [keys])),
    ...(await findBalanceMismatches(
      connection,
      unmoved.map(({ userId }) => userId),
    )),
  ];
}

/** The start of the entries that the next generation of totals counts; undefined after the last one. */
async function findNextGeneration(
  { select }: Connection,
  { aggregatedIn, createdAt }: Omit<RecentPosition, "id">,
): Promise<RecentPosition | undefined> {
  const [next] = await select<{ aggregatedIn: number | null }>(
    `/* find_next_generation */ select min(aggregated_in) aggregatedIn from point_transactions
     where aggregated_in > ?`,
    [aggregatedIn],
  );
  const found = next?.aggregatedIn ?? undefined;
  return found === undefined ? undefined : { aggregatedIn: found, createdAt, id: "" };
}

const ENTRIES = "point_transactions t force index (primary)";

/** Grants that do not belong to a DONE reservation. */
async function findOrphanEntries(
  { select }: Connection,
  { from, where, values }: { from: string; where: string; values: unknown[] },
): Promise<OrphanEntry[]> {
  const rows = await select<ShownEntry & { reservation_status: ReservationStatus | null }>(
    `/* find_orphan_entries */ select ${SHOWN_COLUMNS}, named.status reservation_status
     from ${from} left join point_reservations named on named.id = t.reservation_id
     where ${where} and t.kind = 'grant'
       and (named.id is null or named.status <> 'DONE' or named.idempotency_key <> t.idempotency_key)`,
    values,
  );
  return rows.map(({ reservation_status, ...entry }) => ({
    kind: "entry",
    entries: [entry],
    reservation_id: entry.reservation_id,
    reservation_status,
  }));
}
