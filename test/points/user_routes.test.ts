import { describe, expect, test } from "bun:test";
import { openTestDatabase } from "../harness/database.ts";
import { insertReservation, type RowFields } from "../harness/fixtures.ts";
import { insertEntries } from "../harness/ledger.ts";
import { processReservations } from "../harness/pipeline.ts";
import { appOn, expectProblem, json } from "../http/client.ts";
import { readPage, walkPages } from "../http/pages.ts";

const db = await openTestDatabase();
const { send } = appOn(db.database);

let users = 0;
function newUser(): string {
  return `User${++users}`;
}

/** An entry of the ledger as of a time, without its balance. */
function insertEntry(userId: string, pointAmount: number, time: string | number) {
  return insertEntries(db, [{ userId, pointAmount, createdAt: new Date(time) }]);
}

function setBalance(user_id: string, points: bigint, updated_at = new Date()) {
  return db.query("insert into point_root set ?", [{ user_id, point_num: points.toString(), updated_at }]);
}

async function bodyOf(path: string): Promise<Record<string, unknown>> {
  const response = await send(path);
  expect(response.status).toBe(200);
  return (await response.json()) as Record<string, unknown>;
}

describe("GET /users/:user_id/points", () => {
  test("sums up what is PENDING or PROCESSING, and tells when the next of it is due", async () => {
    const user = newUser();
    const updatedAt = "2026-01-01T00:00:00.123Z";
    await setBalance(user, 30n, new Date(updatedAt));
    for (const [status, pointAmount, time] of [
      ["PENDING", 1, "2029-01-03T00:00:00.000Z"],
      ["PROCESSING", 20, "2029-01-02T00:00:00.456Z"],
      ["PENDING", 300, "2029-01-04T00:00:00.000Z"],
      ["DONE", 4_000, "2029-01-01T00:00:00.000Z"],
      ["FAILED", 50_000, "2029-01-01T00:00:00.000Z"],
      ["CANCELLED", 600_000, "2029-01-01T00:00:00.000Z"],
    ] as const) {
      await insertReservation(db, { userId: user, status, pointAmount, executeAt: new Date(time) });
    }
    await insertReservation(db, { userId: user.toLowerCase(), pointAmount: 7_000_000 });
    expect(await bodyOf(`/users/${user}/points`)).toEqual({
      user_id: user,
      point_num: 30,
      reserved_point_num: 321,
      next_execute_at: "2029-01-02T00:00:00.456Z",
      updated_at: updatedAt,
    });
  });

  test.each(["PENDING", "PROCESSING"] as const)(
    "knows a user with nothing but a reservation that is %s",
    async (status) => {
      const user = newUser();
      const { executeAt } = await insertReservation(db, { userId: user, status });
      const next = { reserved_point_num: 100, next_execute_at: executeAt.toISOString() };
      const nothing = { user_id: user, point_num: 0, updated_at: null };
      expect(await bodyOf(`/users/${user}/points`)).toEqual({ ...nothing, ...next });
      const at = "2026-01-01T00:00:00.000Z";
      expect(await bodyOf(`/users/${user}/points?at=${at}`)).toEqual({ ...nothing, at });
    },
  );

  test("is 404 if all of a user's reservations ended without points, or if the name differs in case", async () => {
    const [user, known] = [newUser(), newUser()];
    for (const status of ["FAILED", "CANCELLED"] as const) {
      await insertReservation(db, { userId: user, status });
    }
    await setBalance(known, 1n);
    for (const unknown of [user, known.toLowerCase()]) {
      for (const query of ["", "?at=2029-01-01T00:00:00Z"]) {
        await expectProblem(await send(`/users/${unknown}/points${query}`), 404, ["user not found"]);
      }
    }
  });

  test.each(["9007199254740993", "9223372036854775807"])("keeps all digits of %s", async (points) => {
    const user = newUser();
    await setBalance(user, BigInt(points));
    for (let row = 0; row < 5; row++) {
      await insertReservation(db, { userId: user, pointAmount: 2_147_483_647 });
    }
    // As text: JSON.parse() would round the digits.
    const text = await (await send(`/users/${user}/points`)).text();
    expect(text).toContain(`"point_num":${points},"reserved_point_num":10737418235,`);
  });

  test("?at= is what the ledger had then, to the millisecond", async () => {
    const user = newUser();
    const first = "2026-03-01T00:00:00.250Z";
    const second = "2026-03-02T00:00:00.000Z";
    const third = "2026-03-02T00:00:00.001Z";
    await insertEntry(user, 100, first);
    await insertEntry(user, -30, second);
    await insertEntry(user, 5, third);
    await insertEntry(user.toLowerCase(), 1_000, first);
    await setBalance(user, 75n);
    for (const [time, point_num, updated_at] of [
      ["1970-01-01T00:00:00Z", 0, null],
      ["2026-03-01T00:00:00.249Z", 0, null],
      [first, 100, first],
      ["2026-03-01T23:59:59.999Z", 100, first],
      [second, 70, second],
      [third, 75, third],
      ["9999-12-31T23:59:59.999Z", 75, third],
      ["2026-03-01T09:00:00.25+09:00", 100, first],
      ["2026-03-01T23:00:00-01:00", 70, second],
    ] as const) {
      const at = new Date(time).toISOString();
      const found = await bodyOf(`/users/${user}/points?at=${encodeURIComponent(time)}`);
      expect(found).toEqual({ user_id: user, point_num, at, updated_at });
    }
  });
});

describe("GET /users/:user_id/transactions", () => {
  test("tells grants with their reservation, and direct changes with the client's key", async () => {
    const userId = newUser();
    async function grant(fields: RowFields) {
      const reservation = await insertReservation(db, { status: "PROCESSING", userId, ...fields });
      expect(await processReservations([[reservation]], db)).toEqual(["ack"]);
      return reservation;
    }
    async function change(verb: "add" | "sub", point_num: number, idempotency_key: string) {
      const init = json("PUT", { user_id: userId, point_num, idempotency_key });
      expect((await send(`/point/${verb}`, init)).status).toBe(200);
    }
    const first = await grant({ pointAmount: 70, campaign: "summer", idempotencyKey: "order-1" });
    await change("add", 30, "gift-1");
    const second = await grant({ pointAmount: 5 });
    // A reservation has this key too, which has nothing to do with it.
    await change("sub", 20, "order-1");
    const list = { send, path: `/users/${userId}/transactions` };
    const { entries, next } = await readPage<Record<string, unknown>>(list);
    expect(next).toBeNull();
    const [ofFirst, ofSecond, direct] = [first, second, null].map((reservation) => ({
      transaction_id: expect.stringMatching(/^[0-9a-f-]{36}$/),
      created_at: expect.stringMatching(/^\d{4}-.*\.\d{3}Z$/),
      reservation_id: reservation?.id ?? null,
      campaign: reservation?.campaign ?? null,
    }));
    expect(entries).toEqual([
      { ...direct, kind: "sub", point: -20, idempotency_key: "order-1" },
      { ...ofSecond, kind: "grant", point: 5, idempotency_key: second.idempotencyKey },
      { ...direct, kind: "add", point: 30, idempotency_key: "gift-1" },
      { ...ofFirst, kind: "grant", point: 70, idempotency_key: "order-1" },
    ]);
    const { transaction_id, granted_at } = await bodyOf(`/point/reservations/${first.id}`);
    expect(entries[3]).toMatchObject({ transaction_id, created_at: granted_at });
  });

  test("gives each entry once, newest first, in pages of any size", async () => {
    const userId = newUser();
    // Four at each time; their ids say nothing of their order.
    const base = Date.parse("2020-01-01T00:00:00.000Z");
    const entries = Array.from({ length: 60 }, (_, index) => {
      return { userId, pointAmount: index % 2 ? 5 : -5, createdAt: new Date(base + Math.floor(index / 4)) };
    });
    await insertEntries(db, entries);
    for (const other of [userId.toLowerCase(), `${userId}r`, userId.slice(0, -1)]) {
      await insertEntry(other, 1, base);
    }
    const rows = await db.query<{ id: string; at: Date }>(
      "select id, created_at at from point_transactions where user_id = ?",
      [userId],
    );
    const oldestFirst = rows.map(({ id, at }) => at.toISOString() + id).toSorted();
    const ids = oldestFirst.reverse().map((row) => row.slice(-36));
    const list = { send, path: `/users/${userId}/transactions` };
    const idsOf = (listed: { transaction_id: string }[]) => listed.map((entry) => entry.transaction_id);
    for (const limits of [[1], [4], [7], [20], [59], [60], [61], [1_000], [3, 25, 1, 8]]) {
      expect(idsOf(await walkPages(list, { limits }))).toEqual(ids);
    }

    const { entries: newer, next } = await readPage<{ transaction_id: string }>(list, { limit: 30 });
    await insertEntry(userId, 1, Date.now());
    const older = await readPage<{ transaction_id: string }>(list, { limit: 100, cursor: next ?? "" });
    expect([...idsOf(newer), ...idsOf(older.entries)]).toEqual(ids);
  });
});
