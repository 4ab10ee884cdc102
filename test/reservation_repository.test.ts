import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, spyOn, test } from "bun:test";
import { type Database, openDatabase } from "../lib/database.ts";
import { findReservation, type ReservationStory } from "../lib/history.ts";
import { RESERVATION_STATUSES, type Reservation } from "../lib/reservation.ts";
import {
  type ClaimedReservation,
  cancelCampaign,
  cancelReservation,
  claimDue,
  createReservations,
  findNextScan,
  lockReservations,
  markDone,
  markFailed,
  patchReservation,
  retryReservation,
  scheduleRetry,
} from "../lib/reservation_repository.ts";
import { createTestDatabase, insertReservation, reservationOf, type TestDatabase, until } from "./harness.ts";

let db: TestDatabase;
/** One connection whose clock stands still: only so can a test be exact to the millisecond. */
let frozen: Database;
beforeAll(async () => {
  db = await createTestDatabase();
});
afterAll(() => db.drop());
beforeEach(() => {
  frozen = openDatabase(db.url, { connections: 1 });
});
afterEach(async () => {
  await frozen.close();
  await db.query("delete from point_reservations");
  await db.query("delete from point_transactions");
});

/** Sets the frozen clock. Whole and half seconds only: MySQL takes a floating-point number. */
async function freezeAt(iso: string): Promise<void> {
  await frozen.run(({ execute }) => execute(`set timestamp = ${Date.parse(iso) / 1000}`));
}

const MIDDAY = "2029-02-22T12:00:00.500Z";
const LEASE = { limit: 1_000, leaseMs: 60_000 };

/** So many milliseconds from midday. */
function midday(offsetMs = 0): Date {
  return new Date(Date.parse(MIDDAY) + offsetMs);
}

function insertDueAt(offsetMs: number, fields: Parameters<typeof insertReservation>[1] = {}) {
  return insertReservation(db, { executeAt: midday(offsetMs), ...fields });
}

function idsOf(reservations: readonly Pick<Reservation, "id">[]): string[] {
  return reservations.map(({ id }) => id);
}

async function rowOf(id: string) {
  const row = await findReservation(db.database, id);
  if (!row) throw new Error("There is no such reservation");
  return row;
}

/** A row has these values. Not by `toMatchObject()`, which takes any two Dates for equal. */
async function expectRow(id: string, fields: Partial<ReservationStory>): Promise<void> {
  const row = await rowOf(id);
  const found = Object.keys(fields).map((name) => [name, row[name as keyof ReservationStory]]);
  expect(Object.fromEntries(found)).toEqual(fields);
}

/** What `work` gets within its transaction, which commits only when told. */
function openTransaction<T>(work: (database: Database) => Promise<T>) {
  const { promise: gate, resolve: commit } = Promise.withResolvers<void>();
  const inside = Promise.withResolvers<T>();
  const held: Database = {
    ...db.database,
    transaction: (work) =>
      db.database.transaction(async (connection) => {
        const result = await work(connection);
        inside.resolve(result as never);
        await gate;
        return result;
      }),
  };
  const done = work(held);
  done.catch(inside.reject);
  return { inside: inside.promise, commit, done };
}

/** What a claim gets, whose transaction commits only when told. */
function openClaim(limit: number) {
  const { inside: claimed, commit, done } = openTransaction((held) => claimDue(held, { ...LEASE, limit }));
  return { claimed, commit, done };
}

/** Waits until a statement of this database that begins so is under way: it waits for a lock, as it does nothing long. */
async function untilWaiting(statement: string): Promise<void> {
  await until(`${statement} waits`, async () => {
    const [waiting] = await db.query(
      "select id from information_schema.processlist where db = ? and info like ?",
      [db.name, `${statement}%`],
    );
    return waiting !== undefined;
  });
}

function create(batch: readonly Reservation[]) {
  return db.database.run((connection) => createReservations(connection, batch));
}

/** Inserts this many, due one millisecond after the other, in mixed order; gives their ids in the order of scan_at. */
async function insertMany(count: number, firstDue = new Date(Date.now() - 60_000)): Promise<string[]> {
  const ordered = Array.from({ length: count }, (_, index) =>
    reservationOf({ executeAt: new Date(firstDue.getTime() + index) }),
  );
  await create(ordered.toSorted((a, b) => (Bun.hash(a.id) < Bun.hash(b.id) ? -1 : 1)));
  return idsOf(ordered);
}

describe("createReservations()", () => {
  test("inserts all of a batch, to the millisecond and PENDING (fault 6)", async () => {
    const batch = [
      reservationOf({ executeAt: new Date("1970-01-01T00:00:00.000Z"), pointAmount: 1 }),
      reservationOf({ executeAt: new Date("2029-02-22T13:59:00.001Z"), idempotencyKey: "k".repeat(100) }),
      reservationOf({ executeAt: new Date("9999-12-31T23:59:59.999Z"), pointAmount: 2147483647 }),
      reservationOf({ userId: "x".repeat(20) }),
    ];
    const outcomes = await create(batch);
    expect(outcomes).toEqual(batch.map((reservation) => ({ kind: "created", reservation })));
    for (const reservation of batch) {
      const row = await rowOf(reservation.id);
      expect(row).toEqual({
        ...reservation,
        status: "PENDING",
        scanAt: reservation.executeAt,
        attempts: 0,
        lastError: null,
        createdAt: expect.any(Date),
        updatedAt: expect.any(Date),
        grantedAt: null,
        transactionId: null,
        originalPointAmount: null,
        originalExecuteAt: null,
      });
      expect(Math.abs(row.createdAt.getTime() - Date.now())).toBeLessThan(60_000);
    }
  });

  test("stores UTC: the text in the table is the time in UTC", async () => {
    const reservation = reservationOf({ executeAt: new Date("2029-02-22T13:59:00.123Z") });
    await create([reservation]);
    expect(
      await db.query(
        "select cast(execute_at as char) at, cast(scan_at as char) scan from point_reservations",
      ),
    ).toEqual([{ at: "2029-02-22 13:59:00.123", scan: "2029-02-22 13:59:00.123" }]);
  });

  test("replays the same key with the same content: the first reservation", async () => {
    const first = reservationOf({ idempotencyKey: "order-42" });
    const second = { ...first, id: reservationOf().id };
    await create([first]);
    expect(await create([second])).toEqual([{ kind: "replayed", reservation: first }]);
    expect(await db.query("select id from point_reservations")).toEqual([{ id: first.id }]);
  });

  test.each<[string, Partial<Reservation>]>([
    ["user", { userId: "testuser01" }],
    ["amount", { pointAmount: 101 }],
    ["time, by a millisecond", { executeAt: midday(1) }],
    ["campaign", { campaign: "winter" }],
  ])("refuses the same key with another %s, and changes nothing", async (_, other) => {
    const first = reservationOf({ idempotencyKey: "order-42", executeAt: midday() });
    await create([first]);
    const before = await rowOf(first.id);
    expect(await create([{ ...first, id: reservationOf().id, ...other }])).toEqual([{ kind: "conflict" }]);
    expect(await rowOf(first.id)).toEqual(before);
    expect(await db.query("select id from point_reservations")).toHaveLength(1);
  });

  test("lets a taken key affect only its own reservation, also one taken within the batch", async () => {
    const taken = reservationOf({ idempotencyKey: "taken" });
    await create([taken]);
    const first = reservationOf({ idempotencyKey: "twice" });
    const batch = [
      reservationOf(),
      { ...taken, id: reservationOf().id },
      first,
      { ...first, id: reservationOf().id },
      { ...first, id: reservationOf().id, pointAmount: 7 },
      reservationOf({ idempotencyKey: "taken", userId: "other" }),
      reservationOf(),
    ];
    expect(await create(batch)).toEqual([
      { kind: "created", reservation: batch[0] as Reservation },
      { kind: "replayed", reservation: taken },
      { kind: "created", reservation: first },
      { kind: "replayed", reservation: first },
      { kind: "conflict" },
      { kind: "conflict" },
      { kind: "created", reservation: batch[6] as Reservation },
    ]);
    expect(await db.query("select id from point_reservations")).toHaveLength(4);
  });

  test("says created again where the same batch comes again, as after an answer that was lost", async () => {
    const batch = [reservationOf(), reservationOf()];
    const outcomes = batch.map((reservation) => ({ kind: "created" as const, reservation }));
    expect(await create(batch)).toEqual(outcomes);
    expect(await create(batch)).toEqual(outcomes);
    expect(await db.query("select id from point_reservations")).toHaveLength(2);
  });

  test("creates each key once where many batches bring the same keys at the same moment, in any order", async () => {
    const keys = Array.from({ length: 20 }, (_, index) => `key-${index}`);
    const batchOf = (index: number) => {
      const batch = keys.map((idempotencyKey) => reservationOf({ idempotencyKey, executeAt: midday() }));
      return index % 2 === 0 ? batch : batch.reverse();
    };
    const outcomes = await Promise.all(Array.from({ length: 10 }, (_, index) => create(batchOf(index))));
    const byKey = Map.groupBy(outcomes.flat(), (outcome) =>
      outcome.kind === "conflict" ? "conflict" : outcome.reservation.idempotencyKey,
    );
    expect([...byKey.keys()].toSorted()).toEqual(keys.toSorted());
    for (const same of byKey.values()) {
      expect(same.filter(({ kind }) => kind === "created")).toHaveLength(1);
      expect(same.filter(({ kind }) => kind === "replayed")).toHaveLength(9);
      expect(new Set(same.map((outcome) => outcome.kind !== "conflict" && outcome.reservation.id)).size).toBe(
        1,
      );
    }
    expect(await db.query("select id from point_reservations")).toHaveLength(20);
  }, 20_000);

  test("takes users and keys that differ only in case for two (fault 4)", async () => {
    const batch = [
      reservationOf({ userId: "User1", idempotencyKey: "Order" }),
      reservationOf({ userId: "user1", idempotencyKey: "order" }),
    ];
    expect((await create(batch)).map(({ kind }) => kind)).toEqual(["created", "created"]);
    expect(
      await db.query("select idempotency_key k from point_reservations where user_id = 'user1'"),
    ).toEqual([{ k: "order" }]);
  });

  test("inserts nothing of a batch with a user id that would be cut (fault 27)", async () => {
    const batch = [reservationOf(), reservationOf({ userId: "x".repeat(21) })];
    await expect(create(batch)).rejects.toThrow("ER_DATA_TOO_LONG");
    expect(await db.query("select id from point_reservations")).toEqual([]);
  });
});

describe("findReservation()", () => {
  test("gives undefined for an id that is not there", async () => {
    expect(await findReservation(db.database, reservationOf().id)).toBeUndefined();
  });

  test("tells when it was granted", async () => {
    const { id, idempotencyKey, userId, pointAmount } = await insertReservation(db, { status: "DONE" });
    const entry = { id, idempotency_key: idempotencyKey, user_id: userId, point_amount: pointAmount };
    await db.query("insert into point_transactions set ?", [{ ...entry, created_at: midday(3) }]);
    expect((await rowOf(id)).grantedAt).toEqual(midday(3));
  });

  test("does not take another user's ledger entry of the same key for its grant", async () => {
    const { id, idempotencyKey } = await insertReservation(db, { status: "FAILED" });
    const entry = { id, idempotency_key: idempotencyKey, user_id: "somebodyElse", point_amount: 1 };
    await db.query("insert into point_transactions set ?", [entry]);
    expect((await rowOf(id)).grantedAt).toBeNull();
  });
});

describe("claimDue()", () => {
  test("gives what is due as PROCESSING, with its lateness, and holds it until the lease ends", async () => {
    const due = await insertDueAt(-1_500);
    await freezeAt(MIDDAY);
    expect(await claimDue(frozen, LEASE)).toEqual([{ ...due, lateMs: 1_500 }]);
    await expectRow(due.id, { status: "PROCESSING", scanAt: midday(60_000), attempts: 0 });
  });

  test("leaves the future alone to the millisecond (fault 6)", async () => {
    const due = [await insertDueAt(-1), await insertDueAt(0)];
    const future = await insertDueAt(1);
    await freezeAt(MIDDAY);
    expect(idsOf(await claimDue(frozen, LEASE))).toEqual(idsOf(due));
    await expectRow(future.id, { status: "PENDING", scanAt: midday(1) });
  });

  test("goes by the database's own running clock: due a millisecond ago is taken, due in 10 s is not", async () => {
    const { id: past } = await insertReservation(db);
    const { id: future } = await insertReservation(db);
    await db.query(
      "update point_reservations set scan_at = now(3) - interval 1000 microsecond where id = ?",
      [past],
    );
    await db.query("update point_reservations set scan_at = now(3) + interval 10 second where id = ?", [
      future,
    ]);
    expect(idsOf(await claimDue(db.database, LEASE))).toEqual([past]);
  });

  test("never takes a row before its time, on a clock that runs", async () => {
    const ids = await insertMany(300, new Date(Date.now() + 50));
    const claimed: ClaimedReservation[] = [];
    await until("all are claimed", async () => {
      claimed.push(...(await claimDue(db.database, LEASE)));
      return claimed.length === ids.length;
    });
    expect(idsOf(claimed)).toEqual(ids);
    expect(Math.min(...claimed.map(({ lateMs }) => lateMs))).toBeGreaterThanOrEqual(0);
  });

  test("takes in the order of scan_at, then of id, up to the limit", async () => {
    const tied = [await insertDueAt(-5), await insertDueAt(-5), await insertDueAt(-5)];
    const oldest = await insertDueAt(-7, { scanAt: midday(-6) });
    const last = await insertDueAt(-9, { scanAt: midday(-1) });
    const expected = [oldest.id, ...idsOf(tied).toSorted(), last.id];
    await freezeAt(MIDDAY);
    const order: string[] = [];
    for (const limit of [2, 2, 2]) order.push(...idsOf(await claimDue(frozen, { ...LEASE, limit })));
    expect(order).toEqual(expected);
    expect(await claimDue(frozen, LEASE)).toEqual([]);
  });

  test("gives a claim's rows again once its lease has ended, not before", async () => {
    const over = await insertDueAt(-2_000);
    await freezeAt(MIDDAY);
    expect(await claimDue(frozen, { limit: 1, leaseMs: 5_000 })).toHaveLength(1);
    const open = await insertDueAt(-1_000);
    expect(await claimDue(frozen, { limit: 1, leaseMs: 5_001 })).toHaveLength(1);
    expect(await claimDue(frozen, LEASE)).toEqual([]);
    await freezeAt(midday(5_000).toISOString());
    expect(await claimDue(frozen, LEASE)).toEqual([{ ...over, lateMs: 0 }]);
    await expectRow(open.id, { scanAt: midday(5_001) });
  });

  test("gives a row again after a lease of the running clock: its publish never happened", async () => {
    const { id } = await insertReservation(db);
    const startedAt = performance.now();
    expect(idsOf(await claimDue(db.database, { limit: 1, leaseMs: 300 }))).toEqual([id]);
    await until("the lease ends", async () => (await claimDue(db.database, LEASE)).length === 1);
    expect(performance.now() - startedAt).toBeGreaterThanOrEqual(299);
  });

  test("leaves a row that another scheduler holds, and takes those behind it", async () => {
    const ids = await insertMany(5);
    await db.database.transaction(async (connection) => {
      await lockReservations(connection, [ids[0] as string, ids[2] as string]);
      expect(idsOf(await claimDue(db.database, LEASE))).toEqual(
        [1, 3, 4].map((index) => ids[index] as string),
      );
    });
    expect(idsOf(await claimDue(db.database, LEASE))).toEqual([ids[0] as string, ids[2] as string]);
  });

  test("locks only what it takes: a second claim, while the first is open, gets the next ones (fault 18)", async () => {
    const ids = await insertMany(100);
    const claims = [openClaim(30), openClaim(30), openClaim(30)];
    const parts = await Promise.all(claims.map(({ claimed }) => claimed));
    for (const { commit } of claims) commit();
    await Promise.all(claims.map(({ done }) => done));
    expect(parts.map(({ length }) => length)).toEqual([30, 30, 30]);
    expect(new Set(idsOf(parts.flat()))).toEqual(new Set(ids.slice(0, 90)));
    expect(idsOf(await claimDue(db.database, LEASE))).toEqual(ids.slice(90));
  });

  test("by several schedulers at once gives disjoint sets, each in order, together everything (fault 10)", async () => {
    const ids = await insertMany(3_000);
    const position = new Map(ids.map((id, index) => [id, index]));
    const drain = async (limit: number) => {
      const scans: number[][] = [];
      for (;;) {
        const claimed = await claimDue(db.database, { limit, leaseMs: 60_000 });
        if (claimed.length === 0) return scans;
        scans.push(claimed.map(({ id }) => position.get(id) ?? -1));
      }
    };
    const scans = (await Promise.all([70, 110, 130, 170].map(drain))).flat();
    for (const scan of scans) expect(scan).toEqual(scan.toSorted((a, b) => a - b));
    expect(scans.flat().toSorted((a, b) => a - b)).toEqual(ids.map((_, index) => index));
  }, 30_000);

  test("never takes a reservation that is over (fault 17)", async () => {
    for (const status of ["DONE", "FAILED", "CANCELLED"] as const) await insertDueAt(-1_000, { status });
    await freezeAt(MIDDAY);
    expect(await claimDue(frozen, LEASE)).toEqual([]);
  });

  test.each(RESERVATION_STATUSES)(
    "can rely on the table: scan_at of %s is null exactly where it is over",
    async (status) => {
      const isOpen = status === "PENDING" || status === "PROCESSING";
      const wrong = insertReservation(db, { status, scanAt: isOpen ? null : midday() });
      await expect(wrong).rejects.toThrow("MySQL failed with");
      await insertReservation(db, { status });
    },
  );

  test("takes its locks by the index point_reservations_scan_at, and its rows by their ids", async () => {
    await insertMany(2_500);
    await db.query("update point_reservations set status = 'DONE', scan_at = null where scan_at % 3 = 0");
    await db.query("analyze table point_reservations");
    const [select, update] = await statementsOfClaim(100);
    const plan = await explain(select);
    expect(plan).toHaveLength(1);
    expect(plan[0]).toMatchObject({ key: "point_reservations_scan_at", type: "range" });
    expect(plan[0]?.Extra ?? "").not.toContain("filesort");
    const updatePlan = await explain(update);
    expect(updatePlan).toHaveLength(1);
    expect(updatePlan[0]).toMatchObject({ key: "PRIMARY", type: "range" });
  }, 20_000);
});

type Statement = { sql: string; params: unknown[] };

/** The SELECT and the UPDATE that claimDue() really sends. */
async function statementsOfClaim(limit: number): Promise<[Statement, Statement]> {
  const statements: Statement[] = [];
  const spied: Database = {
    ...db.database,
    transaction: (work) =>
      db.database.transaction((connection) =>
        work({
          ...connection,
          select: (sql, params = []) => {
            statements.push({ sql, params });
            return connection.select(sql, params);
          },
          execute: (sql, params = []) => {
            statements.push({ sql, params });
            return connection.execute(sql, params);
          },
        }),
      ),
  };
  expect(await claimDue(spied, { limit, leaseMs: 60_000 })).toHaveLength(limit);
  expect(statements).toHaveLength(2);
  return statements as [Statement, Statement];
}

/** `traditional` gives a table on any server; later versions of MySQL draw a tree unless told. */
function explain({ sql, params }: Statement) {
  return db.query<{ key: string | null; type: string; Extra: string | null }>(
    `explain format=traditional ${sql}`,
    params,
  );
}

describe("findNextScan()", () => {
  test("gives undefined where nothing waits", async () => {
    await insertReservation(db, { status: "DONE" });
    expect((await findNextScan(db.database)).inMs).toBeUndefined();
  });

  test.each([[1_500], [1], [0], [-1], [-2_500]])("gives %d ms to the row that is next", async (offsetMs) => {
    await insertDueAt(offsetMs);
    await insertDueAt(offsetMs + 1);
    await insertDueAt(-10_000, { status: "PROCESSING", scanAt: midday(86_400_000) });
    await freezeAt(MIDDAY);
    expect(await findNextScan(frozen)).toEqual({ inMs: offsetMs, nowMs: Date.parse(MIDDAY) });
  });
});

describe("lockReservations()", () => {
  test("gives the rows in the order of their ids, due by the database's clock to the millisecond", async () => {
    const future = await insertDueAt(1);
    const now = await insertDueAt(0, { status: "PROCESSING" });
    const past = await insertDueAt(-1, { status: "DONE" });
    await freezeAt(MIDDAY);
    const rows = await frozen.transaction((connection) =>
      lockReservations(connection, [past.id, reservationOf().id, future.id, now.id]),
    );
    const fieldsOf = ({ id, userId, pointAmount, idempotencyKey }: Reservation) => ({
      ...{ id, userId, pointAmount, idempotencyKey, attempts: 0 },
    });
    const expected = [
      { ...fieldsOf(future), status: "PENDING", isDue: false, lateMs: -1 },
      { ...fieldsOf(now), status: "PROCESSING", isDue: true, lateMs: 0 },
      { ...fieldsOf(past), status: "DONE", isDue: true, lateMs: 1 },
    ] as const;
    expect(rows).toEqual(expected.toSorted((a, b) => (a.id < b.id ? -1 : 1)));
  });
});

describe("lockReservations() holds", () => {
  test.each([
    [30, 100],
    [400, 2_000],
  ])("no other row than those it is asked for: %d of %d", async (count, all) => {
    const ids = await insertMany(all);
    await db.database.transaction(async (connection) => {
      await lockReservations(connection, ids.slice(0, count));
      const others = await db.database.transaction((other) =>
        lockReservations(other, ids.slice(count, 2 * count)),
      );
      expect(idsOf(others)).toEqual(ids.slice(count, 2 * count).toSorted());
      expect(idsOf(await claimDue(db.database, LEASE))).toEqual(ids.slice(count).slice(0, LEASE.limit));
    });
  });

  test("its rows until the transaction ends", async () => {
    const { id } = await insertReservation(db);
    await db.database.transaction(async (connection) => {
      await lockReservations(connection, [id]);
      expect(await claimDue(db.database, LEASE)).toEqual([]);
    });
    expect(idsOf(await claimDue(db.database, LEASE))).toEqual([id]);
  });
});

describe("markDone()", () => {
  test("ends reservations that are PROCESSING", async () => {
    const rows = [
      await insertReservation(db, { status: "PROCESSING" }),
      await insertReservation(db, { status: "PROCESSING" }),
    ];
    await db.database.transaction((connection) => markDone(connection, idsOf(rows)));
    for (const { id } of rows) await expectRow(id, { status: "DONE", scanAt: null });
  });

  test.each(["PENDING", "DONE", "FAILED", "CANCELLED"] as const)(
    "throws where one is %s, and the transaction leaves all as they were",
    async (status) => {
      const good = await insertReservation(db, { status: "PROCESSING" });
      const bad = await insertReservation(db, { status });
      const work = db.database.transaction((connection) => markDone(connection, [good.id, bad.id]));
      await expect(work).rejects.toThrow("Cannot mark 2 reservations as DONE: 1 were PROCESSING");
      expect((await rowOf(good.id)).status).toBe("PROCESSING");
      expect((await rowOf(bad.id)).status).toBe(status);
    },
  );

  test("throws where one is not there", async () => {
    const work = db.database.transaction((connection) => markDone(connection, [reservationOf().id]));
    await expect(work).rejects.toThrow("Cannot mark 1 reservations as DONE: 0 were PROCESSING");
  });
});

describe("markFailed()", () => {
  test("ends a reservation with its reason, and counts the attempt", async () => {
    const { id } = await insertReservation(db, { status: "PROCESSING" });
    await db.database.run((connection) => markFailed(connection, id, { reason: "残高 out of range" }));
    await expectRow(id, {
      status: "FAILED",
      scanAt: null,
      attempts: 1,
      lastError: "残高 out of range",
    });
  });

  test("cuts a reason that is longer than its column", async () => {
    const { id } = await insertReservation(db, { status: "PROCESSING" });
    await db.database.run((connection) => markFailed(connection, id, { reason: "あ".repeat(501) }));
    expect((await rowOf(id)).lastError).toBe("あ".repeat(500));
  });
});

describe("scheduleRetry()", () => {
  test.each([1, 3_600_000])(
    "makes the reservation wait %d ms for its next try, with the reason",
    async (retryInMs) => {
      const { id } = await insertDueAt(-1_000, { status: "PROCESSING" });
      await freezeAt(MIDDAY);
      await frozen.run((connection) => scheduleRetry(connection, id, { reason: "no luck", retryInMs }));
      await expectRow(id, {
        status: "PENDING",
        scanAt: midday(retryInMs),
        attempts: 1,
        lastError: "no luck",
      });
    },
  );
});

test.each(["PENDING", "DONE", "FAILED", "CANCELLED"] as const)(
  "markFailed() and scheduleRetry() leave a reservation alone that is %s",
  async (status) => {
    const { id } = await insertReservation(db, { status });
    const before = await rowOf(id);
    await db.database.run(async (connection) => {
      await markFailed(connection, id, { reason: "late" });
      await scheduleRetry(connection, id, { reason: "late", retryInMs: 1 });
    });
    expect(await rowOf(id)).toEqual(before);
  },
);

describe("cancelReservation()", () => {
  test.each(["PENDING", "PROCESSING"] as const)(
    "ends a reservation that is %s, and changes nothing else of it",
    async (status) => {
      const { id } = await insertReservation(db, { status });
      const other = await insertReservation(db, { status });
      const before = await rowOf(id);
      expect(await cancelReservation(db.database, id)).toBe(true);
      const after = { ...before, status: "CANCELLED", scanAt: null, updatedAt: expect.any(Date) };
      expect(await rowOf(id)).toEqual(after as never);
      await expectRow(other.id, { status });
    },
  );

  test.each(["DONE", "FAILED", "CANCELLED"] as const)(
    "says false of a reservation that is %s, and leaves it alone",
    async (status) => {
      const { id } = await insertReservation(db, { status });
      const before = await rowOf(id);
      expect(await cancelReservation(db.database, id)).toBe(false);
      expect(await rowOf(id)).toEqual(before);
    },
  );

  test("says false of an id that is not there", async () => {
    await insertReservation(db);
    expect(await cancelReservation(db.database, reservationOf().id)).toBe(false);
  });

  test.each(["PENDING", "PROCESSING"] as const)(
    "called ten times at once on a row that is %s says true exactly once",
    async (status) => {
      for (let round = 0; round < 20; round++) {
        const { id } = await insertReservation(db, { status });
        const answers = await Promise.all(
          Array.from({ length: 10 }, () => cancelReservation(db.database, id)),
        );
        expect(answers.filter(Boolean)).toHaveLength(1);
        expect((await rowOf(id)).status).toBe("CANCELLED");
      }
    },
  );

  test.each([
    ["commits", "DONE"],
    ["is rolled back", "CANCELLED"],
  ])("waits for a grant of the row: where the grant %s, it ends %s (fault 20)", async (what, status) => {
    const { id } = await insertReservation(db, { status: "PROCESSING" });
    let cancelled: Promise<boolean> | undefined;
    const granted = db.database.transaction(async (connection) => {
      await lockReservations(connection, [id]);
      cancelled = cancelReservation(db.database, id);
      await untilWaiting("update `point_reservations` set `status`");
      await markDone(connection, [id]);
      if (what !== "commits") throw new Error("no grant");
    });
    if (what === "commits") await granted;
    else await expect(granted).rejects.toThrow("no grant");
    expect(await cancelled).toBe(status === "CANCELLED");
    expect((await rowOf(id)).status).toBe(status as never);
  });

  test("makes a claim pass the row by, and a grant that comes later throw (fault 20)", async () => {
    const { id } = await insertReservation(db);
    expect(idsOf(await claimDue(db.database, LEASE))).toEqual([id]);
    await cancelReservation(db.database, id);
    const granted = db.database.transaction((connection) => markDone(connection, [id]));
    await expect(granted).rejects.toThrow("Cannot mark 1 reservations as DONE: 0 were PROCESSING");
    expect((await findNextScan(db.database)).inMs).toBeUndefined();
    expect(await claimDue(db.database, LEASE)).toEqual([]);
  });
});

/** All the time that it takes. */
const IN_TIME = { untilMs: Number.POSITIVE_INFINITY };

/** A database that does something after so many pieces of work, as if somebody else did it just then. */
function disturbed(afterRuns: number, disturb: () => unknown): Database {
  let runs = 0;
  return {
    ...db.database,
    async run(work) {
      const result = await db.database.run(work);
      if (++runs === afterRuns) await disturb();
      return result;
    },
  };
}

describe("cancelCampaign()", () => {
  test("ends what is PENDING or PROCESSING, counts how each has ended, and says the same again", async () => {
    for (const [status, count] of [
      ["PENDING", 4],
      ["PROCESSING", 3],
      ["DONE", 2],
      ["FAILED", 1],
      ["CANCELLED", 5],
    ] as const) {
      for (let at = 0; at < count; at++) {
        await insertReservation(db, { status, campaign: "summer", userId: `User${at}` });
      }
    }
    const over = await db.query(
      "select * from point_reservations where status in ('DONE', 'FAILED', 'CANCELLED') order by id",
    );
    const counts = { cancelled: 12, granted: 2, failed: 1, open: 0 };
    expect(await cancelCampaign(db.database, "summer", IN_TIME)).toEqual(counts);
    const ids = over.map((row) => (row as { id: string }).id);
    expect(await db.query("select * from point_reservations where id in (?) order by id", [ids])).toEqual(
      over,
    );
    expect(
      await db.query("select status, count(*) n from point_reservations group by status order by status"),
    ).toEqual([
      { status: "CANCELLED", n: 12 },
      { status: "DONE", n: 2 },
      { status: "FAILED", n: 1 },
    ]);
    expect(await cancelCampaign(db.database, "summer", IN_TIME)).toEqual(counts);
  });

  test("leaves other campaigns alone, also one that differs only in case, and what is of none", async () => {
    const others = [
      await insertReservation(db, { campaign: "Summer" }),
      await insertReservation(db, { campaign: "summer-2" }),
      await insertReservation(db, { campaign: "summe_" }),
      await insertReservation(db, { status: "PROCESSING" }),
    ];
    const before = await Promise.all(others.map(({ id }) => rowOf(id)));
    expect(await cancelCampaign(db.database, "summer", IN_TIME)).toEqual({
      ...{ cancelled: 0, granted: 0, failed: 0, open: 0 },
    });
    await insertReservation(db, { campaign: "summer" });
    expect(await cancelCampaign(db.database, "summer", IN_TIME)).toMatchObject({ cancelled: 1 });
    expect(await Promise.all(others.map(({ id }) => rowOf(id)))).toEqual(before);
  });

  test("takes all of 20,500, of users with many of one time, many of one user and many users", async () => {
    const shapes: [number, (index: number) => Partial<Reservation>][] = [
      [12_000, () => ({ userId: "Alpha", executeAt: midday() })],
      [8_300, (index) => ({ userId: "Beta", executeAt: midday(index) })],
      [200, (index) => ({ userId: `Gamma${index}`, executeAt: midday(-index) })],
    ];
    const all = shapes.flatMap(([count, fields]) =>
      Array.from({ length: count }, (_, index) => reservationOf({ campaign: "big", ...fields(index) })),
    );
    await create(all.toSorted((a, b) => (Bun.hash(a.id) < Bun.hash(b.id) ? -1 : 1)));
    const untouched = await insertReservation(db, { userId: "Beta", executeAt: midday() });
    await db.query(
      `update point_reservations set status = 'DONE', scan_at = null
       where campaign = 'big' and mod(crc32(id), 10) = 0`,
    );
    const [done] = await db.query<{ n: number }>(
      "select count(*) n from point_reservations where status = 'DONE'",
    );
    const granted = Number(done?.n);
    expect(granted).toBeGreaterThan(1_000);
    const counts = { cancelled: all.length - granted, granted, failed: 0, open: 0 };
    expect(await cancelCampaign(db.database, "big", IN_TIME)).toEqual(counts);
    expect(await db.query("select id from point_reservations where scan_at is not null")).toEqual([
      { id: untouched.id },
    ]);
    expect(await cancelCampaign(db.database, "big", IN_TIME)).toEqual(counts);
  }, 60_000);

  test("gives up before it starts where the time is over: nothing is cancelled, and what is open is counted", async () => {
    const { id } = await insertReservation(db, { campaign: "summer" });
    const untilMs = performance.now() - 1;
    expect(await cancelCampaign(db.database, "summer", { untilMs })).toEqual({
      ...{ cancelled: 0, granted: 0, failed: 0, open: 1 },
    });
    expect((await rowOf(id)).status).toBe("PENDING");
  });

  test("gives up in the middle where the time is over then: what it did stays, and the same again goes on", async () => {
    await create(Array.from({ length: 2_500 }, () => reservationOf({ campaign: "summer" })));
    const clock = spyOn(performance, "now").mockReturnValue(1_000);
    try {
      // One page is read, then one statement has cancelled.
      const slow = disturbed(2, () => clock.mockReturnValue(2_001));
      expect(await cancelCampaign(slow, "summer", { untilMs: 2_000 })).toEqual({
        ...{ cancelled: 1_000, granted: 0, failed: 0, open: 1_500 },
      });
      expect(
        await db.query("select status, count(*) n from point_reservations group by status order by status"),
      ).toEqual([
        { status: "CANCELLED", n: 1_000 },
        { status: "PENDING", n: 1_500 },
      ]);
      expect(await cancelCampaign(db.database, "summer", { untilMs: 3_000 })).toEqual({
        ...{ cancelled: 2_500, granted: 0, failed: 0, open: 0 },
      });
    } finally {
      clock.mockRestore();
    }
  }, 20_000);

  test.each([
    ["DONE", { cancelled: 2, granted: 1, failed: 0, open: 0 }],
    ["FAILED", { cancelled: 2, granted: 0, failed: 1, open: 0 }],
    ["CANCELLED", { cancelled: 3, granted: 0, failed: 0, open: 0 }],
  ] as const)(
    "counts as what it is a reservation that came to be %s after its page was read",
    async (status, counts) => {
      const rows = [];
      for (let at = 0; at < 3; at++) rows.push(await insertReservation(db, { campaign: "summer" }));
      const [row] = rows;
      const busy = disturbed(1, () =>
        db.query("update point_reservations set status = ?, scan_at = null where id = ?", [status, row?.id]),
      );
      expect(await cancelCampaign(busy, "summer", IN_TIME)).toEqual(counts);
      expect((await rowOf(row?.id ?? "")).status).toBe(status);
    },
  );

  test("by five at once: each gets the same counts, and none of them fails", async () => {
    await create(
      Array.from({ length: 3_000 }, (_, index) =>
        reservationOf({ campaign: "summer", userId: `User${index % 7}` }),
      ),
    );
    const all = await Promise.all(
      Array.from({ length: 5 }, () => cancelCampaign(db.database, "summer", IN_TIME)),
    );
    expect(all).toEqual(all.map(() => ({ cancelled: 3_000, granted: 0, failed: 0, open: 0 })));
  }, 20_000);
});

describe("patchReservation()", () => {
  test("gives another time and amount, due then, and keeps what was reserved first", async () => {
    const first = await insertDueAt(0, { pointAmount: 100 });
    const before = await rowOf(first.id);
    const patch = { executeAt: midday(5_000), pointAmount: 250 };
    expect(await patchReservation(db.database, first.id, patch)).toBe(true);
    const after = {
      ...before,
      ...patch,
      scanAt: midday(5_000),
      originalExecuteAt: midday(),
      originalPointAmount: 100,
      updatedAt: expect.any(Date),
    };
    expect(await rowOf(first.id)).toEqual(after as never);
  });

  test("of the amount only leaves the time, and when it is tried next, as they are", async () => {
    const { id } = await insertDueAt(0, { pointAmount: 100, scanAt: midday(9_000) });
    expect(await patchReservation(db.database, id, { pointAmount: 7 })).toBe(true);
    await expectRow(id, {
      ...{ pointAmount: 7, originalPointAmount: 100 },
      ...{ executeAt: midday(), scanAt: midday(9_000), originalExecuteAt: null },
    });
  });

  test("of the time only leaves the amount as it is", async () => {
    const { id } = await insertDueAt(0, { pointAmount: 100, scanAt: midday(9_000) });
    expect(await patchReservation(db.database, id, { executeAt: midday(-1) })).toBe(true);
    await expectRow(id, {
      ...{ executeAt: midday(-1), scanAt: midday(-1), originalExecuteAt: midday() },
      ...{ pointAmount: 100, originalPointAmount: null },
    });
  });

  test("again and again keeps what was reserved at the very first", async () => {
    const { id } = await insertDueAt(0, { pointAmount: 100 });
    for (const step of [1, 2, 3]) {
      await patchReservation(db.database, id, { executeAt: midday(step), pointAmount: step });
    }
    await expectRow(id, {
      ...{ executeAt: midday(3), scanAt: midday(3), pointAmount: 3 },
      ...{ originalExecuteAt: midday(), originalPointAmount: 100 },
    });
  });

  test("with what is there already says true: the same request again gets the same answer", async () => {
    const { id } = await insertDueAt(0, { pointAmount: 100 });
    const patch = { executeAt: midday(1), pointAmount: 7 };
    expect(await patchReservation(db.database, id, patch)).toBe(true);
    const before = await rowOf(id);
    expect(await patchReservation(db.database, id, patch)).toBe(true);
    expect(await rowOf(id)).toEqual(before);
  });

  test.each(["PROCESSING", "DONE", "FAILED", "CANCELLED"] as const)(
    "says false of a reservation that is %s, and leaves it alone",
    async (status) => {
      const { id } = await insertReservation(db, { status });
      const before = await rowOf(id);
      const patch = { executeAt: midday(), pointAmount: 7 };
      expect(await patchReservation(db.database, id, patch)).toBe(false);
      expect(await rowOf(id)).toEqual(before);
    },
  );

  test("says false of an id that is not there", async () => {
    await insertReservation(db);
    expect(await patchReservation(db.database, reservationOf().id, { pointAmount: 7 })).toBe(false);
  });

  test("called ten times at once on one row: each in turn, the last one stays, and the first content is kept", async () => {
    const { id } = await insertDueAt(0, { pointAmount: 100 });
    const answers = await Promise.all(
      Array.from({ length: 10 }, (_, index) =>
        patchReservation(db.database, id, { executeAt: midday(1 + index), pointAmount: 1 + index }),
      ),
    );
    expect(answers).toEqual(answers.map(() => true));
    const row = await rowOf(id);
    await expectRow(id, { originalExecuteAt: midday(), originalPointAmount: 100 });
    // Both fields are of one and the same patch.
    expect(row.executeAt).toEqual(midday(row.pointAmount));
    expect(row.scanAt).toEqual(row.executeAt);
  });

  test("waits for a claim that holds the row, and says false once it is claimed", async () => {
    const { id } = await insertReservation(db);
    const claim = openClaim(1);
    expect(idsOf(await claim.claimed)).toEqual([id]);
    const patched = patchReservation(db.database, id, { pointAmount: 7 });
    await untilWaiting("select `id`");
    claim.commit();
    await claim.done;
    expect(await patched).toBe(false);
    await expectRow(id, { status: "PROCESSING", pointAmount: 100 });
  });

  test("while it is open makes a claim pass the row by; once committed, the row is due at its new time only", async () => {
    const { id } = await insertReservation(db);
    const patch = openTransaction((held) => patchReservation(held, id, { executeAt: midday() }));
    expect(await patch.inside).toBe(true);
    expect(await claimDue(db.database, LEASE)).toEqual([]);
    patch.commit();
    await patch.done;
    expect(await claimDue(db.database, LEASE)).toEqual([]);
    await freezeAt(MIDDAY);
    expect(idsOf(await claimDue(frozen, LEASE))).toEqual([id]);
  });

  test("changes no replay: the first content is still the key's, the patched content is another", async () => {
    const first = reservationOf({ idempotencyKey: "order-42", executeAt: midday() });
    await create([first]);
    const patch = { executeAt: midday(1), pointAmount: 7 };
    await patchReservation(db.database, first.id, patch);
    const { id } = reservationOf();
    expect(await create([{ ...first, id }])).toEqual([{ kind: "replayed", reservation: first }]);
    expect(await create([{ ...first, ...patch, id }])).toEqual([{ kind: "conflict" }]);
  });
});

describe("retryReservation()", () => {
  /** A reservation that has used up its attempts. */
  async function insertFailed() {
    const { id } = await insertDueAt(-60_000, { status: "FAILED" });
    await db.query("update point_reservations set attempts = 10, last_error = 'no luck' where id = ?", [id]);
    return id;
  }

  test("makes it due at once by the database's clock, with all its attempts, and keeps why it had failed", async () => {
    const id = await insertFailed();
    const other = await insertFailed();
    const before = await rowOf(id);
    await freezeAt(MIDDAY);
    expect(await retryReservation(frozen, id)).toBe(true);
    const after = {
      ...before,
      status: "PENDING",
      scanAt: midday(),
      attempts: 0,
      updatedAt: expect.any(Date),
    };
    expect(await rowOf(id)).toEqual(after as never);
    await expectRow(other, { status: "FAILED", attempts: 10 });
    expect(idsOf(await claimDue(frozen, LEASE))).toEqual([id]);
  });

  test.each(["PENDING", "PROCESSING", "DONE", "CANCELLED"] as const)(
    "says false of a reservation that is %s, and leaves it alone",
    async (status) => {
      const { id } = await insertReservation(db, { status });
      await db.query("update point_reservations set attempts = 3");
      const before = await rowOf(id);
      expect(await retryReservation(db.database, id)).toBe(false);
      expect(await rowOf(id)).toEqual(before);
    },
  );

  test("says false of an id that is not there", async () => {
    await insertFailed();
    expect(await retryReservation(db.database, reservationOf().id)).toBe(false);
  });

  test("called ten times at once on one row says true exactly once", async () => {
    for (let round = 0; round < 20; round++) {
      const id = await insertFailed();
      const answers = await Promise.all(Array.from({ length: 10 }, () => retryReservation(db.database, id)));
      expect(answers.filter(Boolean)).toHaveLength(1);
    }
  });
});
