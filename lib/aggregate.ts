import { parseArgs } from "node:util";
import { readConfig, type Settings } from "./config.ts";
import { type Database, DatabaseError, openDatabase } from "./database.ts";
import { daysBetween, newDays, parseDay } from "./day.ts";
import { DomainError } from "./errors.ts";
import { openProgress, runCommand } from "./terminal.ts";
import {
  chooseTimeZone,
  countEntries,
  countWaiting,
  deleteOldGenerations,
  noteAggregated,
  resetDay,
  startGeneration,
} from "./total_repository.ts";

/** How many ledger entries one transaction counts: it holds their totals' rows for as long as it takes, some 0.2 s. */
const PAGE = 5_000;
/** How often to wait 5 s for whoever makes a day's totals anew: as long as that may take. */
const MAX_WAITS = 120;

export interface AggregateOptions {
  /** The zone whose days the totals are of. */
  timeZone: string;
  /** Ends it after the page under way. */
  signal?: AbortSignal;
  /** Called after each page with the number of entries that it counted. */
  onPage?: (counted: number) => Promise<void> | void;
}

/**
 * Adds every ledger entry that no total holds yet to the totals of its day, page by page: what one call leaves, the next one
 * does.
 *
 * @returns how many entries it counted
 * @throws {DomainError} TIME_ZONE where the totals are by the days of another zone
 * @throws {DatabaseError}
 */
export async function aggregate(
  database: Database,
  { timeZone, signal, onPage }: AggregateOptions,
): Promise<number> {
  await chooseTimeZone(database, timeZone);
  let sum = 0;
  let waits = 0;
  // Until a page is not full, and not until one is empty: while points are granted, there is always one more.
  for (let counted = PAGE; counted === PAGE && !signal?.aborted; ) {
    try {
      counted = await countEntries(database, { timeZone, limit: PAGE });
    } catch (error) {
      // A day that is set back takes its time.
      if (!(error instanceof DatabaseError && error.isContended) || ++waits > MAX_WAITS) throw error;
      continue;
    }
    sum += counted;
    await onPage?.(counted);
  }
  if (!signal?.aborted) await noteAggregated(database);
  await deleteOldGenerations(database);
  return sum;
}

/** What the command line asks for. */
interface Wanted {
  days?: { from: string; to: string };
  isRebuild: boolean;
}

const USAGE = `Usage: bun run aggregate [--from DAY --to DAY | --rebuild]
  adds what is new in the ledger to the daily totals
  --from DAY --to DAY   makes the totals of these days (366 at most) anew, e.g. where \`bun run reconcile\` found one wrong
  --rebuild             makes all totals anew, by the days of AGGREGATE_TIME_ZONE`;

/** @throws {DomainError} INVALID_INPUT */
function readWanted(args: string[]): Wanted {
  const { values } = parseArgs({
    args,
    options: { from: { type: "string" }, to: { type: "string" }, rebuild: { type: "boolean" } },
  });
  const { from, to, rebuild: isRebuild = false } = values;
  if (from === undefined && to === undefined) return { isRebuild };
  const places = { from: "--from", to: "--to" };
  if (isRebuild) throw new DomainError("INVALID_INPUT", "--rebuild takes no days: it makes all of them anew");
  // Both or neither: what is made anew is said in full.
  for (const [name, place] of Object.entries(places)) parseDay(values[name as "from" | "to"], place);
  return { days: newDays({ from, to }, { timeZone: "UTC", places }), isRebuild };
}

async function main(
  { days, isRebuild }: Wanted,
  { DATABASE_URL, AGGREGATE_TIME_ZONE: timeZone }: Pick<Settings, "DATABASE_URL" | "AGGREGATE_TIME_ZONE">,
): Promise<number> {
  const database = openDatabase(DATABASE_URL);
  const startedAt = performance.now();
  if (isRebuild) await startGeneration(database, timeZone);
  if (days) {
    await chooseTimeZone(database, timeZone);
    for (const day of daysBetween(days.from, days.to)) await resetDay(database, day, timeZone);
  }
  let counted: number;
  {
    using progress = await openProgress("entries", await countWaiting(database));
    counted = await aggregate(database, { timeZone, onPage: progress.add });
  }
  const seconds = ((performance.now() - startedAt) / 1_000).toFixed(1);
  const scope = isRebuild ? "all totals made anew: " : days ? `${days.from} to ${days.to} made anew: ` : "";
  console.log(`${scope}${counted} ledger entries counted in ${seconds} s, by days of ${timeZone}`);
  if (isRebuild) console.log(`Set AGGREGATE_TIME_ZONE=${timeZone} for every scheduler, and start them again`);
  await database.close();
  return 0;
}

if (import.meta.main) {
  await runCommand({
    ...{ what: "aggregate", usage: USAGE, failed: 1 },
    read: readWanted,
    run: (wanted) => main(wanted, readConfig(Bun.env, ["DATABASE_URL", "AGGREGATE_TIME_ZONE"])),
  });
}
