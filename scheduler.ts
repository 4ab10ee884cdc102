import type { Logger } from "pino";
import { aggregate } from "./lib/aggregate.ts";
import { findBooksState } from "./lib/book_repository.ts";
import { readConfig, type Settings } from "./lib/config.ts";
import { type Database, openDatabase } from "./lib/database.ts";
import { DomainError } from "./lib/errors.ts";
import { openAlarm, runLoop, sleep } from "./lib/loop.ts";
import { decodeHint, encodeMessage } from "./lib/message.ts";
import { openQueue, type Queue } from "./lib/queue.ts";
import { describeDifference, reconcile } from "./lib/reconcile.ts";
import { type ClaimedReservation, claimDue, findNextScan } from "./lib/reservation_repository.ts";
import {
  aborted,
  describeError,
  logRetry,
  pingDatabase,
  runService,
  serveHealth,
  waitForDatabase,
} from "./lib/service.ts";
import { endTurn, keepTurn, takeTurn } from "./lib/total_repository.ts";
import { checkDatabase } from "./sql/migrate.ts";

/** How soon to look again while the queue is deep. */
const BACK_PRESSURE_MS = 200;
/** How long a scan under way may take after a signal, in milliseconds. */
const STOP_MS = 5_000;
/** The shortest sleep: rows that are due but held by another scheduler or worker must not make a hot loop. */
const MIN_SLEEP_MS = 20;
/** How long to gather what is reserved for at once, before one scan takes all of it, in milliseconds. */
const HINT_MS = 5;

/** How often to ask whether it is time to aggregate, in milliseconds. */
const TURN_MS = 10_000;
/** How often to say that the turn is still taken, in milliseconds. */
const KEEP_TURN_MS = 10_000;
/** After a failure of the books, in milliseconds: what can only be mended by hand need not be tried every second. */
const BOOKS_RETRY = { baseMs: 10_000, maxMs: 300_000 };
/** One for a page of the books, one to keep the turn meanwhile: scans have theirs for themselves. */
const BOOKS_CONNECTIONS = 2;
/** The most differences that one run logs; it counts all of them. */
const MAX_LOGGED = 100;

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
  /** What the database's clock said at the end, in milliseconds since 1970; undefined where nobody asked it. */
  nowMs?: number;
}

/**
 * One scan: claims what is due, and publishes it. A row whose message was not confirmed is left alone: it may have arrived,
 * and when its lease ends it is claimed again.
 *
 * @throws {QueueError} where RabbitMQ takes no messages, before anything is claimed
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
    logger[confirmed === messages.length ? "info" : "warn"](
      {
        claimed: claimed.length,
        messages: messages.length,
        confirmed,
        maxScanLateMs: Math.max(...claimed.map(({ lateMs }) => lateMs)),
        tookMs: Math.round(performance.now() - startedAt),
      },
      confirmed === messages.length ? "published" : "not all confirmed; their leases bring them again",
    );
  }
  if (claimed.length === config.SCAN_BATCH) return { sleepMs: 0 };
  const { nowMs, inMs = config.SCAN_INTERVAL_MS } = await findNextScan(database);
  return { sleepMs: Math.min(config.SCAN_INTERVAL_MS, Math.max(MIN_SLEEP_MS, inMs)), nowMs };
}

export interface BooksOptions {
  database: Database;
  logger: Logger;
  config: Pick<Settings, "AGGREGATE_INTERVAL_MS" | "AGGREGATE_TIME_ZONE" | "LEASE_MS">;
  signal: AbortSignal;
}

/**
 * Where it is time, and no other scheduler is at it: adds what is new in the ledger to the daily totals, then compares what was
 * changed with what it must agree with. A difference is logged, and the service goes on. A run that dies is done again by
 * whoever comes a minute later.
 *
 * @returns how many milliseconds to sleep before asking again
 * @throws {DatabaseError}
 */
export async function keepBooks({ database, logger, config, signal }: BooksOptions): Promise<number> {
  const intervalMs = config.AGGREGATE_INTERVAL_MS;
  const sleepMs = Math.min(intervalMs, TURN_MS);
  const turn = await takeTurn(database, { intervalMs });
  if (!turn) return sleepMs;
  // What cannot keep it, as MySQL is away, notices so by itself.
  const keeping = setInterval(() => keepTurn(database, turn).catch(() => undefined), KEEP_TURN_MS);
  let isFinished = false;
  try {
    await countAndCompare({ database, logger, config, signal });
    isFinished = !signal.aborted;
  } finally {
    clearInterval(keeping);
    await endTurn(database, turn, { isFinished }).catch(() => undefined);
  }
  return sleepMs;
}

async function countAndCompare({ database, logger, config, signal }: BooksOptions): Promise<void> {
  const startedAt = performance.now();
  const aggregating = aggregate(database, { timeZone: config.AGGREGATE_TIME_ZONE, signal });
  const counted = await aggregating.catch((error) => {
    // Of another zone: a setting is to be mended, and the books can be compared all the same.
    if (!(error instanceof DomainError)) throw error;
    logger.error({ error: describeError(error) }, "the totals could not be made");
    return undefined;
  });
  let logged = 0;
  const found = await reconcile(database, {
    ...{ leaseMs: config.LEASE_MS, signal },
    onDifference(difference) {
      if (logged++ < MAX_LOGGED)
        logger.error({ difference: describeDifference(difference) }, "the books differ");
    },
  });
  if (signal.aborted) return;
  const { users, reservations, entries, days, differences } = found;
  logger[differences > 0 ? "error" : "info"](
    {
      counted,
      users,
      reservations,
      entries,
      days,
      differences,
      tookMs: Math.round(performance.now() - startedAt),
    },
    differences > 0 ? "the books differ: `bun run reconcile` names all of it" : "the books agree",
  );
}

function chunk(claimed: readonly ClaimedReservation[], size: number): ClaimedReservation[][] {
  return Array.from({ length: Math.ceil(claimed.length / size) }, (_, index) =>
    claimed.slice(index * size, (index + 1) * size),
  );
}

if (import.meta.main) {
  await runService({
    name: "scheduler",
    configure: () =>
      readConfig(Bun.env, [
        "DATABASE_URL",
        "DATABASE_CONNECTIONS",
        "ALLOW_LOSSY_DATABASE",
        "AMQP_URL",
        "QUEUE",
        "HOST",
        "SCHEDULER_PORT",
        "SCAN_INTERVAL_MS",
        "SCAN_BATCH",
        "LEASE_MS",
        "PUBLISH_CHUNK",
        "PUBLISH_TIMEOUT_MS",
        "QUEUED_RESERVATIONS",
        "AGGREGATE_INTERVAL_MS",
        "AGGREGATE_TIME_ZONE",
        "LOG_LEVEL",
      ]),
    async main({ config, logger, signal }) {
      const database = openDatabase(config.DATABASE_URL, {
        connections: config.DATABASE_CONNECTIONS,
        onRetry: logRetry(logger),
      });
      const books = openDatabase(config.DATABASE_URL, {
        connections: BOOKS_CONNECTIONS,
        onRetry: logRetry(logger),
      });
      let queue: Queue | undefined;
      const health = serveHealth({
        hostname: config.HOST,
        port: config.SCHEDULER_PORT,
        logger,
        async isReady() {
          await pingDatabase(database);
          return queue?.isReady() ?? false;
        },
        async metrics() {
          const { differences, reconciledAt, aggregatedAt } = await findBooksState(database);
          const secondsOf = (time: Date | null) => time?.getTime() && time.getTime() / 1_000;
          return {
            pointservice_reconcile_differences: differences ?? undefined,
            pointservice_reconcile_finished_timestamp_seconds: secondsOf(reconciledAt),
            pointservice_aggregate_finished_timestamp_seconds: secondsOf(aggregatedAt),
          };
        },
      });
      if (await waitForDatabase(() => checkDatabase(database, config), { signal, logger })) {
        const connected = Promise.withResolvers<void>();
        const alarm = openAlarm();
        // What the database's clock is ahead of this process's own: hints name times of the former.
        let aheadMs = 0;
        const opened = openQueue(config.AMQP_URL, {
          name: config.QUEUE,
          publishTimeoutMs: config.PUBLISH_TIMEOUT_MS,
          onConnected() {
            logger.info({ queue: config.QUEUE }, "connected to RabbitMQ");
            connected.resolve();
          },
          onDisconnected: (reason, retryInMs) => logger.warn({ reason, retryInMs }, "waiting for RabbitMQ"),
          onHint(content) {
            const executeAt = decodeHint(content);
            if (executeAt) {
              alarm.wakeIn(Math.max(HINT_MS, executeAt.getTime() - aheadMs - performance.now()));
            }
          },
        });
        queue = opened;
        await Promise.race([connected.promise, aborted(signal)]);
        const scan = async () => {
          // What was hinted at before is in the tables by now; what comes from here on may not be seen by this scan.
          alarm.clear();
          const { sleepMs, nowMs } = await scanAndPublish({ database, queue: opened, logger, config });
          if (nowMs !== undefined) aheadMs = nowMs - performance.now();
          return sleepMs;
        };
        const scanning = runLoop(scan, {
          signal,
          alarm,
          onFailure: (error, retryInMs) =>
            logger.warn({ error: describeError(error), retryInMs }, "scan failed"),
        });
        // Beside the scans, which never wait for it.
        const keepingBooks =
          config.AGGREGATE_INTERVAL_MS > 0 &&
          runLoop(() => keepBooks({ database: books, logger, config, signal }), {
            ...{ signal, ...BOOKS_RETRY },
            onFailure: (error, retryInMs) =>
              logger.error({ error: describeError(error), retryInMs }, "the books could not be kept"),
          });
        // A step that hangs is left to the lease of what it had claimed.
        await Promise.race([
          Promise.all([scanning, keepingBooks]),
          aborted(signal).then(() => sleep(STOP_MS)),
        ]);
      }
      await Promise.all([queue?.close(), database.close(), books.close(), health.stop()]);
    },
  });
}
