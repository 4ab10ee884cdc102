import type { Struck } from "./report.ts";

/** How far the clock of a process under test may be off, in milliseconds. */
const HOST_OFF_MS = [0, 3_600_000, -3_600_000];
/** How long a transaction may last, in milliseconds. */
const TRANSACTION_MS = 15_000;
/** How much earlier than a fault's end MySQL's clock may have been set right, in milliseconds. */
const FELT_MS = 3_000;

/**
 * The time of this machine, in milliseconds since 1970, at which MySQL has stored its time. A run must be shorter than the
 * smallest jump of the clock, which is an hour.
 */
export function rightMsOf(storedMs: number, struck: readonly Struck[]): number {
  const off = struck.find(({ startMs, endMs, clockOffMs }) => {
    const rightMs = storedMs - (clockOffMs ?? 0);
    return clockOffMs !== undefined && rightMs >= startMs && rightMs <= endMs;
  });
  return storedMs - (off?.clockOffMs ?? 0);
}

/**
 * Whether MySQL's clock was ahead at that time, which a process under test may have written down: then what is due for a moment
 * is overdue, as far as anybody can tell.
 */
export function isAhead(writtenMs: number, struck: readonly Struck[]): boolean {
  return struck.some(({ startMs, endMs, clockOffMs = 0 }) => {
    const isWithin = (atMs: number) => atMs >= startMs && atMs <= endMs + FELT_MS;
    return clockOffMs > 0 && HOST_OFF_MS.some((offMs) => isWithin(writtenMs - offMs));
  });
}

/**
 * Whether MySQL's clock went back shortly before it stored this time, by so much that the same transaction may have read a time
 * from `dueMs` on before.
 */
export function mayBeSetBack(storedMs: number, dueMs: number, struck: readonly Struck[]): boolean {
  return struck.some(({ startMs, endMs, clockOffMs = 0 }) => {
    // Back from ahead when the fault ends, or back by the fault itself.
    const [backMs, lowMs] = clockOffMs > 0 ? [endMs - FELT_MS, 0] : [startMs, clockOffMs];
    const rightMs = storedMs - lowMs;
    const isSoonAfter = rightMs >= backMs && rightMs <= backMs + FELT_MS + TRANSACTION_MS;
    return clockOffMs !== 0 && isSoonAfter && dueMs <= storedMs + Math.abs(clockOffMs);
  });
}
