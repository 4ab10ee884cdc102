import { and, eq, inArray, sql } from "drizzle-orm";
import { BUSY, openUntilFree, type UntilFree } from "../busy.ts";
import { OverloadError } from "../coalesce.ts";
import type { Connection, Database, Transaction } from "../database.ts";
import { DatabaseError } from "../database_errors.ts";
import { backoffMs, sleep } from "../loop.ts";
import { type ReservationRow, type ReservationStatus, pointReservations as reservations } from "../schema.ts";
import type { Reservation, ReservationPatch } from "./reservation.ts";
import { findDetails, type ReservationDetails } from "./reservation_queries.ts";

/** The outcome of a request to reserve. */
export type CreateOutcome =
  | { kind: "created"; reservation: Reservation }
  /** The key was used before, with the same content: the first reservation. */
  | { kind: "replayed"; reservation: Reservation }
  /** The key was used before, with other content. */
  | { kind: "conflict" };

/**
 * Inserts reservations in one statement; if it runs twice, it inserts once. A key that is already used, even in the same batch,
 * affects only its own reservation.
 */
export async function createReservations(
  connection: Connection,
  batch: readonly Reservation[],
): Promise<CreateOutcome[]> {
  const rows = batch.map(({ id, userId, pointAmount, executeAt, idempotencyKey, campaign }) => [
    id,
    userId,
    pointAmount,
    executeAt,
    idempotencyKey,
    campaign,
  ]);
  // Not INSERT IGNORE: it also ignores truncation, and a truncated user id could be that of another user.
  const { affectedRows } = await connection.execute(
    `/* create_reservations */ insert into point_reservations
       (id, user_id, point_amount, execute_at, idempotency_key, campaign)
     values ? on duplicate key update id = id`,
    [rows],
  );
  if (affectedRows === batch.length) {
    return batch.map((reservation) => ({ kind: "created", reservation }));
  }
  const firsts = await findByIdempotencyKeys(connection, batch);
  return batch.map((reservation) => outcomeOf(reservation, firsts));
}

/** The outcome for a reservation: its key belongs to the first reservation with this key. */
function outcomeOf(reservation: Reservation, firsts: ReadonlyMap<string, Reservation>): CreateOutcome {
  const first = firsts.get(reservation.idempotencyKey);
  if (!first) throw new Error("A reservation is neither inserted nor found by its idempotency key");
  if (first.id === reservation.id) return { kind: "created", reservation };
  return hasSameContent(first, reservation) ? { kind: "replayed", reservation: first } : { kind: "conflict" };
}

function hasSameContent(first: Reservation, second: Reservation): boolean {
  return (
    first.userId === second.userId &&
    first.pointAmount === second.pointAmount &&
    first.executeAt.getTime() === second.executeAt.getTime() &&
    first.campaign === second.campaign
  );
}

/** The reservations with these keys, by key, with their original content even if they were patched. */
async function findByIdempotencyKeys(
  { drizzle }: Connection,
  batch: readonly Reservation[],
): Promise<Map<string, Reservation>> {
  if (batch.length === 0) return new Map();
  const { id, userId, pointAmount, executeAt, idempotencyKey, campaign } = reservations;
  const { originalPointAmount, originalExecuteAt } = reservations;
  const keys = batch.map((reservation) => reservation.idempotencyKey);
  const found: Reservation[] = await drizzle("find_by_idempotency_keys")
    .select({
      id,
      userId,
      pointAmount: sql<number>`coalesce(${originalPointAmount}, ${pointAmount})`.mapWith(pointAmount),
      executeAt: sql<Date>`coalesce(${originalExecuteAt}, ${executeAt})`.mapWith(executeAt),
      idempotencyKey,
      campaign,
    })
    .from(reservations)
    .where(inArray(idempotencyKey, keys));
  return new Map(found.map((reservation) => [reservation.idempotencyKey, reservation]));
}

/**
 * The same without waiting for others: a replay whose row another transaction has locked would hold up the whole INSERT. Not
 * the usual way, as it needs three statements.
 *
 * @returns `BUSY` for a reservation whose key another transaction has inserted, and not committed yet
 */
export async function createBesideLocks(
  database: Database,
  batch: readonly Reservation[],
): Promise<(CreateOutcome | typeof BUSY)[]> {
  return database.run(async (connection) => {
    const firsts = await findByIdempotencyKeys(connection, batch);
    const others = batch.filter(({ idempotencyKey }) => !firsts.has(idempotencyKey));
    const taken = await findTakenKeys(connection, others);
    const fresh = others.filter(({ idempotencyKey }) => !taken.has(idempotencyKey));
    const created = (fresh.length > 0 ? await createReservations(connection, fresh) : []).values();
    return batch.map((reservation) => {
      if (firsts.has(reservation.idempotencyKey)) return outcomeOf(reservation, firsts);
      return taken.has(reservation.idempotencyKey) ? BUSY : (created.next().value as CreateOutcome);
    });
  });
}

/** The keys that are in use, also those of uncommitted reservations. */
async function findTakenKeys(
  { execute, select }: Connection,
  batch: readonly Reservation[],
): Promise<Set<string>> {
  if (batch.length === 0) return new Set();
  // For the next statement alone.
  await execute("/* read_uncommitted */ set transaction isolation level read uncommitted");
  const rows = await select<{ key: string }>(
    "/* find_taken_keys */ select idempotency_key `key` from point_reservations where idempotency_key in (?)",
    [batch.map(({ idempotencyKey }) => idempotencyKey)],
  );
  return new Set(rows.map(({ key }) => key));
}

/** The maximum number of rows of one INSERT. */
const INSERT_ROWS = 1_000;
/** How often an all-or-none bulk is tried if other requests use its keys meanwhile. */
const MAX_TRIES = 5;
/** How long a bulk may take by default, in milliseconds, and how long it waits before it tries again beside others' locks. */
const BULK_MS = 12_000;
const BULK_WAITS = { baseMs: 20, maxMs: 400 };

/** Another request has used a key between the SELECT and the INSERT. Thrown to roll the transaction back. */
class KeyTaken extends Error {}

/**
 * Inserts the reservations of one request, up to 1,000 in one statement.
 *
 * @param options.allOrNone in one transaction, which inserts nothing if a reservation is a `conflict`
 * @param options.workMs how long one try may take, and for how long to try, in milliseconds
 * @throws {OverloadError} if other requests use its keys in every try; with `allOrNone`, nothing is inserted then
 */
export async function createBulk(
  database: Database,
  batch: readonly Reservation[],
  { allOrNone, workMs = BULK_MS }: { allOrNone: boolean; workMs?: number },
): Promise<CreateOutcome[]> {
  const create = (connection: Connection) => createTogether(connection, batch, { allOrNone });
  const end = performance.now() + workMs;
  for (let taken = 0, attempt = 1; taken < MAX_TRIES; attempt++) {
    try {
      if (!allOrNone) return await database.run(create, { workMs });
      return await database.transaction(create, { workMs });
    } catch (error) {
      if (error instanceof KeyTaken) {
        taken++;
        continue;
      }
      // Another request has inserted one of its keys, and not committed yet: this one finds it in a later try.
      const isHeldUp = error instanceof DatabaseError && error.kind === "lock_timeout";
      if (!isHeldUp || performance.now() > end) throw error;
      await sleep(backoffMs(attempt, BULK_WAITS));
    }
  }
  throw new OverloadError(`Cannot reserve a bulk as other requests used its keys in ${MAX_TRIES} tries`);
}

async function createTogether(
  connection: Connection,
  batch: readonly Reservation[],
  { allOrNone }: { allOrNone: boolean },
): Promise<CreateOutcome[]> {
  // First a SELECT that locks nothing: the INSERT would lock the gaps beside each key that is used, until the COMMIT.
  const firsts = await findByIdempotencyKeys(connection, batch);
  const fresh: Reservation[] = [];
  for (const reservation of batch) {
    if (firsts.has(reservation.idempotencyKey)) continue;
    firsts.set(reservation.idempotencyKey, reservation);
    fresh.push(reservation);
  }
  const outcomes = batch.map((reservation) => outcomeOf(reservation, firsts));
  if (allOrNone && outcomes.some(({ kind }) => kind === "conflict")) return outcomes;
  // In the order of the keys: two requests with the same keys wait for each other and do not deadlock.
  fresh.sort((a, b) => (a.idempotencyKey < b.idempotencyKey ? -1 : 1));
  let areTaken = false;
  for (let at = 0; at < fresh.length; at += INSERT_ROWS) {
    const inserted = await createReservations(connection, fresh.slice(at, at + INSERT_ROWS));
    areTaken ||= inserted.some(({ kind }) => kind !== "created");
  }
  if (!areTaken) return outcomes;
  if (allOrNone) throw new KeyTaken();
  const now = await findByIdempotencyKeys(connection, batch);
  return batch.map((reservation) => outcomeOf(reservation, now));
}

/** The statuses of open reservations. */
const OPEN: readonly ReservationStatus[] = ["PENDING", "PROCESSING"];

const SET_CANCELLED = "status = 'CANCELLED', scan_at = null";

/** The result of a request to change a reservation. */
export interface Transitioned {
  /** Whether the reservation is now as requested; if not, its status did not allow the change. */
  isDone: boolean;
  /** The details, read in the same transaction: after the change, or as the reason why there was none. */
  details: ReservationDetails;
}

/** A change that only some statuses allow. */
interface Transition {
  /** The name of its UPDATE. */
  name: string;
  from: readonly ReservationStatus[];
  /** The assignments, in order: MySQL evaluates each one after those before it. */
  set: string;
  values?: readonly unknown[];
  /**
   * Whether a row whose status does not allow the change shows that the change was made before.
   *
   * @param wasSent whether this request has already made the change, in a transaction whose COMMIT got no answer
   */
  wasMade: (row: ReservationRow, wasSent: boolean) => boolean;
}

export interface TransitionOptions {
  /** How to wait for a row that another transaction holds; by default with a limit of its own. */
  untilFree?: UntilFree | undefined;
}

/**
 * Makes a transition by one conditional UPDATE, and reads the row in the same transaction.
 *
 * @throws {OverloadError} if another transaction holds the row for too long
 */
function transition(
  database: Database,
  id: string,
  { name, from, set, values = [], wasMade }: Transition,
  { untilFree = openUntilFree() }: TransitionOptions,
): Promise<Transitioned | undefined> {
  const isIt = eq(reservations.id, id);
  let wasSent = false;
  const attempt = () =>
    database.transaction(async (transaction) => {
      // Locked: the row must not change between the decision and the answer that explains it.
      const row = await lockReservation(transaction, id);
      if (row === undefined || row === BUSY) return row;
      const isAllowed = from.includes(row.status);
      if (isAllowed) {
        await transaction.execute(
          `/* ${name} */ update point_reservations set ${set} where id = ? and status in (?)`,
          [...values, id, from],
        );
      }
      const isDone = isAllowed || wasMade(row, wasSent);
      const details = await findDetails(transaction, isIt);
      if (!details) throw new Error("A reservation that the transaction has locked is missing");
      wasSent = isDone;
      return { isDone, details };
    });
  return untilFree<Transitioned | undefined>(attempt);
}

/** Locks a row without waiting; undefined if there is none. */
async function lockReservation(
  { drizzle }: Transaction,
  id: string,
): Promise<ReservationRow | typeof BUSY | undefined> {
  const isIt = eq(reservations.id, id);
  const [row] = await drizzle("lock_reservation")
    .select()
    .from(reservations)
    .where(isIt)
    .for("update", { skipLocked: true });
  if (row) return row;
  const exists = await drizzle("is_held").select({ id: reservations.id }).from(reservations).where(isIt);
  return exists.length > 0 ? BUSY : undefined;
}

/**
 * PENDING or PROCESSING → CANCELLED. The grant locks the same row: one of the two is first, and the other finds the reservation
 * over. A message that is already in the queue changes nothing.
 *
 * @returns `isDone` is true even if the reservation was CANCELLED before; undefined if there is no such reservation
 */
export function cancelReservation(
  database: Database,
  id: string,
  options: TransitionOptions = {},
): Promise<Transitioned | undefined> {
  const cancel: Transition = {
    name: "cancel_reservation",
    from: OPEN,
    set: SET_CANCELLED,
    wasMade: ({ status }) => status === "CANCELLED",
  };
  return transition(database, id, cancel, options);
}

/**
 * Changes the amount or the time of a PENDING reservation; keeps the original values, for replays.
 *
 * @returns undefined if there is no such reservation
 */
export function patchReservation(
  database: Database,
  id: string,
  { executeAt, pointAmount }: ReservationPatch,
  options: TransitionOptions = {},
): Promise<Transitioned | undefined> {
  const set = ["changed_at = now(3)"];
  const values: unknown[] = [];
  if (pointAmount !== undefined) {
    set.push("original_point_amount = coalesce(original_point_amount, point_amount)", "point_amount = ?");
    values.push(pointAmount);
  }
  if (executeAt !== undefined) {
    set.push(
      "original_execute_at = coalesce(original_execute_at, execute_at)",
      "execute_at = ?",
      "scan_at = greatest(execute_at, now(3))",
    );
    values.push(executeAt);
  }
  const patch: Transition = {
    name: "patch_reservation",
    from: ["PENDING"],
    set: set.join(", "),
    values,
    // A COMMIT whose answer was lost may have succeeded, and the row may have been claimed since.
    wasMade: (row, wasSent) =>
      wasSent &&
      (pointAmount === undefined || row.pointAmount === pointAmount) &&
      (executeAt === undefined || row.executeAt.getTime() === executeAt.getTime()),
  };
  return transition(database, id, patch, options);
}

/**
 * FAILED → PENDING, due at once, with `attempts` reset to 0.
 *
 * @returns undefined if there is no such reservation
 */
export function retryReservation(
  database: Database,
  id: string,
  options: TransitionOptions = {},
): Promise<Transitioned | undefined> {
  const retry: Transition = {
    name: "retry_reservation",
    from: ["FAILED"],
    set: "status = 'PENDING', scan_at = greatest(execute_at, now(3)), attempts = 0, changed_at = now(3)",
    // A COMMIT whose answer was lost may have succeeded, and the row may have been claimed since.
    wasMade: (_, wasSent) => wasSent,
  };
  return transition(database, id, retry, options);
}

/** The number of a campaign's reservations in each state. */
export interface CampaignCounts {
  cancelled: number;
  granted: number;
  failed: number;
  /** Not over yet. */
  open: number;
}

/** The maximum number of reservations that one statement cancels: workers wait for its locks. */
const CANCEL_ROWS = 1_000;
/** Waits for reservations that other transactions hold, in milliseconds. */
const CANCEL_WAITS = { baseMs: 20, maxMs: 400 };

/**
 * Cancels all open reservations of a campaign, up to 1,000 in one statement. Those that other transactions hold come last: they
 * are tried again until `untilMs`. After a crash some of them are cancelled; the same call again cancels the rest.
 *
 * @param options.untilMs when to stop, by `performance.now()`
 * @returns the numbers of its reservations in each state after that; all 0 if it has none
 */
export async function cancelCampaign(
  database: Database,
  campaign: string,
  { untilMs }: { untilMs: number },
): Promise<CampaignCounts> {
  for (let waits = 0; performance.now() < untilMs; ) {
    const cancelled = await database.transaction((transaction) => cancelSome(transaction, campaign));
    if (cancelled > 0) {
      waits = 0;
      continue;
    }
    const counts = await countCampaign(database, campaign);
    if (counts.open === 0) return counts;
    const leftMs = Math.max(0, untilMs - performance.now());
    await sleep(Math.min(leftMs, backoffMs(++waits, CANCEL_WAITS)));
  }
  return countCampaign(database, campaign);
}

/** Cancels reservations that no other transaction holds; returns their number, 0 if there are none. */
async function cancelSome({ drizzle, execute }: Transaction, campaign: string): Promise<number> {
  const found = await drizzle("lock_open_of_campaign")
    .select({ id: reservations.id })
    .from(reservations, { forceIndex: "point_reservations_campaign" })
    .where(and(eq(reservations.campaign, campaign), eq(reservations.campaignListedAs, "OPEN")))
    .limit(CANCEL_ROWS)
    .for("update", { skipLocked: true });
  if (found.length === 0) return 0;
  await execute(
    `/* cancel_reservations */ update point_reservations set ${SET_CANCELLED} where id in (?) and status in (?)`,
    [found.map(({ id }) => id), OPEN],
  );
  return found.length;
}

async function countCampaign(database: Database, campaign: string): Promise<CampaignCounts> {
  const rows = await database.run(({ drizzle }) =>
    drizzle("count_campaign")
      .select({ listedAs: reservations.campaignListedAs, count: sql`count(*)`.mapWith(Number) })
      .from(reservations)
      .where(eq(reservations.campaign, campaign))
      .groupBy(reservations.campaignListedAs),
  );
  const countOf = (listedAs: string) => rows.find((row) => row.listedAs === listedAs)?.count ?? 0;
  return {
    cancelled: countOf("CANCELLED"),
    granted: countOf("DONE"),
    failed: countOf("FAILED"),
    open: countOf("OPEN"),
  };
}
