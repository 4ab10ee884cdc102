import type { Logger } from "pino";
import { coalesce } from "./lib/coalesce.ts";
import { readConfig } from "./lib/config.ts";
import { type Connection, type Database, DatabaseError, openDatabase } from "./lib/database.ts";
import { backoffMs } from "./lib/loop.ts";
import { decodeMessage, type ReservationMessage } from "./lib/message.ts";
import { addPointsIdempotent, findLedgerEntry } from "./lib/point_repository.ts";
import { type Outcome, openQueue, type Queue } from "./lib/queue.ts";
import {
  type LockedReservation,
  lockReservations,
  markDone,
  markFailed,
  scheduleRetry,
} from "./lib/reservation_repository.ts";
import {
  aborted,
  describeError,
  logRetry,
  pingDatabase,
  runService,
  serveHealth,
  waitForDatabase,
} from "./lib/service.ts";
import { checkDatabase } from "./sql/migrate.ts";

/** Waits between the attempts of a reservation that fails for a reason of its own: 1 to 2 s, 2 to 4 s … up to 1 h. */
const RETRY = { baseMs: 2_000, maxMs: 3_600_000 };
/** How long a worker that was told to stop grants what it holds, in milliseconds; the rest goes back to the queue. */
const STOP_MS = 4_000;
/** How long one batch may be granted one by one, in milliseconds; the rest is left to its lease. */
const ONE_BY_ONE_MS = 20_000;

/**
 * What became of a reservation that a message named:
 * - `granted`: its points are in the balance
 * - `over`: it was DONE, FAILED or CANCELLED before
 * - `not_due`: it is not claimed, or its time has not come; the scheduler brings it when it has
 * - `failed`: refused for good, or to be tried again; the row says why
 * - `busy`: somebody holds a lock on what it needs; its lease brings it again, and no attempt is counted
 * - `unknown`: there is no such row
 */
type Verdict = "granted" | "over" | "not_due" | "failed" | "busy" | "unknown";

export interface GrantOptions {
  database: Database;
  logger: Logger;
  maxAttempts: number;
}

/**
 * Grants what some messages name, all in one transaction, and says what becomes of each message, in their order.
 *
 * @throws {DatabaseError} where MySQL is away: no message may be acknowledged then
 */
export async function processMessages(
  messages: readonly ReservationMessage[][],
  options: GrantOptions,
): Promise<Outcome[]> {
  const startedAt = performance.now();
  const ids = [...new Set(messages.flat().map((message) => message.reservation_id))];
  const { verdicts, maxLateMs } = await grant(ids, options);

  const counts: Partial<Record<Verdict, number>> = {};
  for (const verdict of verdicts.values()) counts[verdict] = (counts[verdict] ?? 0) + 1;
  const tookMs = Math.round(performance.now() - startedAt);
  options.logger.info({ messages: messages.length, ...counts, maxLateMs, tookMs }, "processed");

  const isUnknown = (message: ReservationMessage) => verdicts.get(message.reservation_id) === "unknown";
  const unknown = messages.flat().filter(isUnknown);
  if (unknown.length > 0) {
    const reservations = unknown.slice(0, 10).map((message) => message.reservation_id);
    options.logger.error({ count: unknown.length, reservations }, "no such reservation: dead letter");
  }
  return messages.map((message) => (message.some(isUnknown) ? "dead" : "ack"));
}

interface Granted {
  verdicts: Map<string, Verdict>;
  /** The longest time between `execute_at` and the grant, in milliseconds; not known of grants one by one. */
  maxLateMs?: number;
}

async function grant(ids: readonly string[], options: GrantOptions): Promise<Granted> {
  try {
    return await options.database.transaction((connection) => grantTogether(connection, ids));
  } catch (error) {
    if (!(error instanceof DatabaseError) || error.isOutage) throw error;
    // One row is at fault, or locked: alone, each of the others is granted.
    options.logger.warn({ error: describeError(error), count: ids.length }, "granting one by one");
    return { verdicts: await grantOneByOne(ids, options) };
  }
}

async function grantOneByOne(ids: readonly string[], options: GrantOptions): Promise<Map<string, Verdict>> {
  const verdicts = new Map<string, Verdict>();
  // Users whose balance was found locked: nobody waits for the same lock twice.
  const lockedUsers = new Set<string>();
  const end = performance.now() + ONE_BY_ONE_MS;
  for (const id of ids) {
    verdicts.set(id, performance.now() < end ? await grantAlone(id, lockedUsers, options) : "busy");
  }
  return verdicts;
}

async function grantTogether(connection: Connection, ids: readonly string[]): Promise<Granted> {
  const rows = await lockReservations(connection, ids);
  const due = rows.filter((row) => refuse(row) === undefined);
  if (due.length > 0) {
    await markDone(
      connection,
      due.map(({ id }) => id),
    );
    // Last: everybody who gets points at this moment waits for the lock on the balance, from here to the COMMIT.
    await addPointsIdempotent(connection, due);
  }
  const verdicts = new Map<string, Verdict>(ids.map((id) => [id, "unknown"]));
  for (const row of rows) verdicts.set(row.id, refuse(row) ?? "granted");
  return { verdicts, maxLateMs: due.reduce((max, { lateMs }) => Math.max(max, lateMs), 0) };
}

/** The row decides, not the message: only what is claimed and due is granted. */
function refuse(row: LockedReservation): Verdict | undefined {
  if (row.status === "PROCESSING") return row.isDue ? undefined : "not_due";
  return row.status === "PENDING" ? "not_due" : "over";
}

async function grantAlone(id: string, lockedUsers: Set<string>, options: GrantOptions): Promise<Verdict> {
  let userId: string | undefined;
  try {
    return await options.database.transaction(async (connection) => {
      const [row] = await lockReservations(connection, [id]);
      const refused = row ? refuse(row) : "unknown";
      if (!row || refused) return refused ?? "unknown";
      userId = row.userId;
      if (lockedUsers.has(userId)) return "busy";
      const entry = await findLedgerEntry(connection, row.idempotencyKey);
      if (entry && (entry.userId !== row.userId || entry.pointAmount !== row.pointAmount)) {
        const reason = `The ledger has the idempotency key already, with other content: entry ${entry.id}`;
        return fail(connection, row, { reason, ...options });
      }
      await markDone(connection, [id]);
      if (!entry) await addPointsIdempotent(connection, [row]);
      return "granted";
    });
  } catch (error) {
    if (!(error instanceof DatabaseError) || error.isOutage) throw error;
    if (!error.isContended) return recordFailure(id, error, options);
    if (userId !== undefined) lockedUsers.add(userId);
    options.logger.warn({ reservation: id, error: describeError(error) }, "locked by somebody else");
    return "busy";
  }
}

/** Counts an attempt. It takes a write to MySQL, so that no outage of MySQL can end a reservation. */
async function recordFailure(id: string, error: DatabaseError, options: GrantOptions): Promise<Verdict> {
  return options.database.transaction<Verdict>(async (connection) => {
    const [row] = await lockReservations(connection, [id]);
    const refused = row ? refuse(row) : "unknown";
    if (!row || refused) return refused ?? "unknown";
    if (error.kind === "out_of_range") {
      return fail(connection, row, { reason: "The balance would be out of range", ...options });
    }
    const attempts = row.attempts + 1;
    if (attempts >= options.maxAttempts) {
      return fail(connection, row, {
        reason: `Gave up after ${attempts} attempts: ${error.message}`,
        ...options,
      });
    }
    const retryInMs = backoffMs(attempts, RETRY);
    await scheduleRetry(connection, id, { reason: error.message, retryInMs });
    options.logger.warn(
      { reservation: id, attempts, retryInMs, error: describeError(error) },
      "grant failed",
    );
    return "failed";
  });
}

async function fail(
  connection: Connection,
  { id }: LockedReservation,
  { reason, logger }: { reason: string; logger: Logger },
): Promise<Verdict> {
  await markFailed(connection, id, { reason });
  logger.error({ reservation: id, reason }, "reservation FAILED");
  return "failed";
}

/** Reads a message, and says in the log why one cannot be read. */
function readMessage(content: Buffer, logger: Logger): ReservationMessage[] | undefined {
  try {
    return decodeMessage(content);
  } catch (error) {
    logger.error({ error: describeError(error) }, "unreadable message: dead letter");
    return undefined;
  }
}

if (import.meta.main) {
  await runService({
    name: "worker",
    configure: () =>
      readConfig(Bun.env, [
        "DATABASE_URL",
        "DATABASE_CONNECTIONS",
        "ALLOW_LOSSY_DATABASE",
        "AMQP_URL",
        "QUEUE",
        "HOST",
        "WORKER_PORT",
        "WORKER_BATCH",
        "WORKER_PREFETCH",
        "WORKER_TRANSACTIONS",
        "MAX_ATTEMPTS",
        "LOG_LEVEL",
      ]),
    async main({ config, logger, signal }) {
      const database = openDatabase(config.DATABASE_URL, {
        connections: config.DATABASE_CONNECTIONS,
        onRetry: logRetry(logger),
      });
      let queue: Queue | undefined;
      const health = serveHealth({
        hostname: config.HOST,
        port: config.WORKER_PORT,
        logger,
        async isReady() {
          await pingDatabase(database);
          return queue?.isReady() ?? false;
        },
      });
      if (await waitForDatabase(() => checkDatabase(database, config), { signal, logger })) {
        queue = openQueue(config.AMQP_URL, {
          name: config.QUEUE,
          onConnected: () => logger.info({ queue: config.QUEUE }, "consuming"),
          onDisconnected: (reason, retryInMs) => logger.warn({ reason, retryInMs }, "not consuming"),
        });
        const grantCoalesced = coalesce(
          (messages: ReservationMessage[][]) =>
            processMessages(messages, { database, logger, maxAttempts: config.MAX_ATTEMPTS }),
          // What waits is bounded by the prefetch.
          {
            maxBatch: config.WORKER_BATCH,
            maxCalls: config.WORKER_TRANSACTIONS,
            weight: (message) => message.length,
          },
        );
        queue.consume({
          prefetch: config.WORKER_PREFETCH,
          before: () => waitForDatabase(() => pingDatabase(database), { signal, logger }),
          async handle(content) {
            const message = readMessage(content, logger);
            return message ? grantCoalesced(message) : "dead";
          },
        });
        await aborted(signal);
        await queue.stop(STOP_MS);
      }
      await Promise.all([queue?.close(), database.close(), health.stop()]);
    },
  });
}
