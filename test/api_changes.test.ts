import { afterAll, beforeAll, describe, expect, spyOn, test } from "bun:test";
import { pino } from "pino";
import { type Database, openDatabase } from "../lib/database.ts";
import { freePorts } from "../lib/dev/servers.ts";
import { compareSums, findBalance } from "../lib/point_repository.ts";
import { RESERVATION_STATUSES, type Reservation, type ReservationStatus } from "../lib/reservation.ts";
import { claimDue } from "../lib/reservation_repository.ts";
import { appOn, bodyOf, expectProblem, post } from "./api_client.ts";
import {
  createTestDatabase,
  insertReservation,
  reservationOf,
  type TestDatabase,
  uniqueName,
  until,
} from "./harness.ts";
import { processReservations } from "./pipeline.ts";

let db: TestDatabase;
let app: ReturnType<typeof appOn>;
beforeAll(async () => {
  db = await createTestDatabase();
  app = appOn(db.database);
}, 30_000);
afterAll(() => db?.drop(), 30_000);

const UNKNOWN = "01890a5d-ac96-774b-bcce-b302099a8057";
const TO_COME = "2029-02-22T13:59:00.000Z";
const MAX_BIGINT = 9_223_372_036_854_775_807n;

let users = 0;
function newUser(): string {
  return `User${++users}`;
}

function insert(status: ReservationStatus, fields: Parameters<typeof insertReservation>[1] = {}) {
  return insertReservation(db, { userId: newUser(), status, ...fields });
}

/** A reservation that stands there; DONE by a real grant, so that it has its ledger entry and its points. */
async function reservationThatIs(status: ReservationStatus, fields: Partial<Reservation> = {}) {
  if (status !== "DONE") return insert(status, fields);
  const reservation = await insert("PROCESSING", fields);
  expect(await grant([reservation])).toEqual({ granted: 1 });
  return reservation;
}

/** Reserves as a client does. */
async function reserve(fields: Record<string, unknown>, headers: Record<string, string> = {}) {
  const response = await app.send("/point/reserve", post(bodyOf(fields), headers));
  const replayed = response.headers.get("idempotent-replayed");
  return { status: response.status, replayed, body: (await response.json()) as { reservation_id: string } };
}

interface Story extends Record<string, unknown> {
  reservation_id: string;
  status: ReservationStatus;
  next_scan_at: string;
}

async function tell(id: string): Promise<Story> {
  const response = await app.send(`/point/reservations/${id}`);
  expect(response.status).toBe(200);
  return (await response.json()) as Story;
}

function cancel(id: string, { send } = app) {
  return send(`/point/reservations/${id}`, { method: "DELETE" });
}

function patch(id: string, body: unknown, headers: Record<string, string> = {}) {
  return app.send(`/point/reservations/${id}`, { ...post(body, headers), method: "PATCH" });
}

function retry(id: string, { send } = app) {
  return send(`/point/reservations/${id}/retry`, { method: "POST" });
}

function cancelCampaign(campaign: string, { send } = app) {
  return send(`/point/campaigns/${campaign}/cancel`, { method: "POST" });
}

async function expectJson(response: Response, status: number): Promise<unknown> {
  expect(response.status).toBe(status);
  expect(response.headers.get("content-type")).toStartWith("application/json");
  return response.json();
}

/** What a worker does with the messages of these reservations; gives what became of how many. */
async function grant(
  reservations: readonly Reservation[],
  database: Database = db.database,
): Promise<Record<string, unknown>> {
  const log: Record<string, unknown>[] = [];
  const logger = pino({}, { write: (line: string) => log.push(JSON.parse(line)) });
  const messages = reservations.map((reservation) => [reservation]);
  const outcomes = await processReservations(messages, { database, logger });
  expect(outcomes).toEqual(reservations.map(() => "ack"));
  const { granted, over, not_due, failed, busy } = log.find(({ msg }) => msg === "processed") ?? {};
  return { granted, over, not_due, failed, busy };
}

/** What a scheduler and a worker do: claims all that is due, and grants it. Resolves to the ids of what was claimed. */
async function scanAndGrant(): Promise<string[]> {
  const claimed = await claimDue(db.database, { limit: 10_000, leaseMs: 60_000 });
  if (claimed.length > 0) await grant(claimed);
  return claimed.map(({ id }) => id);
}

async function points({ userId }: Pick<Reservation, "userId">): Promise<bigint | undefined> {
  return (await findBalance(db.database, userId))?.pointNum;
}

async function ledgerOf({ userId }: Pick<Reservation, "userId">) {
  return db.query<{ id: string; point_amount: number; created_at: Date }>(
    "select id, point_amount, created_at from point_transactions where user_id = ?",
    [userId],
  );
}

async function expectNoPoints(reservation: Reservation) {
  expect(await ledgerOf(reservation)).toEqual([]);
  expect(await points(reservation)).toBeUndefined();
}

/** The members of a 409 that say where the reservation stands; of a granted one by its ledger entry. */
async function factsOf(reservation: Reservation, status: ReservationStatus) {
  const [entry] = status === "DONE" ? await ledgerOf(reservation) : [];
  return {
    reservation_id: reservation.id,
    reservation_status: status,
    granted_at: entry?.created_at.toISOString() ?? null,
    transaction_id: entry?.id ?? null,
  };
}

/** A database whose work is done, but commits only when told. */
function openHeld() {
  const { promise: gate, resolve: commit } = Promise.withResolvers<void>();
  const { promise: inside, resolve: enter } = Promise.withResolvers<void>();
  const transaction: Database["transaction"] = (work, options) =>
    db.database.transaction(async (connection) => {
      const result = await work(connection);
      enter();
      await gate;
      return result;
    }, options);
  return { database: { ...db.database, run: transaction, transaction }, inside, commit };
}

/** A database where something happens just after a piece of work, once; what that gave decides whether. */
function openInterrupted(isIt: (result: unknown) => boolean, happen: () => Promise<unknown>): Database {
  let left = 1;
  async function interrupt<T>(result: T): Promise<T> {
    if (isIt(result) && left-- > 0) await happen();
    return result;
  }
  return {
    ...db.database,
    run: async (work, options) => interrupt(await db.database.run(work, options)),
    transaction: async (work, options) => interrupt(await db.database.transaction(work, options)),
  };
}

/** A database that commits each transaction, but loses the answer: it starts again, after something has happened. */
function openForgetful(happen: () => Promise<unknown>): Database {
  return {
    ...db.database,
    async transaction(work, options) {
      await db.database.transaction(work, options);
      await happen();
      return db.database.transaction(work, options);
    },
  };
}

/** Waits until a statement of this database that begins so is under way: it waits for a lock, as it does nothing long. */
async function untilWaiting(statement: string) {
  await until(`${statement} waits`, async () => {
    const [waiting] = await db.query(
      "select id from information_schema.processlist where db = ? and info like ?",
      [db.name, `${statement}%`],
    );
    return waiting !== undefined;
  });
}

const UPDATE = "update `point_reservations`";
const SELECT = "select id, user_id userId, point_amount pointAmount";

describe("DELETE /point/reservations/:id", () => {
  test.each(["PENDING", "PROCESSING"] as const)(
    "cancels what is %s, and answers the same again",
    async (status) => {
      const { id } = await insert(status);
      for (const written of [id, id, id.toUpperCase()]) {
        expect(await expectJson(await cancel(written), 200)).toEqual({
          reservation_id: id,
          status: "CANCELLED",
        });
      }
      expect(await tell(id)).toMatchObject({ status: "CANCELLED", next_scan_at: null, granted_at: null });
    },
  );

  test("leaves the others alone", async () => {
    const userId = newUser();
    const [one, other] = [await insert("PENDING", { userId }), await insert("PENDING", { userId })];
    const before = await tell(other.id);
    expect((await cancel(one.id)).status).toBe(200);
    expect(await tell(other.id)).toEqual(before);
  });

  test("keeps the points away where the message is in the queue already", async () => {
    const reservation = await insert("PROCESSING");
    expect((await cancel(reservation.id)).status).toBe(200);
    expect(await grant([reservation])).toEqual({ over: 1 });
    expect(await tell(reservation.id)).toMatchObject({ status: "CANCELLED", granted_at: null });
    await expectNoPoints(reservation);
  });

  test("answers 409 with time and ledger entry to what was granted, which stays", async () => {
    const reservation = await reservationThatIs("DONE");
    const facts = await factsOf(reservation, "DONE");
    expect(facts.transaction_id).toBeString();
    const before = await tell(reservation.id);
    for (let again = 0; again < 2; again++) {
      const problem = await expectProblem(await cancel(reservation.id), 409, ["reservation was granted"]);
      expect(problem).toMatchObject(facts);
      for (const fact of [facts.granted_at, facts.transaction_id]) {
        expect(problem.detail).toContain(fact as string);
      }
    }
    expect(await tell(reservation.id)).toEqual(before);
    expect(await points(reservation)).toBe(100n);
  });

  test("answers 409 to what is FAILED, which stays", async () => {
    const reservation = await insert("FAILED");
    const before = await tell(reservation.id);
    const problem = await expectProblem(await cancel(reservation.id), 409, ["reservation is FAILED"]);
    expect(problem).toMatchObject(await factsOf(reservation, "FAILED"));
    expect(await tell(reservation.id)).toEqual(before);
  });

  test("answers 404 where there is none, and 400 to what is no id", async () => {
    await expectProblem(await cancel(UNKNOWN), 404, ["reservation not found"]);
    for (const id of ["42", "%zz", `${UNKNOWN}0`]) {
      await expectProblem(await cancel(id), 400, ["reservation id is invalid format"]);
    }
  });

  test("waits for a grant whose transaction is open, and then answers 409", async () => {
    const reservation = await insert("PROCESSING");
    const held = openHeld();
    const granting = grant([reservation], held.database);
    await held.inside;
    const answer = cancel(reservation.id);
    await untilWaiting(UPDATE);
    held.commit();
    expect(await granting).toEqual({ granted: 1 });
    const problem = await expectProblem(await answer, 409, ["reservation was granted"]);
    expect(problem).toMatchObject(await factsOf(reservation, "DONE"));
    expect(await points(reservation)).toBe(100n);
  });

  test("makes a grant wait that comes a little later, which then grants nothing of it", async () => {
    const [reservation, other] = [await insert("PROCESSING"), await insert("PROCESSING")];
    const held = openHeld();
    const answer = cancel(reservation.id, appOn(held.database));
    await held.inside;
    const granting = grant([reservation, other]);
    await untilWaiting(SELECT);
    held.commit();
    expect(await expectJson(await answer, 200)).toEqual({
      reservation_id: reservation.id,
      status: "CANCELLED",
    });
    expect(await granting).toEqual({ granted: 1, over: 1 });
    await expectNoPoints(reservation);
    expect(await points(other)).toBe(100n);
  });

  test("cancels what was FAILED, and is tried again before it is looked at", async () => {
    const { id } = await insert("FAILED");
    const database = openInterrupted(
      (cancelled) => cancelled === 0,
      () => retry(id),
    );
    expect((await cancel(id, appOn(database))).status).toBe(200);
    expect(await tell(id)).toMatchObject({ status: "CANCELLED" });
  });

  test("answers ten at once with 200", async () => {
    const { id } = await insert("PROCESSING");
    const answers = await Promise.all(Array.from({ length: 10 }, () => cancel(id)));
    expect(answers.map(({ status }) => status)).toEqual(Array(10).fill(200));
  });
});

describe("PATCH /point/reservations/:id", () => {
  const ORIGINAL = new Date(TO_COME);

  test("gives another time: the scheduler looks then, and the first time is kept", async () => {
    const { id } = await insert("PENDING", { executeAt: ORIGINAL, campaign: "spring" });
    const before = await tell(id);
    const body = { execute_at: "2029-03-01T09:00:00.250+09:00" };
    const story = await expectJson(await patch(id.toUpperCase(), body), 200);
    expect(story).toEqual({
      ...before,
      execute_at: "2029-03-01T00:00:00.250Z",
      next_scan_at: "2029-03-01T00:00:00.250Z",
      original_execute_at: TO_COME,
      original_point_amount: null,
      updated_at: expect.any(String),
    });
    expect(story).toEqual(await tell(id));
  });

  test("gives another amount: the scheduler looks as before, and the first amount is kept", async () => {
    // Between two attempts, which are later than execute_at.
    const scanAt = new Date("2029-02-22T14:30:00.000Z");
    const { id } = await insert("PENDING", { executeAt: ORIGINAL, scanAt, pointAmount: 70 });
    const before = await tell(id);
    const story = await expectJson(await patch(id, { point_amount: 2_147_483_647 }), 200);
    expect(story).toEqual({
      ...before,
      point_amount: 2_147_483_647,
      original_point_amount: 70,
      original_execute_at: null,
      next_scan_at: scanAt.toISOString(),
      updated_at: expect.any(String),
    });
    expect(story).toEqual(await tell(id));
  });

  test("keeps what was reserved first, however often it is patched, also back to the first", async () => {
    const { id } = await insert("PENDING", { executeAt: ORIGINAL });
    const kept = { original_execute_at: TO_COME, original_point_amount: 100 };
    const patches = [
      { execute_at: "2029-03-01T00:00:00.000Z", point_amount: 250 },
      { execute_at: "2029-03-02T00:00:00.000Z", point_amount: 251 },
      { execute_at: TO_COME, point_amount: 100 },
    ];
    for (const body of patches) {
      const story = await expectJson(await patch(id, body), 200);
      expect(story).toMatchObject({ ...body, ...kept, next_scan_at: body.execute_at });
    }
  });

  test("with the same body again changes nothing more", async () => {
    const { id } = await insert("PENDING", { executeAt: ORIGINAL });
    const body = { execute_at: "2029-03-01T00:00:00.000Z", point_amount: 250 };
    const story = await expectJson(await patch(id, body), 200);
    expect(await expectJson(await patch(id, body), 200)).toEqual(story);
    expect(story).toMatchObject({ original_execute_at: TO_COME, original_point_amount: 100 });
  });

  test("at the same moment as others keeps what was reserved first, and one of the others", async () => {
    const { id } = await insert("PENDING", { pointAmount: 7 });
    const amounts = Array.from({ length: 20 }, (_, index) => 100 + index);
    const answers = await Promise.all(amounts.map((point_amount) => patch(id, { point_amount })));
    expect(answers.map(({ status }) => status)).toEqual(amounts.map(() => 200));
    const story = await tell(id);
    expect(story.original_point_amount).toBe(7);
    expect(amounts).toContain(story.point_amount as number);
  });

  test.each<[string, object[]]>([
    ["the amount", [{ point_amount: 249 }, { point_amount: 250 }]],
    ["the time", [{ execute_at: "2029-03-01T00:00:00Z" }, { execute_at: "2029-03-02T00:00:00Z" }]],
    ["both", [{ point_amount: 250, execute_at: "2029-03-01T00:00:00Z" }]],
    ["one after the other", [{ point_amount: 250 }, { execute_at: "2029-03-01T00:00:00Z" }]],
  ])(
    "of %s leaves the request that reserved it a replay, and makes what it is now another request",
    async (_, patches) => {
      const fields = { user_id: newUser(), idempotency_key: uniqueName("key") };
      const first = await reserve(fields);
      const id = first.body.reservation_id;
      for (const body of patches) {
        expect((await patch(id, body)).status).toBe(200);
        const story = await tell(id);
        expect(await reserve(fields)).toEqual({ status: 201, replayed: "true", body: first.body });
        const { idempotency_key, ...rest } = fields;
        const byHeader = await reserve(rest, { "idempotency-key": idempotency_key });
        expect(byHeader).toEqual({ status: 201, replayed: "true", body: first.body });
        const patched = { ...fields, point_amount: story.point_amount, execute_at: story.execute_at };
        await expectProblem(await app.send("/point/reserve", post(bodyOf(patched))), 422, [
          "idempotency key is used with other content",
        ]);
        expect(await tell(id)).toEqual(story);
      }
    },
  );

  test("decides what is granted, and when", async () => {
    const [sooner, later] = [newUser(), newUser()];
    const toCome = await reserve({ user_id: sooner });
    const due = await reserve({ user_id: later, execute_at: "2001-01-01T00:00:00Z" });
    const ids = [toCome, due].map(({ body }) => body.reservation_id) as [string, string];
    expect((await patch(ids[0], { execute_at: "2001-01-01T00:00:00Z", point_amount: 250 })).status).toBe(200);
    expect((await patch(ids[1], { execute_at: TO_COME })).status).toBe(200);
    const claimed = await scanAndGrant();
    expect(claimed).toContain(ids[0]);
    expect(claimed).not.toContain(ids[1]);
    expect(await tell(ids[0])).toMatchObject({ status: "DONE", point_amount: 250 });
    expect(await ledgerOf({ userId: sooner })).toMatchObject([{ point_amount: 250 }]);
    expect(await points({ userId: sooner })).toBe(250n);
    expect(await points({ userId: later })).toBeUndefined();
  });

  test.each(RESERVATION_STATUSES.filter((status) => status !== "PENDING"))(
    "answers 409 to what is %s, which stays",
    async (status) => {
      const reservation = await reservationThatIs(status);
      const before = await tell(reservation.id);
      // The last one asks for what it is already.
      for (const body of [{ point_amount: 250 }, { execute_at: TO_COME }, { point_amount: 100 }]) {
        const answer = await patch(reservation.id, body);
        const problem = await expectProblem(answer, 409, ["reservation is not PENDING"]);
        expect(problem).toMatchObject(await factsOf(reservation, status));
        expect(problem.detail).toContain(`it is ${status}`);
      }
      expect(await tell(reservation.id)).toEqual(before);
    },
  );

  const unreadable = ["execute at must be an RFC 3339 time with seconds and offset"];
  test.each<[string, unknown, string[]]>([
    ["nothing", {}, ["execute at or point amount is required"]],
    [
      "all broken rules at once",
      { execute_at: "2029-02-30T00:00:00Z", point_amount: 0, note: 1 },
      [
        "execute at must be a date that exists",
        "point amount must be greater than 0",
        'unknown field "note"',
      ],
    ],
    [
      "a good field beside a bad one",
      { point_amount: 250, execute_at: "2029-02-22T22:59:00" },
      [...unreadable],
    ],
    [
      "a good time beside a bad amount",
      { point_amount: -1, execute_at: TO_COME },
      ["point amount must be greater than 0"],
    ],
    ["a text as amount", { point_amount: "250" }, ["point amount must be an integer"]],
    ["a fraction", { point_amount: 2.5 }, ["point amount must be an integer"]],
    ["null as amount", { point_amount: null }, ["point amount must be an integer"]],
    ["too large an amount", { point_amount: 2_147_483_648 }, ["point amount must be at most 2147483647"]],
    ["null as time", { execute_at: null }, [...unreadable]],
    ["a number as time", { execute_at: 1_900_000_000_000 }, [...unreadable]],
    ["a time before 1970", { execute_at: "1969-12-31T23:59:59Z" }, ["execute at must be from 1970 to 9999"]],
    ["another user", { point_amount: 250, user_id: "Thief" }, ['unknown field "user_id"']],
    ["another status", { point_amount: 250, status: "DONE" }, ['unknown field "status"']],
    ["another key", { idempotency_key: "a" }, ['unknown field "idempotency_key"']],
    ["another campaign", { campaign: "a" }, ['unknown field "campaign"']],
    ["a field of JavaScript's", '{"__proto__":{"point_amount":1}}', ['unknown field "__proto__"']],
    ["an array", [{ point_amount: 250 }], ["body must be a JSON object"]],
    ["null", null, ["body must be a JSON object"]],
    ["half a JSON", '{"point_amount":250', ["body must be JSON"]],
    ["no body", "", ["body must be JSON"]],
  ])("answers 400 to %s, and changes nothing", async (_, body, errors) => {
    const { id } = await insert("PENDING", { executeAt: ORIGINAL });
    const before = await tell(id);
    await expectProblem(await patch(id, body), 400, errors);
    expect(await tell(id)).toEqual(before);
  });

  test("answers 404 where there is none, and 400 to what is no id", async () => {
    await expectProblem(await patch(UNKNOWN, { point_amount: 1 }), 404, ["reservation not found"]);
    for (const id of ["42", "%zz"]) {
      await expectProblem(await patch(id, { point_amount: 1 }), 400, ["reservation id is invalid format"]);
    }
  });

  test("answers 415 to another content type, and changes nothing", async () => {
    const { id } = await insert("PENDING");
    const before = await tell(id);
    for (const type of ["text/plain", "application/merge-patch+json", "application/json; charset=utf-16"]) {
      await expectProblem(await patch(id, { point_amount: 250 }, { "content-type": type }), 415, [
        "content type must be application/json",
      ]);
    }
    expect(await tell(id)).toEqual(before);
  });

  test("takes a body of 64 KiB, and answers 413 to one byte more", async () => {
    const { id } = await insert("PENDING");
    const text = '{"point_amount":250}';
    expect((await patch(id, text.padEnd(65_536))).status).toBe(200);
    const before = await tell(id);
    await expectProblem(await patch(id, '{"point_amount":251}'.padEnd(65_537)), 413, ["body is too large"]);
    expect(await tell(id)).toEqual(before);
  });

  test("waits for a claim whose transaction is open, and then answers 409", async () => {
    const reservation = await insert("PENDING");
    const held = openHeld();
    const claiming = claimDue(held.database, { limit: 10_000, leaseMs: 60_000 });
    await held.inside;
    const answer = patch(reservation.id, { point_amount: 250 });
    await untilWaiting("select `id`, `user_id`");
    held.commit();
    expect((await claiming).map(({ id }) => id)).toContain(reservation.id);
    const problem = await expectProblem(await answer, 409, ["reservation is not PENDING"]);
    expect(problem).toMatchObject(await factsOf(reservation, "PROCESSING"));
    expect(await tell(reservation.id)).toMatchObject({ point_amount: 100, original_point_amount: null });
  });

  test("makes a claim pass over it while its transaction is open, and its new time holds", async () => {
    const { id } = await insert("PENDING");
    const held = openHeld();
    const answer = appOn(held.database).send(`/point/reservations/${id}`, {
      ...post({ execute_at: TO_COME }),
      method: "PATCH",
    });
    await held.inside;
    expect(await scanAndGrant()).not.toContain(id);
    held.commit();
    expect(await expectJson(await answer, 200)).toMatchObject({ execute_at: TO_COME });
    expect(await scanAndGrant()).not.toContain(id);
    expect(await tell(id)).toMatchObject({ status: "PENDING", next_scan_at: TO_COME });
  });

  test("answers 200 where the answer to its COMMIT was lost, and the row was claimed since", async () => {
    const { id } = await insert("PENDING", { executeAt: ORIGINAL });
    const database = openForgetful(() =>
      db.query("update point_reservations set status = 'PROCESSING' where id = ?", [id]),
    );
    const body = { point_amount: 250, execute_at: "2029-03-01T00:00:00.000Z" };
    const answer = await appOn(database).send(`/point/reservations/${id}`, {
      ...post(body),
      method: "PATCH",
    });
    expect(await expectJson(answer, 200)).toMatchObject({
      ...{ ...body, status: "PROCESSING", original_point_amount: 100, original_execute_at: TO_COME },
    });
  });

  test.each<[string, object]>([
    ["time", { point_amount: 100, execute_at: "2029-03-01T00:00:00Z" }],
    ["amount", { point_amount: 250, execute_at: TO_COME }],
  ])(
    "answers 409 where its COMMIT did not come through, and the row was claimed with its first %s",
    async (_, body) => {
      const { id } = await insert("PENDING", { executeAt: ORIGINAL });
      const before = await tell(id);
      const database = openForgetful(() =>
        db.query(
          `update point_reservations set status = 'PROCESSING', execute_at = ?, scan_at = execute_at, point_amount = 100,
         original_execute_at = null, original_point_amount = null where id = ?`,
          [ORIGINAL, id],
        ),
      );
      const init = { ...post(body), method: "PATCH" };
      const answer = await appOn(database).send(`/point/reservations/${id}`, init);
      await expectProblem(answer, 409, ["reservation is not PENDING"]);
      expect(await tell(id)).toEqual({ ...before, status: "PROCESSING", updated_at: expect.any(String) });
    },
  );

  test("changes what was on its way, and waits for its next attempt before it is looked at", async () => {
    const { id } = await insert("PROCESSING");
    // As the worker does after a failure.
    const database = openInterrupted(
      (isPatched) => isPatched === false,
      () => db.query("update point_reservations set status = 'PENDING' where id = ?", [id]),
    );
    const init = { ...post({ point_amount: 250 }), method: "PATCH" };
    const answer = await appOn(database).send(`/point/reservations/${id}`, init);
    expect(await expectJson(answer, 200)).toMatchObject({ status: "PENDING", point_amount: 250 });
  });
});

describe("POST /point/reservations/:id/retry", () => {
  async function now(): Promise<string> {
    const [row] = await db.query<{ now: Date }>("select now(3) now");
    return row?.now.toISOString() ?? "";
  }

  test("makes what is FAILED PENDING, due now and with all its attempts, and keeps why it failed", async () => {
    const { id } = await insert("FAILED");
    await db.query("update point_reservations set attempts = 10, last_error = '残高' where id = ?", [id]);
    const before = await tell(id);
    const earliest = await now();
    const story = (await expectJson(await retry(id.toUpperCase()), 200)) as Story;
    const latest = await now();
    expect(story).toEqual({
      ...before,
      status: "PENDING",
      attempts: 0,
      next_scan_at: expect.any(String),
      updated_at: expect.any(String),
    });
    expect(story).toEqual(await tell(id));
    expect(story.next_scan_at >= earliest && story.next_scan_at <= latest).toBe(true);
  });

  test("lets what failed be granted, once its reason is mended", async () => {
    const reservation = await insert("PROCESSING");
    const { id, userId } = reservation;
    await db.query("insert into point_root (user_id, point_num) values (?, ?)", [userId, String(MAX_BIGINT)]);
    expect(await grant([reservation])).toEqual({ failed: 1 });
    expect(await tell(id)).toMatchObject({ status: "FAILED", attempts: 1 });
    await db.query("update point_root set point_num = 0 where user_id = ?", [userId]);
    expect(await expectJson(await retry(id), 200)).toMatchObject({ status: "PENDING", attempts: 0 });
    expect(await scanAndGrant()).toContain(id);
    expect(await tell(id)).toMatchObject({ status: "DONE", attempts: 0, next_scan_at: null });
    expect(await points(reservation)).toBe(100n);
    expect(await ledgerOf(reservation)).toHaveLength(1);
  });

  test("grants once where the message of the first attempt comes again", async () => {
    const reservation = await insert("FAILED");
    expect((await retry(reservation.id)).status).toBe(200);
    expect(await grant([reservation])).toEqual({ not_due: 1 });
    expect(await scanAndGrant()).toContain(reservation.id);
    expect(await grant([reservation])).toEqual({ over: 1 });
    expect(await points(reservation)).toBe(100n);
  });

  test("brings no points before execute_at", async () => {
    const reservation = await insert("FAILED", { executeAt: new Date(TO_COME) });
    expect((await retry(reservation.id)).status).toBe(200);
    await scanAndGrant();
    await grant([reservation]);
    await expectNoPoints(reservation);
  });

  test.each(RESERVATION_STATUSES.filter((status) => status !== "FAILED"))(
    "answers 409 to what is %s, which stays",
    async (status) => {
      const reservation = await reservationThatIs(status);
      const before = await tell(reservation.id);
      const problem = await expectProblem(await retry(reservation.id), 409, ["reservation is not FAILED"]);
      expect(problem).toMatchObject(await factsOf(reservation, status));
      expect(problem.detail).toContain(`it is ${status}`);
      expect(await tell(reservation.id)).toEqual(before);
    },
  );

  test("answers 409 the second time: it is PENDING then", async () => {
    const reservation = await insert("FAILED");
    const answers = await Promise.all([retry(reservation.id), retry(reservation.id)]);
    expect(answers.map(({ status }) => status).toSorted()).toEqual([200, 409]);
  });

  test("answers 404 where there is none, and 400 to what is no id", async () => {
    await expectProblem(await retry(UNKNOWN), 404, ["reservation not found"]);
    for (const id of ["42", "%zz"]) {
      await expectProblem(await retry(id), 400, ["reservation id is invalid format"]);
    }
  });

  test("answers 200 where the answer to its COMMIT was lost, and the row was claimed since", async () => {
    const { id } = await insert("FAILED");
    const database = openForgetful(() =>
      db.query("update point_reservations set status = 'PROCESSING' where id = ?", [id]),
    );
    const answer = await retry(id, appOn(database));
    expect(await expectJson(answer, 200)).toMatchObject({ status: "PROCESSING", attempts: 0 });
  });

  test("tries again what was on its way, and has failed before it is looked at", async () => {
    const { id } = await insert("PROCESSING");
    const database = openInterrupted(
      (isRetried) => isRetried === false,
      () => db.query("update point_reservations set status = 'FAILED', scan_at = null where id = ?", [id]),
    );
    expect(await expectJson(await retry(id, appOn(database)), 200)).toMatchObject({ status: "PENDING" });
  });
});

describe("POST /point/reserve with a campaign", () => {
  test.each([["summer-2029"], ["A_z-09"], ["x".repeat(64)]])(
    "keeps it, and tells it: %s",
    async (campaign) => {
      const { body } = await reserve({ user_id: newUser(), campaign });
      expect(await tell(body.reservation_id)).toMatchObject({ campaign, point_amount: 100 });
    },
  );

  test.each<[string, object, object]>([
    ["another campaign", { campaign: "summer" }, { campaign: "winter" }],
    ["a campaign in other letters", { campaign: "summer" }, { campaign: "Summer" }],
    ["no campaign any more", { campaign: "summer" }, {}],
    ["a campaign all at once", {}, { campaign: "summer" }],
  ])("answers 422 to the same key with %s, and the first answer to the first", async (_, first, second) => {
    const fields = { user_id: newUser(), idempotency_key: uniqueName("key") };
    const reserved = await reserve({ ...fields, ...first });
    expect(reserved).toMatchObject({ status: 201, replayed: null });
    const story = await tell(reserved.body.reservation_id);
    const init = post(bodyOf({ ...fields, ...second }));
    await expectProblem(await app.send("/point/reserve", init), 422, [
      "idempotency key is used with other content",
    ]);
    expect(await tell(reserved.body.reservation_id)).toEqual(story);
    expect(await reserve({ ...fields, ...first })).toEqual({ ...reserved, replayed: "true" });
  });

  test.each<[string, unknown]>([
    ["an empty name", ""],
    ["a blank", "summer 2029"],
    ["65 characters", "x".repeat(65)],
    ["other letters", "夏"],
    ["a line end", "summer\n"],
    ["a colon", "a:b"],
    ["a number", 2029],
    ["null", null],
  ])("answers 400 to %s", async (_, campaign) => {
    const userId = newUser();
    const init = post(bodyOf({ user_id: userId, campaign }));
    await expectProblem(await app.send("/point/reserve", init), 400, ["campaign is invalid format"]);
    expect(await db.query("select id from point_reservations where user_id = ?", [userId])).toEqual([]);
  });
});

describe("POST /point/campaigns/:campaign/cancel", () => {
  let campaigns = 0;
  function newCampaign(): string {
    return `Campaign-${++campaigns}`;
  }

  /** One of each status. */
  function insertEach(campaign: string): Promise<Reservation[]> {
    return Promise.all(
      RESERVATION_STATUSES.map((status) => reservationThatIs(status, { userId: newUser(), campaign })),
    );
  }

  async function statusesOf(campaign: string | null): Promise<Record<string, number>> {
    const rows = await db.query<{ status: string; count: number }>(
      "select status, count(*) count from point_reservations where campaign <=> ? group by status",
      [campaign],
    );
    return Object.fromEntries(rows.map(({ status, count }) => [status, Number(count)]));
  }

  test("cancels what is PENDING and PROCESSING, counts how all of it has ended, and answers the same again", async () => {
    const campaign = newCampaign();
    await insertEach(campaign);
    await insertEach(campaign);
    for (let again = 0; again < 2; again++) {
      expect(await expectJson(await cancelCampaign(campaign), 200)).toEqual({
        ...{ campaign, cancelled: 6, granted: 2, failed: 2, open: 0 },
      });
    }
    expect(await statusesOf(campaign)).toEqual({ CANCELLED: 6, DONE: 2, FAILED: 2 });
  });

  test("answers 200 also where nothing was left to cancel", async () => {
    const [granted, failed] = [newCampaign(), newCampaign()];
    await reservationThatIs("DONE", { campaign: granted });
    await insert("FAILED", { campaign: failed });
    expect(await expectJson(await cancelCampaign(granted), 200)).toEqual({
      ...{ campaign: granted, cancelled: 0, granted: 1, failed: 0, open: 0 },
    });
    expect(await expectJson(await cancelCampaign(failed), 200)).toEqual({
      ...{ campaign: failed, cancelled: 0, granted: 0, failed: 1, open: 0 },
    });
  });

  test("keeps the points of what is on its way away, and leaves what was granted", async () => {
    const campaign = newCampaign();
    const reservations = await insertEach(campaign);
    const [pending, processing, done] = reservations as [Reservation, Reservation, Reservation];
    expect((await cancelCampaign(campaign)).status).toBe(200);
    expect(await scanAndGrant()).not.toContain(pending.id);
    expect(await grant([pending, processing, done])).toEqual({ over: 3 });
    await expectNoPoints(pending);
    await expectNoPoints(processing);
    expect(await points(done)).toBe(100n);
    expect(await ledgerOf(done)).toHaveLength(1);
    expect(await tell(processing.id)).toMatchObject({ status: "CANCELLED", next_scan_at: null });
  });

  test("leaves other campaigns, names in other letters, and what is of none", async () => {
    const campaign = newCampaign();
    const others = [campaign.toLowerCase(), `${campaign}-2`, campaign.slice(0, -1), null];
    await insert("PENDING", { campaign });
    const bystanders: Reservation[] = [];
    for (const other of others) bystanders.push(await insert("PENDING", { campaign: other }));
    const before = await Promise.all(bystanders.map(({ id }) => tell(id)));
    expect(await expectJson(await cancelCampaign(campaign), 200)).toEqual({
      ...{ campaign, cancelled: 1, granted: 0, failed: 0, open: 0 },
    });
    expect(await Promise.all(bystanders.map(({ id }) => tell(id)))).toEqual(before);
  });

  test("answers 404 to a campaign that is not there; case matters", async () => {
    const campaign = newCampaign();
    const { id } = await insert("PENDING", { campaign });
    for (const unknown of [campaign.toUpperCase(), `${campaign}-`, "y".repeat(64)]) {
      const { detail } = await expectProblem(await cancelCampaign(unknown), 404, ["campaign not found"]);
      expect(detail).toContain(unknown);
    }
    expect(await tell(id)).toMatchObject({ status: "PENDING" });
  });

  test.each([["summer%202029"], ["x".repeat(65)], ["a%2Fb"], ["%zz"], ["%E5%A4%8F"], ["a%00"], ["a:b"]])(
    "answers 400 to the campaign %s",
    async (campaign) => {
      await expectProblem(await cancelCampaign(campaign), 400, ["campaign is invalid format"]);
    },
  );

  test("counts a grant that commits first as granted, and cancels the others", async () => {
    const campaign = newCampaign();
    const [granted, ...others] = await Promise.all(
      Array.from({ length: 5 }, () => insert("PROCESSING", { campaign, userId: newUser() })),
    );
    const held = openHeld();
    const granting = grant([granted as Reservation], held.database);
    await held.inside;
    const answer = cancelCampaign(campaign);
    await untilWaiting(UPDATE);
    held.commit();
    expect(await granting).toEqual({ granted: 1 });
    const counts = { campaign, cancelled: 4, granted: 1, failed: 0, open: 0 };
    expect(await expectJson(await answer, 200)).toEqual(counts);
    expect(await points(granted as Reservation)).toBe(100n);
    expect(await grant(others)).toEqual({ over: 4 });
    expect(await expectJson(await cancelCampaign(campaign), 200)).toEqual(counts);
  });

  describe("of many reservations", () => {
    /** Of all statuses, and of users and times in no order. */
    async function insertMany(campaign: string, count: number): Promise<void> {
      const rows = Array.from({ length: count }, (_, index) => {
        const { id, idempotencyKey, executeAt } = reservationOf();
        const status = RESERVATION_STATUSES[index % 5];
        const scanAt = status === "PENDING" || status === "PROCESSING" ? new Date(TO_COME) : null;
        return [id, `Many${index % 997}`, 1, executeAt, idempotencyKey, campaign, status, scanAt];
      });
      await db.query(
        `insert into point_reservations
         (id, user_id, point_amount, execute_at, idempotency_key, campaign, status, scan_at) values ?`,
        [rows],
      );
    }

    // DONE without a ledger entry is no state of ours: the file's last test compares all sums.
    async function deleteAll(campaign: string) {
      await db.query("delete from point_reservations where campaign = ?", [campaign]);
    }

    async function countCancelled(campaign: string): Promise<number> {
      return (await statusesOf(campaign)).CANCELLED ?? 0;
    }

    test("cancels each of 12,500 once, 1,000 at most in one transaction", async () => {
      const campaign = newCampaign();
      await insertMany(campaign, 12_500);
      const seen = [await countCancelled(campaign)];
      const watched: Database = {
        ...db.database,
        async run(work, options) {
          const result = await db.database.run(work, options);
          seen.push(await countCancelled(campaign));
          return result;
        },
      };
      const counts = { campaign, cancelled: 7_500, granted: 2_500, failed: 2_500, open: 0 };
      expect(await expectJson(await cancelCampaign(campaign, appOn(watched)), 200)).toEqual(counts);
      const steps = seen.slice(1).map((count, index) => count - (seen[index] ?? 0));
      expect(Math.max(...steps)).toBe(1_000);
      expect(await statusesOf(campaign)).toEqual({ CANCELLED: 7_500, DONE: 2_500, FAILED: 2_500 });
      expect(await expectJson(await cancelCampaign(campaign), 200)).toEqual(counts);
      await deleteAll(campaign);
    }, 30_000);

    test("stops after 20 s, says what is open still, and the same again goes on", async () => {
      const campaign = newCampaign();
      await insertMany(campaign, 4_000);
      const clock = spyOn(performance, "now");
      const startedAt = performance.now();
      const slow = openInterrupted(
        (result) => Array.isArray(result) && result.length === 1_000,
        async () => clock.mockImplementation(() => startedAt + 60_000),
      );
      const response = await cancelCampaign(campaign, appOn(slow)).finally(() => clock.mockRestore());
      expect(await expectJson(response, 200)).toEqual({
        ...{ campaign, cancelled: 800 + 1_000, granted: 800, failed: 800, open: 600 },
      });
      expect(await statusesOf(campaign)).toMatchObject({ CANCELLED: 1_800 });
      expect(await expectJson(await cancelCampaign(campaign), 200)).toEqual({
        ...{ campaign, cancelled: 2_400, granted: 800, failed: 800, open: 0 },
      });
      await deleteAll(campaign);
    }, 30_000);
  });

  test("the third at once is 503 with Retry-After, and those that end give their places back", async () => {
    const names = [newCampaign(), newCampaign(), newCampaign()] as const;
    for (const campaign of names) await insert("PENDING", { campaign });
    const { promise: gate, resolve: open } = Promise.withResolvers<void>();
    let waiting = 0;
    const held = appOn({
      ...db.database,
      run(work, options) {
        waiting++;
        return gate.then(() => db.database.run(work, options));
      },
    });
    const answers = [cancelCampaign(names[0], held), cancelCampaign(names[1], held)];
    await until("two wait for MySQL", () => waiting === 2);
    const response = await cancelCampaign(names[2], held);
    expect(response.headers.get("retry-after")).toBe("1");
    await expectProblem(response, 503, ["service is unavailable"]);
    open();
    for (const answer of await Promise.all(answers)) {
      expect(await expectJson(answer, 200)).toMatchObject({ cancelled: 1, open: 0 });
    }
    for (let times = 0; times < 3; times++) {
      await expectProblem(await cancelCampaign(newCampaign(), held), 404, ["campaign not found"]);
    }
    expect(await expectJson(await cancelCampaign(names[2], held), 200)).toMatchObject({ cancelled: 1 });
  });
});

describe("where MySQL is away,", () => {
  test.each<[string, string, RequestInit]>([
    ["DELETE /point/reservations/:id", `/point/reservations/${UNKNOWN}`, { method: "DELETE" }],
    [
      "PATCH /point/reservations/:id",
      `/point/reservations/${UNKNOWN}`,
      { ...post({ point_amount: 250 }), method: "PATCH" },
    ],
    ["POST /point/reservations/:id/retry", `/point/reservations/${UNKNOWN}/retry`, { method: "POST" }],
    ["POST /point/campaigns/:campaign/cancel", "/point/campaigns/summer/cancel", { method: "POST" }],
  ])("%s is 503 with Retry-After", async (_, path, init) => {
    const [port] = await freePorts(1);
    const database = openDatabase(`mysql://u:p@127.0.0.1:${port}/d`, { acquireMs: 300 });
    const { send, log } = appOn(database);
    const response = await send(path, init).finally(() => database.close());
    expect(response.headers.get("retry-after")).toBe("1");
    const { request_id } = await expectProblem(response, 503, ["service is unavailable"]);
    expect(log.map(({ requestId }) => requestId)).toEqual([request_id]);
  });
});

test("ledger, balances and reservations agree after all of the above", async () => {
  const sums = await compareSums(db.database);
  expect(sums).toMatchObject({ usersApart: 0, reservationsApart: 0, early: 0, agree: true });
  expect(sums.ledger).toBeGreaterThan(1_000n);
});
