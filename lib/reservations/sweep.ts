import type { Logger } from "pino";
import type { Database } from "../database.ts";
import { type DatabaseClock, describeJump, JUMP_MS, type Jump } from "../database_clock.ts";
import { BEGINNING, findNextScan, isBefore, type ScanPosition } from "./scan_repository.ts";
import { findScanState, releaseSetAside, restartClock, saveScanState } from "./scan_state_repository.ts";

/** How long to sleep between two sweeps, in milliseconds; between these, nine times as long as a sweep takes. */
const SWEEP_MS = { min: 1_000, max: 10_000 };
/** How often to sweep from the very beginning, in milliseconds; up to this, a hundred times as long as that takes. */
const SWEEP_ALL_MS = { min: 10_000, max: 600_000 };
/** How often to store what is known, in milliseconds. */
const SAVE_MS = 10_000;
/** A statement that sets `scan_at` to its present commits within this time, in milliseconds: longer than any may take. */
const COMMIT_MS = 60_000;
/** The scans themselves find what commits within this time, in milliseconds. */
const RECENT_MS = 2_000;

/** Where a scheduler looks for due reservations. `from` is for its scans; from `openFrom` to `from` is for its sweeps. */
export interface ScanPositions {
  /** What was due before it has been claimed, or another transaction had it locked or not yet committed. */
  from: ScanPosition;
  /** No open reservation was before it. */
  openFrom: ScanPosition;
}

/** Where the next scan starts after one that has claimed all that was due when MySQL's clock showed that time. */
export function fromAfter(nowMs: number): ScanPosition {
  return { scanAt: new Date(nowMs - RECENT_MS), id: "" };
}

/** The position before which nothing can commit any more, if `from` is not in the future. */
function settledBefore(from: ScanPosition): ScanPosition {
  if (!isBefore(BEGINNING, from)) return BEGINNING;
  return { scanAt: new Date(from.scanAt.getTime() - COMMIT_MS), id: "" };
}

function between(value: number, { min, max }: { min: number; max: number }): number {
  return Math.min(max, Math.max(min, value));
}

export interface SweepOptions {
  database: Database;
  logger: Logger;
  leaseMs: number;
  clock: DatabaseClock;
  positions: ScanPositions;
  /** Claims and publishes what is due from there on. Resolves to whether there may be more. */
  claimFrom: (position: ScanPosition) => Promise<boolean>;
  /** Ends the sleep between two scans. */
  wakeScan: () => void;
}

export interface Sweeper {
  /**
   * Claims what is due before the scans' position, because it committed late, or was locked, or was inserted by hand.
   *
   * @returns how many milliseconds to sleep before the next sweep
   * @throws {DatabaseError}
   * @throws {QueueError} if RabbitMQ accepts no messages
   */
  sweep(): Promise<number>;
  /** Call it when MySQL's clock has jumped. */
  onJump(jump: Jump): void;
}

/** Where to start, as the schedulers before have left it. */
export async function findPositions(database: Database, logger: Logger): Promise<ScanPositions> {
  const { wasAheadMs, openFrom } = await findScanState(database);
  const hasGoneBack = wasAheadMs > JUMP_MS;
  if (hasGoneBack) {
    const byMs = -Math.round(wasAheadMs);
    logger.warn({ byMs }, `${describeJump(byMs)} since a scheduler last saw it`);
  }
  const from = hasGoneBack || !openFrom ? BEGINNING : openFrom;
  return { from, openFrom: from };
}

export function openSweeper(options: SweepOptions): Sweeper {
  const { database, logger, leaseMs, clock, positions, claimFrom, wakeScan } = options;
  let sweepAllAtMs = 0;
  let saveAtMs = 0;
  let clockWas: Date | undefined;

  async function save(): Promise<void> {
    saveAtMs = performance.now() + SAVE_MS;
    const saved = clockWas;
    await saveScanState(database, { openFrom: positions.openFrom, clockWas: saved });
    if (clockWas === saved) clockWas = undefined;
    const { wasAheadMs } = await findScanState(database);
    if (wasAheadMs <= JUMP_MS) return;
    const released = await releaseSetAside(database, { leaseMs, wasAheadMs });
    // Last: after a crash, the next scheduler does it again.
    await restartClock(database);
    logger.info({ released }, "brought back what MySQL's wrong clock had set aside");
    wakeScan();
  }

  return {
    async sweep() {
      const startedAt = performance.now();
      const isOfAll = startedAt >= sweepAllAtMs;
      if (isOfAll) positions.openFrom = BEGINNING;
      const { from, openFrom } = positions;
      const { clock: reading, first } = await findNextScan(database, {
        from: openFrom,
        withinMs: 0,
        limit: 1,
      });
      const tookMs = performance.now() - startedAt;
      if (isOfAll) sweepAllAtMs = startedAt + between(100 * tookMs, SWEEP_ALL_MS);
      clock.read(reading);
      const oldest = first && isBefore(first, from) ? first : undefined;
      // Unless the clock has gone back meanwhile, and everything starts from the beginning.
      if (positions.openFrom === openFrom) {
        const settled = settledBefore(from);
        positions.openFrom = oldest && isBefore(oldest, settled) ? oldest : settled;
      }
      // Before the claim, which fails while RabbitMQ is away.
      if (startedAt >= saveAtMs) await save();
      const hasMore = oldest !== undefined && (await claimFrom(oldest));
      return hasMore ? 0 : between(9 * (performance.now() - startedAt), SWEEP_MS);
    },
    onJump({ byMs, wouldShowMs }) {
      logger.warn({ byMs }, describeJump(byMs));
      saveAtMs = 0;
      // For what was about to commit.
      sweepAllAtMs = Math.min(sweepAllAtMs, performance.now() + COMMIT_MS);
      if (byMs < 0) {
        clockWas = new Date(wouldShowMs);
        positions.from = { ...BEGINNING };
        positions.openFrom = positions.from;
      }
      // The sleep is for the time before the jump.
      wakeScan();
    },
  };
}
