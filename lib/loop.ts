import { setTimeout as wait } from "node:timers/promises";

/** Waits some milliseconds, or shorter where `signal` is aborted meanwhile; never throws. */
export async function sleep(ms: number, signal?: AbortSignal): Promise<void> {
  await wait(ms, undefined, signal ? { signal } : {}).catch(() => undefined);
}

/**
 * How long to wait before try `attempt + 1`: doubles from `baseMs` up to `maxMs`, of which a random half is taken off, so
 * that those who failed together do not come back together.
 */
export function backoffMs(attempt: number, { baseMs, maxMs }: { baseMs: number; maxMs: number }): number {
  const full = Math.min(maxMs, baseMs * 2 ** Math.min(attempt - 1, 30));
  return Math.round(full / 2 + (Math.random() * full) / 2);
}

/** Settles as `promise` does, or rejects with `late()` after `ms`; the promise itself is then left to itself. */
export async function withDeadline<T>(promise: Promise<T>, ms: number, late: () => Error): Promise<T> {
  const { promise: expired, reject } = Promise.withResolvers<never>();
  const timer = setTimeout(() => reject(late()), ms);
  try {
    return await Promise.race([promise, expired]);
  } finally {
    clearTimeout(timer);
  }
}

export interface RetryOptions {
  signal: AbortSignal;
  /** Called after each failure with the error and the time until the next try; throws what no retry can mend. */
  onFailure: (error: unknown, retryInMs: number) => void;
  baseMs?: number;
  maxMs?: number;
}

/**
 * Tries until it succeeds, with backoff, for as long as it takes.
 *
 * @returns the result, or undefined where `signal` was aborted first
 */
export async function retry<T>(attempt: () => Promise<T>, options: RetryOptions): Promise<T | undefined> {
  const { signal, onFailure, baseMs = 200, maxMs = 5_000 } = options;
  for (let failures = 1; !signal.aborted; failures++) {
    try {
      return await attempt();
    } catch (error) {
      const retryInMs = backoffMs(failures, { baseMs, maxMs });
      onFailure(error, retryInMs);
      await sleep(retryInMs, signal);
    }
  }
  return undefined;
}

/**
 * Runs a step again and again until `signal` is aborted; a step under way is finished. The step says how many
 * milliseconds to sleep before the next one; one that throws is tried again with backoff.
 */
export async function runLoop(step: () => Promise<number>, options: RetryOptions): Promise<void> {
  const { signal } = options;
  while (!signal.aborted) {
    const sleepMs = await retry(step, options);
    if (sleepMs !== undefined && sleepMs > 0) await sleep(sleepMs, signal);
  }
}
