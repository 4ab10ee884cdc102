import type { Database } from "../database.ts";
import { checkBalances } from "./balance_check.ts";
import { type CheckedPage, EARLIEST } from "./check.ts";
import type { Difference } from "./difference.ts";
import { checkEntries, checkSuspects, checkUncounted, FIRST_UNCOUNTED } from "./ledger_check.ts";
import { checkOverdue, findOpenFrom } from "./overdue_check.ts";
import { checkReservations } from "./reservation_check.ts";
import { findNextRun, type Reconciliation, recordReconciliation } from "./run_repository.ts";
import { checkDay, findDays } from "./total_check.ts";

const FIRST = "";

export interface ReconcileOptions {
  /** Checks everything, not only what differs from the sums of the counted entries. */
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
  { isFull: asksForFull = false, leaseMs, signal, onDifference, onPage }: ReconcileOptions,
): Promise<Reconciliation> {
  const { now: startedAt, mustBeFull } = await findNextRun(database);
  const isFull = asksForFull || mustBeFull;
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

  const users = await walk(FIRST, (after) => checkBalances(database, { after, isFull }));
  const reservations = await walk(FIRST, (after) => checkReservations(database, { after, isFull, leaseMs }));
  let entries = isFull
    ? await walk(FIRST, (after) => checkEntries(database, { after }))
    : await walk(FIRST_UNCOUNTED, (after) => checkUncounted(database, { after }));
  // After the uncounted entries: one that is counted meanwhile, and does not fit, is here.
  const suspects = await walk(FIRST, (after) => checkSuspects(database, { after }));
  if (!isFull) entries += suspects;
  let days = 0;
  for await (const day of findDays(database, { isFull })) {
    if (signal?.aborted) break;
    days++;
    await report(await checkDay(database, day), 1);
  }
  const openFrom = isFull ? null : await findOpenFrom(database);
  await walk({ scanAt: openFrom ?? EARLIEST, id: FIRST }, (after) =>
    checkOverdue(database, { after, leaseMs }),
  );
  const found = { isFull, startedAt, users, reservations, entries, days, differences };
  if (!signal?.aborted) await recordReconciliation(database, found);
  return found;
}

/** The id of a difference, if more than one page may find it. */
function idOf(difference: Difference): string | undefined {
  const { kind } = difference;
  if (kind === "balance") return `${kind} ${difference.user_id}`;
  if (kind === "entry") return `${kind} ${difference.entries[0].transaction_id}`;
  return kind === "total" ? undefined : `${kind} ${difference.reservation_id}`;
}
