import type { Database } from "../database.ts";
import { checkBalances } from "./balance_check.ts";
import type { CheckedPage } from "./check.ts";
import { boundsOf, dayOf, plusDays } from "./day.ts";
import type { Difference } from "./difference.ts";
import { checkEntries, checkRecentEntries, checkReservations } from "./ledger_check.ts";
import { checkOverdue } from "./overdue_check.ts";
import { findLastRuns, type Reconciliation, recordReconciliation } from "./run_repository.ts";
import { checkDay, findDay } from "./total_check.ts";
import { type Aggregation, findAggregation } from "./total_repository.ts";

/**
 * The next run checks changes from this time before the start of the last clean run, in milliseconds: a row has the time of its
 * statement and commits later, but no transaction that changes points takes a minute.
 */
const MARGIN_MS = 600_000;
/** The first moment that a DATETIME can hold. */
const EARLIEST = new Date("1000-01-01T00:00:00Z");
const FIRST = "";

export interface ReconcileOptions {
  /** Checks everything, not only what has changed since the last clean run. */
  isFull?: boolean;
  leaseMs: number;
  /** Stops after the current page; the run is not recorded then. */
  signal?: AbortSignal;
  /** Called with each difference when it is found. */
  onDifference?: (difference: Difference) => Promise<void> | void;
  /** Called after each page with the number of rows that it checked. */
  onPage?: (checked: number) => Promise<void> | void;
}

/**
 * Compares each balance with the user's ledger entries, each DONE reservation with its entry, each grant in the ledger with its
 * reservation, and each daily total with the entries that it counts; also finds overdue reservations. Each page is one
 * consistent read: a grant meanwhile is not a difference.
 *
 * @throws {DatabaseError}
 */
export async function reconcile(
  database: Database,
  { isFull = false, leaseMs, signal, onDifference, onPage }: ReconcileOptions,
): Promise<Reconciliation> {
  const { now: startedAt, cleanAt } = await findLastRuns(database);
  const since = isFull || !cleanAt ? undefined : new Date(cleanAt.getTime() - MARGIN_MS);
  const known = new Set<string>();
  let differences = 0;

  async function report(found: readonly Difference[], checked: number): Promise<void> {
    for (const difference of found) {
      const id = idOf(difference);
      if (id !== undefined && known.has(id)) continue;
      if (id !== undefined) known.add(id);
      differences++;
      await onDifference?.(difference);
    }
    await onPage?.(checked);
  }

  /** Checks page after page. @returns the number of rows that it checked */
  async function walk<Position>(
    first: Position,
    check: (after: Position) => Promise<CheckedPage<Position>>,
  ): Promise<number> {
    let sum = 0;
    for (let after: Position | undefined = first; after !== undefined && !signal?.aborted; ) {
      const page: CheckedPage<Position> = await check(after);
      sum += page.count;
      await report(page.differences, page.count);
      after = page.next;
    }
    return sum;
  }

  const users = await walk(FIRST, (after) => checkBalances(database, { after, since }));
  const reservations = await walk(FIRST, (after) => checkReservations(database, { after, since }));
  const entries = since
    ? await walk({ aggregatedIn: 0, createdAt: since, id: FIRST }, (after) =>
        checkRecentEntries(database, { after, since }),
      )
    : await walk(FIRST, (after) => checkEntries(database, { after }));
  let days = 0;
  for await (const { day, aggregation } of daysOf(database, since)) {
    if (signal?.aborted) break;
    days++;
    await report(await checkDay(database, day, aggregation), 1);
  }
  await walk({ scanAt: EARLIEST, id: FIRST }, (after) => checkOverdue(database, { after, leaseMs }));
  const found = { isFull: !since, startedAt, users, reservations, entries, days, differences };
  if (!signal?.aborted) await recordReconciliation(database, found);
  return found;
}

/** The id of a difference, if more than one page may find it. */
function idOf(difference: Difference): string | undefined {
  if (difference.kind === "balance") return difference.user_id;
  if (difference.kind === "reservation") return difference.reservation_id;
  return difference.kind === "entry" ? difference.entries[0].transaction_id : undefined;
}

/** The days that have totals, or entries that totals count, in ascending order. */
async function* daysOf(
  database: Database,
  since: Date | undefined,
): AsyncGenerator<{ day: string; aggregation: Aggregation }> {
  const aggregation = await findAggregation(database);
  const { generation, timeZone } = aggregation;
  if (timeZone === "") return;
  let from = since ?? EARLIEST;
  let nextDay = EARLIEST.toISOString().slice(0, 10);
  for (;;) {
    const found = await findDay(database, { generation, from, day: nextDay, since });
    const candidates = [found.day, found.createdAt && dayOf(found.createdAt, timeZone)];
    const [day] = candidates.filter((candidate) => candidate !== null).toSorted();
    if (day === undefined) return;
    yield { day, aggregation };
    nextDay = plusDays(day, 1);
    const { until } = boundsOf(day, timeZone);
    if (until > from) from = until;
  }
}
