import { expect } from "bun:test";
import { aggregate } from "../../lib/accounting/aggregate.ts";
import { changePoints } from "../../lib/points/change_repository.ts";
import { newPointChange } from "../../lib/points/point.ts";
import type { Reservation } from "../../lib/reservations/reservation.ts";
import type { TestDatabase } from "../harness/database.ts";
import { insertReservation } from "../harness/fixtures.ts";
import { insertEntries } from "../harness/ledger.ts";
import { processReservations } from "../harness/pipeline.ts";

export const LEASE_MS = 15_000;

/** Reserves and grants, as the program does. */
export async function grant(db: TestDatabase, fields: Partial<Reservation> = {}): Promise<void> {
  const reservation = await insertReservation(db, { status: "PROCESSING", ...fields });
  expect(await processReservations([[reservation]], { database: db.database })).toEqual(["ack"]);
}

/** Adds points to a balance, or subtracts them. */
export function change({ database }: TestDatabase, userId: string, points: number) {
  const input = { user_id: userId, point_num: Math.abs(points) };
  return changePoints(database, [newPointChange(input, { kind: points > 0 ? "add" : "sub" })]);
}

/** Some of everything, counted, and all of it right. */
export async function fill(db: TestDatabase): Promise<void> {
  for (const userId of ["Ann", "Bob", "Cat", "Ann"]) await grant(db, { userId, campaign: "spring" });
  await change(db, "Ann", 50);
  await change(db, "Ann", -20);
  for (const status of ["PENDING", "FAILED", "CANCELLED"] as const) await insertReservation(db, { status });
  await db.query("update point_transactions set created_at = '2026-01-01 12:00:00'");
  await db.query(
    `update point_reservations set created_at = '2026-01-01',
       execute_at = if(status = 'DONE', '2026-01-01 11:59:59', execute_at)`,
  );
  await aggregate(db.database, { timeZone: "UTC" });
}

/** Totals of three days of Tokyo, to the millisecond at the ends of the first one. */
export async function fillTotals(db: TestDatabase): Promise<void> {
  const grants = [
    { userId: "Ann", pointAmount: 100, campaign: "spring", at: "2026-03-01T14:59:59.999Z", lateMs: 5 },
    { userId: "Ann", pointAmount: 10, campaign: "spring", at: "2026-03-01T15:00:00.000Z", lateMs: 0 },
    { userId: "Bob", pointAmount: 20, campaign: "spring", at: "2026-03-01T15:00:00.001Z", lateMs: 8 },
    { userId: "Bob", pointAmount: 30, campaign: null, at: "2026-03-02T01:00:00.000Z", lateMs: 2 },
  ];
  for (const { at, lateMs, ...fields } of grants) {
    const createdAt = new Date(at);
    const executeAt = new Date(createdAt.getTime() - lateMs);
    const reservation = await insertReservation(db, { ...fields, executeAt, status: "DONE" });
    await insertEntries(db, [{ ...fields, reservation, createdAt }]);
  }
  await db.query("update point_reservations set created_at = execute_at");
  await insertEntries(db, [
    { userId: "Ann", pointAmount: -40, createdAt: new Date("2026-03-02T02:00:00Z") },
    { userId: "Cat", pointAmount: 7, createdAt: new Date("2026-03-04T02:00:00Z") },
  ]);
  await aggregate(db.database, { timeZone: "Asia/Tokyo" });
}
