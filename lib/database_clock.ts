/** What MySQL's clock showed. */
export interface ClockReading {
  /** In milliseconds since 1970. */
  nowMs: number;
  /** Bounds of the moment at which it was read, by `performance.now()`. */
  sentAtMs: number;
  receivedAtMs: number;
}

/** MySQL's clock, compared with this process's monotonic clock. */
export interface DatabaseClock {
  /** Takes a reading; calls `onJump` if the clock has jumped since the last one. */
  read(reading: ClockReading): void;
  /** How many milliseconds from now MySQL's clock shows that time; 0 before the first reading. */
  msUntil(time: Date): number;
}

/** A jump of MySQL's clock. */
export interface Jump {
  /** In milliseconds; negative if the clock went back. */
  byMs: number;
  /** What it would show without the jump, in milliseconds since 1970. */
  wouldShowMs: number;
}

/** A larger step than this is a jump, in milliseconds. A reading that took longer is ignored: it is too inexact. */
export const JUMP_MS = 1_000;

/** @param onJump called once for each jump */
export function openDatabaseClock(onJump: (jump: Jump) => void): DatabaseClock {
  /** The bounds of MySQL's time minus `performance.now()`. */
  let offset: { minMs: number; maxMs: number } | undefined;
  const middle = ({ minMs, maxMs }: { minMs: number; maxMs: number }) => (minMs + maxMs) / 2;
  return {
    read({ nowMs, sentAtMs, receivedAtMs }) {
      if (receivedAtMs - sentAtMs > JUMP_MS) return;
      const before = offset;
      offset = { minMs: nowMs - receivedAtMs, maxMs: nowMs - sentAtMs };
      if (!before) return;
      // Not by the middles: slow answers are no jumps.
      const hasJumped = offset.minMs - before.maxMs > JUMP_MS || before.minMs - offset.maxMs > JUMP_MS;
      if (!hasJumped) return;
      const byMs = Math.round(middle(offset) - middle(before));
      onJump({ byMs, wouldShowMs: nowMs - byMs });
    },
    msUntil(time) {
      return offset ? time.getTime() - middle(offset) - performance.now() : 0;
    },
  };
}

/** A jump in words, for the log. */
export function describeJump(byMs: number): string {
  return `MySQL's clock went ${byMs < 0 ? "back" : "ahead"} by ${Math.abs(byMs).toLocaleString("en")} ms`;
}
