import { backoffMs, openAlarm } from "../loop.ts";

/**
 * Claimed reservations that cannot be granted yet, as another transaction holds a row that they need. They wait in memory, by
 * what is held: the balance of a user, or their own row. What does not fit, or is here when the process ends, is claimed again
 * when its lease ends.
 */
export interface WaitingRoom {
  /**
   * Lets a reservation wait for what is held: a user's id, or its own.
   *
   * @returns for how long that is known to be held, in milliseconds
   */
  put(heldId: string, reservationId: string): number;
  /** Lets a reservation wait if others already wait for its user's balance, or if it waits itself. Returns whether it does. */
  join(reservation: { id: string; userId: string }): boolean;
  /**
   * Passes waiting reservations to `grant` until `signal` is aborted: for all that is held one reservation at a time, which tries
   * whether it is still held; all others that wait for the same once it is free. `grant` puts back what is still held.
   *
   * @param options.maxBatch the maximum number that is passed at once
   */
  run(options: {
    grant: (ids: string[]) => Promise<unknown>;
    maxBatch: number;
    signal: AbortSignal;
  }): Promise<void>;
}

export interface WaitingRoomOptions {
  /** The maximum number of reservations. */
  size?: number;
  /** Called with the number of reservations that have found no room. */
  onFull?: (count: number) => void;
}

/** Some 20 MB. */
const SIZE = 100_000;
/** Waits between attempts, in milliseconds. Most locks are another worker's, which are released within a few milliseconds. */
const WAITS = { baseMs: 20, maxMs: 200 };
/** What is to be tried within this time is tried together with what is to be tried now, in milliseconds. */
const TOGETHER_MS = 50;
/** The wait after an attempt that failed, e.g. since MySQL is away. */
const FAILED_MS = 1_000;

/** Reservations that wait for the same. */
interface Held {
  ids: Set<string>;
  sinceMs: number;
  /** Attempts that found it held. */
  attempts: number;
  /** When to try next, by `performance.now()`. */
  nextMs: number;
  isFree: boolean;
  /** Whether something was put here since it was taken for the last attempt: then it is still held. */
  isPut: boolean;
}

export function openWaitingRoom({ size = SIZE, onFull = () => {} }: WaitingRoomOptions = {}): WaitingRoom {
  /** By what is held; in the order in which they were tried, so that each has its turn. */
  const held = new Map<string, Held>();
  const alarm = openAlarm();
  let count = 0;

  function add(waiting: Held, reservationId: string) {
    if (waiting.ids.has(reservationId)) return;
    if (count >= size) {
      onFull(1);
      return;
    }
    count++;
    waiting.ids.add(reservationId);
  }

  function put(heldId: string, reservationId: string): number {
    const nowMs = performance.now();
    let waiting = held.get(heldId);
    if (!waiting) {
      const nextMs = nowMs + backoffMs(1, WAITS);
      waiting = { ids: new Set(), sinceMs: nowMs, attempts: 1, nextMs, isFree: false, isPut: false };
      held.set(heldId, waiting);
      alarm.wakeIn(nextMs - nowMs);
    }
    add(waiting, reservationId);
    waiting.isPut = true;
    return nowMs - waiting.sinceMs;
  }

  function join({ id, userId }: { id: string; userId: string }): boolean {
    const waiting = held.get(userId) ?? held.get(id);
    if (waiting) add(waiting, id);
    return waiting !== undefined;
  }

  /** Takes out what is to be tried now, by what is held. */
  function take(limit: number): Map<string, string[]> {
    const taken = new Map<string, string[]>();
    let left = limit;
    if (nextInMs() > 0) return taken;
    const untilMs = performance.now() + TOGETHER_MS;
    for (const [heldId, waiting] of held) {
      if (left === 0) break;
      if (waiting.nextMs > untilMs) continue;
      const ids: string[] = [];
      for (const id of waiting.ids) {
        if (ids.length === (waiting.isFree ? left : 1)) break;
        ids.push(id);
      }
      for (const id of ids) waiting.ids.delete(id);
      count -= ids.length;
      left -= ids.length;
      waiting.isPut = false;
      taken.set(heldId, ids);
    }
    return taken;
  }

  /** After an attempt: what was put back is still held. */
  function settle(heldIds: Iterable<string>) {
    const nowMs = performance.now();
    for (const heldId of heldIds) {
      const waiting = held.get(heldId);
      if (!waiting) continue;
      held.delete(heldId);
      if (waiting.ids.size === 0) continue;
      // To the end.
      held.set(heldId, waiting);
      waiting.isFree = !waiting.isPut;
      if (waiting.isFree) Object.assign(waiting, { attempts: 0, sinceMs: nowMs, nextMs: nowMs });
      else waiting.nextMs = nowMs + backoffMs(++waiting.attempts, WAITS);
    }
  }

  /** Milliseconds until the next attempt. */
  function nextInMs(): number {
    let nextMs = Infinity;
    for (const waiting of held.values()) nextMs = Math.min(nextMs, waiting.nextMs);
    return Math.max(0, nextMs - performance.now());
  }

  return {
    put,
    join,
    async run({ grant, maxBatch, signal }) {
      while (!signal.aborted) {
        alarm.clear();
        // A timer must not be longer than 2^31 ms.
        await alarm.sleep(Math.min(nextInMs(), 1_000), signal);
        const taken = take(maxBatch);
        if (taken.size === 0 || signal.aborted) continue;
        try {
          await grant([...taken.values()].flat());
        } catch {
          // Whoever grants has logged it. The reservations are neither granted nor refused.
          for (const [heldId, ids] of taken) for (const id of ids) put(heldId, id);
          await alarm.sleep(FAILED_MS, signal);
        }
        settle(taken.keys());
      }
    },
  };
}
