import type { Connection, Database } from "../database.ts";
import { findBalanceMismatches } from "./balance_check.ts";
import { type CheckedPage, EARLIEST, PAGE, runPage } from "./check.ts";
import type { Difference } from "./difference.ts";
import { ENTRIES, findOrphanEntries, findReservationMismatches } from "./mismatch_queries.ts";

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

interface Entry {
  id: string;
  idempotencyKey: string;
}

/** Compares grants with their reservations, in both directions. */
async function compareEntries(connection: Connection, entries: readonly Entry[]): Promise<Difference[]> {
  const ids = entries.map(({ id }) => id);
  const keys = entries.map(({ idempotencyKey }) => idempotencyKey);
  return [
    ...(await findOrphanEntries(connection, { from: ENTRIES, where: "t.id in (?)", values: [ids] })),
    ...(await findReservationMismatches(connection, { where: "r.idempotency_key in (?)", values: [keys] })),
  ];
}

/** A position in a walk over the ledger entries that no total counts. */
export interface UncountedPosition {
  aggregatedIn: number;
  createdAt: Date;
  id: string;
}

/** Before all uncounted entries. */
export const FIRST_UNCOUNTED: UncountedPosition = { aggregatedIn: 0, createdAt: EARLIEST, id: "" };

/**
 * Compares a page of the ledger entries that no total counts yet with their reservations. Also compares the balances of their
 * users that are equal to the sum of the counted entries: `checkBalances()` skips those.
 */
export function checkUncounted(
  database: Database,
  { after }: { after: UncountedPosition },
): Promise<CheckedPage<UncountedPosition>> {
  return runPage(database, async (connection) => {
    const { aggregatedIn, createdAt, id } = after;
    const page = await connection.select<Entry & { createdAt: Date }>(
      `/* page_of_uncounted_entries */ select t.id, t.created_at createdAt, t.idempotency_key idempotencyKey
       from point_aggregation a join point_transactions t force index (point_transactions_aggregated)
       where a.id = 1 and a.generation > ? and t.aggregated_in = ?
         and t.created_at >= ? and (t.created_at > ? or t.id > ?)
       order by t.created_at, t.id limit ?`,
      [aggregatedIn, aggregatedIn, createdAt, createdAt, id, PAGE],
    );
    const differences = page.length > 0 ? await compareEntries(connection, page) : [];
    if (page.length > 0) {
      const unmoved = await findUnmovedBalances(connection, page);
      differences.push(...(await findBalanceMismatches(connection, unmoved)));
    }
    const last = page.at(-1);
    const next =
      last && page.length === PAGE
        ? { aggregatedIn, createdAt: last.createdAt, id: last.id }
        : await findNextUncounted(connection, aggregatedIn);
    return { next, count: page.length, differences };
  });
}

/** The users of some entries whose balance is equal to the sum of the counted entries. */
async function findUnmovedBalances({ select }: Connection, entries: readonly Entry[]): Promise<string[]> {
  const rows = await select<{ userId: string }>(
    `/* find_unmoved_balances */ select distinct t.user_id userId
     from point_transactions t force index (primary)
     left join point_root b on b.user_id = t.user_id
     left join point_user_totals s on s.user_id = t.user_id
       and s.generation = (select generation from point_aggregation where id = 1)
     where t.id in (?) and coalesce(b.point_num, 0) = coalesce(s.points, 0)`,
    [entries.map(({ id }) => id)],
  );
  return rows.map(({ userId }) => userId);
}

/** The start of the entries of the next voided generation of totals; undefined after the last one. */
async function findNextUncounted(
  { select }: Connection,
  aggregatedIn: number,
): Promise<UncountedPosition | undefined> {
  const [next] = await select<{ aggregatedIn: number | null }>(
    `/* find_next_uncounted */ select min(aggregated_in) aggregatedIn from point_transactions
     where aggregated_in > ? and aggregated_in < (select generation from point_aggregation where id = 1)`,
    [aggregatedIn],
  );
  const found = next?.aggregatedIn ?? undefined;
  return found === undefined ? undefined : { ...FIRST_UNCOUNTED, aggregatedIn: found };
}

/** Compares a page of the entries that did not fit when they were counted, and forgets those that do. */
export function checkSuspects(
  database: Database,
  { after }: { after: string },
): Promise<CheckedPage<string>> {
  return runPage(database, async (connection) => {
    const page = await connection.select<{ suspect: string; idempotencyKey: string | null }>(
      `/* page_of_suspects */ select s.transaction_id suspect, t.idempotency_key idempotencyKey
       from point_suspects s left join point_transactions t on t.id = s.transaction_id
       where s.transaction_id > ? order by s.transaction_id limit ?`,
      [after, PAGE],
    );
    if (page.length === 0) return { next: undefined, count: 0, differences: [] };
    const entries = page.flatMap(({ suspect: id, idempotencyKey }) =>
      idempotencyKey === null ? [] : [{ id, idempotencyKey }],
    );
    const differences = entries.length > 0 ? await compareEntries(connection, entries) : [];
    const wrong = new Set(differences.flatMap(namesOf));
    const right = page.filter(
      ({ suspect, idempotencyKey }) => !wrong.has(suspect) && !wrong.has(idempotencyKey ?? ""),
    );
    if (right.length > 0) {
      await connection.execute(
        `/* forget_suspects */ delete from point_suspects where transaction_id in (?)`,
        [right.map(({ suspect }) => suspect)],
      );
    }
    const last = page.at(-1);
    return { next: page.length === PAGE ? last?.suspect : undefined, count: entries.length, differences };
  });
}

/** The entries' ids and the keys that are wrong. */
function namesOf(difference: Difference): string[] {
  if (difference.kind === "entry") return [difference.entries[0].transaction_id];
  return difference.kind === "reservation" ? [difference.idempotency_key] : [];
}
