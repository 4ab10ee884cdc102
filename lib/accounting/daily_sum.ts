import type { EntryKind, ReservationStatus } from "../schema.ts";
import { boundsOf, dayOf } from "./day.ts";

/** A ledger entry that no total counts yet. */
export interface UncountedEntry {
  id: string;
  userId: string;
  pointAmount: number;
  kind: EntryKind;
  reservationId: string | null;
  idempotencyKey: string;
  createdAt: Date;
}

/** The reservation that an entry names. */
export interface GrantedReservation {
  id: string;
  userId: string;
  pointAmount: number;
  status: ReservationStatus;
  idempotencyKey: string;
  campaign: string | null;
  /** When it could first be granted: `execute_at`, or when it was made or last changed, if that is later. */
  grantableAt: Date;
}

/** The key of a daily total. */
export interface TotalName {
  day: string;
  kind: EntryKind;
  /** Empty if there is none. */
  campaign: string;
}

/** The sums of some entries of one day, kind and campaign. */
export interface DailySum extends TotalName {
  entries: number;
  points: number;
  userIds: Set<string>;
  /** Milliseconds from when the reservation could be granted to the grant; 0 for other entries. A bigint, as a number would lose digits. */
  lateMsSum: bigint;
  lateMsMax: number;
}

/**
 * Adds up entries by day, kind and campaign. Returns the sums in the order of the totals' primary key: two batches that lock
 * totals in different orders would deadlock.
 */
export function sumByDay(
  entries: readonly UncountedEntry[],
  { reservations, timeZone }: { reservations: ReadonlyMap<string, GrantedReservation>; timeZone: string },
): DailySum[] {
  const sums = new Map<string, DailySum>();
  let day = { name: "", from: new Date(0), until: new Date(0) };
  for (const { userId, pointAmount, kind, reservationId, createdAt } of entries) {
    // Entries are ordered by time: most have the same day as the entry before.
    if (createdAt < day.from || createdAt >= day.until) {
      const name = dayOf(createdAt, timeZone);
      day = { name, ...boundsOf(name, timeZone) };
    }
    const { campaign, grantableAt } = reservations.get(reservationId ?? "") ?? {};
    const total = { day: day.name, kind, campaign: campaign ?? "" };
    const key = `${total.day} ${total.kind} ${total.campaign}`;
    const sum = sums.get(key) ?? { ...total, ...emptySum() };
    const lateMs = grantableAt ? Math.max(0, createdAt.getTime() - grantableAt.getTime()) : 0;
    sum.entries++;
    sum.points += pointAmount;
    sum.userIds.add(userId);
    sum.lateMsSum += BigInt(lateMs);
    sum.lateMsMax = Math.max(sum.lateMsMax, lateMs);
    sums.set(key, sum);
  }
  return [...sums].toSorted(([a], [b]) => (a < b ? -1 : 1)).map(([, sum]) => sum);
}

function emptySum(): Omit<DailySum, keyof TotalName> {
  return { entries: 0, points: 0, userIds: new Set(), lateMsSum: 0n, lateMsMax: 0 };
}
