import { beforeEach, describe, expect, test } from "bun:test";
import { findReservation, findReservationByKey } from "../../lib/reservations/reservation_queries.ts";
import { emptyTables, openTestDatabase } from "../harness/database.ts";
import { insertReservation, reservationOf } from "../harness/fixtures.ts";
import { insertEntries } from "../harness/ledger.ts";

// What lists give: reserved_points.test.ts. What each query reads: plans.test.ts.

const db = await openTestDatabase();
beforeEach(() => emptyTables(db));

describe("findReservation() and findReservationByKey()", () => {
  test("give the reservation, and the ledger entry of its grant", async () => {
    const reservation = await insertReservation(db, { status: "DONE", idempotencyKey: "Order" });
    const createdAt = new Date("2029-02-22T13:59:00.003Z");
    await insertEntries(db, [{ ...reservation, reservation, createdAt }]);
    const [entry] = await db.query<{ id: string }>("select id from point_transactions");
    const details = await findReservation(db.database, reservation.id);
    expect(details).toMatchObject({ ...reservation, status: "DONE", transactionId: entry?.id });
    expect(details?.grantedAt).toEqual(createdAt);
    expect(await findReservationByKey(db.database, "Order")).toEqual(details);
  });

  test("do not take another entry of the same key for its grant", async () => {
    const { id } = await insertReservation(db, { status: "FAILED", idempotencyKey: "order" });
    const another = { id: reservationOf().id, idempotencyKey: "order" };
    await insertEntries(db, [{ userId: "Somebody", pointAmount: 1, reservation: another }]);
    await insertEntries(db, [{ userId: "TestUser01", pointAmount: 100 }]);
    await db.query("update point_transactions set idempotency_key = 'order'");
    const none = { transactionId: null, grantedAt: null };
    expect(await findReservation(db.database, id)).toMatchObject(none);
    expect(await findReservationByKey(db.database, "order")).toMatchObject(none);
  });

  test("give undefined for an id and a key that are not there, also if they differ only in case", async () => {
    await insertReservation(db, { idempotencyKey: "Order" });
    expect(await findReservation(db.database, reservationOf().id)).toBeUndefined();
    expect(await findReservationByKey(db.database, "order")).toBeUndefined();
  });
});
