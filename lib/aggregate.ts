import { parseArgs } from "node:util";
import { readConfig } from "./config.ts";
import { type Database, openDatabase } from "./database.ts";
import { daysBetween, newDays, parseDay } from "./day.ts";
import { DomainError, explain, ForeseenError } from "./errors.ts";
import { openProgress } from "./terminal.ts";
import {
  chooseTimeZone,
  countEntries,
  countWaiting,
  deleteOldGenerations,
  resetDay,
  startGeneration,
} from "./total_repository.ts";

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
  while (!signal?.aborted) {
    const counted = await countEntries(database, { timeZone });
    if (counted === 0) break;
    sum += counted;
    await onPage?.(counted);
  }
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

if (import.meta.main) {
  let wanted: Wanted;
  try {
    wanted = readWanted(Bun.argv.slice(2));
  } catch (error) {
    console.error(`${error instanceof DomainError ? explain(error) : (error as Error).message}\n${USAGE}`);
    process.exit(2);
  }
  try {
    const config = readConfig(Bun.env, ["DATABASE_URL", "AGGREGATE_TIME_ZONE"]);
    const timeZone = config.AGGREGATE_TIME_ZONE;
    const database = openDatabase(config.DATABASE_URL);
    const startedAt = performance.now();
    if (wanted.isRebuild) await startGeneration(database, timeZone);
    if (wanted.days) {
      const { from, to } = wanted.days;
      for (const day of daysBetween(from, to)) await resetDay(database, day, timeZone);
    }
    let counted: number;
    {
      using progress = openProgress("entries", await countWaiting(database));
      counted = await aggregate(database, { timeZone, onPage: progress.add });
    }
    const seconds = ((performance.now() - startedAt) / 1_000).toFixed(1);
    console.log(`${counted} ledger entries counted in ${seconds} s, by days of ${timeZone}`);
    await database.close();
    process.exit(0);
  } catch (error) {
    if (!(error instanceof ForeseenError)) throw error;
    console.error(error instanceof DomainError ? explain(error) : `Cannot aggregate: ${error.message}`);
    process.exit(1);
  }
}
