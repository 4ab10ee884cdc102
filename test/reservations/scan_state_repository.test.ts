import { beforeEach, describe, expect, test } from "bun:test";
import { findReservation } from "../../lib/reservations/reservation_queries.ts";
import { BEGINNING, claimDue } from "../../lib/reservations/scan_repository.ts";
import {
  findScanState,
  releaseSetAside,
  restartClock,
  saveScanState,
} from "../../lib/reservations/scan_state_repository.ts";
import { emptyTables, openTestDatabase } from "../harness/database.ts";
import { insertReservation, insertReservations, type RowFields, reservationOf } from "../harness/fixtures.ts";
import { openFrozen } from "../harness/frozen.ts";

const db = await openTestDatabase();
beforeEach(() => emptyTables(db));

const DAY_MS = 86_400_000;
const LEASE_MS = 15_000;

/** So many milliseconds from midday. */
function midday(offsetMs = 0): Date {
  return new Date(Date.parse("2029-02-22T12:00:00.500Z") + offsetMs);
}

function positionAt(offsetMs: number) {
  return { scanAt: midday(offsetMs), id: "" };
}

describe("saveScanState() and findScanState()", () => {
  test("give a new scheduler the position of the last one that saved it", async () => {
    expect(await findScanState(db.database)).toEqual({ wasAheadMs: 0, openFrom: undefined });
    await using frozen = await openFrozen(db, midday());
    for (const offsetMs of [-5, -9]) {
      await saveScanState(frozen, { openFrom: positionAt(offsetMs), clockWas: undefined });
      expect(await findScanState(frozen)).toEqual({ wasAheadMs: 0, openFrom: positionAt(offsetMs) });
    }
  });

  test("know of a clock that went back, whoever saw it ahead, and then of no position until restartClock()", async () => {
    await using ahead = await openFrozen(db, midday(DAY_MS));
    await saveScanState(ahead, { openFrom: positionAt(DAY_MS - 5), clockWas: undefined });
    await using frozen = await openFrozen(db, midday());
    expect(await findScanState(frozen)).toMatchObject({ wasAheadMs: DAY_MS });
    await saveScanState(frozen, { openFrom: positionAt(-5), clockWas: undefined });
    expect(await findScanState(frozen)).toEqual({ wasAheadMs: DAY_MS, openFrom: undefined });
    await restartClock(frozen);
    await saveScanState(frozen, { openFrom: positionAt(-5), clockWas: undefined });
    expect(await findScanState(frozen)).toEqual({ wasAheadMs: 0, openFrom: positionAt(-5) });
  });

  test("know of a clock that only this scheduler has seen ahead, and of one a second off nothing", async () => {
    await using frozen = await openFrozen(db, midday());
    await saveScanState(frozen, { openFrom: positionAt(-5), clockWas: midday(1_000) });
    expect((await findScanState(frozen)).openFrom).toEqual(positionAt(-5));
    await saveScanState(frozen, { openFrom: positionAt(-5), clockWas: midday(1_001) });
    expect(await findScanState(frozen)).toEqual({ wasAheadMs: 1_001, openFrom: undefined });
  });

  test.each([
    ["in the future", positionAt(1)],
    ["at the very beginning", BEGINNING],
  ])("take a position %s for unknown", async (_, openFrom) => {
    await using frozen = await openFrozen(db, midday());
    await saveScanState(frozen, { openFrom: positionAt(-5), clockWas: undefined });
    await saveScanState(frozen, { openFrom, clockWas: undefined });
    expect(await findScanState(frozen)).toEqual({ wasAheadMs: 0, openFrom: undefined });
  });
});

describe("releaseSetAside()", () => {
  const HOUR_MS = 3_600_000;
  const options = { leaseMs: LEASE_MS, wasAheadMs: DAY_MS };
  type Case = [what: string, fields: RowFields, attempts: number, scanAt: Date];

  async function scanAtOf(fields: RowFields, attempts: number) {
    const { id } = await insertReservation(db, fields);
    await db.query("update point_reservations set attempts = ? where id = ?", [attempts, id]);
    await using frozen = await openFrozen(db, midday());
    const released = await releaseSetAside(frozen, options);
    return { released, scanAt: (await findReservation(db.database, id))?.scanAt };
  }

  const past = midday(-1_000);
  const [aside, lease] = [midday(DAY_MS + LEASE_MS), midday(LEASE_MS)];
  test.each<Case>([
    ["a claim gets a usual lease", { executeAt: past, status: "PROCESSING", scanAt: aside }, 0, lease],
    [
      "a claim that came too early waits for its time",
      { executeAt: midday(HOUR_MS), status: "PROCESSING", scanAt: aside },
      0,
      midday(HOUR_MS),
    ],
    ["what was due at once is due now", { executeAt: past, scanAt: midday(DAY_MS) }, 0, midday()],
    ["a retry is due now", { executeAt: past, scanAt: midday(DAY_MS) }, 3, midday()],
  ])("brings back what the clock of tomorrow has set aside: %s", async (_, fields, attempts, scanAt) => {
    expect(await scanAtOf(fields, attempts)).toEqual({ released: 1, scanAt });
  });

  const future = midday(DAY_MS / 2);
  test.each<Case>([
    ["a reservation of the future", { executeAt: future }, 0, future],
    ["one that was retried before it was patched", { executeAt: future }, 3, future],
    ["a claim whose lease is as usual", { executeAt: past, status: "PROCESSING", scanAt: lease }, 0, lease],
    ["a retry after the longest wait", { executeAt: past, scanAt: midday(HOUR_MS) }, 3, midday(HOUR_MS)],
    ["what is due", { executeAt: past }, 0, past],
  ])("leaves as it is %s", async (_, fields, attempts, scanAt) => {
    expect(await scanAtOf(fields, attempts)).toEqual({ released: 0, scanAt });
  });

  test("brings back all of many, among others, and claims find them", async () => {
    const many = Array.from({ length: 2_500 }, () => reservationOf());
    await insertReservations(db, { reservations: many });
    await db.query(
      "update point_reservations set scan_at = now(3) + interval 1 day, status = if(crc32(id) % 2, status, 'PROCESSING')",
    );
    const later = new Date(Date.now() + 2 * HOUR_MS);
    const others = Array.from({ length: 1_500 }, () => reservationOf({ executeAt: later }));
    await insertReservations(db, { reservations: others });
    expect(await releaseSetAside(db.database, { leaseMs: 1, wasAheadMs: DAY_MS })).toBe(2_500);
    expect(await releaseSetAside(db.database, { leaseMs: 1, wasAheadMs: DAY_MS })).toBe(0);
    await Bun.sleep(2);
    expect(await claimDue(db.database, { limit: 5_000, leaseMs: LEASE_MS })).toHaveLength(2_500);
  });
});
