// The scheduler claims due reservations under a lease, and publishes them for the workers. In parallel it does the
// accounting: daily totals and reconciliation.

import type { Logger } from "pino";
import { keepAccounts } from "./lib/accounting/keep.ts";
import { findAccountingState } from "./lib/accounting/run_repository.ts";
import { openTurns } from "./lib/accounting/turn_repository.ts";
import type { Settings } from "./lib/config.ts";
import type { Database } from "./lib/database.ts";
import { type ClockReading, openDatabaseClock } from "./lib/database_clock.ts";
import { describeError } from "./lib/errors.ts";
import { aborted, openAlarm, retry, runLoop, sleep } from "./lib/loop.ts";
import type { Queue } from "./lib/queue.ts";
import { decodeHint, encodeMessage } from "./lib/reservations/message.ts";
import {
  BEGINNING,
  type ClaimedReservation,
  claimDue,
  findNextScan,
  isBefore,
  type ScanPosition,
} from "./lib/reservations/scan_repository.ts";
import { findPositions, fromAfter, openSweeper } from "./lib/reservations/sweep.ts";
import { SCAN_TRIAL } from "./lib/reservations/trial_queries.ts";
import { type Metrics, serveHealth } from "./lib/service/health.ts";
import { runService } from "./lib/service/run_service.ts";

/** The sleep before the next look at a queue that is full, in milliseconds. */
const BACK_PRESSURE_MS = 200;
/** The shortest sleep, in milliseconds: due rows that another scheduler or a worker has locked must not cause a hot loop. */
const MIN_SLEEP_MS = 20;
/** How long to wait after a hint of a reservation that is due at once, in milliseconds: one scan then claims several. */
const HINT_MS = 5;
/** The longest time for the work in progress after a signal, in milliseconds. */
const STOP_MS = 5_000;
/**
 * The wait before the first accounting of a process, in milliseconds: after a start, what has become due meanwhile comes first. In
 * a drain of 60,000 reservations, an accounting at the start cost a quarter of the grants per second.
 */
const ACCOUNTING_START_MS = 60_000;
/** Waits after failures of the accounting, in milliseconds: if only an operator can fix the cause, frequent retries are useless. */
const ACCOUNTING_RETRY = { baseMs: 10_000, maxMs: 300_000 };
/** One for a page of rows, one to renew the turn meanwhile. The scans have a separate pool. */
const ACCOUNTING_CONNECTIONS = 2;
const SWEEP_CONNECTIONS = 1;

export interface ScanOptions {
  database: Database;
  queue: Pick<Queue, "depth" | "publish">;
  logger: Logger;
  config: Pick<
    Settings,
    "SCAN_BATCH" | "SCAN_INTERVAL_MS" | "LEASE_MS" | "PUBLISH_CHUNK" | "QUEUED_RESERVATIONS"
  >;
  /** Where to start; by default at the beginning. */
  from?: ScanPosition | undefined;
}

export interface Scanned {
  /** How many milliseconds to sleep before the next scan. */
  sleepMs: number;
  /** Where the next scan starts: what was due before that is claimed, or locked by another transaction. */
  from: ScanPosition;
  /** Undefined if the scan did not need the database's clock. */
  clock?: ClockReading;
}

/**
 * Scans once: claims due reservations, and publishes them. If a message is not confirmed, its rows stay PROCESSING, since the
 * message may have arrived: they are claimed again when their lease ends.
 *
 * @throws {QueueError} if RabbitMQ accepts no messages, before anything is claimed
 * @throws {DatabaseError}
 */
export async function scanAndPublish(options: ScanOptions): Promise<Scanned> {
  const { database, queue, logger, config, from = BEGINNING } = options;
  // The backlog belongs in MySQL, where it can still be cancelled: claim no more than the queue may hold.
  const depth = await queue.depth();
  if (depth * config.PUBLISH_CHUNK >= config.QUEUED_RESERVATIONS) return { sleepMs: BACK_PRESSURE_MS, from };

  const startedAt = performance.now();
  const limit = config.SCAN_BATCH;
  const withinMs = config.SCAN_INTERVAL_MS;
  const { clock, first, inMs, due } = await findNextScan(database, { from, withinMs, limit });
  const recent = fromAfter(clock.nowMs);
  if (!first || due === 0) {
    const sleepMs = Math.min(config.SCAN_INTERVAL_MS, Math.max(MIN_SLEEP_MS, inMs));
    return { sleepMs, from: recent, clock };
  }
  const claimed = await claimDue(database, { from: first, limit: due, leaseMs: config.LEASE_MS });
  const last = claimed.at(-1);
  if (last) {
    const messages = chunk(claimed, config.PUBLISH_CHUNK).map(encodeMessage);
    const confirmed = await queue.publish(messages);
    const facts = {
      claimed: claimed.length,
      messages: messages.length,
      confirmed,
      maxScanLateMs: Math.max(...claimed.map(({ lateMs }) => lateMs)),
      tookMs: Math.round(performance.now() - startedAt),
    };
    if (confirmed === messages.length) logger.info(facts, "published");
    else logger.warn(facts, "not all confirmed; the rows are claimed again when their lease ends");
  }
  const sleepMs = claimed.length === limit ? 0 : MIN_SLEEP_MS;
  // A claim of its limit may have left more behind its last row.
  const hasMore = last && claimed.length === due && isBefore(last, recent);
  return { sleepMs, from: hasMore ? { scanAt: last.scanAt, id: last.id } : recent, clock };
}

function chunk(claimed: readonly ClaimedReservation[], size: number): ClaimedReservation[][] {
  return Array.from({ length: Math.ceil(claimed.length / size) }, (_, index) =>
    claimed.slice(index * size, (index + 1) * size),
  );
}

/** The results of the last reconciliation and aggregation of any process. */
async function readMetrics(database: Database): Promise<Metrics> {
  const { differences, reconciledAt, aggregatedAt } = await findAccountingState(database);
  const secondsOf = (time: Date | null) => (time ? time.getTime() / 1_000 : undefined);
  return {
    pointservice_reconcile_differences: differences ?? undefined,
    pointservice_reconcile_finished_timestamp_seconds: secondsOf(reconciledAt),
    pointservice_aggregate_finished_timestamp_seconds: secondsOf(aggregatedAt),
  };
}

if (import.meta.main) {
  await runService({
    name: "scheduler",
    port: "SCHEDULER_PORT",
    settings: [
      "SCAN_INTERVAL_MS",
      "SCAN_BATCH",
      "LEASE_MS",
      "PUBLISH_CHUNK",
      "QUEUED_RESERVATIONS",
      "AGGREGATE_INTERVAL_MS",
      "AGGREGATE_TIME_ZONE",
    ],
    trial: SCAN_TRIAL,
    serve: (service) => serveHealth(service, { metrics: () => readMetrics(service.database) }),
    async main({ config, logger, signal, database, openDatabase, openQueue }) {
      const connected = Promise.withResolvers<void>();
      const alarm = openAlarm();
      const clock = openDatabaseClock((jump) => sweeper.onJump(jump));
      const queue = openQueue({
        connected: "connected to RabbitMQ",
        disconnected: "waiting for RabbitMQ",
        onConnected: connected.resolve,
        onHint(content) {
          const executeAt = decodeHint(content);
          if (executeAt) alarm.wakeIn(Math.max(HINT_MS, clock.msUntil(executeAt)));
        },
      });
      await Promise.race([connected.promise, aborted(signal)]);

      const failing = (message: string) => ({
        signal,
        onFailure: (error: unknown, retryInMs: number) =>
          logger.warn({ error: describeError(error), retryInMs }, message),
      });
      const positions = await retry(() => findPositions(database, logger), failing("scan failed"));
      if (!positions) return;

      const scan = async () => {
        // This scan sees the reservations of earlier hints, which are committed; it may miss those of later hints.
        alarm.clear();
        const { from } = positions;
        const scanned = await scanAndPublish({ database, queue, logger, config, from });
        // Unless the clock has gone back meanwhile, and everything starts from the beginning.
        if (positions.from === from) positions.from = scanned.from;
        if (scanned.clock) clock.read(scanned.clock);
        return scanned.sleepMs;
      };
      const scanning = runLoop(scan, { ...failing("scan failed"), alarm });

      // The scans never wait for the sweeps, nor for their connection.
      const swept = openDatabase({ connections: SWEEP_CONNECTIONS });
      const sweeper = openSweeper({
        database: swept,
        logger,
        leaseMs: config.LEASE_MS,
        clock,
        positions,
        async claimFrom(from) {
          const { sleepMs } = await scanAndPublish({ database: swept, queue, logger, config, from });
          return sleepMs === 0;
        },
        wakeScan: () => alarm.wakeIn(0),
      });
      const sweeping = runLoop(sweeper.sweep, failing("sweep failed"));

      // The scans never wait for the accounting, nor for its connections.
      const accounts = openDatabase({ connections: ACCOUNTING_CONNECTIONS });
      const turns = openTurns(accounts, { intervalMs: config.AGGREGATE_INTERVAL_MS });
      const keeping =
        config.AGGREGATE_INTERVAL_MS > 0 &&
        sleep(Math.min(config.AGGREGATE_INTERVAL_MS, ACCOUNTING_START_MS), signal).then(() =>
          runLoop(() => keepAccounts({ database: accounts, turns, logger, config, signal }), {
            ...ACCOUNTING_RETRY,
            signal,
            onFailure: (error, retryInMs) =>
              logger.error({ error: describeError(error), retryInMs }, "accounting failed"),
          }),
        );

      // If a step hangs, the lease of the rows that it has claimed ends.
      await Promise.race([
        Promise.all([scanning, sweeping, keeping]),
        aborted(signal).then(() => sleep(STOP_MS)),
      ]);
    },
  });
}
