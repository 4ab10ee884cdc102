import type { Logger } from "pino";
import type { Database } from "../database.ts";
import { DatabaseError } from "../database_errors.ts";
import { describeError } from "../errors.ts";
import { perSecond } from "../log.ts";
import { retry } from "../loop.ts";

export interface WaitOptions {
  signal: AbortSignal;
  logger: Logger;
  /** Whether to throw the error instead of waiting if MySQL has unsafe settings. */
  refuseUnsafe?: boolean;
  /** Called after each failure that it waits out. */
  onFailure?: (error: DatabaseError) => void;
}

/**
 * Waits until MySQL answers and `check` passes. Logs the first failure, each one with another message, and the end.
 *
 * @returns false if `signal` was aborted first
 * @throws what `check` throws, except outages of MySQL
 */
export async function waitForDatabase(check: () => Promise<void>, options: WaitOptions): Promise<boolean> {
  const { signal, logger, refuseUnsafe = false } = options;
  let logged: string | undefined;
  await retry(check, {
    signal,
    onFailure(error) {
      if (!(error instanceof DatabaseError && error.isOutage)) throw error;
      if (refuseUnsafe && error.kind === "unsafe") throw error;
      options.onFailure?.(error);
      if (error.message === logged) return;
      logger.warn({ error: describeError(error) }, "waiting for MySQL");
      logged = error.message;
    },
  });
  if (logged !== undefined && !signal.aborted) logger.info("MySQL answers again");
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
  return (error, attempt) =>
    perSecond(logger).warn({ error: describeError(error), attempt }, "retrying transaction");
}
