import type { Database } from "../database.ts";
import { DatabaseError } from "../database_errors.ts";

/** The result of one reconciliation. */
export interface Reconciliation {
  /** True: it checked everything; false: only what differed from the sums of the counted entries. */
  isFull: boolean;
  /** When it started, by MySQL's clock: for people. */
  startedAt: Date;
  users: number;
  reservations: number;
  entries: number;
  days: number;
  differences: number;
}

/**
 * The time by MySQL's clock, and whether the next run must be a full one: before the first full run, and after a full run with
 * differences until a full run is clean, since an incremental run may not see these differences.
 */
export async function findNextRun(database: Database): Promise<{ now: Date; mustBeFull: boolean }> {
  const [row] = await database.run(({ select }) =>
    select<{ now: Date; differences: number | null }>(
      `/* find_next_run */ select now(3) now, (
         select differences from point_reconciliations where is_full = 1 order by number desc limit 1
       ) differences`,
    ),
  );
  if (!row) throw new Error("A SELECT without a table gave no row");
  return { now: row.now, mustBeFull: row.differences === null || Number(row.differences) > 0 };
}

/** How often a number is tried that another run may take at the same time. */
const MAX_TRIES = 10;

/** Records the result of a complete run, under the next number. */
export async function recordReconciliation(database: Database, found: Reconciliation): Promise<void> {
  const { isFull, startedAt, users, reservations, entries, days, differences } = found;
  for (let attempt = 1; ; attempt++) {
    try {
      await database.run(({ execute }) =>
        execute(
          `/* record_reconciliation */ insert into point_reconciliations
             (number, started_at, is_full, users, reservations, entries, days, differences)
           select coalesce(max(number), 0) + 1, ?, ?, ?, ?, ?, ?, ? from point_reconciliations`,
          [startedAt, isFull, users, reservations, entries, days, differences],
        ),
      );
      return;
    } catch (error) {
      const mayPass = error instanceof DatabaseError && error.kind === "duplicate";
      if (!mayPass || attempt === MAX_TRIES) throw error;
    }
  }
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
         select differences, finished_at from point_reconciliations order by number desc limit 1
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
