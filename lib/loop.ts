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

/** A sleep that can be cut short, also before it begins. */
export interface Alarm {
  /** Ends the sleep, this one or the next, at the latest `ms` from now. */
  wakeIn(ms: number): void;
  /** Forgets what was said until now. */
  clear(): void;
  /** Sleeps `ms`, shorter where the alarm or `signal` ends it. */
  sleep(ms: number, signal: AbortSignal): Promise<void>;
}

export function openAlarm(): Alarm {
  let wakeAtMs = Infinity;
  let rouse = () => {};
  return {
    wakeIn(ms) {
      const atMs = performance.now() + ms;
      if (atMs >= wakeAtMs) return;
      wakeAtMs = atMs;
      rouse();
    },
    clear() {
      wakeAtMs = Infinity;
    },
    async sleep(ms, signal) {
      const endMs = performance.now() + ms;
      for (;;) {
        const leftMs = Math.min(endMs, wakeAtMs) - performance.now();
        if (leftMs <= 0 || signal.aborted) return;
        // A new time to wake ends this sleep and begins one that is shorter.
        const roused = new AbortController();
        rouse = () => roused.abort();
        const stop = () => roused.abort();
        signal.addEventListener("abort", stop, { once: true });
        await sleep(Math.ceil(leftMs), roused.signal);
        signal.removeEventListener("abort", stop);
      }
    },
  };
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
 *
 * @param options.alarm sleeps between the steps
 */
export async function runLoop(
  step: () => Promise<number>,
  options: RetryOptions & { alarm?: Pick<Alarm, "sleep"> },
): Promise<void> {
  const { signal, alarm = { sleep } } = options;
  while (!signal.aborted) {
    const sleepMs = await retry(step, options);
    if (sleepMs !== undefined && sleepMs > 0) await alarm.sleep(sleepMs, signal);
  }
}
