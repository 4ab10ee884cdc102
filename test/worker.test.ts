import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { v7 as uuidv7 } from "uuid";
import { DatabaseError, openDatabase } from "../lib/database.ts";
import { findReservation } from "../lib/history.ts";
import { decodeMessage, encodeMessage, type ReservationMessage } from "../lib/message.ts";
import { compareSums, findBalance } from "../lib/point_repository.ts";
import type { Outcome } from "../lib/queue.ts";
import type { Reservation } from "../lib/reservation.ts";
import { claimDue } from "../lib/reservation_repository.ts";
import { processMessages } from "../worker.ts";
import {
  createTestDatabase,
  DATABASE_URL,
  insertReservation,
  reservationOf,
  silent,
  type TestDatabase,
} from "./harness.ts";
import { insertReservations, openAnother } from "./pipeline.ts";

let db: TestDatabase;
/** Whose ledger entries MySQL refuses: a failure of the row's own. */
const CURSED = "Cursed";
const MAX_BIGINT = 9_223_372_036_854_775_807n;

beforeAll(async () => {
  db = await createTestDatabase();
  await db.query("alter table point_transactions add constraint not_cursed check (user_id <> ?)", [CURSED]);
}, 30_000);
afterAll(() => db.drop(), 30_000);

function messageOf(...reservations: Reservation[]): ReservationMessage[] {
  return decodeMessage(encodeMessage(reservations));
}

function work(
  messages: ReservationMessage[][],
  { database = db.database, maxAttempts = 10 } = {},
): Promise<Outcome[]> {
  return processMessages(messages, { database, logger: silent, maxAttempts });
}

let users = 0;
function newUser(): string {
  return `User${++users}`;
}

/** A claimed reservation of a user of its own, 100 points, due. */
function insertClaimed(fields: Partial<Reservation> = {}): Promise<Reservation> {
  return insertReservation(db, { userId: newUser(), status: "PROCESSING", ...fields });
}

async function story({ id }: Reservation) {
  const found = await findReservation(db.database, id);
  if (!found) throw new Error(`No reservation ${id}`);
  return found;
}

async function points({ userId }: Pick<Reservation, "userId">): Promise<bigint | undefined> {
  return (await findBalance(db.database, userId))?.pointNum;
}

async function ledgerOf({ userId }: Pick<Reservation, "userId">) {
  return db.query<{ id: string; idempotency_key: string; point_amount: number }>(
    "select id, idempotency_key, point_amount from point_transactions where user_id = ?",
    [userId],
  );
}

describe("processMessages() grants", () => {
  test("what is claimed and due: ledger, balance and DONE together", async () => {
    const reservation = await insertClaimed({ pointAmount: 70 });
    expect(await work([messageOf(reservation)])).toEqual(["ack"]);
    const { status, scanAt, attempts, lastError, grantedAt } = await story(reservation);
    expect({ status, scanAt, attempts, lastError }).toEqual({
      status: "DONE",
      scanAt: null,
      attempts: 0,
      lastError: null,
    });
    expect(grantedAt?.getTime()).toBeGreaterThanOrEqual(reservation.executeAt.getTime());
    expect(await points(reservation)).toBe(70n);
    expect(await ledgerOf(reservation)).toMatchObject([
      { idempotency_key: reservation.idempotencyKey, point_amount: 70 },
    ]);
  });

  test("once where the same message comes twice (fault 24)", async () => {
    const reservation = await insertClaimed();
    expect(await work([messageOf(reservation)])).toEqual(["ack"]);
    expect(await work([messageOf(reservation)])).toEqual(["ack"]);
    expect(await points(reservation)).toBe(100n);
    expect(await ledgerOf(reservation)).toHaveLength(1);
  });

  test("once where one message holds a reservation twice, and where two messages of a batch do", async () => {
    const reservation = await insertClaimed();
    const message = messageOf(reservation, reservation);
    expect(message).toHaveLength(2);
    expect(await work([message, messageOf(reservation)])).toEqual(["ack", "ack"]);
    expect(await points(reservation)).toBe(100n);
    expect(await ledgerOf(reservation)).toHaveLength(1);
  });

  test("the others of a batch that has one duplicate among many", async () => {
    const done = await insertClaimed();
    await work([messageOf(done)]);
    const userId = newUser();
    const fresh = Array.from({ length: 50 }, () => reservationOf({ userId, pointAmount: 3 }));
    await insertReservations(db, { reservations: fresh, status: "PROCESSING" });
    const batch = [...fresh.slice(0, 25), done, ...fresh.slice(25)];
    expect(await work(batch.map((reservation) => messageOf(reservation)))).toEqual(Array(51).fill("ack"));
    expect(await points({ userId })).toBe(150n);
    expect(await points(done)).toBe(100n);
    expect(await ledgerOf({ userId })).toHaveLength(50);
  });

  test("what the row says, not what a forged message says (fault 32)", async () => {
    const reservation = await insertClaimed();
    const [forged] = messageOf(reservation);
    if (!forged) throw new Error("No message");
    const thief = { userId: newUser() };
    const message = { ...forged, user_id: thief.userId, point_amount: 1_000_000, idempotency_key: "other" };
    expect(await work([[message]])).toEqual(["ack"]);
    expect(await points(reservation)).toBe(100n);
    expect(await points(thief)).toBeUndefined();
    expect(await ledgerOf(reservation)).toMatchObject([
      { idempotency_key: reservation.idempotencyKey, point_amount: 100 },
    ]);
  });

  test("the others of a message that names an unknown id, and calls that message dead (fault 37)", async () => {
    const [known, other] = [await insertClaimed(), await insertClaimed()];
    const outcomes = await work([messageOf(known, reservationOf({ id: uuidv7() })), messageOf(other)]);
    expect(outcomes).toEqual(["dead", "ack"]);
    expect(await points(known)).toBe(100n);
    expect(await points(other)).toBe(100n);
  });
});

describe("processMessages() does not grant", () => {
  test.each(["PENDING", "PROCESSING"] as const)(
    "a %s reservation whose time has not come",
    async (status) => {
      const executeAt = new Date(Date.now() + 60_000);
      const reservation = await insertReservation(db, { userId: newUser(), status, executeAt });
      expect(await work([messageOf(reservation)])).toEqual(["ack"]);
      const told = await story(reservation);
      expect(told).toMatchObject({
        status,
        attempts: 0,
        scanAt: executeAt,
        grantedAt: null,
      });
      // Which takes any two dates for the same.
      expect(told.scanAt).toEqual(executeAt);
      expect(await points(reservation)).toBeUndefined();
    },
  );

  test("a due reservation that no scheduler has claimed", async () => {
    const reservation = await insertReservation(db, { userId: newUser(), status: "PENDING" });
    expect(await work([messageOf(reservation)])).toEqual(["ack"]);
    expect(await story(reservation)).toMatchObject({ status: "PENDING", grantedAt: null });
    expect(await points(reservation)).toBeUndefined();
  });

  test.each(["DONE", "CANCELLED", "FAILED"] as const)(
    "a reservation that is %s, and leaves it so (fault 33)",
    async (status) => {
      const reservation = await insertReservation(db, { userId: newUser(), status });
      expect(await work([messageOf(reservation)])).toEqual(["ack"]);
      expect(await story(reservation)).toMatchObject({ status, attempts: 0, scanAt: null, grantedAt: null });
      expect(await points(reservation)).toBeUndefined();
      // DONE without a ledger entry is no state of ours: the file's last test compares all sums.
      await db.query("delete from point_reservations where id = ?", [reservation.id]);
    },
  );

  test("twice what the ledger has already with the same content: DONE", async () => {
    const [reservation, innocent] = [await insertClaimed(), await insertClaimed()];
    await addLedgerEntry(reservation, reservation.pointAmount);
    await db.query("insert into point_root (user_id, point_num) values (?, ?)", [reservation.userId, 100]);
    expect(await work([messageOf(reservation), messageOf(innocent)])).toEqual(["ack", "ack"]);
    expect(await story(reservation)).toMatchObject({ status: "DONE", attempts: 0 });
    expect(await points(reservation)).toBe(100n);
    expect(await ledgerOf(reservation)).toHaveLength(1);
    expect(await story(innocent)).toMatchObject({ status: "DONE" });
    expect(await points(innocent)).toBe(100n);
  });

  test("what the ledger has already with other content: FAILED with the reason, the innocent are granted (fault 28)", async () => {
    const [reservation, innocent] = [await insertClaimed(), await insertClaimed()];
    const entry = await addLedgerEntry(reservation, 99);
    expect(await work([messageOf(reservation, innocent)])).toEqual(["ack"]);
    const { status, scanAt, lastError } = await story(reservation);
    expect({ status, scanAt }).toEqual({ status: "FAILED", scanAt: null });
    expect(lastError).toContain("other content");
    expect(lastError).toContain(entry);
    expect(await points(reservation)).toBeUndefined();
    expect(await points(innocent)).toBe(100n);
    await db.query("delete from point_transactions where id = ?", [entry]);
  });

  test("beyond the largest balance: FAILED with the reason, the others of the batch are granted (fault 29)", async () => {
    const rich = await insertClaimed();
    const [same, innocent] = [
      await insertClaimed({ userId: rich.userId, pointAmount: 7 }),
      await insertClaimed(),
    ];
    const balance = MAX_BIGINT - 7n;
    await db.query("insert into point_root (user_id, point_num) values (?, ?)", [
      rich.userId,
      String(balance),
    ]);
    expect(await work([messageOf(rich, same, innocent)])).toEqual(["ack"]);
    const { status, scanAt, lastError } = await story(rich);
    expect({ status, scanAt, lastError }).toEqual({
      status: "FAILED",
      scanAt: null,
      lastError: "The balance would be out of range",
    });
    expect(await story(same)).toMatchObject({ status: "DONE" });
    expect(await points(rich)).toBe(MAX_BIGINT);
    expect(await ledgerOf(rich)).toMatchObject([{ point_amount: 7 }]);
    expect(await points(innocent)).toBe(100n);
    await db.query("update point_root set point_num = point_num - cast(? as signed) where user_id = ?", [
      String(balance),
      rich.userId,
    ]);
  });

  async function addLedgerEntry(
    { idempotencyKey, userId }: Reservation,
    pointAmount: number,
  ): Promise<string> {
    const id = uuidv7();
    await db.query(
      "insert into point_transactions (id, idempotency_key, user_id, point_amount) values (?, ?, ?, ?)",
      [id, idempotencyKey, userId, pointAmount],
    );
    return id;
  }
});

describe("processMessages() with a row that fails for a reason of its own", () => {
  test("counts the attempt, plans the next one, says why, and grants the others", async () => {
    const [cursed, innocent] = [await insertClaimed({ userId: CURSED }), await insertClaimed()];
    expect(await work([messageOf(cursed, innocent)])).toEqual(["ack"]);
    const { status, attempts, lastError } = await story(cursed);
    expect({ status, attempts }).toEqual({ status: "PENDING", attempts: 1 });
    expect(lastError).toMatch(/^MySQL failed with ER_/);
    expect(await waitMs(cursed)).toBeGreaterThan(500);
    expect(await waitMs(cursed)).toBeLessThanOrEqual(2_000);
    expect(await story(innocent)).toMatchObject({ status: "DONE", attempts: 0 });
    expect(await points(innocent)).toBe(100n);
    expect(await points(cursed)).toBeUndefined();
  });

  test("waits longer each time, and ends FAILED after the last attempt (fault 30)", async () => {
    const cursed = await insertClaimed({ userId: CURSED });
    const waits: number[] = [];
    for (let attempt = 1; attempt < 4; attempt++) {
      await work([messageOf(cursed)], { maxAttempts: 4 });
      expect(await story(cursed)).toMatchObject({ status: "PENDING", attempts: attempt });
      waits.push(await waitMs(cursed));
      // A duplicate before its time is no attempt.
      expect(await work([messageOf(cursed)], { maxAttempts: 4 })).toEqual(["ack"]);
      expect(await story(cursed)).toMatchObject({ status: "PENDING", attempts: attempt });
      await claimAgain(cursed);
    }
    for (const [index, waitedMs] of waits.entries()) {
      expect(waitedMs).toBeGreaterThan(2 ** index * 1_000 - 500);
      expect(waitedMs).toBeLessThanOrEqual(2 ** index * 2_000);
    }
    expect(await work([messageOf(cursed)], { maxAttempts: 4 })).toEqual(["ack"]);
    const { status, attempts, scanAt, lastError } = await story(cursed);
    expect({ status, attempts, scanAt }).toEqual({ status: "FAILED", attempts: 4, scanAt: null });
    expect(lastError).toMatch(/^Gave up after 4 attempts: MySQL failed with ER_/);
    await work([messageOf(cursed)]);
    expect(await story(cursed)).toMatchObject({ status: "FAILED", attempts: 4 });
    expect(await ledgerOf({ userId: CURSED })).toHaveLength(0);
  });

  /** As the scheduler does when the time of the next attempt has come. */
  async function claimAgain({ id }: Reservation): Promise<void> {
    await db.query("update point_reservations set scan_at = utc_timestamp(3) where id = ?", [id]);
    const claimed = await claimDue(db.database, { limit: 100, leaseMs: 60_000 });
    expect(claimed.map((reservation) => reservation.id)).toContain(id);
  }

  /** How long until the next attempt, by the database's clock. */
  async function waitMs({ id }: Reservation): Promise<number> {
    const [row] = await db.query<{ ms: number }>(
      "select timestampdiff(microsecond, utc_timestamp(3), scan_at) / 1000 ms from point_reservations where id = ?",
      [id],
    );
    return Number(row?.ms);
  }
});

describe("processMessages() beside others", () => {
  test("grants the others where somebody holds one balance locked, and that one later, without an attempt (fault 22)", async () => {
    const [locked, again, ...others] = await Promise.all([
      insertClaimed({ userId: "Locked" }),
      insertClaimed({ userId: "Locked" }),
      insertClaimed(),
      insertClaimed(),
    ]);
    await work([messageOf(await insertClaimed({ userId: "Locked" }))]);
    await db.database.transaction(async ({ select }) => {
      await select("select * from point_root where user_id = 'Locked' for update");
      expect(
        await work([messageOf(locked, others[0] as Reservation), messageOf(again, others[1] as Reservation)]),
      ).toEqual(["ack", "ack"]);
    });
    for (const other of others) expect(await story(other)).toMatchObject({ status: "DONE" });
    for (const one of [locked, again]) {
      expect(await story(one)).toMatchObject({ status: "PROCESSING", attempts: 0, lastError: null });
    }
    await work([messageOf(locked, again)]);
    expect(await points(locked)).toBe(300n);
  }, 30_000);

  test("rejects where MySQL is away, and counts no attempt (fault 37)", async () => {
    const reservation = await insertClaimed();
    const away = new URL(DATABASE_URL);
    away.port = "1";
    const database = openDatabase(away.href, { acquireMs: 500 });
    const error = await work([messageOf(reservation)], { database }).catch((thrown) => thrown);
    expect(error).toBeInstanceOf(DatabaseError);
    expect(error.isOutage).toBe(true);
    await database.close();
    expect(await story(reservation)).toMatchObject({ status: "PROCESSING", attempts: 0, lastError: null });
    await work([messageOf(reservation)]);
    expect(await points(reservation)).toBe(100n);
  }, 20_000);

  test("grants once where two workers have the same messages at the same time", async () => {
    await using another = openAnother(db);
    for (let round = 0; round < 10; round++) {
      const userId = newUser();
      const reservations = Array.from({ length: 20 }, () => reservationOf({ userId, pointAmount: 5 }));
      await insertReservations(db, { reservations, status: "PROCESSING" });
      const forth = reservations.map((reservation) => messageOf(reservation));
      const back = forth.toReversed();
      const outcomes = await Promise.all([work(forth), work(back, { database: another })]);
      expect(outcomes.flat()).toEqual(Array(40).fill("ack"));
      expect(await points({ userId })).toBe(100n);
      expect(await ledgerOf({ userId })).toHaveLength(20);
    }
  }, 30_000);

  test("grants all where workers add to the same users in different orders (fault 23)", async () => {
    await using another = openAnother(db);
    const crowd = Array.from({ length: 60 }, newUser);
    const batches = Array.from({ length: 8 }, (_, batch) => {
      const ordered = batch % 2 === 0 ? crowd : crowd.toReversed();
      return ordered.map((userId) => reservationOf({ userId, pointAmount: 1 }));
    });
    await insertReservations(db, { reservations: batches.flat(), status: "PROCESSING" });
    await Promise.all(
      batches.map((batch, index) =>
        work([messageOf(...batch)], { database: index % 2 === 0 ? db.database : another }),
      ),
    );
    for (const userId of crowd) expect(await points({ userId })).toBe(8n);
  }, 30_000);

  test("leaves ledger, balances and reservations in agreement after all of the above", async () => {
    const sums = await compareSums(db.database);
    expect(sums).toMatchObject({ usersApart: 0, reservationsApart: 0, early: 0, agree: true });
    expect(sums.ledger).toBeGreaterThan(1_000n);
  });
});
