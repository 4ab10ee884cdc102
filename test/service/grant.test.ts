import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { type Database, openDatabase } from "../../lib/database.ts";
import { findBalance } from "../../lib/points/balance_queries.ts";
import type { Reservation } from "../../lib/reservations/reservation.ts";
import { findReservation } from "../../lib/reservations/reservation_queries.ts";
import { claimDue } from "../../lib/reservations/scan_repository.ts";
import { emptyTables, openAnother, openTestDatabase, untilRunning } from "../harness/database.ts";
import { command } from "../harness/fault_points.ts";
import { insertReservation, reservationOf } from "../harness/fixtures.ts";
import { DATABASE_URL, errorOf, until } from "../harness/harness.ts";
import { insertEntries } from "../harness/ledger.ts";
import { expectAgreement, processReservations } from "../harness/pipeline.ts";
import { type Moment, startProxy } from "../harness/proxy.ts";

/** Whose ledger entries MySQL refuses: a failure of the row's own. */
const CURSED = "Cursed";
const MAX_BIGINT = 9_223_372_036_854_775_807n;

const db = await openTestDatabase();
await db.query(`alter table point_transactions add constraint not_cursed check (user_id <> '${CURSED}')`);
beforeEach(() => emptyTables(db));

/** Grants reservations as a worker does, one message for each of `messages`. */
function grant(messages: Reservation[][], options: { database?: Database; maxAttempts?: number } = {}) {
  return processReservations(messages, { database: db.database, ...options });
}

let users = 0;
function newUser(): string {
  return `User${++users}`;
}

/** A claimed reservation of a user of its own, 100 points, due. */
function insertClaimed(fields: Partial<Reservation> = {}): Promise<Reservation> {
  return insertReservation(db, { userId: newUser(), status: "PROCESSING", ...fields });
}

async function detailsOf({ id }: Reservation) {
  const details = await findReservation(db.database, id);
  if (!details) throw new Error(`No reservation ${id}`);
  return details;
}

async function pointsOf({ userId }: Pick<Reservation, "userId">): Promise<bigint | undefined> {
  return (await findBalance(db.database, userId))?.pointNum;
}

/** Its status, and what its user has. */
async function endOf(reservation: Reservation) {
  return [(await detailsOf(reservation)).status, await pointsOf(reservation)];
}

function ledgerOf({ userId }: Pick<Reservation, "userId">) {
  return db.query<{ id: string }>(
    `select id, kind, reservation_id, idempotency_key, point_amount from point_transactions
     where user_id = ?`,
    [userId],
  );
}

function setBalance({ userId }: Reservation, points: bigint) {
  return db.query("insert into point_root (user_id, point_num) values (?, ?)", [userId, String(points)]);
}

describe("processMessages() grants", () => {
  afterEach(() => expectAgreement(db));

  test("what is claimed and due: ledger, balance and DONE together", async () => {
    const reservation = await insertClaimed({ pointAmount: 70 });
    expect(await grant([[reservation]])).toEqual(["ack"]);
    const { grantedAt, ...details } = await detailsOf(reservation);
    expect(details).toMatchObject({ status: "DONE", scanAt: null, attempts: 0, lastError: null });
    expect(grantedAt?.getTime()).toBeGreaterThanOrEqual(reservation.executeAt.getTime());
    expect(await pointsOf(reservation)).toBe(70n);
    const { id: reservation_id, idempotencyKey: idempotency_key } = reservation;
    const entry = { kind: "grant", reservation_id, idempotency_key, point_amount: 70 };
    expect(await ledgerOf(reservation)).toMatchObject([entry]);
  });

  test("once if the same message comes twice (fault 24)", async () => {
    const [twice, other] = [await insertClaimed(), await insertClaimed()];
    expect(await grant([[twice, twice], [twice]])).toEqual(["ack", "ack"]);
    expect(await grant([[twice], [other]])).toEqual(["ack", "ack"]);
    for (const one of [twice, other]) expect(await endOf(one)).toEqual(["DONE", 100n]);
    expect(await ledgerOf(twice)).toHaveLength(1);
  });

  test("what the row says, not what a forged message says (fault 32)", async () => {
    const reservation = await insertClaimed();
    const thief = { userId: newUser() };
    expect(await grant([[{ ...reservation, ...thief, pointAmount: 1_000_000 }]])).toEqual(["ack"]);
    expect(await pointsOf(reservation)).toBe(100n);
    expect(await pointsOf(thief)).toBeUndefined();
    expect(await ledgerOf(reservation)).toMatchObject([{ point_amount: 100 }]);
  });

  test("the others of a message that names an unknown id, and calls that message dead (fault 37)", async () => {
    const [known, other] = [await insertClaimed(), await insertClaimed()];
    expect(await grant([[known, reservationOf()], [other]])).toEqual(["dead", "ack"]);
    for (const one of [known, other]) expect(await endOf(one)).toEqual(["DONE", 100n]);
  });
});

describe("processMessages() does not grant", () => {
  test.each([
    ["PENDING", 60_000],
    ["PROCESSING", 60_000],
    ["PENDING", -1_000],
  ] as const)("a reservation that is %s and due in %d ms", async (status, inMs) => {
    const executeAt = new Date(Date.now() + inMs);
    const reservation = await insertReservation(db, { status, executeAt });
    expect(await grant([[reservation]])).toEqual(["ack"]);
    const details = await detailsOf(reservation);
    expect(details).toMatchObject({ status, attempts: 0, grantedAt: null });
    expect(details.scanAt).toEqual(executeAt);
    expect(await pointsOf(reservation)).toBeUndefined();
  });

  test.each(["DONE", "CANCELLED", "FAILED"] as const)(
    "a reservation that is %s, and leaves it so (fault 33)",
    async (status) => {
      const reservation = await insertReservation(db, { status });
      expect(await grant([[reservation]])).toEqual(["ack"]);
      expect(await detailsOf(reservation)).toMatchObject({ attempts: 0, scanAt: null });
      expect(await endOf(reservation)).toEqual([status, undefined]);
      expect(await ledgerOf(reservation)).toEqual([]);
    },
  );

  test.each([
    ["amount", { pointAmount: 99 }],
    ["user", { userId: "Other" }],
    ["reservation", { id: crypto.randomUUID() }],
  ])(
    "if the ledger has the key with another %s: FAILED with the reason, and the others (fault 28)",
    async (_, other) => {
      const [reservation, innocent] = [await insertClaimed(), await insertClaimed()];
      const first = { ...reservation, ...other };
      await insertEntries(db, [{ ...first, reservation: first }]);
      const [entry] = await ledgerOf(first);
      expect(await grant([[reservation, innocent]])).toEqual(["ack"]);
      expect(await detailsOf(reservation)).toMatchObject({
        scanAt: null,
        lastError: `The ledger already has the idempotency key, with other content: entry ${entry?.id}`,
      });
      expect(await endOf(reservation)).toEqual(["FAILED", undefined]);
      expect(await endOf(innocent)).toEqual(["DONE", 100n]);
    },
  );

  test("beyond the largest balance: FAILED with the reason, and the others (fault 29)", async () => {
    const rich = await insertClaimed();
    const same = await insertClaimed({ userId: rich.userId, pointAmount: 7 });
    const innocent = await insertClaimed();
    await setBalance(rich, MAX_BIGINT - 7n);
    expect(await grant([[rich, same, innocent]])).toEqual(["ack"]);
    const lastError = "The balance would be out of range";
    expect(await detailsOf(rich)).toMatchObject({ scanAt: null, lastError });
    expect(await endOf(rich)).toEqual(["FAILED", MAX_BIGINT]);
    expect(await endOf(same)).toEqual(["DONE", MAX_BIGINT]);
    expect(await endOf(innocent)).toEqual(["DONE", 100n]);
    expect(await ledgerOf(rich)).toMatchObject([{ point_amount: 7 }]);
  });
});

test("processMessages() tries a row that fails by itself later and later, grants the others, and gives up (fault 30)", async () => {
  const cursed = await insertClaimed({ userId: CURSED });
  const waitsMs: number[] = [];
  for (let attempts = 1; attempts < 4; attempts++) {
    const innocent = await insertClaimed();
    expect(await grant([[cursed, innocent]], { maxAttempts: 4 })).toEqual(["ack"]);
    expect(await endOf(innocent)).toEqual(["DONE", 100n]);
    // A duplicate before its time is no attempt.
    expect(await grant([[cursed]], { maxAttempts: 4 })).toEqual(["ack"]);
    const { lastError, ...details } = await detailsOf(cursed);
    expect(details).toMatchObject({ status: "PENDING", attempts });
    expect(lastError).toMatch(/^MySQL failed with /);
    const [row] = await db.query<{ ms: number }>(
      `select timestampdiff(microsecond, updated_at, scan_at) / 1000 ms from point_reservations where id = ?`,
      [cursed.id],
    );
    waitsMs.push(Number(row?.ms));
    await db.query("update point_reservations set scan_at = now(3) where id = ?", [cursed.id]);
    expect(await claimDue(db.database, { limit: 9, leaseMs: 60_000 })).toMatchObject([{ id: cursed.id }]);
  }
  // Between half of the backoff and all of it.
  for (const [index, waitMs] of waitsMs.entries()) {
    expect(waitMs).toBeWithin(2 ** index * 1_000 - 1, 2 ** index * 2_000 + 2);
  }
  await grant([[cursed]], { maxAttempts: 4 });
  const { lastError, ...details } = await detailsOf(cursed);
  expect(details).toMatchObject({ status: "FAILED", attempts: 4, scanAt: null });
  expect(lastError).toMatch(/^Gave up at attempt 4: MySQL failed with /);
  await grant([[cursed]]);
  expect(await endOf(cursed)).toEqual(["FAILED", undefined]);
  await expectAgreement(db);
});

describe("processMessages() beside others", () => {
  afterEach(() => expectAgreement(db));

  test("grants all but those of a balance that is locked; these later, without an attempt (fault 22)", async () => {
    const locked = await insertClaimed({ userId: "Locked" });
    const again = await insertClaimed({ userId: "Locked" });
    await setBalance(locked, 0n);
    const other = await insertClaimed();
    await db.database.transaction(async ({ select }) => {
      await select("select * from point_root where user_id = 'Locked' for update");
      expect(await grant([[locked], [again, other]])).toEqual(["ack", "ack"]);
      // Until MySQL has ended the first attempt, that one holds the rows.
      await until("the other is granted", async () => {
        await grant([[other]]);
        return (await detailsOf(other)).status === "DONE";
      });
    });
    expect(await endOf(other)).toEqual(["DONE", 100n]);
    for (const one of [locked, again]) {
      expect(await detailsOf(one)).toMatchObject({ status: "PROCESSING", attempts: 0, lastError: null });
    }
    await grant([[locked, again]]);
    expect(await pointsOf(locked)).toBe(200n);
  });

  test("locks balances in the order of their users, so that two workers do not deadlock (fault 23)", async () => {
    const [late, early] = [await insertClaimed({ userId: "B" }), await insertClaimed({ userId: "A" })];
    await setBalance(early, 0n);
    await setBalance(late, 0n);
    const { granting } = await db.database.transaction(async ({ select }) => {
      await select("select * from point_root where user_id = 'A' for update");
      const granting = grant([[late, early]]);
      await untilRunning(db, "upsert_balances");
      // It has not locked B meanwhile.
      const free = await select("select user_id from point_root where user_id = 'B' for update skip locked");
      expect(free).toHaveLength(1);
      return { granting };
    });
    expect(await granting).toEqual(["ack"]);
    for (const one of [late, early]) expect(await endOf(one)).toEqual(["DONE", 100n]);
  });

  test("rejects if MySQL is away, and counts no attempt (fault 37)", async () => {
    const reservation = await insertClaimed();
    const away = Object.assign(new URL(DATABASE_URL), { port: "1" }).href;
    const database = openDatabase(away, { acquireMs: 500 });
    expect((await errorOf(grant([[reservation]], { database }))).isOutage).toBe(true);
    await database.close();
    const untouched = { status: "PROCESSING", attempts: 0, lastError: null };
    expect(await detailsOf(reservation)).toMatchObject(untouched);
  });

  test("grants once if two workers have the same messages at the same time", async () => {
    await using another = openAnother(db);
    const [first, second] = [await insertClaimed(), await insertClaimed()];
    // Both wait for this row, and go on one after the other.
    const { both } = await db.database.transaction(async ({ select }) => {
      await select("select * from point_reservations where id = ? for update", [second.id]);
      const both = [grant([[first], [second]]), grant([[second], [first]], { database: another })];
      await untilRunning(db, "lock_reservations", 2);
      return { both };
    });
    expect((await Promise.all(both)).flat()).toEqual(Array(4).fill("ack"));
    for (const one of [first, second]) expect(await endOf(one)).toEqual(["DONE", 100n]);
  });

  test.each<[string, Moment]>([
    ["MySQL never had it", "unsent"],
    ["only its answer is lost", "answered"],
  ])(
    "reads the rows again if its connection is lost at its COMMIT, and grants once: %s (fault 25)",
    async (_, moment) => {
      await using proxy = await startProxy(db.url);
      const retries: string[] = [];
      const database = openDatabase(proxy.url, { onRetry: ({ kind }) => retries.push(kind) });
      const reservation = await insertClaimed();
      proxy.trap({ command: command("commit"), moment, spring: () => proxy.cut() });
      expect(await grant([[reservation]], { database })).toEqual(["ack"]);
      await database.close();
      expect(retries).toEqual(["lost"]);
      expect(await detailsOf(reservation)).toMatchObject({ status: "DONE", attempts: 0, lastError: null });
      expect(await pointsOf(reservation)).toBe(100n);
    },
  );
});
