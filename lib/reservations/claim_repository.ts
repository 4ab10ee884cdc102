import { and, eq, type SQL, sql } from "drizzle-orm";
import type { Transaction } from "../database.ts";
import { grantableAt, type ReservationStatus, pointReservations as reservations } from "../schema.ts";
import type { Reservation } from "./reservation.ts";

// The statements of the hot path are raw SQL: Drizzle takes 5 ms to build one with 1,000 ids, mysql2 a tenth of that.

const LOCKED_COLUMNS = `r.id, r.user_id userId, r.point_amount pointAmount, r.idempotency_key idempotencyKey, r.status, r.attempts,
    r.execute_at <= now(3) isDue,
    greatest(0, timestampdiff(microsecond, ${grantableAt("r.")},
      now(3)) div 1000) lateMs`;
const LOCK_RESERVATIONS = `/* lock_reservations */ select ${LOCKED_COLUMNS}
  from point_reservations r where r.id in (?) order by r.id for update`;
// A locked balance is null, as a missing one is. The index hints keep the order: the row of the reservation first.
const LOCK_FREE = `/* lock_free */ select ${LOCKED_COLUMNS}, b.user_id is not null hasBalance
  from point_reservations r force index (primary)
    left join point_root b force index (primary) on b.user_id = r.user_id
  where r.id in (?) order by r.id for update skip locked`;
const FIND_EXISTING = "/* find_existing */ select id from point_reservations where id in (?)";
const MARK_DONE = `/* mark_done */ update point_reservations set status = 'DONE', scan_at = null
  where id in (?) and status = 'PROCESSING'`;

/** A reservation that is locked until the transaction ends. */
export interface LockedReservation
  extends Pick<Reservation, "id" | "userId" | "pointAmount" | "idempotencyKey"> {
  status: ReservationStatus;
  attempts: number;
  /** Whether `execute_at` has passed by the database's clock. */
  isDue: boolean;
  /** Milliseconds since it could have been granted: since `execute_at`, or since it was made or changed if that was later. */
  lateMs: number;
}

/** A reservation that is locked; and the balance of its user, if `hasBalance`. */
export interface FreeReservation extends LockedReservation {
  /** False if the user has no balance, or if another transaction has locked it. */
  hasBalance: boolean;
}

/** Locks rows in the order of their ids, so that two workers with the same rows wait and do not deadlock. */
export async function lockReservations(
  transaction: Transaction,
  ids: readonly string[],
): Promise<LockedReservation[]> {
  if (ids.length === 0) return [];
  type Row = Omit<LockedReservation, "isDue"> & { isDue: 0 | 1 };
  const rows = await transaction.select<Row>(LOCK_RESERVATIONS, [ids]);
  return rows.map((row) => ({ ...row, isDue: row.isDue === 1 }));
}

/** Locks rows that no other transaction holds, and the balances of their users, without waiting. */
export async function lockFree(
  transaction: Transaction,
  ids: readonly string[],
): Promise<{
  free: FreeReservation[];
  /** Ids of rows that another transaction holds. */
  held: string[];
}> {
  type Row = Omit<FreeReservation, "isDue" | "hasBalance"> & { isDue: 0 | 1; hasBalance: 0 | 1 };
  const rows = await transaction.select<Row>(LOCK_FREE, [ids]);
  const free = rows.map((row) => ({ ...row, isDue: row.isDue === 1, hasBalance: row.hasBalance === 1 }));
  const locked = new Set(free.map(({ id }) => id));
  const others = ids.filter((id) => !locked.has(id));
  if (others.length === 0) return { free, held: [] };
  const existing = await transaction.select<{ id: string }>(FIND_EXISTING, [others]);
  return { free, held: existing.map(({ id }) => id) };
}

/**
 * PROCESSING → DONE.
 *
 * @throws {Error} if a row was not PROCESSING: then the transaction must not commit
 */
export async function markDone(transaction: Transaction, ids: readonly string[]): Promise<void> {
  const { affectedRows } = await transaction.execute(MARK_DONE, [ids]);
  if (affectedRows !== ids.length) {
    throw new Error(`Cannot mark ${ids.length} reservations as DONE: ${affectedRows} were PROCESSING`);
  }
}

/** PROCESSING → FAILED, until an operator retries it; stores the reason. */
export async function markFailed(
  transaction: Transaction,
  id: string,
  { reason }: { reason: string },
): Promise<void> {
  await transaction
    .drizzle("mark_failed")
    .update(reservations)
    .set({ status: "FAILED", scanAt: null, ...failureOf(reason) })
    .where(isProcessing(id));
}

/** The longest `retryInMs` of `scheduleRetry()`. */
export const LONGEST_RETRY_MS = 3_600_000;

/**
 * PROCESSING → PENDING, to be claimed again after `retryInMs`: the row is the retry queue. Only from PROCESSING: otherwise
 * duplicates of its message would use up its attempts.
 */
export async function scheduleRetry(
  transaction: Transaction,
  id: string,
  { reason, retryInMs }: { reason: string; retryInMs: number },
): Promise<void> {
  const scanAt = sql`now(3) + interval ${retryInMs * 1_000} microsecond`;
  await transaction
    .drizzle("schedule_retry")
    .update(reservations)
    .set({ status: "PENDING", scanAt, ...failureOf(reason) })
    .where(isProcessing(id));
}

function failureOf(reason: string) {
  return { attempts: sql`${reservations.attempts} + 1`, lastError: reason.slice(0, 500) };
}

function isProcessing(id: string): SQL | undefined {
  return and(eq(reservations.id, id), eq(reservations.status, "PROCESSING"));
}
