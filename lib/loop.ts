import { setTimeout as wait } from "node:timers/promises";

/** Waits, but not longer than until `signal` is aborted; never throws. */
export async function sleep(ms: number, signal?: AbortSignal): Promise<void> {
  await wait(ms, undefined, signal ? { signal } : {}).catch(() => undefined);
}

/** Resolves when `signal` is aborted. */
export function aborted(signal: AbortSignal): Promise<void> {
  if (signal.aborted) return Promise.resolve();
  return new Promise((resolve) => signal.addEventListener("abort", () => resolve(), { once: true }));
}

/**
 * The wait after a failed attempt: doubles from `baseMs` up to `maxMs`, minus a random part of up to half, so that callers that
 * failed together do not retry together.
 */
export function backoffMs(attempt: number, { baseMs, maxMs }: { baseMs: number; maxMs: number }): number {
  const full = Math.min(maxMs, baseMs * 2 ** Math.min(attempt - 1, 30));
  return Math.round(full / 2 + (Math.random() * full) / 2);
}

/** Settles as `promise` does, or rejects with `late()` after `ms`. Does not stop the work of the promise. */
export async function withDeadline<T>(promise: Promise<T>, ms: number, late: () => Error): Promise<T> {
  const { promise: expired, reject } = Promise.withResolvers<never>();
  const timer = setTimeout(() => reject(late()), ms);
  try {
    return await Promise.race([promise, expired]);
  } finally {
    clearTimeout(timer);
  }
}

/** A sleep that can be shortened, even before it begins. */
export interface Alarm {
  /** Ends the current or the next sleep within `ms` from now. */
  wakeIn(ms: number): void;
  /** Cancels all earlier calls of `wakeIn()`. */
  clear(): void;
  /** Sleeps `ms`, or until the alarm or `signal` ends it. */
  sleep(ms: number, signal: AbortSignal): Promise<void>;
}

/** Opens an alarm that is not set. */
export function openAlarm(): Alarm {
  let wakeAtMs = Infinity;
  let wake = () => {};
  return {
    wakeIn(ms) {
      const atMs = performance.now() + ms;
      if (atMs >= wakeAtMs) return;
      wakeAtMs = atMs;
      wake();
    },
    clear() {
      wakeAtMs = Infinity;
    },
    async sleep(ms, signal) {
      const endMs = performance.now() + ms;
      for (;;) {
        const leftMs = Math.min(endMs, wakeAtMs) - performance.now();
        if (leftMs <= 0 || signal.aborted) return;
        // An earlier `wakeAtMs` ends this sleep, and the loop begins a shorter one.
        const woken = new AbortController();
        wake = () => woken.abort();
        signal.addEventListener("abort", wake, { once: true });
        await sleep(Math.ceil(leftMs), woken.signal);
        signal.removeEventListener("abort", wake);
      }
    },
  };
}

/** How to retry, and what to do after a failure. */
export interface RetryOptions {
  signal: AbortSignal;
  /** Called after each failure. Throws the error to stop the retries. */
  onFailure: (error: unknown, retryInMs: number) => void;
  baseMs?: number;
  maxMs?: number;
}

/**
 * Retries with backoff until an attempt succeeds.
 *
 * @returns the result, or undefined if `signal` was aborted first
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
 * Repeats a step until `signal` is aborted; the current step is finished. The step returns how many milliseconds to sleep
 * before the next one. A step that throws is retried with backoff.
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
