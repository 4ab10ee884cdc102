// The worker takes messages from the queue and grants their reservations. One transaction writes DONE, ledger entry and balance
// for all messages that have arrived. Only after its COMMIT are the messages acknowledged. What another transaction has locked
// does not hold up the others: it waits in memory.

import type { Logger } from "pino";
import { coalesce } from "./lib/coalesce.ts";
import type { Settings } from "./lib/config.ts";
import type { Database, Transaction } from "./lib/database.ts";
import { DatabaseError } from "./lib/database_errors.ts";
import { describeError } from "./lib/errors.ts";
import { perSecond } from "./lib/log.ts";
import { aborted, backoffMs, sleep } from "./lib/loop.ts";
import { addPointsIdempotent, findGrantEntry, findTakenBalances } from "./lib/points/ledger_repository.ts";
import type { PointTransaction } from "./lib/points/point.ts";
import type { Outcome } from "./lib/queue.ts";
import {
  LONGEST_RETRY_MS,
  type LockedReservation,
  lockFree,
  lockReservations,
  markDone,
  markFailed,
  scheduleRetry,
} from "./lib/reservations/claim_repository.ts";
import { decodeMessage, type ReservationMessage } from "./lib/reservations/message.ts";
import { openPace, type Pace } from "./lib/reservations/pace.ts";
import { GRANT_TRIAL } from "./lib/reservations/trial_queries.ts";
import { openWaitingRoom, type WaitingRoom } from "./lib/reservations/waiting_room.ts";
import { serveHealth } from "./lib/service/health.ts";
import { runService } from "./lib/service/run_service.ts";
import { pingDatabase, waitForDatabase } from "./lib/service/wait_for_database.ts";

/** Concurrent transactions: while one waits for the disk, the other computes. Two grant 1.06 × as much as one on two cores. */
const WORKER_TRANSACTIONS = 2;
/** The maximum prefetch: if this worker hangs, these messages wait until their lease ends. */
const MAX_PREFETCH = 10_000;
/** Waits between the attempts of a reservation, in milliseconds: 1 to 2 s, 2 to 4 s … up to 1 h. Outages are not attempts. */
const RETRY = { baseMs: 2_000, maxMs: LONGEST_RETRY_MS };
/** The longest time to finish delivered messages after a signal, in milliseconds; the rest goes back to the queue. */
const STOP_MS = 4_000;
/** The maximum number of waiting reservations in one batch: they leave room for new messages. */
const MAX_RETRIED = 500;
/** How long MySQL may take to end a session, in milliseconds. */
const END_MS = 20;
/** A lock that is held longer than this is not that of a worker's usual batch, in milliseconds. */
const LONG_HELD_MS = 300;
/** The longest time to grant the reservations of a batch one by one, in milliseconds; the rest is claimed again when its lease ends. */
const ONE_BY_ONE_MS = 20_000;

/**
 * The outcome for a reservation in a message:
 * - `granted`: its points are in the balance
 * - `over`: it was DONE, FAILED or CANCELLED before
 * - `not_due`: it is not claimed, or not due yet; the scheduler publishes it in time
 * - `failed`: it is FAILED, or will be retried; the row has the reason
 * - `busy`: another transaction holds a row that it needs; it waits in memory, at the latest until its lease ends, and no attempt
 *   is counted
 * - `unknown`: there is no such row
 */
type Verdict = "granted" | "over" | "not_due" | "failed" | "busy" | "unknown";

export interface GrantOptions {
  database: Database;
  logger: Logger;
  maxAttempts: number;
  /** Where `busy` reservations wait; without it, each is claimed again when its lease ends. */
  room?: WaitingRoom;
  /** What the worker remembers of earlier batches; without it, a batch waits for locks as long as MySQL lets it. */
  pace?: Pace;
}

/**
 * Grants the reservations of some messages in one transaction, and returns the outcome of each message, in order. Those that
 * another transaction holds up are `ack`, too: they wait in `room`.
 *
 * @throws {DatabaseError} if MySQL is unavailable: then no message may be acknowledged
 */
export async function processMessages(
  messages: readonly GrantMessage[][],
  options: GrantOptions,
): Promise<Outcome[]> {
  const startedAt = performance.now();
  const ids = [...new Set(messages.flat().map((message) => message.reservation_id))];
  const { verdicts, held, maxLateMs } = await grant(ids, options);
  for (const [id, heldId] of held) {
    const heldMs = options.room?.put(heldId, id) ?? 0;
    if (heldMs > LONG_HELD_MS) options.pace?.beCareful();
  }

  const counts: Partial<Record<Verdict, number>> = {};
  for (const verdict of verdicts.values()) counts[verdict] = (counts[verdict] ?? 0) + 1;
  const tookMs = Math.round(performance.now() - startedAt);
  options.logger.info({ messages: messages.length, ...counts, maxLateMs, tookMs }, "processed");

  const isUnknown = (message: GrantMessage) => verdicts.get(message.reservation_id) === "unknown";
  const unknown = messages.flat().filter(isUnknown);
  if (unknown.length > 0) {
    const reservations = unknown.slice(0, 10).map((message) => message.reservation_id);
    const fields = { unknown: unknown.length, reservations };
    perSecond(options.logger).error(fields, "no such reservation: dead letter");
  }
  return messages.map((message) => (message.some(isUnknown) ? "dead" : "ack"));
}

/** The part of a message that says what to grant. */
type GrantMessage = Pick<ReservationMessage, "reservation_id">;

interface Granted {
  verdicts: Map<string, Verdict>;
  /** For each `busy` reservation what another transaction holds: its own id, or its user's. */
  held: Map<string, string>;
  /** The greatest lateness of a grant, in milliseconds; unknown after grants one by one. */
  maxLateMs?: number;
}

async function grant(ids: readonly string[], options: GrantOptions): Promise<Granted> {
  try {
    return await grantBatch(ids, options);
  } catch (error) {
    if (!(error instanceof DatabaseError) || error.isOutage) throw error;
    // One row is invalid: one by one, all others are granted.
    options.logger.warn({ error: describeError(error), count: ids.length }, "granting one by one");
    return grantOneByOne(ids, options);
  }
}

/**
 * Usually waits for locks: those of other workers are short, and skipping them would make two workers with the same users grant
 * less. If that takes too long, and for some seconds after it, grants around what is locked.
 */
async function grantBatch(ids: readonly string[], options: GrantOptions): Promise<Granted> {
  const { database, pace } = options;
  const startedAt = performance.now();
  const stallMs = pace?.stallMs();
  let isStalled = false;
  if (!pace?.isCareful()) {
    try {
      const granted = await database.transaction((transaction) => grantTogether(transaction, ids), {
        workMs: stallMs,
      });
      pace?.record(performance.now() - startedAt);
      return granted;
    } catch (error) {
      if (!isStall(error)) throw error;
      isStalled = true;
      // MySQL ends the session that waits; until then, that one holds the rows.
      await sleep(END_MS);
    }
  }
  const carefulAt = performance.now();
  const granted = await grantAround(ids, options);
  if (granted.held.size === 0) pace?.record(performance.now() - carefulAt, { isStalled });
  else if (isStalled) pace?.beCareful();
  if (isStalled) {
    const fields = { waitedMs: Math.round(carefulAt - startedAt), busy: granted.held.size };
    perSecond(options.logger).warn(fields, "a batch took too long: granted around what is locked");
  }
  return granted;
}

/** Whether work has waited too long for a lock. */
function isStall(error: unknown): boolean {
  return error instanceof DatabaseError && (error.kind === "timeout" || error.isContended);
}

async function grantTogether(transaction: Transaction, ids: readonly string[]): Promise<Granted> {
  const rows = await lockReservations(transaction, ids);
  return grantRows(transaction, rows, ids);
}

/** Grants rows that are locked. An id without a row is unknown. */
async function grantRows(
  transaction: Transaction,
  rows: readonly LockedReservation[],
  ids: readonly string[],
): Promise<Granted> {
  const verdicts = new Map<string, Verdict>();
  const dueIds: string[] = [];
  const entries: PointTransaction[] = [];
  let maxLateMs = 0;
  for (const row of rows) {
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
  return { verdicts, held: new Map(), maxLateMs };
}

/** Grants all that no other transaction holds up, without waiting for what is locked. */
async function grantAround(
  ids: readonly string[],
  { database, pace }: Pick<GrantOptions, "database" | "pace">,
): Promise<Granted> {
  const { granted, unlocked } = await database.transaction((transaction) => grantFree(transaction, ids));
  const taken = await findTakenBalances(database, [...new Set(unlocked.values())]);
  const newUsers = new Map<string, string>();
  for (const [id, userId] of unlocked) {
    if (taken.has(userId)) holdUp(granted, id, userId);
    else newUsers.set(id, userId);
  }
  if (newUsers.size === 0) return granted;
  // Last, apart from the others: somebody may hold the place of a balance that does not exist yet.
  try {
    const newIds = [...newUsers.keys()];
    const others = await database.transaction((transaction) => grantTogether(transaction, newIds), {
      workMs: pace?.stallMs(),
    });
    for (const [id, verdict] of others.verdicts) granted.verdicts.set(id, verdict);
    granted.maxLateMs = Math.max(granted.maxLateMs ?? 0, others.maxLateMs ?? 0);
  } catch (error) {
    if (!isStall(error)) throw error;
    for (const [id, userId] of newUsers) holdUp(granted, id, userId);
  }
  return granted;
}

function holdUp({ verdicts, held }: Granted, id: string, heldId: string): void {
  verdicts.set(id, "busy");
  held.set(id, heldId);
}

/** Grants those whose row and whose user's balance can be locked at once. */
async function grantFree(
  transaction: Transaction,
  ids: readonly string[],
): Promise<{
  granted: Granted;
  /** The users of due reservations whose balance could not be locked, or does not exist, by reservation. */
  unlocked: Map<string, string>;
}> {
  const { free, held } = await lockFree(transaction, ids);
  const unlocked = new Map<string, string>();
  for (const row of free) {
    if (!row.hasBalance && refuse(row) === undefined) unlocked.set(row.id, row.userId);
  }
  const left = new Set(ids).difference(new Set([...held, ...unlocked.keys()]));
  const rows = free.filter(({ id }) => left.has(id));
  const granted = await grantRows(transaction, rows, [...left]);
  for (const id of held) holdUp(granted, id, id);
  return { granted, unlocked };
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

async function grantOneByOne(ids: readonly string[], options: GrantOptions): Promise<Granted> {
  const granted: Granted = { verdicts: new Map(), held: new Map() };
  const end = performance.now() + ONE_BY_ONE_MS;
  for (const id of ids) {
    if (performance.now() > end) granted.verdicts.set(id, "busy");
    else await grantAlone(id, granted, options);
  }
  return granted;
}

async function grantAlone(id: string, granted: Granted, options: GrantOptions): Promise<void> {
  try {
    const { verdicts, held } = await grantAround([id], options);
    for (const [, verdict] of verdicts) granted.verdicts.set(id, verdict);
    for (const [, heldId] of held) granted.held.set(id, heldId);
  } catch (error) {
    if (!(error instanceof DatabaseError) || error.isOutage) throw error;
    const verdict = error.isContended ? "busy" : await refuseRow(id, error, options);
    if (verdict === "busy") holdUp(granted, id, id);
    else granted.verdicts.set(id, verdict);
  }
}

/** Finds out why a row cannot be granted, and records it. */
async function refuseRow(id: string, error: DatabaseError, options: GrantOptions): Promise<Verdict> {
  return options.database.transaction(async (transaction) => {
    const { free, held } = await lockFree(transaction, [id]);
    if (held.length > 0) return "busy";
    const [row] = free;
    const refused = row ? refuse(row) : "unknown";
    if (!row || refused) return refused ?? "unknown";
    const entry = await findGrantEntry(transaction, row.idempotencyKey);
    if (!entry) return recordFailure(transaction, row, { ...options, error });
    if (isEntryOf(entry, row)) {
      await markDone(transaction, [id]);
      return "granted";
    }
    const reason = `The ledger already has the idempotency key, with other content: entry ${entry.id}`;
    return fail(transaction, row, { reason, logger: options.logger });
  });
}

/** Counts an attempt. This needs a write to MySQL, so an outage of MySQL cannot end a reservation. */
async function recordFailure(
  transaction: Transaction,
  row: LockedReservation,
  { error, logger, maxAttempts }: GrantOptions & { error: DatabaseError },
): Promise<Verdict> {
  if (error.kind === "out_of_range") {
    return fail(transaction, row, { reason: "The balance would be out of range", logger });
  }
  const attempts = row.attempts + 1;
  if (attempts >= maxAttempts) {
    return fail(transaction, row, { reason: `Gave up at attempt ${attempts}: ${error.message}`, logger });
  }
  const retryInMs = backoffMs(attempts, RETRY);
  await scheduleRetry(transaction, row.id, { reason: error.message, retryInMs });
  logger.warn({ reservation: row.id, attempts, retryInMs, error: describeError(error) }, "grant failed");
  return "failed";
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
    perSecond(logger).error({ error: describeError(error) }, "unreadable message: dead letter");
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

export interface GranterOptions extends Pick<GrantOptions, "database" | "logger" | "maxAttempts"> {
  /** How many reservations are granted in one transaction. */
  batch: number;
  /** When it is aborted, what waits for others' locks is left to its lease. */
  signal: AbortSignal;
}

/** Makes a function that grants the reservations of a message, together with those of others. */
export function openGranter({ batch, signal, ...given }: GranterOptions) {
  const onFull = (count: number) =>
    perSecond(given.logger).warn({ count }, "too many reservations wait for locks: left to their lease");
  const room = openWaitingRoom({ onFull });
  const options = { ...given, room, pace: openPace() };
  const grantBatches = coalesce(
    (messages: GrantMessage[][]) => processMessages(messages, options),
    // The prefetch limits how many messages wait.
    { maxBatch: batch, maxCalls: WORKER_TRANSACTIONS, weight: (message) => message.length },
  );
  room.run({
    grant: (ids) => grantBatches(ids.map((id) => ({ reservation_id: id }))),
    maxBatch: Math.min(MAX_RETRIED, batch),
    signal,
  });
  return async function grantMessage(message: readonly ReservationMessage[]): Promise<Outcome> {
    const free = message.filter(({ reservation_id: id, user_id: userId }) => !room.join({ id, userId }));
    return free.length > 0 ? grantBatches(free) : "ack";
  };
}

if (import.meta.main) {
  await runService({
    name: "worker",
    port: "WORKER_PORT",
    settings: ["WORKER_BATCH", "PUBLISH_CHUNK", "MAX_ATTEMPTS"],
    trial: GRANT_TRIAL,
    serve: serveHealth,
    async main({ config, logger, signal, database, openQueue }) {
      const grantCoalesced = openGranter({
        database,
        logger,
        signal,
        maxAttempts: config.MAX_ATTEMPTS,
        batch: config.WORKER_BATCH,
      });
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
