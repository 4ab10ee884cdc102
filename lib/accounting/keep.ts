import type { Logger } from "pino";
import type { Settings } from "../config.ts";
import type { Database } from "../database.ts";
import { DomainError, describeError } from "../errors.ts";
import { aggregate } from "./aggregate.ts";
import { describeDifference } from "./difference.ts";
import { reconcile } from "./reconcile.ts";
import { endTurn, keepTurn, takeTurn } from "./turn_repository.ts";

/** How often to check if the accounting is due, in milliseconds. */
const TURN_MS = 10_000;
/** How often to renew the turn, in milliseconds. */
const KEEP_TURN_MS = 10_000;
/** The maximum number of differences that one run logs; it counts all of them. */
const MAX_LOGGED = 100;

export interface AccountingOptions {
  database: Database;
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
export async function keepAccounts({ database, logger, config, signal }: AccountingOptions): Promise<number> {
  const intervalMs = config.AGGREGATE_INTERVAL_MS;
  const sleepMs = Math.min(intervalMs, TURN_MS);
  const turn = await takeTurn(database, { intervalMs });
  if (!turn) return sleepMs;
  // If MySQL is unavailable, the work itself fails.
  const keeping = setInterval(() => keepTurn(database, turn).catch(() => undefined), KEEP_TURN_MS);
  let isFinished = false;
  try {
    await aggregateAndReconcile({ database, logger, config, signal });
    isFinished = !signal.aborted;
  } finally {
    clearInterval(keeping);
    await endTurn(database, turn, { isFinished }).catch(() => undefined);
  }
  return sleepMs;
}

async function aggregateAndReconcile({ database, logger, config, signal }: AccountingOptions): Promise<void> {
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
