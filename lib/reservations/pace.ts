/** A batch that takes so many times the usual time, within these milliseconds, waits for a lock. */
const STALL = { times: 4, minMs: 200, maxMs: 5_000 };
/** The usual time before any is known, in milliseconds: the first batches of a process are slow. */
const FIRST_MS = 125;
/** How long batches do not wait for locks after one of them did, in milliseconds. */
const CAREFUL_MS = 3_000;

/** What a worker remembers of its batches: how long they may take, and whether others hold locks. */
export interface Pace {
  /** How long a batch may wait for locks, in milliseconds. */
  stallMs(): number;
  /** Whether to grant around what is locked. */
  isCareful(): boolean;
  beCareful(): void;
  /** @param options.isStalled whether the batch was taken for stalled, but nothing was locked: MySQL is slow */
  record(tookMs: number, options?: { isStalled: boolean }): void;
}

export function openPace(): Pace {
  let usualMs = FIRST_MS;
  let carefulUntilMs = 0;
  return {
    stallMs: () => Math.min(STALL.maxMs, Math.max(STALL.minMs, STALL.times * usualMs)),
    isCareful: () => performance.now() < carefulUntilMs,
    beCareful() {
      carefulUntilMs = performance.now() + CAREFUL_MS;
    },
    record(tookMs, { isStalled } = { isStalled: false }) {
      if (isStalled) usualMs = Math.max(2 * usualMs, tookMs);
      else usualMs += (tookMs - usualMs) / 10;
    },
  };
}
