import type { Database } from "../database.ts";
import { countEntries } from "./count_repository.ts";
import { chooseTimeZone, deleteOldGenerations, noteAggregated, retryLocked } from "./total_repository.ts";

/** The number of ledger entries that one transaction counts. It locks their totals for about 0.2 s. */
const PAGE = 5_000;

export interface AggregateOptions {
  /** The time zone of the days. */
  timeZone: string;
  /** Stops after the current page. */
  signal?: AbortSignal;
  /** Called after each page with the number of entries that it counted. */
  onPage?: (counted: number) => Promise<void> | void;
}

/**
 * Adds every ledger entry that no total counts yet to the totals of its day, page by page. The next call counts the entries that
 * one call leaves.
 *
 * @returns the number of entries that it counted
 * @throws {DomainError} TIME_ZONE if the totals are by days of another time zone
 * @throws {DatabaseError}
 */
export async function aggregate(
  database: Database,
  { timeZone, signal, onPage }: AggregateOptions,
): Promise<number> {
  await chooseTimeZone(database, timeZone);
  let sum = 0;
  // Until a page is not full, not until one is empty: while points are granted, there are always new entries.
  for (let counted = PAGE; counted === PAGE && !signal?.aborted; ) {
    counted = await retryLocked(() => countEntries(database, { timeZone, limit: PAGE }), signal);
    sum += counted;
    await onPage?.(counted);
  }
  if (!signal?.aborted) await noteAggregated(database);
  await deleteOldGenerations(database);
  return sum;
}
