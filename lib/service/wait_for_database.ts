import type { Logger } from "pino";
import type { Database } from "../database.ts";
import { DatabaseError } from "../database_errors.ts";
import { describeError } from "../errors.ts";
import { retry } from "../loop.ts";

/**
 * Waits until MySQL answers and `check` passes; logs each failure.
 *
 * @returns false if `signal` was aborted first
 * @throws what `check` throws, except outages of MySQL
 */
export async function waitForDatabase(
  check: () => Promise<void>,
  { signal, logger }: { signal: AbortSignal; logger: Logger },
): Promise<boolean> {
  let hasFailed = false;
  await retry(check, {
    signal,
    onFailure(error, retryInMs) {
      if (!(error instanceof DatabaseError && error.isOutage)) throw error;
      logger.warn({ error: describeError(error), retryInMs }, "waiting for MySQL");
      hasFailed = true;
    },
  });
  if (hasFailed && !signal.aborted) logger.info("MySQL answers again");
  return !signal.aborted;
}

/**
 * Checks that MySQL answers.
 *
 * @throws {DatabaseError} if it does not
 */
export async function pingDatabase(database: Database): Promise<void> {
  await database.run((connection) => connection.select("/* ping */ select 1"));
}

/** Logs each retry of work in MySQL, with the reason. */
export function logRetry(logger: Logger): (error: DatabaseError, attempt: number) => void {
  return (error, attempt) => logger.warn({ error: describeError(error), attempt }, "retrying transaction");
}
