import { plural } from "../errors.ts";
import type { EntryKind, ReservationStatus } from "../schema.ts";

/** A ledger entry in a difference. */
export interface ShownEntry {
  transaction_id: string;
  user_id: string;
  point_amount: number;
  idempotency_key: string;
  kind: EntryKind;
  reservation_id: string | null;
  created_at: Date;
}

/** The sums of the entries of a day, kind and campaign in a difference. */
export interface ShownTotal {
  entries: bigint;
  points: bigint;
  users: bigint;
  late_ms_sum: bigint;
  late_ms_max: bigint;
}

/** A balance that is not the sum of the user's ledger entries. */
export interface BalanceMismatch {
  kind: "balance";
  user_id: string;
  /** Null if the user has no balance. */
  balance: bigint | null;
  ledger: bigint;
  /** The number of the user's entries; `entries` has the newest of them. */
  entry_count: number;
  entries: ShownEntry[];
}

/** A DONE reservation that does not have exactly one ledger entry of its key, user and amount. */
export interface ReservationMismatch {
  kind: "reservation";
  reservation_id: string;
  user_id: string;
  point_amount: number;
  idempotency_key: string;
  entries: ShownEntry[];
}

/** A grant in the ledger that does not belong to a DONE reservation. */
export interface OrphanEntry {
  kind: "entry";
  entries: [ShownEntry];
  /** The reservation that the entry names. */
  reservation_id: string | null;
  /** Null if there is no such reservation. */
  reservation_status: ReservationStatus | null;
}

/** A daily total that is not the sum of the entries that it counts. */
export interface TotalMismatch {
  kind: "total";
  day: string;
  of: EntryKind;
  campaign: string | null;
  /** Null if there is no total. */
  total: ShownTotal | null;
  ledger: ShownTotal | null;
}

/** A reservation that was due minutes ago and is still open. */
export interface OverdueReservation {
  kind: "overdue";
  reservation_id: string;
  user_id: string;
  status: ReservationStatus;
  execute_at: Date;
  attempts: number;
  last_error: string | null;
}

/** A finding of a reconciliation: two figures that must agree and do not, or an overdue reservation. */
export type Difference =
  | BalanceMismatch
  | ReservationMismatch
  | OrphanEntry
  | TotalMismatch
  | OverdueReservation;

/** A difference in one line: the problem, both figures, and their entries. */
export function describeDifference(difference: Difference): string {
  switch (difference.kind) {
    case "balance": {
      const { user_id, balance, ledger, entry_count, entries } = difference;
      const has = balance === null ? "no balance" : balance;
      const older = entry_count > entries.length ? ` and ${entry_count - entries.length} older` : "";
      return `balance mismatch: ${user_id} has ${has}, but the ledger has ${ledger} in ${plural(entry_count, "entry", "entries")}${listEntries(entries)}${older}`;
    }
    case "reservation": {
      const { reservation_id, user_id, point_amount, entries } = difference;
      const found = entries.length === 0 ? ": it has none" : listEntries(entries);
      return `reservation mismatch: ${reservation_id} is DONE, but does not have exactly one ledger entry of ${point_amount} for ${user_id}${found}`;
    }
    case "entry": {
      const { entries, reservation_id, reservation_status } = difference;
      return `orphan entry: ${orphanReason(reservation_id, reservation_status)}${listEntries(entries)}`;
    }
    case "total": {
      const { day, of, campaign, total, ledger } = difference;
      const name = `${day}, ${of}, ${campaign ? `campaign ${campaign}` : "no campaign"}`;
      return `total mismatch: ${name}: ${total ? `the total has ${showTotal(total)}` : "there is no total"}, but the ledger has ${ledger ? showTotal(ledger) : "none"}`;
    }
    case "overdue": {
      const { reservation_id, user_id, status, execute_at, attempts, last_error } = difference;
      const error = last_error === null ? "" : `, last error: ${last_error}`;
      return `overdue reservation: ${reservation_id} of ${user_id} was due at ${execute_at.toISOString()} and is still ${status} after ${plural(attempts, "failed attempt")}${error}`;
    }
  }
}

function orphanReason(id: string | null, status: ReservationStatus | null): string {
  if (status === null) return `there is no reservation ${id ?? "for it"}`;
  if (status === "DONE") return `reservation ${id} has another idempotency key`;
  return `its reservation ${id} is ${status}`;
}

function listEntries(entries: readonly ShownEntry[]): string {
  if (entries.length === 0) return "";
  const shown = entries.map((entry) => {
    const source = entry.reservation_id === null ? entry.kind : `${entry.kind} of ${entry.reservation_id}`;
    return `${entry.transaction_id} (${entry.point_amount} for ${entry.user_id}, key ${entry.idempotency_key}, ${source}, ${entry.created_at.toISOString()})`;
  });
  return `: ${shown.join(", ")}`;
}

function showTotal({ entries, points, users, late_ms_sum, late_ms_max }: ShownTotal): string {
  return `${plural(entries, "entry", "entries")}, ${plural(points, "point")}, ${plural(users, "user")}, late by ${late_ms_sum} ms in total and ${late_ms_max} ms at most`;
}
