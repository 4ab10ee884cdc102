import type { Database } from "../database.ts";

/** Sums that must agree, and counts that must be 0. Reservations and direct changes add up to the ledger, the ledger to the balances. */
export interface Sums {
  /** The points of all DONE reservations. */
  reservations: bigint;
  /** The points of all direct changes. */
  direct: bigint;
  ledger: bigint;
  balances: bigint;
  /** Users whose balance is not the sum of their ledger entries. */
  balanceMismatches: number;
  /** DONE reservations without a ledger entry, and other reservations with one. */
  reservationMismatches: number;
  /** Ledger entries older than their reservation's `execute_at`. */
  early: number;
  agree: boolean;
}

const COMPARE_SUMS = `/* compare_sums */ select
  (select coalesce(sum(point_amount), 0) from point_reservations where status = 'DONE') reservations,
  (select coalesce(sum(point_amount), 0) from point_transactions where kind <> 'grant') direct,
  (select coalesce(sum(point_amount), 0) from point_transactions) ledger,
  (select coalesce(sum(point_num), 0) from point_root) balances,
  (select count(*) from (
    select user_id from (
      select user_id, point_num from point_root
      union all
      select user_id, -point_amount from point_transactions
    ) signed group by user_id having sum(point_num) <> 0
  ) users) balanceMismatches,
  (select count(*) from point_reservations r
    left join point_transactions t on t.idempotency_key = r.idempotency_key and t.is_grant = 1
      and t.reservation_id = r.id and t.user_id = r.user_id and t.point_amount = r.point_amount
    where (r.status = 'DONE') <> (t.id is not null)) reservationMismatches,
  (select count(*) from point_transactions t join point_reservations r on r.id = t.reservation_id
    where t.created_at < r.execute_at) early`;

/**
 * Compares DONE reservations, ledger and balances in one snapshot. Reads the three tables completely.
 *
 * @param options.workMs the longest time for this, in milliseconds
 */
export async function compareSums(database: Database, options?: { workMs: number }): Promise<Sums> {
  type Row = Record<Exclude<keyof Sums, "agree">, string | number>;
  // One statement, hence one snapshot: a grant between two statements would look like a difference.
  const [row] = await database.run((connection) => connection.select<Row>(COMPARE_SUMS), options);
  if (!row) throw new Error("A SELECT without a table gave no row");
  const sums = {
    reservations: BigInt(row.reservations),
    direct: BigInt(row.direct),
    ledger: BigInt(row.ledger),
    balances: BigInt(row.balances),
    balanceMismatches: Number(row.balanceMismatches),
    reservationMismatches: Number(row.reservationMismatches),
    early: Number(row.early),
  };
  const { reservations, direct, ledger, balances, balanceMismatches, reservationMismatches, early } = sums;
  const agree =
    reservations + direct === ledger &&
    ledger === balances &&
    balanceMismatches + reservationMismatches + early === 0;
  return { ...sums, agree };
}
