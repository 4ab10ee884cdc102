import { hostname, userInfo } from "node:os";
import { parseArgs } from "node:util";
import {
  type Checked,
  checkBalances,
  checkDay,
  checkEntries,
  checkOverdue,
  checkRecentEntries,
  checkReservations,
  type Difference,
  estimateRows,
  findDay,
  findLastRuns,
  OVERDUE_MS,
  type Reconciliation,
  recordReconciliation,
  repairBalance,
  type ShownEntry,
  type ShownTotal,
} from "./book_repository.ts";
import { readConfig, type Settings } from "./config.ts";
import { type Database, DatabaseError, openDatabase } from "./database.ts";
import { boundsOf, dayOf, plusDays } from "./day.ts";
import { digitsOf } from "./point.ts";
import { openProgress, runCommand } from "./terminal.ts";
import { type Aggregation, findAggregation } from "./total_repository.ts";

/**
 * How far before the last clean run's beginning the next one looks, in milliseconds: a row bears the time of its statement,
 * and commits later; no transaction that grants or changes points lives for a minute.
 */
const MARGIN_MS = 600_000;
/** The first moment that a DATETIME can hold. */
const EARLIEST = new Date("1000-01-01T00:00:00Z");
const FIRST = "";

export interface ReconcileOptions {
  /** Everything, and not only what was changed since the last run that found nothing amiss. */
  isFull?: boolean;
  leaseMs: number;
  /** Ends it after the page under way; it is not written down then. */
  signal?: AbortSignal;
  /** Called with each difference as it is found. */
  onDifference?: (difference: Difference) => Promise<void> | void;
  /** Called after each page with the number of rows that it has checked. */
  onPage?: (checked: number) => Promise<void> | void;
}

/**
 * Compares what must agree: each balance with its ledger entries, each reservation that is DONE with its one entry and each entry
 * with its reservation, each daily total with the entries that it counts; and looks for reservations that are overdue. In pages,
 * each one consistent read: what is granted meanwhile is no difference.
 *
 * @throws {DatabaseError}
 */
export async function reconcile(
  database: Database,
  { isFull = false, leaseMs, signal, onDifference, onPage }: ReconcileOptions,
): Promise<Reconciliation> {
  const { now: startedAt, cleanAt } = await findLastRuns(database);
  const since = isFull || !cleanAt ? undefined : new Date(cleanAt.getTime() - MARGIN_MS);
  const found: Reconciliation = {
    ...{ isFull: since === undefined, startedAt },
    ...{ users: 0, reservations: 0, entries: 0, days: 0, differences: 0 },
  };

  /** Balances, reservations and entries that are known to be wrong: more than one page may come by them. */
  const wrong = new Set<string>();

  function isNew(difference: Difference): boolean {
    const before = wrong.size;
    if (difference.kind === "balance") wrong.add(difference.user_id);
    else if (difference.kind === "reservation") wrong.add(difference.reservation_id);
    else if (difference.kind === "entry") wrong.add(difference.entries[0].transaction_id);
    else return true;
    return wrong.size > before;
  }

  async function take(differences: readonly Difference[], checked: number): Promise<void> {
    for (const difference of differences.filter(isNew)) {
      found.differences++;
      await onDifference?.(difference);
    }
    await onPage?.(checked);
  }

  /** Checks page after page, and counts what it has checked. */
  async function walk<Position>(
    first: Position,
    check: (after: Position) => Promise<Checked<Position>>,
  ): Promise<number> {
    let sum = 0;
    for (let after: Position | undefined = first; after !== undefined && !signal?.aborted; ) {
      const page: Checked<Position> = await check(after);
      sum += page.count;
      await take(page.differences, page.count);
      after = page.next;
    }
    return sum;
  }

  found.users = await walk(FIRST, (after) => checkBalances(database, { after, since }));
  found.reservations = await walk(FIRST, (after) => checkReservations(database, { after, since }));
  found.entries = since
    ? await walk({ aggregatedIn: 0, createdAt: since, id: FIRST }, (after) =>
        checkRecentEntries(database, { after, since }),
      )
    : await walk(FIRST, (after) => checkEntries(database, { after }));
  for await (const day of daysOf(database, since)) {
    if (signal?.aborted) break;
    found.days++;
    await take(await checkDay(database, day.name, day), 1);
  }
  await walk({ scanAt: EARLIEST, id: FIRST }, (after) => checkOverdue(database, { after, leaseMs }));
  if (!signal?.aborted) await recordReconciliation(database, found);
  return found;
}

/** The days that have totals or entries that totals count, in their order. */
async function* daysOf(
  database: Database,
  since: Date | undefined,
): AsyncGenerator<{ name: string } & Aggregation> {
  const aggregation = await findAggregation(database);
  const { generation, timeZone } = aggregation;
  if (timeZone === "") return;
  let from = since ?? EARLIEST;
  let day = EARLIEST.toISOString().slice(0, 10);
  for (;;) {
    const next = await findDay(database, { generation, from, day, since });
    const names = [next.day, next.createdAt && dayOf(next.createdAt, timeZone)].filter(
      (name) => name !== null,
    );
    const [name] = names.toSorted();
    if (name === undefined) return;
    yield { name, ...aggregation };
    day = plusDays(name, 1);
    const { until } = boundsOf(name, timeZone);
    if (until > from) from = until;
  }
}

/** A difference in one line: what, both figures, the entries behind it. */
export function describeDifference(difference: Difference): string {
  switch (difference.kind) {
    case "balance": {
      const { user_id, balance, ledger, entry_count, entries } = difference;
      return `balance of ${user_id}: ${balance ?? "none"}, but the ledger has ${ledger} in ${entry_count} entries${listEntries(entries, entry_count)}`;
    }
    case "reservation": {
      const { reservation_id, user_id, point_amount, entries } = difference;
      const found =
        entries.length === 0 ? "there is none" : `there is${listEntries(entries, entries.length)}`;
      return `reservation ${reservation_id} is DONE: ${point_amount} for ${user_id} must have one ledger entry, but ${found}`;
    }
    case "entry": {
      const { entries, reservation_id, reservation_status } = difference;
      const reason = reservation_id
        ? `reservation ${reservation_id} of its key is ${reservation_status}`
        : "no reservation has its key";
      return `ledger entry that no reservation made: ${reason}${listEntries(entries, 1)}`;
    }
    case "total": {
      const { day, of, campaign, total, ledger } = difference;
      return `total of ${day}, ${of}, ${campaign ? `campaign ${campaign}` : "no campaign"}: ${showTotal(total)}, but the ledger has ${showTotal(ledger)}`;
    }
    case "overdue": {
      const { reservation_id, user_id, status, execute_at, attempts, last_error } = difference;
      const reason = last_error === null ? "" : `, last error: ${last_error}`;
      return `reservation ${reservation_id} of ${user_id} is overdue: ${status} since ${execute_at.toISOString()}, ${attempts} attempts${reason}`;
    }
  }
}

function listEntries(entries: readonly ShownEntry[], count: number): string {
  if (entries.length === 0) return "";
  const shown = entries.map(
    ({ transaction_id, user_id, point_amount, idempotency_key, created_at }) =>
      `${transaction_id} (${point_amount} for ${user_id}, key ${idempotency_key}, ${created_at.toISOString()})`,
  );
  return `: ${shown.join(", ")}${count > entries.length ? ` and ${count - entries.length} older` : ""}`;
}

function showTotal(total: ShownTotal | null): string {
  if (!total) return "none";
  const { entries, points, users, late_ms_sum, late_ms_max } = total;
  return `${entries} entries, ${points} points, ${users} users, late by ${late_ms_sum} ms in all and ${late_ms_max} ms at most`;
}

/** What to do about a difference of each kind. */
const ADVICE: Record<Difference["kind"], string> = {
  balance:
    "where the ledger is right, --repair sets the balance to what it says; first see what else is named of the user",
  reservation:
    "for people to decide, as the ledger is never changed by itself: did the points come? What has the worker's log of its id?",
  entry: "for people to decide, as the ledger is never changed by itself: who has added it?",
  total: "`bun run aggregate --from DAY --to DAY` makes the totals of its day anew",
  overdue:
    "do scheduler.ts and worker.ts run, and what do their logs say? GET /point/reservations/{id} tells its story",
};

/** Who runs this, as far as the system knows. */
function operator(): string {
  const { username, uid } = userInfo();
  return username === "unknown" ? `uid ${uid}` : username;
}

const OPENING = '{"differences":[';

function toJson(value: unknown): string {
  return JSON.stringify(value, (_, one) => (typeof one === "bigint" ? digitsOf(one) : one));
}

const USAGE = `Usage: bun run reconcile [--full] [--repair] [--json]
  compares balances, ledger, reservations and daily totals; exits 1 where a difference is left
  --full     everything, not only what was changed since the last run that found nothing amiss
  --repair   sets balances to what the ledger says, and notes each in point_repairs
  --json     one JSON document instead of lines`;

function readWanted(args: string[]) {
  const flag = { type: "boolean", default: false } as const;
  return parseArgs({ args, options: { full: flag, repair: flag, json: flag } }).values;
}

/** @returns the exit code: 1 where a difference is left */
async function main(
  { full, repair, json }: ReturnType<typeof readWanted>,
  config: Pick<Settings, "DATABASE_URL" | "LEASE_MS">,
): Promise<number> {
  const database = openDatabase(config.DATABASE_URL);
  const repairedBy = `${operator()}@${hostname()}`;
  const startedAt = performance.now();
  let repaired = 0;
  let printed = 0;
  const kinds = new Set<Difference["kind"]>();
  const progress = await openProgress("rows", await estimateRows(database));
  const found = await reconcile(database, {
    ...{ isFull: full, leaseMs: config.LEASE_MS },
    onPage: progress.add,
    async onDifference(difference) {
      let outcome = {};
      let note = "";
      if (repair && difference.kind === "balance") {
        const repairOf = await repairBalance(database, difference.user_id, { repairedBy }).catch((error) => {
          if (error instanceof DatabaseError && !error.isOutage) return error;
          throw error;
        });
        if (repairOf instanceof DatabaseError) {
          outcome = { repaired: false };
          note = repairOf.isContended
            ? " - not repaired, as somebody else holds it: run it again"
            : " - cannot be repaired: a balance cannot hold that";
        } else {
          repaired++;
          outcome = { repaired: true };
          note = repairOf
            ? ` - repaired: ${repairOf.before ?? "none"} -> ${repairOf.after}`
            : " - by now the two agree";
        }
      }
      progress.clear();
      if (json)
        process.stdout.write(`${printed > 0 ? "," : OPENING}\n${toJson({ ...difference, ...outcome })}`);
      else console.log(`${describeDifference(difference)}${note}`);
      printed++;
      kinds.add(difference.kind);
    },
  });
  progress[Symbol.dispose]();
  const seconds = (performance.now() - startedAt) / 1_000;
  const { isFull, users, reservations, entries, days, differences } = found;
  if (json) {
    const checked = { users, reservations, entries, days };
    const summary = { is_full: isFull, checked, difference_count: differences, repaired, seconds };
    process.stdout.write(`${printed > 0 ? "" : OPENING}\n],${toJson(summary).slice(1)}\n`);
  } else {
    const scope = isFull ? "everything" : "what was changed since the last clean run";
    console.log(
      `${users} users, ${reservations} reservations, ${entries} ledger entries and ${days} days checked in ${seconds.toFixed(1)} s (${scope}; overdue means ${OVERDUE_MS / 60_000} minutes late): ${differences === 0 ? "all agree" : `${differences} differences, ${repaired} repaired`}`,
    );
    if (differences > repaired) for (const kind of kinds) console.log(`  ${kind}: ${ADVICE[kind]}`);
  }
  await database.close();
  return differences > repaired ? 1 : 0;
}

if (import.meta.main) {
  await runCommand({
    // Not 1, which says that there are differences.
    ...{ what: "reconcile", usage: USAGE, failed: 3 },
    read: readWanted,
    run: (wanted) => main(wanted, readConfig(Bun.env, ["DATABASE_URL", "LEASE_MS"])),
  });
}
