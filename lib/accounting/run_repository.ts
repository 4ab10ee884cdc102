import { v7 as uuidv7 } from "uuid";
import type { Database } from "../database.ts";

/** What one reconciliation has checked and found. */
export interface Reconciliation {
  /** True: everything was checked; false: what has changed since the last clean run. */
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
 * MySQL's clock, and when the last clean run began. That is null before the first one, and while differences of a full run
 * are not known to be repaired by another full run: what it saw may be older than all that an incremental run looks at.
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

/** Records what a complete run has found. */
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

/** What a monitoring system asks for: when the last runs finished, and what the last reconciliation found. */
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

/** About how many rows a full reconciliation checks, as far as MySQL knows without counting. */
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
