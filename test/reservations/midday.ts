import type { Reservation } from "../../lib/reservations/reservation.ts";
import { findReservation, type ReservationDetails } from "../../lib/reservations/reservation_queries.ts";
import type { TestDatabase } from "../harness/database.ts";
import { insertReservation, insertReservations, type RowFields, reservationOf } from "../harness/fixtures.ts";

/** So many milliseconds from midday. */
export function midday(offsetMs = 0): Date {
  return new Date(Date.parse("2029-02-22T12:00:00.500Z") + offsetMs);
}

export function idsOf(reservations: readonly Pick<Reservation, "id">[]): string[] {
  return reservations.map(({ id }) => id);
}

/** Reservations of a test's database, due around midday. */
export function aroundMidday(db: TestDatabase) {
  return {
    insertDueAt(offsetMs: number, fields: RowFields = {}) {
      return insertReservation(db, { executeAt: midday(offsetMs), ...fields });
    },
    /** Some of a reservation's details. Not for `toMatchObject()`, which takes any two Dates for equal. */
    async detailsOf<Name extends keyof ReservationDetails>(id: string, ...names: Name[]) {
      const details = await findReservation(db.database, id);
      if (!details) throw new Error(`No reservation ${id}`);
      return Object.fromEntries(names.map((name) => [name, details[name]]));
    },
    /** Inserts so many, due one millisecond after the other; gives their ids in that order. */
    async insertMany(count: number): Promise<string[]> {
      const firstMs = Date.now() - 60_000;
      const ordered = Array.from({ length: count }, (_, index) =>
        reservationOf({ executeAt: new Date(firstMs + index) }),
      );
      const shuffled = ordered.toSorted((a, b) => (Bun.hash(a.id) < Bun.hash(b.id) ? -1 : 1));
      await insertReservations(db, { reservations: shuffled });
      return idsOf(ordered);
    },
  };
}
