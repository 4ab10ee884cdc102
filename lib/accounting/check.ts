import type { Connection, Database } from "../database.ts";
import type { Difference, ShownEntry } from "./difference.ts";

// The checks compare one page at a time. One statement, hence one snapshot, compares a page: it sees a grant completely or not
// at all.

/** The number of balances, reservations or ledger entries in one page. */
export const PAGE = 2_000;
/** The number of rows in one page if only sums are compared. */
export const WALK_PAGE = 20_000;
/** The first moment that a DATETIME can hold. */
export const EARLIEST = new Date("1000-01-01T00:00:00Z");
/** Sorts after every id of a user or a reservation. */
export const AFTER_ALL = "~";
/** The longest time for one page, in milliseconds: a day with millions of entries is one page. */
const WORK_MS = 600_000;
/** The maximum number of ledger entries that a difference shows. */
const MAX_SHOWN = 10;

/** The result of checking one page. */
export interface CheckedPage<Position> {
  /** The start of the next page; undefined after the last one. */
  next: Position | undefined;
  /** The number of rows that were checked. */
  count: number;
  differences: Difference[];
}

/** Runs the statements of one page. */
export function runPage<T>(database: Database, work: (connection: Connection) => Promise<T>): Promise<T> {
  return database.run(work, { workMs: WORK_MS });
}

/** The columns of a ledger entry `t` that a difference shows. */
export const SHOWN_COLUMNS =
  "t.id transaction_id, t.user_id, t.point_amount, t.idempotency_key, t.kind, t.reservation_id, t.created_at";

/** The first ten ledger entries `t` that match a condition with one value; it may end with `order by`. */
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
