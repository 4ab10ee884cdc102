import type { Logger } from "pino";
import type { Settings } from "../config.ts";
import type { Database } from "../database.ts";
import { DomainError, describeError } from "../errors.ts";
import { aggregate } from "./aggregate.ts";
import { describeDifference } from "./difference.ts";
import { reconcile } from "./reconcile.ts";
import type { Turns } from "./turn_repository.ts";

/** How often to check if the accounting is due, in milliseconds. */
const TURN_MS = 10_000;
/** How often to renew the turn, in milliseconds. */
const KEEP_TURN_MS = 10_000;
/** The maximum number of differences that one run logs; it counts all of them. */
const MAX_LOGGED = 100;

export interface AccountingOptions {
  database: Database;
  turns: Turns;
  logger: Logger;
  config: Pick<Settings, "AGGREGATE_INTERVAL_MS" | "AGGREGATE_TIME_ZONE" | "LEASE_MS">;
  signal: AbortSignal;
}

/**
 * If the accounting is due and no other scheduler has the turn: counts the new ledger entries in the daily totals, then
 * reconciles what has changed. Logs each difference; the service continues. If the process dies, another scheduler takes the turn
 * within about a minute.
 *
 * @returns how many milliseconds to sleep before the next check
 * @throws {DatabaseError}
 */
export async function keepAccounts({ turns, ...options }: AccountingOptions): Promise<number> {
  const { config, signal } = options;
  const sleepMs = Math.min(config.AGGREGATE_INTERVAL_MS, TURN_MS);
  const turn = await turns.take();
  if (!turn) return sleepMs;
  // If MySQL is unavailable, the work itself fails.
  const keeping = setInterval(() => turn.keep().catch(() => undefined), KEEP_TURN_MS);
  let isFinished = false;
  try {
    await aggregateAndReconcile(options);
    isFinished = !signal.aborted;
  } finally {
    clearInterval(keeping);
    await turn.end({ isFinished }).catch(() => undefined);
  }
  return sleepMs;
}

async function aggregateAndReconcile({
  database,
  logger,
  config,
  signal,
}: Omit<AccountingOptions, "turns">): Promise<void> {
  const startedAt = performance.now();
  const aggregating = aggregate(database, { timeZone: config.AGGREGATE_TIME_ZONE, signal });
  const counted = await aggregating.catch((error) => {
    // The time zone is a wrong setting that an operator must correct; reconciling is still possible.
    if (!(error instanceof DomainError)) throw error;
    logger.error({ error: describeError(error) }, "cannot aggregate");
    return undefined;
  });
  let logged = 0;
  const { users, reservations, entries, days, differences } = await reconcile(database, {
    leaseMs: config.LEASE_MS,
    signal,
    onDifference(difference) {
      if (logged++ < MAX_LOGGED) {
        logger.error({ difference: describeDifference(difference) }, "reconciliation found a difference");
      }
    },
  });
  if (signal.aborted) return;
  const tookMs = Math.round(performance.now() - startedAt);
  const summary = { counted, users, reservations, entries, days, differences, tookMs };
  if (differences === 0) logger.info(summary, "reconciliation found no differences");
  else logger.error(summary, "reconciliation found differences; `bun run reconcile` lists all of them");
}
