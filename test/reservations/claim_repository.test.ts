import { beforeEach, describe, expect, test } from "bun:test";
import {
  lockReservations,
  markDone,
  markFailed,
  scheduleRetry,
} from "../../lib/reservations/claim_repository.ts";
import type { Reservation } from "../../lib/reservations/reservation.ts";
import { findReservation } from "../../lib/reservations/reservation_queries.ts";
import { claimDue } from "../../lib/reservations/scan_repository.ts";
import { emptyTables, openTestDatabase } from "../harness/database.ts";
import { insertReservation, reservationOf } from "../harness/fixtures.ts";
import { openFrozen } from "../harness/frozen.ts";
import { aroundMidday, idsOf, midday } from "./midday.ts";

const db = await openTestDatabase();
beforeEach(() => emptyTables(db));
const { detailsOf, insertDueAt, insertMany } = aroundMidday(db);

const LEASE = { limit: 1_000, leaseMs: 60_000 };
const WAITING = ["PENDING", "DONE", "FAILED", "CANCELLED"] as const;

describe("lockReservations()", () => {
  test.each<[string, number, number, number | null]>([
    ["its time", -1_000, -2_000, null],
    ["its creation", -2_000, -1_000, null],
    ["its last change", -3_000, -2_000, -1_000],
  ])("counts lateness from %s, if that was last", async (_, dueMs, createdMs, changedMs) => {
    const { id } = await insertDueAt(dueMs);
    await db.query("update point_reservations set created_at = ?, changed_at = ?", [
      midday(createdMs),
      changedMs && midday(changedMs),
    ]);
    await using frozen = await openFrozen(db, midday());
    const rows = await frozen.transaction((transaction) => lockReservations(transaction, [id]));
    expect(rows).toMatchObject([{ lateMs: 1_000 }]);
  });

  test("gives the rows in the order of their ids, due by the database's clock to the millisecond", async () => {
    const future = await insertDueAt(1);
    const now = await insertDueAt(0, { status: "PROCESSING" });
    const past = await insertDueAt(-1, { status: "DONE" });
    await using frozen = await openFrozen(db, midday());
    const ids = [past.id, reservationOf().id, future.id, now.id];
    const rows = await frozen.transaction((transaction) => lockReservations(transaction, ids));
    expect(rows).toEqual([
      { ...fieldsOf(future), status: "PENDING", isDue: false, lateMs: 0 },
      { ...fieldsOf(now), status: "PROCESSING", isDue: true, lateMs: 0 },
      { ...fieldsOf(past), status: "DONE", isDue: true, lateMs: 1 },
    ]);
    function fieldsOf({ id, userId, pointAmount, idempotencyKey }: Reservation) {
      return { id, userId, pointAmount, idempotencyKey, attempts: 0 };
    }
  });

  test.each([
    [30, 100],
    [400, 2_000],
  ])("holds its %d rows of %d until the transaction ends, and no others", async (count, all) => {
    const ids = await insertMany(all);
    const [held, others] = [ids.slice(0, count), ids.slice(count)];
    await db.database.transaction(async (transaction) => {
      await lockReservations(transaction, held);
      const next = await db.database.transaction((another) =>
        lockReservations(another, others.slice(0, count)),
      );
      expect(next).toHaveLength(count);
      expect(idsOf(await claimDue(db.database, { ...LEASE, limit: all }))).toEqual(others);
    });
    expect(idsOf(await claimDue(db.database, LEASE))).toEqual(held);
  });
});

describe("markDone()", () => {
  test("ends reservations that are PROCESSING", async () => {
    const rows = [
      await insertDueAt(0, { status: "PROCESSING" }),
      await insertDueAt(0, { status: "PROCESSING" }),
    ];
    await db.database.transaction((transaction) => markDone(transaction, idsOf(rows)));
    for (const { id } of rows) {
      expect(await detailsOf(id, "status", "scanAt")).toEqual({ status: "DONE", scanAt: null });
    }
  });

  test.each([...WAITING, "not there"] as const)(
    "throws if one is %s, and the transaction leaves all as they were",
    async (status) => {
      const good = await insertReservation(db, { status: "PROCESSING" });
      const bad = status === "not there" ? reservationOf() : await insertReservation(db, { status });
      const before = await db.query("select * from point_reservations order by id");
      const work = db.database.transaction((transaction) => markDone(transaction, idsOf([good, bad])));
      await expect(work).rejects.toThrow("Cannot mark 2 reservations as DONE: 1 were PROCESSING");
      expect(await db.query("select * from point_reservations order by id")).toEqual(before);
    },
  );
});

test.each([
  ["残高 out of range", "残高 out of range"],
  ["あ".repeat(501), "あ".repeat(500)],
])(
  "markFailed() ends a reservation with its reason, cut to its column, and counts the attempt",
  async (reason, lastError) => {
    const { id } = await insertReservation(db, { status: "PROCESSING" });
    await db.database.transaction((transaction) => markFailed(transaction, id, { reason }));
    const failed = { status: "FAILED", scanAt: null, attempts: 1, lastError } as const;
    expect(await detailsOf(id, "status", "scanAt", "attempts", "lastError")).toEqual(failed);
  },
);

test.each([1, 3_600_000])(
  "scheduleRetry() makes a reservation wait %d ms for its next try, with the reason",
  async (retryInMs) => {
    const { id } = await insertDueAt(-1_000, { status: "PROCESSING" });
    await using frozen = await openFrozen(db, midday());
    const reason = "no luck";
    await frozen.transaction((transaction) => scheduleRetry(transaction, id, { reason, retryInMs }));
    const waiting = { status: "PENDING", scanAt: midday(retryInMs), attempts: 1, lastError: reason } as const;
    expect(await detailsOf(id, "status", "scanAt", "attempts", "lastError")).toEqual(waiting);
  },
);

test.each(WAITING)(
  "markFailed() and scheduleRetry() leave a reservation alone that is %s",
  async (status) => {
    const { id } = await insertReservation(db, { status });
    const before = await findReservation(db.database, id);
    await db.database.transaction(async (transaction) => {
      await markFailed(transaction, id, { reason: "late" });
      await scheduleRetry(transaction, id, { reason: "late", retryInMs: 1 });
    });
    expect(await findReservation(db.database, id)).toEqual(before);
  },
);
