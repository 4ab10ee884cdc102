// The worker takes messages from the queue and grants their reservations. One transaction writes DONE, ledger entry and balance
// for all messages that have arrived. Only after its COMMIT are the messages acknowledged.

import type { Logger } from "pino";
import { coalesce } from "./lib/coalesce.ts";
import type { Settings } from "./lib/config.ts";
import type { Database, Transaction } from "./lib/database.ts";
import { DatabaseError } from "./lib/database_errors.ts";
import { describeError } from "./lib/errors.ts";
import { aborted, backoffMs } from "./lib/loop.ts";
import { addPointsIdempotent, findGrantEntry } from "./lib/points/ledger_repository.ts";
import type { PointTransaction } from "./lib/points/point.ts";
import type { Outcome } from "./lib/queue.ts";
import {
  type LockedReservation,
  lockReservations,
  markDone,
  markFailed,
  scheduleRetry,
} from "./lib/reservations/claim_repository.ts";
import { decodeMessage, type ReservationMessage } from "./lib/reservations/message.ts";
import { serveHealth } from "./lib/service/health.ts";
import { runService } from "./lib/service/run_service.ts";
import { pingDatabase, waitForDatabase } from "./lib/service/wait_for_database.ts";

/** Concurrent transactions: while one waits for the disk, the other computes. Two grant 1.06 × as much as one on two cores. */
const WORKER_TRANSACTIONS = 2;
/** The maximum prefetch: if this worker hangs, these messages wait until their lease ends. */
const MAX_PREFETCH = 10_000;
/** Waits between the attempts of a reservation, in milliseconds: 1 to 2 s, 2 to 4 s … up to 1 h. Outages are not attempts. */
const RETRY = { baseMs: 2_000, maxMs: 3_600_000 };
/** The longest time to finish delivered messages after a signal, in milliseconds; the rest goes back to the queue. */
const STOP_MS = 4_000;
/** The longest time to grant the reservations of a batch one by one, in milliseconds; the rest is claimed again when its lease ends. */
const ONE_BY_ONE_MS = 20_000;

/**
 * The outcome for a reservation in a message:
 * - `granted`: its points are in the balance
 * - `over`: it was DONE, FAILED or CANCELLED before
 * - `not_due`: it is not claimed, or not due yet; the scheduler publishes it in time
 * - `failed`: it is FAILED, or will be retried; the row has the reason
 * - `busy`: another transaction holds a lock that it needs; it is claimed again when its lease ends, and no attempt is counted
 * - `unknown`: there is no such row
 */
type Verdict = "granted" | "over" | "not_due" | "failed" | "busy" | "unknown";

export interface GrantOptions {
  database: Database;
  logger: Logger;
  maxAttempts: number;
}

/**
 * Grants the reservations of some messages in one transaction, and returns the outcome of each message, in order.
 *
 * @throws {DatabaseError} if MySQL is unavailable: then no message may be acknowledged
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
  /** The longest time from `execute_at` to the grant, in milliseconds; unknown after grants one by one. */
  maxLateMs?: number;
}

async function grant(ids: readonly string[], options: GrantOptions): Promise<Granted> {
  try {
    return await options.database.transaction((transaction) => grantTogether(transaction, ids));
  } catch (error) {
    if (!(error instanceof DatabaseError) || error.isOutage) throw error;
    // One row is invalid, or locked: one by one, all others are granted.
    options.logger.warn({ error: describeError(error), count: ids.length }, "granting one by one");
    return { verdicts: await grantOneByOne(ids, options) };
  }
}

async function grantTogether(transaction: Transaction, ids: readonly string[]): Promise<Granted> {
  const verdicts = new Map<string, Verdict>();
  const dueIds: string[] = [];
  const entries: PointTransaction[] = [];
  let maxLateMs = 0;
  for (const row of await lockReservations(transaction, ids)) {
    const refused = refuse(row);
    verdicts.set(row.id, refused ?? "granted");
    if (refused) continue;
    dueIds.push(row.id);
    entries.push(entryOf(row));
    maxLateMs = Math.max(maxLateMs, row.lateMs);
  }
  for (const id of ids) if (!verdicts.has(id)) verdicts.set(id, "unknown");
  if (dueIds.length > 0) {
    await markDone(transaction, dueIds);
    // Last: until the COMMIT, all other changes of the same balances wait for these locks.
    await addPointsIdempotent(transaction, entries);
  }
  return { verdicts, maxLateMs };
}

/** The row decides, not the message: only a reservation that is claimed and due is granted. */
function refuse(row: LockedReservation): Verdict | undefined {
  if (row.status === "PROCESSING") return row.isDue ? undefined : "not_due";
  return row.status === "PENDING" ? "not_due" : "over";
}

function entryOf({ id, idempotencyKey, userId, pointAmount }: LockedReservation): PointTransaction {
  return { idempotencyKey, userId, pointAmount, kind: "grant", reservationId: id };
}

function isEntryOf(
  entry: Omit<PointTransaction, "kind">,
  { id, userId, pointAmount }: LockedReservation,
): boolean {
  return entry.reservationId === id && entry.userId === userId && entry.pointAmount === pointAmount;
}

async function grantOneByOne(ids: readonly string[], options: GrantOptions): Promise<Map<string, Verdict>> {
  const verdicts = new Map<string, Verdict>();
  // Users whose balance is locked: the worker does not wait for the same lock twice.
  const lockedUsers = new Set<string>();
  const end = performance.now() + ONE_BY_ONE_MS;
  for (const id of ids) {
    verdicts.set(id, performance.now() < end ? await grantAlone(id, lockedUsers, options) : "busy");
  }
  return verdicts;
}

async function grantAlone(id: string, lockedUsers: Set<string>, options: GrantOptions): Promise<Verdict> {
  let userId: string | undefined;
  try {
    return await options.database.transaction(async (transaction) => {
      const [row] = await lockReservations(transaction, [id]);
      const refused = row ? refuse(row) : "unknown";
      if (!row || refused) return refused ?? "unknown";
      userId = row.userId;
      if (lockedUsers.has(userId)) return "busy";
      const entry = await findGrantEntry(transaction, row.idempotencyKey);
      if (entry && !isEntryOf(entry, row)) {
        const reason = `The ledger already has the idempotency key, with other content: entry ${entry.id}`;
        return fail(transaction, row, { reason, logger: options.logger });
      }
      await markDone(transaction, [id]);
      if (!entry) await addPointsIdempotent(transaction, [entryOf(row)]);
      return "granted";
    });
  } catch (error) {
    if (!(error instanceof DatabaseError) || error.isOutage) throw error;
    if (!error.isContended) return recordFailure(id, error, options);
    if (userId !== undefined) lockedUsers.add(userId);
    options.logger.warn({ reservation: id, error: describeError(error) }, "locked by another transaction");
    return "busy";
  }
}

/** Counts an attempt. This needs a write to MySQL, so an outage of MySQL cannot end a reservation. */
async function recordFailure(id: string, error: DatabaseError, options: GrantOptions): Promise<Verdict> {
  const { database, logger, maxAttempts } = options;
  return database.transaction<Verdict>(async (transaction) => {
    const [row] = await lockReservations(transaction, [id]);
    const refused = row ? refuse(row) : "unknown";
    if (!row || refused) return refused ?? "unknown";
    if (error.kind === "out_of_range") {
      return fail(transaction, row, { reason: "The balance would be out of range", logger });
    }
    const attempts = row.attempts + 1;
    if (attempts >= maxAttempts) {
      return fail(transaction, row, {
        reason: `Gave up at attempt ${attempts}: ${error.message}`,
        logger,
      });
    }
    const retryInMs = backoffMs(attempts, RETRY);
    await scheduleRetry(transaction, id, { reason: error.message, retryInMs });
    logger.warn({ reservation: id, attempts, retryInMs, error: describeError(error) }, "grant failed");
    return "failed";
  });
}

async function fail(
  transaction: Transaction,
  { id }: LockedReservation,
  { reason, logger }: { reason: string; logger: Logger },
): Promise<Verdict> {
  await markFailed(transaction, id, { reason });
  logger.error({ reservation: id, reason }, "reservation FAILED");
  return "failed";
}

/** Decodes a message; logs the reason if it is unreadable. */
function readMessage(content: Buffer, logger: Logger): ReservationMessage[] | undefined {
  try {
    return decodeMessage(content);
  } catch (error) {
    logger.error({ error: describeError(error) }, "unreadable message: dead letter");
    return undefined;
  }
}

/**
 * The number of messages that a worker holds: enough for its concurrent transactions, and for the next ones. If the worker
 * hangs, they wait until their lease ends.
 */
export function prefetchOf({
  WORKER_BATCH,
  PUBLISH_CHUNK,
}: Pick<Settings, "WORKER_BATCH" | "PUBLISH_CHUNK">): number {
  return Math.min(MAX_PREFETCH, Math.ceil((5 * WORKER_TRANSACTIONS * WORKER_BATCH) / PUBLISH_CHUNK));
}

if (import.meta.main) {
  await runService({
    name: "worker",
    port: "WORKER_PORT",
    settings: ["WORKER_BATCH", "PUBLISH_CHUNK", "MAX_ATTEMPTS"],
    serve: serveHealth,
    async main({ config, logger, signal, database, openQueue }) {
      const grantCoalesced = coalesce(
        (messages: ReservationMessage[][]) =>
          processMessages(messages, { database, logger, maxAttempts: config.MAX_ATTEMPTS }),
        // The prefetch limits how many messages wait.
        {
          maxBatch: config.WORKER_BATCH,
          maxCalls: WORKER_TRANSACTIONS,
          weight: (message) => message.length,
        },
      );
      const queue = openQueue({ connected: "consuming", disconnected: "not consuming" });
      queue.consume({
        prefetch: prefetchOf(config),
        before: () => waitForDatabase(() => pingDatabase(database), { signal, logger }),
        async handle(content) {
          const message = readMessage(content, logger);
          return message ? grantCoalesced(message) : "dead";
        },
      });
      await aborted(signal);
      await queue.stop(STOP_MS);
    },
  });
}
