import { beforeEach, describe, expect, test } from "bun:test";
import { pino } from "pino";
import type { Database } from "../../lib/database.ts";
import { openDatabaseClock } from "../../lib/database_clock.ts";
import { QueueError } from "../../lib/queue.ts";
import type { Reservation } from "../../lib/reservations/reservation.ts";
import { findReservation } from "../../lib/reservations/reservation_queries.ts";
import { BEGINNING, claimDue, isBefore, type ScanPosition } from "../../lib/reservations/scan_repository.ts";
import { findScanState } from "../../lib/reservations/scan_state_repository.ts";
import {
  findPositions,
  fromAfter,
  openSweeper,
  type ScanPositions,
  type SweepOptions,
} from "../../lib/reservations/sweep.ts";
import { emptyTables, openTestDatabase } from "../harness/database.ts";
import { insertReservation, insertReservations, reservationOf } from "../harness/fixtures.ts";
import { openFrozen } from "../harness/frozen.ts";
import { silent } from "../harness/harness.ts";

const db = await openTestDatabase();
beforeEach(() => emptyTables(db));

const DAY_MS = 86_400_000;
const LEASE_MS = 15_000;
const LIMIT = 100;

/** So many milliseconds from now. */
function inMs(ms: number): Date {
  return new Date(Date.now() + ms);
}

/** The positions of a scheduler that has just claimed all that was due. */
function upToDate(): ScanPositions {
  return { from: fromAfter(Date.now()), openFrom: fromAfter(Date.now()) };
}

/** A sweeper, with what it claims and logs, and how often it wakes the scans. */
function openTestSweeper(positions: ScanPositions, options: Partial<SweepOptions> = {}) {
  const claimed: string[] = [];
  const log: Record<string, unknown>[] = [];
  const wakes = { count: 0 };
  const { database = db.database } = options;
  const clock = openDatabaseClock((jump) => sweeper.onJump(jump));
  const sweeper = openSweeper({
    database,
    logger: pino({}, { write: (line: string) => log.push(JSON.parse(line)) }),
    leaseMs: LEASE_MS,
    clock,
    positions,
    async claimFrom(from) {
      const rows = await claimDue(database, { from, limit: LIMIT, leaseMs: LEASE_MS });
      claimed.push(...rows.map(({ id }) => id));
      return rows.length === LIMIT;
    },
    wakeScan: () => wakes.count++,
    ...options,
  });
  return { sweep: sweeper.sweep, onJump: sweeper.onJump, claimed, log, wakes };
}

/** The oldest open reservation as everyone sees it. */
async function findOldest(): Promise<ScanPosition | undefined> {
  const [oldest] = await db.query<ScanPosition>(
    "select scan_at scanAt, id from point_reservations where scan_at is not null order by scan_at, id limit 1",
  );
  return oldest;
}

describe("sweep() claims what is due before the scans' position:", () => {
  test("what was committed late, and nothing else", async () => {
    const positions = upToDate();
    const { sweep, claimed } = openTestSweeper(positions);
    expect(await sweep()).toBeWithin(1_000, 10_001);
    const late = await insertReservation(db, { executeAt: inMs(-59_000) });
    await insertReservation(db, { executeAt: inMs(60_000) });
    await insertReservation(db, { status: "PROCESSING", scanAt: inMs(60_000) });
    await sweep();
    expect(claimed).toEqual([late.id]);
    await sweep();
    expect(claimed).toEqual([late.id]);
  });

  test("what somebody had locked, once it is released, and what lies behind it at once", async () => {
    const held = await insertReservation(db, { executeAt: inMs(-50_000) });
    const other = await insertReservation(db, { executeAt: inMs(-40_000) });
    const positions = upToDate();
    const { sweep, claimed } = openTestSweeper(positions);
    await db.database.transaction(async ({ select }) => {
      await select("select id from point_reservations where id = ? for update", [held.id]);
      for (let count = 0; count < 3; count++) await sweep();
      expect(claimed).toEqual([other.id]);
    });
    await sweep();
    expect(claimed).toEqual([other.id, held.id]);
  });

  test("what was locked for long, though everything around it is long over", async () => {
    const held = await insertReservation(db, { executeAt: inMs(-900_000) });
    const positions = upToDate();
    const { sweep, claimed } = openTestSweeper(positions);
    await db.database.transaction(async ({ select }) => {
      await select("select id from point_reservations where id = ? for update", [held.id]);
      for (let count = 0; count < 2; count++) {
        await sweep();
        expect(positions.openFrom).toEqual({ scanAt: held.executeAt, id: held.id });
      }
    });
    await sweep();
    expect(claimed).toEqual([held.id]);
    await sweep();
    expect(isBefore({ scanAt: inMs(-70_000), id: "" }, positions.openFrom)).toBe(true);
  });

  test("at its start whatever was inserted by hand, however long ago", async () => {
    const old = await insertReservation(db, { executeAt: new Date("1970-01-02T00:00:00.000Z") });
    const { sweep, claimed } = openTestSweeper(upToDate());
    await sweep();
    expect(claimed).toEqual([old.id]);
  });

  test("without a rest while there is more", async () => {
    const many = Array.from({ length: LIMIT + 1 }, () => reservationOf({ executeAt: inMs(-30_000) }));
    await insertReservations(db, { reservations: many });
    const { sweep, claimed } = openTestSweeper(upToDate());
    expect(await sweep()).toBe(0);
    expect(await sweep()).toBeGreaterThanOrEqual(1_000);
    expect(claimed).toHaveLength(LIMIT + 1);
  });
});

test("sweep() leaves to the scans what is not before their position", async () => {
  const [first, second] = [reservationOf(), reservationOf()].toSorted((a, b) => (a.id < b.id ? -1 : 1)) as [
    Reservation,
    Reservation,
  ];
  const scanAt = inMs(-5_000);
  const reservations = [first, second].map((one) => ({ ...one, executeAt: scanAt }));
  await insertReservations(db, { reservations });
  const positions = { from: { scanAt, id: second.id }, openFrom: BEGINNING };
  await claimDue(db.database, { from: BEGINNING, limit: 1, leaseMs: LEASE_MS });
  const { sweep, claimed } = openTestSweeper(positions);
  await sweep();
  expect(claimed).toEqual([]);
});

describe("sweep() stores the position that the next scheduler starts from:", () => {
  test("none is open before it", async () => {
    const positions = upToDate();
    const { sweep } = openTestSweeper(positions);
    await insertReservation(db, { executeAt: inMs(DAY_MS) });
    await sweep();
    const next = await findPositions(db.database, silent);
    expect(next.from).toEqual({ scanAt: positions.openFrom.scanAt, id: "" });
    expect(next.openFrom).toEqual(next.from);
    expect(isBefore(next.from, { scanAt: inMs(-60_000), id: "" })).toBe(true);
    expect(isBefore({ scanAt: inMs(-90_000), id: "" }, next.from)).toBe(true);
  });

  test("also while RabbitMQ takes no messages", async () => {
    const held = await insertReservation(db, { executeAt: inMs(-300_000) });
    const claimFrom = () => Promise.reject(new QueueError("RabbitMQ is away"));
    const { sweep } = openTestSweeper(upToDate(), { claimFrom });
    await expect(sweep()).rejects.toThrow("RabbitMQ is away");
    expect((await findScanState(db.database)).openFrom).toEqual({ scanAt: held.executeAt, id: "" });
  });

  test("a scheduler without one starts from the very beginning", async () => {
    expect(await findPositions(db.database, silent)).toEqual({ from: BEGINNING, openFrom: BEGINNING });
    await db.query("delete from point_scan_state");
    try {
      expect(await findPositions(db.database, silent)).toEqual({ from: BEGINNING, openFrom: BEGINNING });
    } finally {
      await db.query("insert into point_scan_state (id) values (1)");
    }
  });
});

describe("after MySQL's clock has gone back (fault 40)", () => {
  const now = new Date("2029-02-22T12:00:00.500Z");
  const tomorrow = new Date(now.getTime() + DAY_MS);

  async function setClock({ run }: Database, time: Date) {
    await run(({ execute }) => execute(`set timestamp = ${time.getTime() / 1_000}`));
  }

  test("sweep() says so once, brings back what was set aside, and starts from the beginning", async () => {
    await using database = await openFrozen(db, tomorrow);
    const positions = { from: fromAfter(tomorrow.getTime()), openFrom: fromAfter(tomorrow.getTime()) };
    const { sweep, claimed, log, wakes } = openTestSweeper(positions, { database });
    await sweep();
    const lost = await insertReservation(db, { executeAt: now });
    await claimDue(database, { limit: 1, leaseMs: LEASE_MS });
    await setClock(database, now);
    const { id } = await insertReservation(db, { executeAt: now });
    for (let count = 0; count < 3; count++) await sweep();
    expect(log.filter(({ level }) => level === 40)).toMatchObject([
      { msg: expect.stringMatching(/^MySQL's clock went back by 86,\d{3},\d{3} ms$/) },
    ]);
    expect(log.at(-1)).toMatchObject({ released: 1 });
    expect(wakes.count).toBe(2);
    expect((await findReservation(db.database, lost.id))?.scanAt).toEqual(new Date(now.getTime() + LEASE_MS));
    expect(positions.from).toEqual(BEGINNING);
    // That is left to the scans, which start from the beginning too.
    expect(claimed).toEqual([]);
    expect((await findReservation(db.database, id))?.status).toBe("PENDING");
  });

  test("a scheduler that starts later says so, and does the same", async () => {
    await db.query("update point_scan_state set clock_at = now(3) + interval 1 day, open_from = clock_at");
    const lost = await insertReservation(db, { status: "PROCESSING", scanAt: inMs(DAY_MS + LEASE_MS) });
    const log: Record<string, unknown>[] = [];
    const logger = pino({}, { write: (line: string) => log.push(JSON.parse(line)) });
    const positions = await findPositions(db.database, logger);
    expect(log).toMatchObject([
      { level: 40, msg: expect.stringMatching(/^MySQL's clock went back by 86,\d{3},\d{3} ms since/) },
    ]);
    expect(positions.from).toEqual(BEGINNING);
    await openTestSweeper(positions).sweep();
    const scanAt = (await findReservation(db.database, lost.id))?.scanAt;
    expect(Number(scanAt)).toBeWithin(Date.now(), Date.now() + LEASE_MS + 1);
    expect((await findScanState(db.database)).wasAheadMs).toBe(0);
  });

  test("what was set aside is brought back by the next scheduler if the first one dies meanwhile", async () => {
    await using dying = await openFrozen(db, tomorrow);
    const first = openTestSweeper(upToDate(), { database: dying });
    await first.sweep();
    await setClock(dying, now);
    const half: Database = {
      ...dying,
      run: (work, options) =>
        dying.run(({ execute, ...connection }) => {
          const dieAtLast: typeof execute = (sql, values) =>
            sql.includes("release_set_aside") ? Promise.reject(new Error("killed")) : execute(sql, values);
          return work({ ...connection, execute: dieAtLast });
        }, options),
    };
    const scanAt = new Date(tomorrow.getTime() + LEASE_MS);
    const lost = await insertReservation(db, { executeAt: now, status: "PROCESSING", scanAt });
    const second = openTestSweeper(upToDate(), { database: half });
    await expect(second.sweep()).rejects.toThrow("killed");
    await using frozen = await openFrozen(db, now);
    await openTestSweeper(await findPositions(frozen, silent), { database: frozen }).sweep();
    expect((await findReservation(db.database, lost.id))?.scanAt).toEqual(new Date(now.getTime() + LEASE_MS));
  });
});

test("onJump() ahead is logged, wakes the scans, and is stored at once", async () => {
  const positions = upToDate();
  const { from, openFrom } = positions;
  const { sweep, onJump, log, wakes } = openTestSweeper(positions);
  await sweep();
  const [before] = await db.query<{ at: Date }>("select clock_at at from point_scan_state");
  onJump({ byMs: 5_000, wouldShowMs: Date.now() - 5_000 });
  expect(log).toMatchObject([{ level: 40, msg: "MySQL's clock went ahead by 5,000 ms" }]);
  expect(wakes.count).toBe(1);
  expect(positions.from).toEqual(from);
  expect(isBefore(positions.openFrom, openFrom)).toBe(true);
  await sweep();
  const [after] = await db.query<{ at: Date }>("select clock_at at from point_scan_state");
  expect(Number(after?.at)).toBeGreaterThan(Number(before?.at));
  expect(await findOldest()).toBeUndefined();
});
