import { beforeEach, describe, expect, test } from "bun:test";
import type { Reservation } from "../../lib/reservations/reservation.ts";
import { findReservation, type ReservationDetails } from "../../lib/reservations/reservation_queries.ts";
import {
  type CampaignCounts,
  cancelCampaign,
  cancelReservation,
  createBulk,
  createReservations,
  patchReservation,
  retryReservation,
} from "../../lib/reservations/reservation_repository.ts";
import { claimDue } from "../../lib/reservations/scan_repository.ts";
import type { ReservationStatus } from "../../lib/schema.ts";
import { emptyTables, openTestDatabase } from "../harness/database.ts";
import { insertReservation, insertReservations, type RowFields, reservationOf } from "../harness/fixtures.ts";
import { openFrozen } from "../harness/frozen.ts";
import { recordStatements } from "../harness/plans.ts";

const db = await openTestDatabase();
beforeEach(() => emptyTables(db));

/** So many milliseconds from midday. */
function midday(offsetMs = 0): Date {
  return new Date(Date.parse("2029-02-22T12:00:00.500Z") + offsetMs);
}

function insertDueAt(offsetMs: number, fields: RowFields = {}) {
  return insertReservation(db, { executeAt: midday(offsetMs), ...fields });
}

async function detailsOf(id: string): Promise<ReservationDetails> {
  const details = await findReservation(db.database, id);
  if (!details) throw new Error(`No reservation ${id}`);
  return details;
}

function create(batch: readonly Reservation[]) {
  return db.database.run((connection) => createReservations(connection, batch));
}

/** The same request again, as far as its key goes. */
function again(first: Reservation, other: Partial<Reservation> = {}): Reservation {
  return { ...first, id: reservationOf().id, ...other };
}

async function countRows(): Promise<number> {
  const [row] = await db.query<{ n: number }>("select count(*) n from point_reservations");
  return Number(row?.n);
}

describe("createReservations()", () => {
  test("inserts all of a batch, to the millisecond and PENDING (fault 6)", async () => {
    const batch = [
      reservationOf({ executeAt: new Date("1970-01-01T00:00:00.000Z"), pointAmount: 1 }),
      reservationOf({ executeAt: midday(), idempotencyKey: "k".repeat(100), campaign: "c".repeat(64) }),
      reservationOf({ executeAt: new Date("9999-12-31T23:59:59.999Z"), pointAmount: 2147483647 }),
      reservationOf({ userId: "x".repeat(20) }),
    ];
    expect(await create(batch)).toEqual(batch.map((reservation) => ({ kind: "created", reservation })));
    for (const reservation of batch) {
      expect(await detailsOf(reservation.id)).toEqual({
        ...reservation,
        status: "PENDING",
        changedAt: null,
        // Never in the past.
        scanAt: reservation.executeAt > new Date() ? reservation.executeAt : expect.any(Date),
        attempts: 0,
        lastError: null,
        createdAt: expect.any(Date),
        updatedAt: expect.any(Date),
        grantedAt: null,
        transactionId: null,
        originalPointAmount: null,
        originalExecuteAt: null,
      });
    }
    const [row] = await db.query(
      `select cast(execute_at as char) at, timestampdiff(minute, created_at, now(3)) age
       from point_reservations where campaign is not null`,
    );
    expect(row).toEqual({ at: "2029-02-22 12:00:00.500", age: 0 });
  });

  test.each([
    [-1, 0],
    [0, 0],
    [1, 1],
  ])("makes what is due in %d ms be scanned in %d ms: never in the past", async (dueMs, scanMs) => {
    const reservation = reservationOf({ executeAt: midday(dueMs) });
    await using frozen = await openFrozen(db, midday());
    await frozen.run((connection) => createReservations(connection, [reservation]));
    expect((await detailsOf(reservation.id)).scanAt).toEqual(midday(scanMs));
  });

  test.each<[string, Partial<Reservation>]>([
    ["user", { userId: "testuser01" }],
    ["amount", { pointAmount: 101 }],
    ["time, by a millisecond", { executeAt: midday(1) }],
    ["campaign", { campaign: "winter" }],
  ])("refuses the same key with another %s, and changes nothing", async (_, other) => {
    const first = reservationOf({ idempotencyKey: "order-42", executeAt: midday() });
    await create([first]);
    const before = await detailsOf(first.id);
    expect(await create([again(first, other)])).toEqual([{ kind: "conflict" }]);
    expect(await detailsOf(first.id)).toEqual(before);
    expect(await countRows()).toBe(1);
  });

  test.each<[string, typeof create]>([
    ["createReservations()", create],
    ["createBulk()", (batch) => createBulk(db.database, batch, { allOrNone: false })],
  ])(
    "%s lets a taken key affect only its own reservation, also one taken within the batch",
    async (_, work) => {
      const taken = reservationOf({ idempotencyKey: "taken" });
      await create([taken]);
      const first = reservationOf({ idempotencyKey: "twice" });
      const batch = [
        reservationOf(),
        again(taken),
        first,
        again(first),
        again(first, { pointAmount: 7 }),
        reservationOf({ idempotencyKey: "taken", userId: "other" }),
        reservationOf(),
      ];
      expect(await work(batch)).toEqual([
        { kind: "created", reservation: batch[0] as Reservation },
        { kind: "replayed", reservation: taken },
        { kind: "created", reservation: first },
        { kind: "replayed", reservation: first },
        { kind: "conflict" },
        { kind: "conflict" },
        { kind: "created", reservation: batch[6] as Reservation },
      ]);
      expect(await countRows()).toBe(4);
    },
  );

  test("says created again if the same batch comes again, as after an answer that was lost", async () => {
    const batch = [reservationOf(), reservationOf()];
    const outcomes = await create(batch);
    expect(await create(batch)).toEqual(outcomes);
    expect(outcomes.map(({ kind }) => kind)).toEqual(["created", "created"]);
    expect(await countRows()).toBe(2);
  });

  test("takes users and keys that differ only in case for two (fault 4)", async () => {
    await create([
      reservationOf({ userId: "User1", idempotencyKey: "Order" }),
      reservationOf({ userId: "user1", idempotencyKey: "order" }),
    ]);
    const found = await db.query("select idempotency_key k from point_reservations where user_id = 'user1'");
    expect(found).toEqual([{ k: "order" }]);
  });

  test("inserts nothing of a batch with a user id that would be cut (fault 27)", async () => {
    const batch = [reservationOf(), reservationOf({ userId: "x".repeat(21) })];
    await expect(create(batch)).rejects.toThrow("ER_DATA_TOO_LONG");
    expect(await countRows()).toBe(0);
  });
});

test.each<[string, (id: string) => Promise<unknown>, ReservationStatus[]]>([
  ["cancelReservation()", (id) => cancelReservation(db.database, id), ["DONE", "FAILED"]],
  [
    "patchReservation()",
    (id) => patchReservation(db.database, id, { executeAt: midday(), pointAmount: 7 }),
    ["PROCESSING", "DONE", "FAILED", "CANCELLED"],
  ],
  [
    "retryReservation()",
    (id) => retryReservation(db.database, id),
    ["PENDING", "PROCESSING", "DONE", "CANCELLED"],
  ],
])(
  "%s leaves alone what it must not change, with the reason, and finds no unknown id",
  async (_, work, statuses) => {
    const rows = await Promise.all(statuses.map((status) => insertReservation(db, { status })));
    for (const { id } of rows) {
      const details = await detailsOf(id);
      expect(await work(id)).toEqual({ isDone: false, details });
      expect(await detailsOf(id)).toEqual(details);
    }
    expect(await work(reservationOf().id)).toBeUndefined();
  },
);

describe("cancelReservation()", () => {
  test.each(["PENDING", "PROCESSING"] as const)(
    "ends a reservation that is %s, changes nothing else, and says the same again",
    async (status) => {
      const [{ id }, other] = [
        await insertReservation(db, { status }),
        await insertReservation(db, { status }),
      ];
      const [before, untouched] = [await detailsOf(id), await detailsOf(other.id)];
      const cancelled = await cancelReservation(db.database, id);
      const details = { ...before, status: "CANCELLED", scanAt: null, updatedAt: expect.any(Date) };
      expect(cancelled).toEqual({ isDone: true, details } as never);
      expect(await cancelReservation(db.database, id)).toEqual(cancelled);
      expect(await detailsOf(other.id)).toEqual(untouched);
    },
  );
});

describe("patchReservation()", () => {
  /** A reservation that was tried before: the scheduler looks at it later than at its time. */
  const insertTried = () => insertDueAt(0, { pointAmount: 100, scanAt: midday(9_000) });
  const ORIGINALS = { originalPointAmount: 100, originalExecuteAt: midday() };

  test.each([
    [
      "time and amount",
      { executeAt: midday(5_000), pointAmount: 250 },
      { scanAt: midday(5_000), ...ORIGINALS },
    ],
    ["the amount: the time of the next try stays", { pointAmount: 7 }, { originalPointAmount: 100 }],
    [
      "a time in the past: due now",
      { executeAt: midday(-1) },
      { scanAt: midday(), originalExecuteAt: midday() },
    ],
  ])("changes %s, and keeps what was reserved first", async (_, patch, others) => {
    const { id } = await insertTried();
    const changed = { changedAt: midday(), updatedAt: expect.any(Date) };
    const details = { ...(await detailsOf(id)), ...patch, ...others, ...changed };
    await using frozen = await openFrozen(db, midday());
    const patched = await patchReservation(frozen, id, patch);
    expect(patched).toEqual({ isDone: true, details });
    expect(await patchReservation(frozen, id, patch)).toEqual(patched);
    expect(await detailsOf(id)).toEqual(patched?.details as ReservationDetails);
  });

  test("changes no replay: the key still stands for the first content, not for the patched one", async () => {
    const first = reservationOf({ idempotencyKey: "order-42", executeAt: midday() });
    await create([first]);
    const patch = { executeAt: midday(1), pointAmount: 7 };
    await patchReservation(db.database, first.id, patch);
    expect(await create([again(first)])).toEqual([{ kind: "replayed", reservation: first }]);
    expect(await create([again(first, patch)])).toEqual([{ kind: "conflict" }]);
  });
});

test.each([
  ["at once", -60_000, 0],
  ["at its time", 60_000, 60_000],
])(
  "retryReservation() makes a FAILED one due %s, with all its attempts, and keeps why it failed",
  async (_, dueMs, scanMs) => {
    const { id } = await insertDueAt(dueMs, { status: "FAILED" });
    await db.query("update point_reservations set attempts = 10, last_error = 'no luck'");
    const other = await insertReservation(db, { status: "FAILED" });
    const [before, untouched] = [await detailsOf(id), await detailsOf(other.id)];
    await using frozen = await openFrozen(db, midday());
    const details = {
      ...before,
      status: "PENDING",
      scanAt: midday(scanMs),
      attempts: 0,
      changedAt: midday(),
      updatedAt: expect.any(Date),
    };
    expect(await retryReservation(frozen, id)).toEqual({ isDone: true, details } as never);
    expect(await detailsOf(other.id)).toEqual(untouched);
    expect(await claimDue(frozen, { limit: 10, leaseMs: 1 })).toHaveLength(dueMs < 0 ? 1 : 0);
  },
);

describe("cancelCampaign()", () => {
  /** All the time that it takes. */
  const IN_TIME = { untilMs: Number.POSITIVE_INFINITY };
  const NONE: CampaignCounts = { cancelled: 0, granted: 0, failed: 0, open: 0 };

  function reserveMany(count: number) {
    const reservations = Array.from({ length: count }, () => reservationOf({ campaign: "summer" }));
    return insertReservations(db, { reservations });
  }

  test("ends what is PENDING or PROCESSING, counts the others, leaves them alone, and says the same again", async () => {
    const counts = { PENDING: 4, PROCESSING: 3, DONE: 2, FAILED: 1, CANCELLED: 5 };
    for (const [status, count] of Object.entries(counts) as [ReservationStatus, number][]) {
      for (let at = 0; at < count; at++) {
        await insertReservation(db, { status, campaign: "summer", userId: `User${at}` });
      }
    }
    const over = "select * from point_reservations where last_error = 'over' order by id";
    await db.query("update point_reservations set last_error = 'over' where scan_at is null");
    const before = await db.query(over);
    for (let time = 0; time < 2; time++) {
      const cancelled = await cancelCampaign(db.database, "summer", IN_TIME);
      expect(cancelled).toEqual({ cancelled: 12, granted: 2, failed: 1, open: 0 });
      expect(await db.query(over)).toEqual(before);
    }
  });

  test("leaves other campaigns alone, also one that differs only in case, and what has none", async () => {
    const fields = [{ campaign: "Summer" }, { campaign: "summer-2" }, { campaign: "summe_" }, {}];
    const others = await Promise.all(fields.map((one) => insertReservation(db, one)));
    const before = await Promise.all(others.map(({ id }) => detailsOf(id)));
    expect(await cancelCampaign(db.database, "summer", IN_TIME)).toEqual(NONE);
    await insertReservation(db, { campaign: "summer" });
    expect(await cancelCampaign(db.database, "summer", IN_TIME)).toEqual({ ...NONE, cancelled: 1 });
    expect(await Promise.all(others.map(({ id }) => detailsOf(id)))).toEqual(before);
  });

  test("takes all of 3,500, and up to 1,000 in one statement", async () => {
    await reserveMany(3_500);
    const statements = await recordStatements(db, async (database) => {
      expect(await cancelCampaign(database, "summer", IN_TIME)).toEqual({ ...NONE, cancelled: 3_500 });
    });
    expect(statements.filter(({ name }) => name === "cancel_reservations")).toHaveLength(4);
  });
});
