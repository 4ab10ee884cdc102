import type { Connection, Database } from "../database.ts";
import type { Difference, ShownEntry } from "./difference.ts";

// The checks compare a page at a time. One statement, hence one snapshot, compares a page: a grant is in everything that it
// reads, or in nothing of it.

/** Balances, reservations or ledger entries of one page. */
export const PAGE = 2_000;
/** Rows of one page if only those that have changed are checked. */
export const WALK_PAGE = 20_000;
/** How long one page may take, in milliseconds: a day with millions of entries is one page. */
const WORK_MS = 600_000;
/** The most ledger entries that a difference shows. */
const MAX_SHOWN = 10;

/** What the check of one page gives. */
export interface CheckedPage<Position> {
  /** Where the next page begins; undefined after the last one. */
  next: Position | undefined;
  /** The number of rows that were checked. */
  count: number;
  differences: Difference[];
}

/** Runs the statements of one page. */
export function runPage<T>(database: Database, work: (connection: Connection) => Promise<T>): Promise<T> {
  return database.run(work, { workMs: WORK_MS });
}

/** The columns of an entry `t`, as a difference shows it. */
export const SHOWN_COLUMNS =
  "t.id transaction_id, t.user_id, t.point_amount, t.idempotency_key, t.kind, t.reservation_id, t.created_at";

/** The first ten entries `t` of a condition with one value, which may end with `order by`. */
export function findShownEntries(
  { select }: Connection,
  condition: string,
  value: string,
): Promise<ShownEntry[]> {
  return select<ShownEntry>(
    `/* find_shown_entries */ select ${SHOWN_COLUMNS} from point_transactions t where ${condition} limit ?`,
    [value, MAX_SHOWN],
  );
}
