import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { v7 as uuidv7 } from "uuid";
import type { Database } from "../lib/database.ts";
import { compareSums } from "../lib/point_repository.ts";
import type { Reservation } from "../lib/reservation.ts";
import { claimDue } from "../lib/reservation_repository.ts";
import { appOn, bodyOf, expectProblem, post, type Send } from "./api_client.ts";
import {
  createTestDatabase,
  insertReservation,
  type RunningService,
  reservationOf,
  startService,
  type TestDatabase,
  uniqueName,
  until,
} from "./harness.ts";
import { insertReservations, processReservations } from "./pipeline.ts";

let db: TestDatabase;
let apis: RunningService[];
let app: ReturnType<typeof appOn>;
beforeAll(async () => {
  db = await createTestDatabase();
  app = appOn(db.database);
  apis = await Promise.all([1, 2].map(() => startService("api", { DATABASE_URL: db.url })));
}, 30_000);
afterAll(async () => {
  await Promise.all((apis ?? []).map((api) => api.kill("SIGKILL")));
  await db?.drop();
});

const ways: [string, Send][] = [
  ["app.handle()", (path, init) => app.send(path, init)],
  ["a real process", (path, init) => fetch(`${apis[0]?.url}${path}`, init)],
];

const MAX_BIGINT = 9_223_372_036_854_775_807n;
const CONFLICT = "idempotency key is used with other content";
const TOO_FEW = "points must be greater than 0";

let users = 0;
function newUser(): string {
  return `User${++users}`;
}

/** A PUT of JSON. */
function put(body: unknown, headers: Record<string, string> = {}): RequestInit {
  return { ...post(body, headers), method: "PUT" };
}

type Verb = "add" | "sub";

interface Change {
  user: string;
  points: number;
  key?: string;
}

function change(verb: Verb, { user, points, key }: Change, send: Send = app.send): Promise<Response> {
  return send(
    `/point/${verb}`,
    put({ user_id: user, point_num: points, ...(key && { idempotency_key: key }) }),
  );
}

/** Changes a balance, and expects the answer of one that was done, now or before. */
async function expectChanged(verb: Verb, fields: Change, { replayed = false } = {}): Promise<void> {
  const response = await change(verb, fields);
  expect(response.status).toBe(200);
  expect(response.headers.get("idempotent-replayed")).toBe(replayed ? "true" : null);
  const message = verb === "add" ? "point updated" : "point subtracted";
  expect(await response.json()).toEqual({ messages: [message] });
}

function setBalance(user: string, points: bigint) {
  return db.query("insert into point_root (user_id, point_num) values (?, ?)", [user, points.toString()]);
}

/** An entry of the ledger as of a time, past the balance. */
function insertEntry(user: string, points: number, createdAt: string) {
  const entry = {
    id: uuidv7(),
    idempotency_key: uniqueName("direct:key"),
    user_id: user,
    point_amount: points,
  };
  return db.query("insert into point_transactions set ?", [{ ...entry, created_at: new Date(createdAt) }]);
}

/** What there is of a user: the balance, and the ledger's amounts in their order. */
async function stateOf(user: string) {
  const [balance] = await db.query<{ points: string }>(
    "select cast(point_num as char) points from point_root where user_id = ?",
    [user],
  );
  const ledger = await db.query<{ points: number }>(
    "select point_amount points from point_transactions where user_id = ? order by id",
    [user],
  );
  return { balance: balance?.points, ledger: ledger.map(({ points }) => points) };
}

function grant(reservations: readonly Reservation[]) {
  return processReservations(
    reservations.map((reservation) => [reservation]),
    db,
  );
}

describe("GET /users/:user_id/points", () => {
  test("adds what is still to come, and when the next of it is due", async () => {
    const user = newUser();
    await db.query("insert into point_root (user_id, point_num, updated_at) values (?, 30, ?)", [
      user,
      new Date("2026-01-01T00:00:00.123Z"),
    ]);
    for (const [status, pointAmount, iso] of [
      ["PENDING", 1, "2029-01-03T00:00:00.000Z"],
      ["PROCESSING", 20, "2029-01-02T00:00:00.456Z"],
      ["PENDING", 300, "2029-01-04T00:00:00.000Z"],
      ["DONE", 4_000, "2029-01-01T00:00:00.000Z"],
      ["FAILED", 50_000, "2029-01-01T00:00:00.000Z"],
      ["CANCELLED", 600_000, "2029-01-01T00:00:00.000Z"],
    ] as const) {
      await insertReservation(db, { userId: user, status, pointAmount, executeAt: new Date(iso) });
    }
    await insertReservation(db, { userId: user.toLowerCase(), pointAmount: 7_000_000 });
    const response = await app.send(`/users/${user}/points`);
    expect(response.status).toBe(200);
    expect(await response.json()).toEqual({
      user_id: user,
      point_num: 30,
      reserved_point_num: 321,
      next_execute_at: "2029-01-02T00:00:00.456Z",
      updated_at: "2026-01-01T00:00:00.123Z",
    });
  });

  test.each(["PENDING", "PROCESSING"] as const)(
    "answers 200 with 0 points, and no time of a change, to a user of whom there is one %s only",
    async (status) => {
      const user = newUser();
      const { executeAt } = await insertReservation(db, { userId: user, status });
      expect(await (await app.send(`/users/${user}/points`)).json()).toEqual({
        user_id: user,
        point_num: 0,
        reserved_point_num: 100,
        next_execute_at: executeAt.toISOString(),
        updated_at: null,
      });
    },
  );

  test("answers 404 to a user whose reservations have all ended without points, and to nobody", async () => {
    const user = newUser();
    for (const status of ["FAILED", "CANCELLED"] as const)
      await insertReservation(db, { userId: user, status });
    for (const path of [
      `/users/${user}/points`,
      "/users/Nobody/points",
      "/users/Nobody/points?at=2029-01-01T00:00:00Z",
    ]) {
      await expectProblem(await app.send(path), 404, ["user not found"]);
    }
  });

  test("keeps all digits of both sums", async () => {
    const user = newUser();
    await setBalance(user, MAX_BIGINT);
    for (let row = 0; row < 5; row++)
      await insertReservation(db, { userId: user, pointAmount: 2_147_483_647 });
    const text = await (await app.send(`/users/${user}/points`)).text();
    // As text: JSON.parse() would round the digits.
    expect(text).toContain('"point_num":9223372036854775807,"reserved_point_num":10737418235,');
  });

  test("moves a grant from what is to come into the balance", async () => {
    const user = newUser();
    const reservation = await insertReservation(db, { userId: user, status: "PROCESSING", pointAmount: 70 });
    await insertReservation(db, { userId: user, pointAmount: 5 });
    await grant([reservation]);
    const points = (await (await app.send(`/users/${user}/points`)).json()) as Record<string, unknown>;
    expect(points).toMatchObject({ point_num: 70, reserved_point_num: 5 });
    expect(points.updated_at).toMatch(/^\d{4}-.*Z$/);
  });
});

describe("GET /users/:user_id/points?at=", () => {
  const FIRST = "2026-03-01T00:00:00.250Z";
  const SECOND = "2026-03-02T00:00:00.000Z";
  const THIRD = "2026-03-02T00:00:00.001Z";
  const user = "Traveller";
  beforeAll(async () => {
    await insertEntry(user, 100, FIRST);
    await insertEntry(user, -30, SECOND);
    await insertEntry(user, 5, THIRD);
    await insertEntry(user.toLowerCase(), 1_000, FIRST);
    await setBalance(user, 75n);
  });

  async function at(time: string, id = user) {
    const response = await app.send(`/users/${id}/points?at=${encodeURIComponent(time)}`);
    return { status: response.status, body: await response.json() };
  }

  test.each<[string, number, string | null]>([
    ["1970-01-01T00:00:00Z", 0, null],
    ["2026-03-01T00:00:00.249Z", 0, null],
    [FIRST, 100, FIRST],
    ["2026-03-01T23:59:59.999Z", 100, FIRST],
    [SECOND, 70, SECOND],
    [THIRD, 75, THIRD],
    ["9999-12-31T23:59:59.999Z", 75, THIRD],
    // The same moments, as a clock in another place shows them.
    ["2026-03-01T09:00:00.25+09:00", 100, FIRST],
    ["2026-03-01T09:00:00.249+09:00", 0, null],
    ["2026-03-01T23:00:00-01:00", 70, SECOND],
    ["2026-03-01t22:59:59.999-01:00", 100, FIRST],
  ])("at %s is %d, changed last at %s", async (time, points, updatedAt) => {
    const answer = {
      user_id: user,
      point_num: points,
      at: new Date(time).toISOString(),
      updated_at: updatedAt,
    };
    expect(await at(time)).toEqual({ status: 200, body: answer });
  });

  test("takes an offset whose + is written %2B, and refuses one whose + has become a blank", async () => {
    const path = `/users/${user}/points?at=2026-03-01T09:00:00.250`;
    expect(await (await app.send(`${path}%2B09:00`)).json()).toMatchObject({ point_num: 100, at: FIRST });
    await expectProblem(await app.send(`${path}+09:00`), 400, [
      "at must be an RFC 3339 time with seconds and offset",
    ]);
  });

  test("is 0 for a user who has only points to come", async () => {
    const id = newUser();
    await insertReservation(db, { userId: id });
    expect((await at(SECOND, id)).body).toEqual({ user_id: id, point_num: 0, at: SECOND, updated_at: null });
  });

  test("counts what is added and subtracted now from now on", async () => {
    const id = newUser();
    await expectChanged("add", { user: id, points: 50 });
    await expectChanged("sub", { user: id, points: 20 });
    const [last] = await db.query<{ at: Date }>(
      "select max(created_at) at from point_transactions where user_id = ?",
      [id],
    );
    const now = last?.at ?? new Date(0);
    expect((await at(now.toISOString(), id)).body).toMatchObject({ point_num: 30 });
    expect((await at(new Date(now.getTime() - 60_000).toISOString(), id)).body).toMatchObject({
      point_num: 0,
    });
  });

  test.each([
    ["at=", "at must be an RFC 3339 time with seconds and offset"],
    ["at", "at must be an RFC 3339 time with seconds and offset"],
    ["at=2026-03-01", "at must be an RFC 3339 time with seconds and offset"],
    ["at=2026-03-01T00:00:00", "at must be an RFC 3339 time with seconds and offset"],
    ["at=2026-03-01T00:00:00.1234Z", "at must be an RFC 3339 time with seconds and offset"],
    ["at=1772323200000", "at must be an RFC 3339 time with seconds and offset"],
    ["at=now", "at must be an RFC 3339 time with seconds and offset"],
    ["at=10000-01-01T00:00:00Z", "at must be an RFC 3339 time with seconds and offset"],
    ["at=2026-02-29T00:00:00Z", "at must be a date that exists"],
    ["at=2026-03-01T24:00:00Z", "at must be a date that exists"],
    ["at=1969-12-31T23:59:59.999Z", "at must be from 1970 to 9999"],
    ["at=1970-01-01T00:00:00%2B00:01", "at must be from 1970 to 9999"],
    ["at=9999-12-31T23:59:59-00:01", "at must be from 1970 to 9999"],
    ["AT=2026-03-01T00:00:00Z", 'unknown field "AT"'],
    ["limit=5", 'unknown field "limit"'],
    ["constructor=1", 'unknown field "constructor"'],
    ["__proto__=1", 'unknown field "__proto__"'],
    ["at=2026-03-01T00:00:00Z&at=2026-03-01T00:00:00Z", "a parameter is given twice"],
    ["x=1&x=2", "a parameter is given twice"],
  ])("answers 400 to ?%s", async (query, sentence) => {
    for (const [, send] of ways) {
      await expectProblem(await send(`/users/${user}/points?${query}`), 400, [sentence]);
    }
  });
});

describe("PUT /point/add", () => {
  test("makes a balance where there is none, adds to one that is there, and writes the ledger", async () => {
    const user = newUser();
    await expectChanged("add", { user, points: 100 });
    expect(await stateOf(user)).toEqual({ balance: "100", ledger: [100] });
    await expectChanged("add", { user, points: 2_147_483_647 });
    expect(await stateOf(user)).toEqual({ balance: "2147483747", ledger: [100, 2_147_483_647] });
  });

  test("fills a balance up to the last point of a BIGINT, and refuses one more", async () => {
    const user = newUser();
    await setBalance(user, MAX_BIGINT - 100n);
    const before = await stateOf(user);
    const { detail } = await expectProblem(await change("add", { user, points: 101 }), 400, [
      "points must be at most 9223372036854775807",
    ]);
    expect(detail).toContain(`the balance of ${user} would be more than 9223372036854775807`);
    expect(await stateOf(user)).toEqual(before);
    await expectChanged("add", { user, points: 100 });
    expect(await stateOf(user)).toEqual({ balance: String(MAX_BIGINT), ledger: [100] });
  });

  test("takes users whose names differ only in case for two", async () => {
    const user = newUser();
    await Promise.all([
      expectChanged("add", { user, points: 1 }),
      expectChanged("add", { user: user.toLowerCase(), points: 20 }),
    ]);
    expect((await stateOf(user)).balance).toBe("1");
    expect((await stateOf(user.toLowerCase())).balance).toBe("20");
  });
});

describe("PUT /point/sub", () => {
  test("takes points by a negative entry of the ledger, down to exactly 0", async () => {
    const user = newUser();
    await expectChanged("add", { user, points: 100 });
    await expectChanged("sub", { user, points: 30 });
    await expectChanged("sub", { user, points: 70 });
    expect(await stateOf(user)).toEqual({ balance: "0", ledger: [100, -30, -70] });
  });

  test("answers 400 in the original's sentence where too few are there, and changes nothing", async () => {
    const user = newUser();
    await expectChanged("add", { user, points: 100 });
    for (const points of [101, 2_147_483_647]) {
      const { detail } = await expectProblem(await change("sub", { user, points }), 400, [TOO_FEW]);
      expect(detail).toBe(`Cannot subtract ${points} points: the balance of ${user} would fall below 0`);
    }
    expect(await stateOf(user)).toEqual({ balance: "100", ledger: [100] });
    await expectChanged("sub", { user, points: 100 });
    await expectProblem(await change("sub", { user, points: 1 }), 400, [TOO_FEW]);
    expect(await stateOf(user)).toEqual({ balance: "0", ledger: [100, -100] });
  });

  test("answers 400 to an unknown user, also one who has points to come, and makes no balance", async () => {
    const user = newUser();
    await insertReservation(db, { userId: user });
    const { detail } = await expectProblem(await change("sub", { user, points: 1 }), 400, ["user not found"]);
    expect(detail).toContain(user);
    expect(await stateOf(user)).toEqual({ balance: undefined, ledger: [] });
  });

  test("takes from a balance beyond 2^53 without losing a digit", async () => {
    const user = newUser();
    await setBalance(user, MAX_BIGINT);
    await expectChanged("sub", { user, points: 2_147_483_647 });
    expect(await stateOf(user)).toEqual({
      balance: String(MAX_BIGINT - 2_147_483_647n),
      ledger: [-2_147_483_647],
    });
  });
});

describe.each<[Verb, number]>([
  ["add", 110],
  ["sub", 90],
])("PUT /point/%s idempotency", (verb, after) => {
  const other: Verb = verb === "add" ? "sub" : "add";
  const signed = verb === "add" ? 10 : -10;

  async function newUserWith100(): Promise<string> {
    const user = newUser();
    await expectChanged("add", { user, points: 100 });
    return user;
  }

  test("counts the same key with the same content once, and says that it is a replay", async () => {
    const user = await newUserWith100();
    const fields = { user, points: 10, key: uniqueName("key") };
    await expectChanged(verb, fields);
    for (let again = 0; again < 2; again++) await expectChanged(verb, fields, { replayed: true });
    expect(await stateOf(user)).toEqual({ balance: String(after), ledger: [100, signed] });
  });

  test("answers 422 to the same key with another amount, another user or the other direction", async () => {
    const [user, stranger] = [await newUserWith100(), await newUserWith100()];
    const key = uniqueName("key");
    await expectChanged(verb, { user, points: 10, key });
    await expectProblem(await change(verb, { user, points: 11, key }), 422, [CONFLICT]);
    await expectProblem(await change(verb, { user: stranger, points: 10, key }), 422, [CONFLICT]);
    await expectProblem(await change(other, { user, points: 10, key }), 422, [CONFLICT]);
    // One who has no balance, and more than there is: the key is looked at first.
    await expectProblem(await change("sub", { user: newUser(), points: 10, key }), 422, [CONFLICT]);
    await expectProblem(await change("sub", { user, points: 1_000, key }), 422, [CONFLICT]);
    expect(await stateOf(user)).toEqual({ balance: String(after), ledger: [100, signed] });
    expect(await stateOf(stranger)).toEqual({ balance: "100", ledger: [100] });
  });

  test("takes the key from the header as well, and takes it for the same as the body's", async () => {
    const user = await newUserWith100();
    const key = uniqueName("key");
    const body = { user_id: user, point_num: 10 };
    const send = async (withKey: unknown, headers: Record<string, string>) => {
      const response = await app.send(`/point/${verb}`, put(withKey, headers));
      return [response.status, response.headers.get("idempotent-replayed")];
    };
    expect(await send(body, { "idempotency-key": key })).toEqual([200, null]);
    expect(await send({ ...body, idempotency_key: key }, {})).toEqual([200, "true"]);
    expect(await send({ ...body, idempotency_key: key }, { "Idempotency-Key": key })).toEqual([200, "true"]);
    expect(await stateOf(user)).toEqual({ balance: String(after), ledger: [100, signed] });
  });

  test("without a key counts each time", async () => {
    const user = await newUserWith100();
    for (let time = 0; time < 3; time++) await expectChanged(verb, { user, points: 10 });
    expect((await stateOf(user)).ledger).toEqual([100, signed, signed, signed]);
  });

  test("gives twenty requests with one key at the same moment, to two processes, one change", async () => {
    const user = await newUserWith100();
    const key = uniqueName("key");
    const answers = await Promise.all(
      Array.from({ length: 20 }, async (_, index) => {
        const send: Send = (path, init) => fetch(`${apis[index % 2]?.url}${path}`, init);
        const response = await change(verb, { user, points: 10, key }, send);
        return [response.status, response.headers.get("idempotent-replayed")];
      }),
    );
    expect(answers.filter(([, replayed]) => replayed === null)).toEqual([[200, null]]);
    expect(answers.filter(([, replayed]) => replayed === "true")).toEqual(Array(19).fill([200, "true"]));
    expect(await stateOf(user)).toEqual({ balance: String(after), ledger: [100, signed] });
  });
});

describe("PUT /point/add and /point/sub:", () => {
  test("a subtraction is a replay also where the balance has fallen below its points since", async () => {
    const user = newUser();
    const fields = { user, points: 60, key: uniqueName("key") };
    await expectChanged("add", { user, points: 100 });
    await expectChanged("sub", fields);
    await expectChanged("sub", { user, points: 40 });
    await expectChanged("sub", fields, { replayed: true });
    expect(await stateOf(user)).toEqual({ balance: "0", ledger: [100, -60, -40] });
  });

  test("an addition is a replay also where the balance could not take it any more", async () => {
    const user = newUser();
    const fields = { user, points: 60, key: uniqueName("key") };
    await expectChanged("add", fields);
    await db.query("update point_root set point_num = ? where user_id = ?", [MAX_BIGINT.toString(), user]);
    await expectChanged("add", fields, { replayed: true });
  });

  test("what was refused uses up no key: the same again works once it can", async () => {
    const user = newUser();
    const fields = { user, points: 60, key: uniqueName("key") };
    await expectProblem(await change("sub", fields), 400, ["user not found"]);
    await expectChanged("add", { user, points: 59 });
    await expectProblem(await change("sub", fields), 400, [TOO_FEW]);
    await expectChanged("add", { user, points: 1 });
    await expectChanged("sub", fields);
    await expectChanged("sub", fields, { replayed: true });
    expect(await stateOf(user)).toEqual({ balance: "0", ledger: [59, 1, -60] });
  });

  test.each(["before", "after"])(
    "a key is another than a reservation's: both count where the addition comes %s the grant",
    async (order) => {
      const user = newUser();
      const key = uniqueName("key");
      const body = bodyOf({ user_id: user, idempotency_key: key, execute_at: "2026-01-01T00:00:00Z" });
      expect((await app.send("/point/reserve", post(body))).status).toBe(201);
      const storyOf = async (id: string) => (await app.send(`/point/reservations/${id}`)).json();
      const add = () => expectChanged("add", { user, points: 100, key });
      const reservations = await claimDue(db.database, { limit: 1_000, leaseMs: 60_000 });
      const reservation = reservations.find(({ idempotencyKey }) => idempotencyKey === key) as Reservation;
      if (order === "before") {
        await add();
        expect(await storyOf(reservation.id)).toMatchObject({ status: "PROCESSING", granted_at: null });
      }
      expect(await grant([reservation])).toEqual(["ack"]);
      if (order === "after") await add();
      expect(await storyOf(reservation.id)).toMatchObject({
        status: "DONE",
        last_error: null,
        granted_at: expect.any(String),
      });
      expect(await stateOf(user)).toEqual({ balance: "200", ledger: [100, 100] });
      await expectChanged("add", { user, points: 100, key }, { replayed: true });
      const again = await app.send("/point/reserve", post(body));
      expect([again.status, again.headers.get("idempotent-replayed")]).toEqual([201, "true"]);
    },
  );
});

describe.each<[Verb]>([["add"], ["sub"]])("PUT /point/%s", (verb) => {
  const path = `/point/${verb}`;
  const valid = { user_id: "TestUser01", point_num: 1 };

  test.each<[string, unknown, Record<string, string>, string[]]>([
    [
      "all broken rules at once",
      { user_id: "a b", point_num: 0, idempotency_key: "?", execute_at: "2029-01-01T00:00:00Z" },
      {},
      [
        "user id is invalid format",
        "point num must be greater than 0",
        "idempotency key is invalid format",
        'unknown field "execute_at"',
      ],
    ],
    ["nothing", {}, {}, ["user id is invalid format", "point num must be greater than 0"]],
    ["a negative amount", { ...valid, point_num: -1 }, {}, ["point num must be greater than 0"]],
    ["a fraction", { ...valid, point_num: 1.5 }, {}, ["point num must be an integer"]],
    ["a text", { ...valid, point_num: "1" }, {}, ["point num must be an integer"]],
    ["null", { ...valid, point_num: null }, {}, ["point num must be an integer"]],
    [
      "one more than an INT",
      { ...valid, point_num: 2_147_483_648 },
      {},
      ["point num must be at most 2147483647"],
    ],
    [
      "the name of the other routes' field",
      { user_id: "a", point_amount: 1 },
      {},
      ["point num must be greater than 0", 'unknown field "point_amount"'],
    ],
    [
      "a key of the ledger",
      { ...valid, idempotency_key: "direct:a" },
      {},
      ["idempotency key is invalid format"],
    ],
    ["a bad key in the header", valid, { "idempotency-key": "a b" }, ["idempotency key is invalid format"]],
    [
      "two different keys",
      { ...valid, idempotency_key: "a" },
      { "idempotency-key": "b" },
      ["idempotency key differs between header and body"],
    ],
    ["an array", [valid], {}, ["body must be a JSON object"]],
    ["the JSON null", null, {}, ["body must be a JSON object"]],
    ["no JSON", "user_id=a", {}, ["body must be JSON"]],
    ["half a JSON", '{"user_id":"a"', {}, ["body must be JSON"]],
    ["no body", "", {}, ["body must be JSON"]],
  ])("answers 400 to %s", async (_, body, headers, errors) => {
    for (const [, send] of ways) await expectProblem(await send(path, put(body, headers)), 400, errors);
  });

  test.each<[string, Record<string, string>]>([
    ["none", {}],
    ["a form", { "content-type": "application/x-www-form-urlencoded" }],
    ["another charset", { "content-type": "application/json; charset=utf-16" }],
    ["compression", { "content-type": "application/json", "content-encoding": "gzip" }],
  ])("answers 415 to the content type %s", async (_, headers) => {
    for (const [, send] of ways) {
      // Bytes: for a text, Request would add a content type by itself.
      const init = { method: "PUT", body: Buffer.from(JSON.stringify(valid)), headers };
      await expectProblem(await send(path, init), 415, ["content type must be application/json"]);
    }
  });

  test("takes a body of 64 KiB, and answers 413 to one byte more", async () => {
    const user = newUser();
    await setBalance(user, 10n);
    const text = JSON.stringify({ user_id: user, point_num: 1 });
    for (const [, send] of ways) {
      expect((await send(path, put(text.padEnd(65_536)))).status).toBe(200);
      await expectProblem(await send(path, put(text.padEnd(65_537))), 413, ["body is too large"]);
    }
    expect((await stateOf(user)).balance).toBe(verb === "add" ? "12" : "8");
  });
});

describe("PUT /point/add and /point/sub under load:", () => {
  test("what is refused affects only itself, also where all go as one", async () => {
    const [rich, poor, full, taken] = [newUser(), newUser(), newUser(), newUser()];
    const key = uniqueName("key");
    await setBalance(rich, 100n);
    await setBalance(poor, 5n);
    await setBalance(full, MAX_BIGINT);
    await expectChanged("add", { user: taken, points: 3, key });
    const batches: number[] = [];
    const { promise: gate, resolve: open } = Promise.withResolvers<void>();
    const counting: Database = {
      ...db.database,
      async transaction(work) {
        // The first is held up: those that come meanwhile gather.
        if (batches.push(1) === 1) await gate;
        return db.database.transaction(work);
      },
    };
    const { send: sendCounted } = appOn(counting);
    let read = 0;
    /** Sends a body that counts when it is read: only then does its change wait for the batch. */
    const send: Send = (path, init) => {
      const bytes = Buffer.from(String(init?.body));
      const source = {
        pull(controller: ReadableStreamDefaultController<Uint8Array>) {
          controller.enqueue(bytes);
          controller.close();
          read++;
        },
      };
      return sendCounted(path, { ...init, body: new ReadableStream(source, { highWaterMark: 0 }) });
    };
    const first = change("add", { user: rich, points: 1 }, send);
    await until("the first is under way", () => batches.length === 1);
    const changes: [Verb, Change][] = [
      ["sub", { user: poor, points: 6 }],
      ["sub", { user: "Nobody", points: 1 }],
      ["add", { user: full, points: 1 }],
      ["add", { user: taken, points: 4, key }],
      ["add", { user: taken, points: 3, key }],
      ["sub", { user: poor, points: 5 }],
      ["sub", { user: rich, points: 100 }],
      ["sub", { user: full, points: 1 }],
      ["add", { user: "Somebody", points: 1 }],
    ];
    const answers = [first, ...changes.map(([verb, fields]) => change(verb, fields, send))];
    await until("all bodies are read", () => read === answers.length);
    open();
    const statuses = await Promise.all(
      (await Promise.all(answers)).map(async (response) => {
        const { errors } = (await response.json()) as { errors?: string[] };
        return [response.status, errors?.[0] ?? response.headers.get("idempotent-replayed")];
      }),
    );
    expect(statuses).toEqual([
      [200, null],
      [400, TOO_FEW],
      [400, "user not found"],
      [400, "points must be at most 9223372036854775807"],
      [422, CONFLICT],
      [200, "true"],
      [200, null],
      [200, null],
      [200, null],
      [200, null],
    ]);
    expect(batches).toHaveLength(2);
    expect(await Promise.all([rich, poor, full, taken, "Nobody", "Somebody"].map(stateOf))).toEqual([
      { balance: "1", ledger: [1, -100] },
      { balance: "0", ledger: [-5] },
      { balance: String(MAX_BIGINT - 1n), ledger: [-1] },
      { balance: "3", ledger: [3] },
      { balance: undefined, ledger: [] },
      { balance: "1", ledger: [1] },
    ]);
  });

  test("a balance that somebody holds holds up its own changes only, and these until it is let go", async () => {
    const [held, free, stranger] = [newUser(), newUser(), newUser()];
    await setBalance(held, 10n);
    await setBalance(free, 10n);
    let waiting: Promise<Response>[] = [];
    await db.database.transaction(async ({ select }) => {
      await select("select point_num from point_root where user_id = ? for update", [held]);
      waiting = [
        change("sub", { user: held, points: 4 }, app.send),
        change("sub", { user: held, points: 7 }, app.send),
      ];
      // Not only those that come before them, nor only those that have a balance.
      for (let round = 0; round < 5; round++) {
        expect((await change("sub", { user: free, points: 1 }, app.send)).status).toBe(200);
        expect((await change("add", { user: stranger, points: 1 }, app.send)).status).toBe(200);
      }
      expect(await Promise.race([...waiting, "nobody"])).toBe("nobody");
    });
    const statuses = (await Promise.all(waiting)).map(({ status }) => status);
    expect(statuses).toEqual([200, 400]);
    expect(await stateOf(held)).toEqual({ balance: "6", ledger: [-4] });
    expect(await stateOf(free)).toEqual({ balance: "5", ledger: [-1, -1, -1, -1, -1] });
  });

  test("1,000 at once on one user, through two processes and beside grants, end at the exact sum (fault 8)", async () => {
    const fresh = await createTestDatabase();
    const services = await Promise.all([1, 2].map(() => startService("api", { DATABASE_URL: fresh.url })));
    try {
      const user = "Busy";
      const reservations = Array.from({ length: 400 }, (_, index) =>
        reservationOf({ userId: user, pointAmount: 1 + (index % 7) }),
      );
      await insertReservations(fresh, { reservations, status: "PROCESSING" });
      const granting = (async () => {
        for (let at = 0; at < reservations.length; at += 20) {
          expect(await processReservations([reservations.slice(at, at + 20)], fresh)).toEqual(["ack"]);
        }
      })();
      const changing = Array.from({ length: 1_000 }, async (_, index) => {
        const verb: Verb = index % 5 < 2 ? "sub" : "add";
        const points = 1 + (index % 11);
        const key = uniqueName("key");
        // Every fourth comes to both processes at the same moment: only one of the two may count.
        const targets = index % 4 === 0 ? services : services.slice(index % 2, (index % 2) + 1);
        const answers = await Promise.all(
          targets.map(({ url }) =>
            change(verb, { user, points, key }, (path, init) => fetch(`${url}${path}`, init)),
          ),
        );
        const changed = answers.filter(
          ({ status, headers }) => status === 200 && !headers.has("idempotent-replayed"),
        );
        const statuses = answers.map(({ status }) => status);
        return { signed: verb === "add" ? points : -points, times: changed.length, statuses };
      });
      const outcomes = await Promise.all(changing);
      await granting;

      expect(Math.max(...outcomes.map(({ times }) => times))).toBe(1);
      for (const { signed, times, statuses } of outcomes) {
        // Only a subtraction may be refused: at some moment there may be too few.
        if (times === 0) expect([signed < 0, new Set(statuses)]).toEqual([true, new Set([400])]);
        else expect(statuses.every((status) => status === 200 || (signed < 0 && status === 400))).toBe(true);
      }
      const granted = reservations.reduce((sum, { pointAmount }) => sum + pointAmount, 0);
      const direct = outcomes.reduce((sum, { signed, times }) => sum + signed * times, 0);
      const [balance] = await fresh.query<{ points: string }>(
        "select cast(point_num as char) points from point_root where user_id = ?",
        [user],
      );
      expect(balance?.points).toBe(String(granted + direct));
      expect(await compareSums(fresh.database)).toEqual({
        ...{ reservations: BigInt(granted), direct: BigInt(direct) },
        ...{ ledger: BigInt(granted + direct), balances: BigInt(granted + direct) },
        ...{ usersApart: 0, reservationsApart: 0, early: 0, agree: true },
      });
      const [entries] = await fresh.query<{ n: number }>("select count(*) n from point_transactions");
      expect(Number(entries?.n)).toBe(400 + outcomes.filter(({ times }) => times === 1).length);
    } finally {
      await Promise.all(services.map((service) => service.kill("SIGKILL")));
      await fresh.drop();
    }
  }, 60_000);
});

describe("GET /point/confirm", () => {
  test.each([["0"], ["130"], ["9223372036854775807"]])(
    "tells a balance of %s in the original's words",
    async (points) => {
      const user = newUser();
      await setBalance(user, BigInt(points));
      for (const [, send] of ways) {
        const response = await send(`/point/confirm?user_id=${user}`);
        expect(response.status).toBe(200);
        expect(await response.json()).toEqual({ messages: [`userID: ${user}`, `pointNum: ${points}`] });
      }
    },
  );

  test("answers 400 in the original's sentence to a user without a balance, also one with points to come", async () => {
    const user = newUser();
    await insertReservation(db, { userId: user });
    for (const id of [user, "Nobody"]) {
      const response = await app.send(`/point/confirm?user_id=${id}`);
      const { detail } = await expectProblem(response, 400, ["user not found"]);
      expect(detail).toContain(id);
    }
  });

  test("minds the case of a user", async () => {
    const user = newUser();
    await setBalance(user, 1n);
    const path = `/point/confirm?user_id=${user.toUpperCase()}`;
    await expectProblem(await app.send(path), 400, ["user not found"]);
  });

  test.each<[string, string[]]>([
    ["", ["user id is invalid format"]],
    ["?user_id=", ["user id is invalid format"]],
    ["?user_id=a%20b", ["user id is invalid format"]],
    [`?user_id=${"x".repeat(21)}`, ["user id is invalid format"]],
    ["?user_id=a&user_id=a", ["a parameter is given twice"]],
    ["?user_id=a&at=2026-01-01T00:00:00Z", ['unknown field "at"']],
    ["?userID=a", ["user id is invalid format", 'unknown field "userID"']],
  ])("answers 400 to the query %p", async (query, errors) => {
    for (const [, send] of ways) await expectProblem(await send(`/point/confirm${query}`), 400, errors);
  });
});
