import { newReservation, type Reservation } from "../../lib/reservations/reservation.ts";
import type { ReservationStatus } from "../../lib/schema.ts";
import type { TestDatabase } from "./database.ts";

/** A valid reservation, due since a second unless told otherwise. */
export function reservationOf(fields: Partial<Reservation> = {}): Reservation {
  const reservation = newReservation({
    user_id: "TestUser01",
    point_amount: 100,
    execute_at: new Date(Date.now() - 1_000).toISOString(),
  });
  return { ...reservation, ...fields };
}

/** A row as it is to stand in the table, whatever the rules of the program say. */
export type RowFields = Partial<Reservation> & { status?: ReservationStatus; scanAt?: Date | null };

/** Inserts a row: for states that only a crash or an operator makes. */
export async function insertReservation(db: TestDatabase, fields: RowFields = {}): Promise<Reservation> {
  const { status = "PENDING", scanAt, ...rest } = fields;
  const reservation = reservationOf(rest);
  await insertRows(db, { reservations: [reservation], status, scanAt });
  return reservation;
}

/** Inserts many rows at once: PENDING and due, or PROCESSING with a lease that is far from its end. */
export function insertReservations(
  db: TestDatabase,
  {
    status = "PENDING",
    ...rows
  }: { reservations: readonly Reservation[]; status?: "PENDING" | "PROCESSING" },
): Promise<void> {
  const scanAt = status === "PENDING" ? undefined : new Date(Date.now() + 3_600_000);
  return insertRows(db, { ...rows, status, scanAt });
}

interface Rows {
  reservations: readonly Reservation[];
  status: ReservationStatus;
  /** By default `execute_at` if that status waits, else none. */
  scanAt: Date | null | undefined;
}

async function insertRows({ query }: TestDatabase, { reservations, status, scanAt }: Rows): Promise<void> {
  const waits = status === "PENDING" || status === "PROCESSING";
  await query(
    `insert into point_reservations
       (id, user_id, point_amount, execute_at, idempotency_key, campaign, status, scan_at) values ?`,
    [
      reservations.map(({ id, userId, pointAmount, executeAt, idempotencyKey, campaign }) => {
        const scan = scanAt === undefined && waits ? executeAt : (scanAt ?? null);
        return [id, userId, pointAmount, executeAt, idempotencyKey, campaign, status, scan];
      }),
    ],
  );
}
