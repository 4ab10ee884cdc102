import { and, asc, eq, inArray, sql } from "drizzle-orm";
import type { Connection, Database } from "./database.ts";
import type { Reservation, ReservationStatus } from "./reservation.ts";
import { pointTransactions, pointReservations as reservations } from "./schema.ts";

/** The columns that make a `Reservation`. */
const COLUMNS = {
  id: reservations.id,
  userId: reservations.userId,
  pointAmount: reservations.pointAmount,
  executeAt: reservations.executeAt,
  idempotencyKey: reservations.idempotencyKey,
};

/** What became of a request to reserve. */
export type CreateOutcome =
  | { kind: "created"; reservation: Reservation }
  /** The same key came with the same content before: the first reservation. */
  | { kind: "replayed"; reservation: Reservation }
  /** The same key came with other content before. */
  | { kind: "conflict" };

/**
 * Inserts reservations in one statement. It commits before it returns; run twice, it inserts once. A key that is taken,
 * also by another one of the same batch, affects only its own reservation.
 */
export async function createReservations(
  database: Database,
  batch: readonly Reservation[],
): Promise<CreateOutcome[]> {
  const rows = batch.map(({ id, userId, pointAmount, executeAt, idempotencyKey }) => [
    id,
    userId,
    pointAmount,
    executeAt,
    executeAt,
    idempotencyKey,
  ]);
  const stored = await database.run(async (connection) => {
    // Not INSERT IGNORE, which also swallows truncation and would give a long user id's points to somebody else.
    const { affectedRows } = await connection.execute(
      `insert into point_reservations (id, user_id, point_amount, execute_at, scan_at, idempotency_key)
       values ? on duplicate key update id = id`,
      [rows],
    );
    return affectedRows === batch.length ? undefined : findByIdempotencyKeys(connection, batch);
  });
  return batch.map((reservation) => {
    if (!stored) return { kind: "created", reservation };
    const first = stored.get(reservation.idempotencyKey);
    if (!first) throw new Error("A reservation is neither inserted nor found by its idempotency key");
    if (first.id === reservation.id) return { kind: "created", reservation };
    return hasSameContent(first, reservation)
      ? { kind: "replayed", reservation: first }
      : { kind: "conflict" };
  });
}

async function findByIdempotencyKeys(connection: Connection, batch: readonly Reservation[]) {
  const found: Reservation[] = await connection.drizzle
    .select(COLUMNS)
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
    first.executeAt.getTime() === second.executeAt.getTime()
  );
}

/** One reservation with the time of its ledger entry, or undefined where there is none of that id. */
export async function findReservation(database: Database, id: string) {
  const [found] = await database.run(({ drizzle }) =>
    drizzle
      .select({ reservation: reservations, grantedAt: pointTransactions.createdAt })
      .from(reservations)
      // A FAILED one may have met another grant's entry under its key: that is no grant of its own.
      .leftJoin(
        pointTransactions,
        and(
          eq(pointTransactions.idempotencyKey, reservations.idempotencyKey),
          eq(pointTransactions.userId, reservations.userId),
          eq(pointTransactions.pointAmount, reservations.pointAmount),
        ),
      )
      .where(eq(reservations.id, id)),
  );
  return found && { ...found.reservation, grantedAt: found.grantedAt };
}

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
  return database.transaction(async ({ drizzle }) => {
    const claimed = await drizzle
      .select({
        ...COLUMNS,
        lateMs: sql`timestampdiff(microsecond, ${reservations.scanAt}, now(3)) div 1000`.mapWith(Number),
      })
      // A plan without this index would lock every candidate row, and other schedulers would get nothing.
      .from(reservations, { forceIndex: "point_reservations_scan_at" })
      .where(sql`${reservations.scanAt} <= now(3)`)
      .orderBy(asc(reservations.scanAt), asc(reservations.id))
      .limit(limit)
      .for("update", { skipLocked: true });
    if (claimed.length === 0) return claimed;
    await drizzle
      .update(reservations)
      .set({ status: "PROCESSING", scanAt: inMs(leaseMs) })
      .where(
        and(
          inArray(
            reservations.id,
            claimed.map(({ id }) => id),
          ),
          inArray(reservations.status, ["PENDING", "PROCESSING"]),
        ),
      );
    return claimed;
  });
}

/** How many milliseconds until the next reservation is due, negative where it is already; undefined where none waits. */
export async function msUntilNextScan(database: Database): Promise<number | undefined> {
  const [next] = await database.run((connection) =>
    connection.select<{ ms: number | string | null }>(
      "select ceiling(timestampdiff(microsecond, now(3), min(scan_at)) / 1000) ms from point_reservations",
    ),
  );
  return next?.ms == null ? undefined : Number(next.ms);
}

/** A reservation as the grant finds it, locked until the transaction ends. */
export interface LockedReservation extends Reservation {
  status: ReservationStatus;
  attempts: number;
  /** Whether `execute_at` has come by the database's clock. */
  isDue: boolean;
  /** Milliseconds since `execute_at`. */
  lateMs: number;
}

/** Locks rows in the order of their ids, so that two workers with the same rows wait instead of deadlock. */
export async function lockReservations(
  { drizzle }: Connection,
  ids: readonly string[],
): Promise<LockedReservation[]> {
  return drizzle
    .select({
      ...COLUMNS,
      status: reservations.status,
      attempts: reservations.attempts,
      isDue: sql`${reservations.executeAt} <= now(3)`.mapWith(Boolean),
      lateMs: sql`timestampdiff(microsecond, ${reservations.executeAt}, now(3)) div 1000`.mapWith(Number),
    })
    .from(reservations)
    .where(inArray(reservations.id, [...ids]))
    .orderBy(asc(reservations.id))
    .for("update");
}

/**
 * PROCESSING → DONE.
 *
 * @throws {Error} where a row was not PROCESSING: the transaction must not commit what it has granted
 */
export async function markDone({ drizzle }: Connection, ids: readonly string[]): Promise<void> {
  const [{ affectedRows }] = await drizzle
    .update(reservations)
    .set({ status: "DONE", scanAt: null })
    .where(and(inArray(reservations.id, [...ids]), eq(reservations.status, "PROCESSING")));
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
