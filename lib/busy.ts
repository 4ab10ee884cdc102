import { OverloadError } from "./coalesce.ts";
import { backoffMs, sleep } from "./loop.ts";

/** The result of work that needs what another transaction has locked. Nothing was done. */
export const BUSY = Symbol("busy");

/** Repeats work while it is `BUSY`. @throws {OverloadError} if it is for too long */
export type UntilFree = <T>(work: () => Promise<T | typeof BUSY>) => Promise<T>;

/** Waits between the attempts, in milliseconds. The longest is short: a lock that is released must be noticed within a second. */
const WAITS = { baseMs: 20, maxMs: 400 };
/** How long to wait for a lock, in milliseconds: the answer must come before clients time out. */
const MAX_WAIT_MS = 4_000;
/** The maximum number of callers that wait: their attempts need the same connections as all other work. */
const MAX_WAITING = 200;

/**
 * Makes a function that repeats work while it is `BUSY`, for up to 4 s. Between the attempts it holds nothing: callers that
 * wait in MySQL would use up the connections. Only callers that wait count against `maxWaiting`.
 */
export function openUntilFree({ maxWaitMs = MAX_WAIT_MS, maxWaiting = MAX_WAITING } = {}): UntilFree {
  let waiting = 0;

  async function wait<T>(work: () => Promise<T | typeof BUSY>): Promise<T> {
    const end = performance.now() + maxWaitMs;
    for (let attempt = 1; performance.now() < end; attempt++) {
      await sleep(backoffMs(attempt, WAITS));
      const result = await work();
      if (result !== BUSY) return result;
    }
    throw new OverloadError(
      `Cannot wait for more than ${maxWaitMs} ms for what another transaction has locked`,
    );
  }

  return async (work) => {
    const result = await work();
    if (result !== BUSY) return result;
    if (waiting >= maxWaiting) {
      throw new OverloadError(`Cannot let more than ${maxWaiting} wait for what others have locked`);
    }
    waiting++;
    try {
      return await wait(work);
    } finally {
      waiting--;
    }
  };
}
