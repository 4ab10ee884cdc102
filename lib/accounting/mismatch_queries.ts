import type { Connection } from "../database.ts";
import type { ReservationStatus } from "../schema.ts";
import { findShownEntries, SHOWN_COLUMNS } from "./check.ts";
import type { OrphanEntry, ReservationMismatch, ShownEntry } from "./difference.ts";

// Every DONE reservation has exactly one ledger entry, and every grant in the ledger has a DONE reservation. An incorrect grant
// may have the wrong reservation id or the wrong key, so both are compared.

/** SQL: some ledger entries `t`, found by their ids. */
export const ENTRIES = "point_transactions t force index (primary)";
/** SQL: some reservations `r`, found by their ids, and the grants of their keys. */
export const GRANTS = `point_reservations r force index (primary)
  join point_transactions t on t.idempotency_key = r.idempotency_key and t.is_grant = 1`;

/** The DONE reservations `r` that do not have exactly one grant of their id, key, user and amount. */
export async function findReservationMismatches(
  connection: Connection,
  { where, values }: { where: string; values: unknown[] },
): Promise<ReservationMismatch[]> {
  type Row = { id: string; userId: string; pointAmount: number; idempotencyKey: string };
  const rows = await connection.select<Row>(
    `/* find_reservation_mismatches */ select r.id, r.user_id userId, r.point_amount pointAmount,
       r.idempotency_key idempotencyKey
     from point_reservations r
     left join point_transactions t on t.idempotency_key = r.idempotency_key and t.is_grant = 1
     where ${where} and r.status = 'DONE'
     group by r.id
     having count(t.id) <> 1
       or sum(t.user_id = r.user_id and t.point_amount = r.point_amount and t.reservation_id <=> r.id) <> 1`,
    values,
  );
  const found: ReservationMismatch[] = [];
  for (const { id, userId, pointAmount, idempotencyKey } of rows) {
    found.push({
      kind: "reservation",
      reservation_id: id,
      user_id: userId,
      point_amount: pointAmount,
      idempotency_key: idempotencyKey,
      entries: await findShownEntries(connection, "t.idempotency_key = ? and t.is_grant = 1", idempotencyKey),
    });
  }
  return found;
}

/**
 * Grants that do not belong to a DONE reservation.
 *
 * @param options.from `ENTRIES` or `GRANTS`
 */
export async function findOrphanEntries(
  { select }: Connection,
  { from, where, values }: { from: string; where: string; values: unknown[] },
): Promise<OrphanEntry[]> {
  const rows = await select<ShownEntry & { reservation_status: ReservationStatus | null }>(
    `/* find_orphan_entries */ select ${SHOWN_COLUMNS}, named.status reservation_status
     from ${from} left join point_reservations named on named.id = t.reservation_id
     where ${where} and t.kind = 'grant'
       and (named.id is null or named.status <> 'DONE' or named.idempotency_key <> t.idempotency_key)`,
    values,
  );
  return rows.map(({ reservation_status, ...entry }) => ({
    kind: "entry",
    entries: [entry],
    reservation_id: entry.reservation_id,
    reservation_status,
  }));
}
