import { v7 as uuidv7 } from "uuid";
import type { Database } from "../database.ts";

/** The result of one reconciliation. */
export interface Reconciliation {
  /** True: it checked everything; false: only what had changed since the last clean run. */
  isFull: boolean;
  /** When it started, by MySQL's clock. */
  startedAt: Date;
  users: number;
  reservations: number;
  entries: number;
  days: number;
  differences: number;
}

/**
 * The time by MySQL's clock, and when the last clean run started. `cleanAt` is null before the first clean run, and after a full run
 * with differences until a full run is clean: the differences may be older than all rows that an incremental run checks.
 */
export async function findLastRuns(database: Database): Promise<{ now: Date; cleanAt: Date | null }> {
  const [row] = await database.run(({ select }) =>
    select<{ now: Date; cleanAt: Date | null }>(
      `/* find_last_runs */ select now(3) now, if(
         coalesce(max(if(is_full and differences > 0, started_at, null)), '1000-01-01')
           > coalesce(max(if(is_full and differences = 0, started_at, null)), '1000-01-01'),
         null, max(if(differences = 0, started_at, null))
       ) cleanAt from point_reconciliations`,
    ),
  );
  if (!row) throw new Error("A SELECT of aggregates gave no row");
  return row;
}

/** Records the result of a complete run. */
export async function recordReconciliation(database: Database, found: Reconciliation): Promise<void> {
  const { isFull, startedAt, users, reservations, entries, days, differences } = found;
  await database.run(({ execute }) =>
    execute(
      `/* record_reconciliation */ insert into point_reconciliations
         (id, started_at, is_full, users, reservations, entries, days, differences) values (?)`,
      [[uuidv7(), startedAt, isFull, users, reservations, entries, days, differences]],
    ),
  );
}

/** The figures for a monitoring system: when the last runs finished, and how many differences the last reconciliation found. */
export interface AccountingState {
  /** Null before the first reconciliation. */
  differences: number | null;
  reconciledAt: Date | null;
  aggregatedAt: Date | null;
}

/** The state of the accounting. */
export async function findAccountingState(database: Database): Promise<AccountingState> {
  const [row] = await database.run(({ select }) =>
    select<AccountingState>(
      `/* find_accounting_state */
       select r.differences, r.finished_at reconciledAt, a.aggregated_at aggregatedAt
       from point_aggregation_turns a left join (
         select differences, finished_at from point_reconciliations order by finished_at desc, id desc limit 1
       ) r on true where a.id = 1`,
    ),
  );
  return row ?? { differences: null, reconciledAt: null, aggregatedAt: null };
}

/** Estimates how many rows a full reconciliation checks, from MySQL's statistics. */
export async function estimateRows(database: Database): Promise<number> {
  const [row] = await database.run(({ select }) =>
    select<{ count: number | null }>(
      `/* estimate_rows */ select cast(sum(table_rows) as signed) count from information_schema.tables
       where table_schema = database()
         and table_name in ('point_root', 'point_reservations', 'point_transactions')`,
    ),
  );
  return Number(row?.count ?? 0);
}
