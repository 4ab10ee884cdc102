import { and, eq, inArray, sql } from "drizzle-orm";
import { type Connection, type Database, DatabaseError } from "./database.ts";
import type { Reservation, ReservationPatch, ReservationStatus } from "./reservation.ts";
import { pointReservations as reservations } from "./schema.ts";

/** The columns that make a `Reservation`. */
const COLUMNS = {
  id: reservations.id,
  userId: reservations.userId,
  pointAmount: reservations.pointAmount,
  executeAt: reservations.executeAt,
  idempotencyKey: reservations.idempotencyKey,
  campaign: reservations.campaign,
};

/** Where points may still come: neither granted, nor failed, nor cancelled. */
const OPEN: ReservationStatus[] = ["PENDING", "PROCESSING"];

/** What became of a request to reserve. */
export type CreateOutcome =
  | { kind: "created"; reservation: Reservation }
  /** The same key came with the same content before: the first reservation. */
  | { kind: "replayed"; reservation: Reservation }
  /** The same key came with other content before. */
  | { kind: "conflict" };

/**
 * Inserts reservations in one statement; run twice, it inserts once. A key that is taken, also by another one of the same
 * batch, affects only its own reservation.
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
    executeAt,
    idempotencyKey,
    campaign,
  ]);
  // Not INSERT IGNORE, which also swallows truncation and would give a long user id's points to somebody else.
  const { affectedRows } = await connection.execute(
    `insert into point_reservations (id, user_id, point_amount, execute_at, scan_at, idempotency_key, campaign)
     values ? on duplicate key update id = id`,
    [rows],
  );
  if (affectedRows === batch.length) {
    return batch.map((reservation) => ({ kind: "created", reservation }));
  }
  const firsts = await findByIdempotencyKeys(connection, batch);
  return batch.map((reservation) => outcomeOf(reservation, firsts));
}

/** What became of a reservation whose key belongs to the first one that brought it. */
function outcomeOf(reservation: Reservation, firsts: ReadonlyMap<string, Reservation>): CreateOutcome {
  const first = firsts.get(reservation.idempotencyKey);
  if (!first) throw new Error("A reservation is neither inserted nor found by its idempotency key");
  if (first.id === reservation.id) return { kind: "created", reservation };
  return hasSameContent(first, reservation) ? { kind: "replayed", reservation: first } : { kind: "conflict" };
}

/** The most rows of one INSERT. */
const INSERT_ROWS = 1_000;

/**
 * Inserts the reservations of one request, up to 1,000 in one statement.
 *
 * @param options.allOrNone for the caller's transaction: where one of them is a `conflict`, none is inserted
 * @throws {DatabaseError} `deadlock` where all or none shall be inserted and somebody else has taken a key meanwhile: the
 *   transaction starts again, and finds it
 */
export async function createBulk(
  connection: Connection,
  batch: readonly Reservation[],
  { allOrNone }: { allOrNone: boolean },
): Promise<CreateOutcome[]> {
  // First a look that locks nothing: the INSERT would lock the gaps beside each key that is taken, until the COMMIT.
  const firsts = await findByIdempotencyKeys(connection, batch);
  const fresh: Reservation[] = [];
  for (const reservation of batch) {
    if (firsts.has(reservation.idempotencyKey)) continue;
    firsts.set(reservation.idempotencyKey, reservation);
    fresh.push(reservation);
  }
  const outcomes = batch.map((reservation) => outcomeOf(reservation, firsts));
  if (allOrNone && outcomes.some(({ kind }) => kind === "conflict")) return outcomes;
  // In the order of the keys: two requests with the same keys wait for each other instead of deadlock.
  fresh.sort((a, b) => (a.idempotencyKey < b.idempotencyKey ? -1 : 1));
  let areTaken = false;
  for (let at = 0; at < fresh.length; at += INSERT_ROWS) {
    const inserted = await createReservations(connection, fresh.slice(at, at + INSERT_ROWS));
    areTaken ||= inserted.some(({ kind }) => kind !== "created");
  }
  if (!areTaken) return outcomes;
  if (allOrNone) throw new DatabaseError("deadlock", "Somebody else has taken a key meanwhile");
  const now = await findByIdempotencyKeys(connection, batch);
  return batch.map((reservation) => outcomeOf(reservation, now));
}

/** What was reserved first under these keys, whatever it was patched to since. */
async function findByIdempotencyKeys(
  connection: Connection,
  batch: readonly Reservation[],
): Promise<Map<string, Reservation>> {
  if (batch.length === 0) return new Map();
  const found: Reservation[] = await connection.drizzle
    .select({
      ...COLUMNS,
      pointAmount:
        sql<number>`coalesce(${reservations.originalPointAmount}, ${reservations.pointAmount})`.mapWith(
          reservations.pointAmount,
        ),
      executeAt: sql<Date>`coalesce(${reservations.originalExecuteAt}, ${reservations.executeAt})`.mapWith(
        reservations.executeAt,
      ),
    })
    .from(reservations)
    .where(
      inArray(
        reservations.idempotencyKey,
        batch.map(({ idempotencyKey }) => idempotencyKey),
      ),
    );
  return new Map(found.map((reservation) => [reservation.idempotencyKey, reservation]));
}

function hasSameContent(first: Reservation, second: Reservation): boolean {
  return (
    first.userId === second.userId &&
    first.pointAmount === second.pointAmount &&
    first.executeAt.getTime() === second.executeAt.getTime() &&
    first.campaign === second.campaign
  );
}

/**
 * PENDING or PROCESSING → CANCELLED. The grant locks the same rows, in the same order: one of the two comes first, and the
 * other finds them over. A message that is in the queue already changes nothing.
 *
 * @returns how many this call cancelled
 */
async function markCancelled(database: Database, ids: readonly string[]): Promise<number> {
  return database.run(async ({ drizzle }) => {
    const [{ affectedRows }] = await drizzle
      .update(reservations)
      .set({ status: "CANCELLED", scanAt: null })
      .where(and(inArray(reservations.id, ids.toSorted()), inArray(reservations.status, OPEN)));
    return affectedRows;
  });
}

/** Cancels one reservation, and says whether this call did. */
export async function cancelReservation(database: Database, id: string): Promise<boolean> {
  return (await markCancelled(database, [id])) === 1;
}

/** How many reservations of a campaign stand where. */
export interface CampaignCounts {
  cancelled: number;
  granted: number;
  failed: number;
  /** Not over yet. */
  open: number;
}

/** The most reservations that one statement cancels: a worker waits for its locks. */
const CANCEL_ROWS = 1_000;

/**
 * Cancels all of a campaign that can still be cancelled, up to 1,000 in one statement. What a crash interrupts is cancelled
 * in part; the same again goes on.
 *
 * @param options.untilMs when to stop, by `performance.now()`
 * @returns where its reservations stand then, whoever brought them there; all 0 where there are none
 */
export async function cancelCampaign(
  database: Database,
  campaign: string,
  { untilMs }: { untilMs: number },
): Promise<CampaignCounts> {
  const isOpen = and(eq(reservations.campaign, campaign), eq(reservations.campaignListedAs, "OPEN"));
  while (performance.now() < untilMs) {
    const ids = await database.run(({ drizzle }) =>
      drizzle.select({ id: reservations.id }).from(reservations).where(isOpen).limit(CANCEL_ROWS),
    );
    if (ids.length === 0) break;
    await markCancelled(
      database,
      ids.map(({ id }) => id),
    );
  }
  return countCampaign(database, campaign);
}

async function countCampaign(database: Database, campaign: string): Promise<CampaignCounts> {
  const rows = await database.run(({ drizzle }) =>
    drizzle
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

/**
 * Changes amount or time of a reservation that is PENDING; what the client reserved first is kept for replays.
 *
 * @returns whether there was such a reservation, PENDING
 */
export async function patchReservation(
  database: Database,
  id: string,
  { executeAt, pointAmount }: ReservationPatch,
): Promise<boolean> {
  let wasSent = false;
  return database.transaction(async ({ drizzle }) => {
    const [row] = await drizzle.select().from(reservations).where(eq(reservations.id, id)).for("update");
    if (!row) return false;
    const isPatched =
      (pointAmount === undefined || row.pointAmount === pointAmount) &&
      (executeAt === undefined || row.executeAt.getTime() === executeAt.getTime());
    // A COMMIT whose answer was lost may have come through, and the row be claimed since.
    if (wasSent && isPatched) return true;
    if (row.status !== "PENDING") return false;
    await drizzle
      .update(reservations)
      .set({
        ...(pointAmount !== undefined && {
          pointAmount,
          originalPointAmount: row.originalPointAmount ?? row.pointAmount,
        }),
        ...(executeAt !== undefined && {
          executeAt,
          scanAt: executeAt,
          originalExecuteAt: row.originalExecuteAt ?? row.executeAt,
        }),
      })
      .where(and(eq(reservations.id, id), eq(reservations.status, "PENDING")));
    wasSent = true;
    return true;
  });
}

/**
 * FAILED → PENDING, due at once and with all its attempts: an operator's second chance.
 *
 * @returns whether there was such a reservation, FAILED
 */
export async function retryReservation(database: Database, id: string): Promise<boolean> {
  let wasFailed = false;
  return database.transaction(async ({ drizzle }) => {
    const isIt = eq(reservations.id, id);
    const [row] = await drizzle
      .select({ status: reservations.status })
      .from(reservations)
      .where(isIt)
      .for("update");
    // A COMMIT whose answer was lost may have come through, and the row be claimed since.
    if (row?.status !== "FAILED") return wasFailed;
    wasFailed = true;
    await drizzle
      .update(reservations)
      .set({ status: "PENDING", scanAt: sql`greatest(now(3), ${reservations.executeAt})`, attempts: 0 })
      .where(and(isIt, eq(reservations.status, "FAILED")));
    return true;
  });
}

// The statements of the hot path are raw: Drizzle takes 5 ms to build one with 1,000 ids, mysql2 a tenth of that.

const CLAIMABLE = `select id, user_id userId, point_amount pointAmount, execute_at executeAt, idempotency_key idempotencyKey, campaign,
    timestampdiff(microsecond, scan_at, now(3)) div 1000 lateMs
  from point_reservations force index (point_reservations_scan_at)
  where scan_at <= now(3) order by scan_at, id limit ? for update skip locked`;
const MARK_PROCESSING = `update point_reservations set status = 'PROCESSING', scan_at = now(3) + interval ? microsecond
  where id in (?) and status in ('PENDING', 'PROCESSING')`;
const LOCK = `select id, user_id userId, point_amount pointAmount, idempotency_key idempotencyKey, status, attempts,
    execute_at <= now(3) isDue, timestampdiff(microsecond, execute_at, now(3)) div 1000 lateMs
  from point_reservations where id in (?) order by id for update`;
const MARK_DONE = `update point_reservations set status = 'DONE', scan_at = null where id in (?) and status = 'PROCESSING'`;

export interface ClaimedReservation extends Reservation {
  /** How many milliseconds after `scan_at` the claim came, by the database's clock. */
  lateMs: number;
}

/**
 * PENDING or PROCESSING → PROCESSING, in the order of `scan_at`, for what is due by the database's clock. No other scan
 * takes the rows until the lease ends; rows that another scan is just claiming are passed over.
 *
 * @param options.limit the most rows
 * @param options.leaseMs until when the claim holds; a row not DONE by then is claimed again
 */
export async function claimDue(
  database: Database,
  { limit, leaseMs }: { limit: number; leaseMs: number },
): Promise<ClaimedReservation[]> {
  return database.transaction(async (connection) => {
    const claimed = await connection.select<ClaimedReservation>(CLAIMABLE, [limit]);
    if (claimed.length === 0) return claimed;
    await connection.execute(MARK_PROCESSING, [leaseMs * 1_000, claimed.map(({ id }) => id)]);
    return claimed;
  });
}

/** When the scheduler must look next, by the database's clock. */
export interface NextScan {
  /** What that clock says now, in milliseconds since 1970. */
  nowMs: number;
  /** How many milliseconds until the next reservation is due, negative where it is already; undefined where none waits. */
  inMs: number | undefined;
}

export async function findNextScan(database: Database): Promise<NextScan> {
  type Row = { nowMs: number | string; inMs: number | string | null };
  const [next] = await database.run((connection) =>
    connection.select<Row>(
      `select unix_timestamp(now(3)) * 1000 nowMs, ceiling(timestampdiff(microsecond, now(3), min(scan_at)) / 1000) inMs
       from point_reservations`,
    ),
  );
  if (!next) throw new Error("A SELECT of a minimum gave no row");
  return { nowMs: Number(next.nowMs), inMs: next.inMs === null ? undefined : Number(next.inMs) };
}

/** A reservation as the grant finds it, locked until the transaction ends. */
export interface LockedReservation
  extends Pick<Reservation, "id" | "userId" | "pointAmount" | "idempotencyKey"> {
  status: ReservationStatus;
  attempts: number;
  /** Whether `execute_at` has come by the database's clock. */
  isDue: boolean;
  /** Milliseconds since `execute_at`. */
  lateMs: number;
}

/** Locks rows in the order of their ids, so that two workers with the same rows wait instead of deadlock. */
export async function lockReservations(
  connection: Connection,
  ids: readonly string[],
): Promise<LockedReservation[]> {
  if (ids.length === 0) return [];
  type Row = Omit<LockedReservation, "isDue"> & { isDue: 0 | 1 };
  const rows = await connection.select<Row>(LOCK, [ids]);
  return rows.map((row) => ({ ...row, isDue: row.isDue === 1 }));
}

/**
 * PROCESSING → DONE.
 *
 * @throws {Error} where a row was not PROCESSING: the transaction must not commit what it has granted
 */
export async function markDone(connection: Connection, ids: readonly string[]): Promise<void> {
  const { affectedRows } = await connection.execute(MARK_DONE, [ids]);
  if (affectedRows !== ids.length) {
    throw new Error(`Cannot mark ${ids.length} reservations as DONE: ${affectedRows} were PROCESSING`);
  }
}

/** PROCESSING → FAILED, for good, with the reason for the one who asks "where are my points?". */
export async function markFailed(
  { drizzle }: Connection,
  id: string,
  { reason }: { reason: string },
): Promise<void> {
  await drizzle
    .update(reservations)
    .set({
      status: "FAILED",
      scanAt: null,
      attempts: sql`${reservations.attempts} + 1`,
      lastError: reason.slice(0, 500),
    })
    .where(and(eq(reservations.id, id), eq(reservations.status, "PROCESSING")));
}

/**
 * PROCESSING → PENDING, to be claimed again after `retryInMs`: the row is the retry queue. Not PROCESSING, or a duplicate
 * of its message would try it before its time and use up its attempts.
 */
export async function scheduleRetry(
  { drizzle }: Connection,
  id: string,
  { reason, retryInMs }: { reason: string; retryInMs: number },
): Promise<void> {
  await drizzle
    .update(reservations)
    .set({
      status: "PENDING",
      scanAt: inMs(retryInMs),
      attempts: sql`${reservations.attempts} + 1`,
      lastError: reason.slice(0, 500),
    })
    .where(and(eq(reservations.id, id), eq(reservations.status, "PROCESSING")));
}

function inMs(ms: number) {
  return sql`now(3) + interval ${ms * 1000} microsecond`;
}
