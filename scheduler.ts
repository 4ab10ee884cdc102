// The scheduler claims due reservations under a lease, and publishes them for the workers. In parallel it does the
// accounting: daily totals and reconciliation.

import type { Logger } from "pino";
import { keepAccounts } from "./lib/accounting/keep.ts";
import { findAccountingState } from "./lib/accounting/run_repository.ts";
import type { Settings } from "./lib/config.ts";
import type { Database } from "./lib/database.ts";
import { describeError } from "./lib/errors.ts";
import { aborted, openAlarm, runLoop, sleep } from "./lib/loop.ts";
import type { Queue } from "./lib/queue.ts";
import { type ClaimedReservation, claimDue, findNextScan } from "./lib/reservations/claim_repository.ts";
import { decodeHint, encodeMessage } from "./lib/reservations/message.ts";
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
/** Waits after failures of the accounting, in milliseconds: if only an operator can fix the cause, frequent retries are useless. */
const ACCOUNTING_RETRY = { baseMs: 10_000, maxMs: 300_000 };
/** One for a page of rows, one to renew the turn meanwhile. The scans have a separate pool. */
const ACCOUNTING_CONNECTIONS = 2;

export interface ScanOptions {
  database: Database;
  queue: Pick<Queue, "depth" | "publish">;
  logger: Logger;
  config: Pick<
    Settings,
    "SCAN_BATCH" | "SCAN_INTERVAL_MS" | "LEASE_MS" | "PUBLISH_CHUNK" | "QUEUED_RESERVATIONS"
  >;
}

export interface Scanned {
  /** How many milliseconds to sleep before the next scan. */
  sleepMs: number;
  /** The time by the database's clock at the end, in milliseconds since 1970; undefined if the scan did not need it. */
  nowMs?: number;
}

/**
 * Scans once: claims due reservations, and publishes them. If a message is not confirmed, its rows stay PROCESSING, since the
 * message may have arrived: they are claimed again when their lease ends.
 *
 * @throws {QueueError} if RabbitMQ accepts no messages, before anything is claimed
 * @throws {DatabaseError}
 */
export async function scanAndPublish({ database, queue, logger, config }: ScanOptions): Promise<Scanned> {
  // The backlog belongs in MySQL, where it can still be cancelled: claim no more than the queue may hold.
  const depth = await queue.depth();
  if (depth * config.PUBLISH_CHUNK >= config.QUEUED_RESERVATIONS) return { sleepMs: BACK_PRESSURE_MS };

  const startedAt = performance.now();
  const claimed = await claimDue(database, { limit: config.SCAN_BATCH, leaseMs: config.LEASE_MS });
  if (claimed.length > 0) {
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
  if (claimed.length === config.SCAN_BATCH) return { sleepMs: 0 };
  const { nowMs, inMs = config.SCAN_INTERVAL_MS } = await findNextScan(database);
  return { sleepMs: Math.min(config.SCAN_INTERVAL_MS, Math.max(MIN_SLEEP_MS, inMs)), nowMs };
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
    serve: (service) => serveHealth(service, { metrics: () => readMetrics(service.database) }),
    async main({ config, logger, signal, database, openDatabase, openQueue }) {
      const connected = Promise.withResolvers<void>();
      const alarm = openAlarm();
      // From `performance.now()` to the database's clock: hints contain times of that clock.
      let clockOffsetMs = 0;
      const queue = openQueue({
        connected: "connected to RabbitMQ",
        disconnected: "waiting for RabbitMQ",
        onConnected: connected.resolve,
        onHint(content) {
          const executeAt = decodeHint(content);
          if (!executeAt) return;
          alarm.wakeIn(Math.max(HINT_MS, executeAt.getTime() - clockOffsetMs - performance.now()));
        },
      });
      await Promise.race([connected.promise, aborted(signal)]);

      async function scan(): Promise<number> {
        // This scan sees the reservations of earlier hints, which are committed; it may miss those of later hints.
        alarm.clear();
        const { sleepMs, nowMs } = await scanAndPublish({ database, queue, logger, config });
        if (nowMs !== undefined) clockOffsetMs = nowMs - performance.now();
        return sleepMs;
      }
      const scanning = runLoop(scan, {
        signal,
        alarm,
        onFailure: (error, retryInMs) =>
          logger.warn({ error: describeError(error), retryInMs }, "scan failed"),
      });

      // The scans never wait for the accounting, nor for its connections.
      const accounts = openDatabase({ connections: ACCOUNTING_CONNECTIONS });
      const keeping =
        config.AGGREGATE_INTERVAL_MS > 0 &&
        runLoop(() => keepAccounts({ database: accounts, logger, config, signal }), {
          ...ACCOUNTING_RETRY,
          signal,
          onFailure: (error, retryInMs) =>
            logger.error({ error: describeError(error), retryInMs }, "accounting failed"),
        });

      // If a step hangs, the lease of the rows that it has claimed ends.
      await Promise.race([Promise.all([scanning, keeping]), aborted(signal).then(() => sleep(STOP_MS))]);
    },
  });
}
