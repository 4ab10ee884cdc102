import type { Database } from "../database.ts";
import type { ClockReading } from "../database_clock.ts";
import { grantableAt } from "../schema.ts";
import type { Reservation } from "./reservation.ts";

// The statements of the hot path are raw SQL: Drizzle takes 5 ms to build one with 1,000 ids, mysql2 a tenth of that.

// The index keeps the entries of former claims and leases until no snapshot needs them: millions, while a backup holds one.
// A claim locks, one by one, all of them that it walks over: 100,000 took 0.5 s. So it starts at the first open reservation,
// and ends at the last one that is due, before the entries of the leases that would end next. Both are found by a read without
// locks, forty times as fast, which starts at a position too.

/** A position in the index of open reservations: at `scanAt` and `id`, or before all with that `scanAt` if `id` is empty. */
export interface ScanPosition {
  scanAt: Date;
  id: string;
}

/** Before every reservation. */
export const BEGINNING: ScanPosition = { scanAt: new Date("1000-01-01T00:00:00.000Z"), id: "" };

/** How long a walk over the whole index may take, in milliseconds. */
const WALK_MS = 600_000;

export function isBefore(a: ScanPosition, b: ScanPosition): boolean {
  const byTime = a.scanAt.getTime() - b.scanAt.getTime();
  return byTime < 0 || (byTime === 0 && a.id < b.id);
}

const OPEN = "point_reservations force index (point_reservations_scan_at)";
// Not `(scan_at, id) >= (?, ?)`: for that the servers do not use the index.
const FROM = "(scan_at > ? or (scan_at = ? and id >= ?))";

function valuesOf({ scanAt, id }: ScanPosition): unknown[] {
  return [scanAt, scanAt, id];
}

// Lateness counts from when the reservation could have been granted; after a failure, from the time of the next try.
const CLAIM_DUE = `/* claim_due */ select id, user_id userId, point_amount pointAmount, execute_at executeAt,
    idempotency_key idempotencyKey, campaign, scan_at scanAt, greatest(0, timestampdiff(microsecond,
      if(attempts > 0, scan_at, ${grantableAt()}),
      now(3)) div 1000) lateMs
  from ${OPEN} where ${FROM} and scan_at <= now(3) order by scan_at, id limit ? for update skip locked`;
const MARK_PROCESSING = `/* mark_processing */ update point_reservations
  set status = 'PROCESSING', scan_at = now(3) + interval ? microsecond
  where id in (?) and status in ('PENDING', 'PROCESSING')`;
const FIND_NEXT_SCAN = `/* find_next_scan */ select unix_timestamp(clock.now) * 1000 nowMs, next.scanAt, next.id,
    ceiling(timestampdiff(microsecond, clock.now, next.scanAt) / 1000) inMs,
    if(next.scanAt <= clock.now, (
      select count(*) from (
        select id from ${OPEN} where ${FROM} and scan_at <= now(3) order by scan_at, id limit ?
      ) due
    ), 0) due
  from (select now(3) now) clock left join (
    select scan_at scanAt, id from ${OPEN}
    where ${FROM} and scan_at <= now(3) + interval ? microsecond order by scan_at, id limit 1
  ) next on true`;

export interface ClaimedReservation extends Reservation {
  scanAt: Date;
  /** Milliseconds from when it could have been granted, or its next try was due, to the claim, by the database's clock. */
  lateMs: number;
}

/**
 * PENDING or PROCESSING → PROCESSING, in the order of `scan_at`, for reservations that are due by the database's clock. No
 * other scan claims the rows until the lease ends. Skips rows that another scan has locked.
 *
 * @param options.from where to start; by default at the beginning
 * @param options.limit the maximum number of rows; not more than are due, or it looks at what comes after them
 * @param options.leaseMs how long the claim holds; a row that is not DONE by then is claimed again
 */
export async function claimDue(
  database: Database,
  { from = BEGINNING, limit, leaseMs }: { from?: ScanPosition; limit: number; leaseMs: number },
): Promise<ClaimedReservation[]> {
  return database.transaction(async (transaction) => {
    const claimed = await transaction.select<ClaimedReservation>(CLAIM_DUE, [...valuesOf(from), limit]);
    if (claimed.length === 0) return claimed;
    await transaction.execute(MARK_PROCESSING, [leaseMs * 1_000, claimed.map(({ id }) => id)]);
    return claimed;
  });
}

/** What a scan has to do next. */
export interface NextScan {
  clock: ClockReading;
  /** The first open reservation; undefined if none is due in time. */
  first: ScanPosition | undefined;
  /** Milliseconds until it is due; 0 or less if it is. */
  inMs: number;
  /** How many reservations are due, up to `limit`. */
  due: number;
}

/**
 * Finds the first open reservation, and how many are due. Locks nothing, and counts also what another transaction has locked.
 *
 * @param options.from where to start; by default at the beginning
 * @param options.withinMs only a reservation that is due so soon, in milliseconds
 * @param options.limit the maximum number of reservations to count
 */
export async function findNextScan(
  database: Database,
  { from = BEGINNING, withinMs, limit }: { from?: ScanPosition; withinMs: number; limit: number },
): Promise<NextScan> {
  type Row = Record<"nowMs" | "inMs" | "due", number | string | null> & { scanAt: Date | null; id: string };
  return database.run(
    async ({ select }) => {
      const sentAtMs = performance.now();
      const values = [...valuesOf(from), limit, ...valuesOf(from), withinMs * 1_000];
      const [row] = await select<Row>(FIND_NEXT_SCAN, values);
      if (!row) throw new Error("A SELECT of the clock gave no row");
      const { scanAt, id } = row;
      return {
        clock: { nowMs: Number(row.nowMs), sentAtMs, receivedAtMs: performance.now() },
        first: scanAt ? { scanAt, id } : undefined,
        inMs: scanAt ? Number(row.inMs) : withinMs,
        due: Number(row.due),
      };
    },
    { workMs: isBefore(BEGINNING, from) ? undefined : WALK_MS },
  );
}
