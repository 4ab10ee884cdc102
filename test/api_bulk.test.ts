import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { type Connection, type Database, DatabaseError, openDatabase } from "../lib/database.ts";
import { freePorts } from "../lib/dev/servers.ts";
import { findBalance } from "../lib/point_repository.ts";
import { newReservation } from "../lib/reservation.ts";
import { claimDue, createReservations } from "../lib/reservation_repository.ts";
import { appOn, bodyOf, expectProblem, post, type Send } from "./api_client.ts";
import {
  createTestDatabase,
  type RunningService,
  startService,
  type TestDatabase,
  uniqueName,
  until,
} from "./harness.ts";
import { openAnother, processReservations } from "./pipeline.ts";

let db: TestDatabase;
let api: RunningService;
let app: ReturnType<typeof appOn>;
beforeAll(async () => {
  db = await createTestDatabase();
  app = appOn(db.database);
  api = await startService("api", { DATABASE_URL: db.url });
}, 30_000);
afterAll(async () => {
  await api?.kill("SIGKILL");
  await db?.drop();
}, 30_000);

const PATH = "/point/reserve/bulk";
const MODES = ["atomic", "each"] as const;
type Mode = (typeof MODES)[number];
const CONFLICT = "idempotency key is used with other content";
const TIME = "2029-02-22T13:59:00.000Z";
const MAX_BYTES = 8 * 1024 * 1024;

const ways: [string, Send][] = [
  ["app.handle()", (path, init) => app.send(path, init)],
  ["a real process", (path, init) => fetch(`${api.url}${path}`, init)],
];

type Row = Record<string, unknown>;
interface Result {
  result: "created" | "replayed" | "refused";
  reservation_id: string;
  errors?: string[];
}
interface BulkOptions {
  headers?: Record<string, string>;
  send?: Send;
}

let users = 0;
/** A user of one's own, so that what a test has inserted can be told from the rest. */
function newUser(): string {
  return `Bulk${++users}`;
}

/** Rows of one user, told apart by their amounts: 1, 2, 3 and so on. */
function rowsOf(userId: string, count: number, fieldsOf: (index: number) => Row = () => ({})): Row[] {
  return Array.from({ length: count }, (_, index) =>
    bodyOf({ user_id: userId, point_amount: index + 1, ...fieldsOf(index) }),
  );
}

/** Rows that each have a key of their own. */
function keyedRowsOf(userId: string, count: number): Row[] {
  return rowsOf(userId, count, (index) => ({ idempotency_key: `${userId}-${index}` }));
}

async function bulk(
  mode: Mode,
  reservations: unknown[],
  { headers = {}, send = app.send }: BulkOptions = {},
) {
  return send(PATH, post({ mode, reservations }, headers));
}

/** The results of a request that is taken, one for each row. */
async function resultsOf(response: Response, mode: Mode): Promise<Result[]> {
  expect(response.status).toBe(mode === "atomic" ? 201 : 200);
  expect(response.headers.get("content-type")).toStartWith("application/json");
  const { results } = (await response.json()) as { results: Result[] };
  return results;
}

async function reserveBulk(mode: Mode, reservations: unknown[], options?: BulkOptions): Promise<Result[]> {
  const results = await resultsOf(await bulk(mode, reservations, options), mode);
  expect(results).toHaveLength(reservations.length);
  return results;
}

async function reserve(row: Row, headers: Record<string, string> = {}) {
  const response = await app.send("/point/reserve", post(row, headers));
  const { reservation_id } = (await response.json()) as { reservation_id: string };
  return { id: reservation_id, replayed: response.headers.get("idempotent-replayed") };
}

function idsOf(results: readonly Result[]): string[] {
  return results.map(({ reservation_id }) => reservation_id);
}

/** How many results of which kind. */
function kindsOf(results: readonly Result[]): Record<string, number> {
  return Object.fromEntries(
    [...new Set(results.map(({ result }) => result))].map((kind) => [
      kind,
      results.filter(({ result }) => result === kind).length,
    ]),
  );
}

/** What is reserved for a user, by amount. */
async function storedOf(userId: string) {
  return db.query<{ id: string; point_amount: number; idempotency_key: string; campaign: string | null }>(
    `select id, point_amount, idempotency_key, campaign from point_reservations
     where user_id = ? order by point_amount, idempotency_key`,
    [userId],
  );
}

/** How many reservations there are, of all users. */
async function countAll(): Promise<number> {
  const [row] = await db.query<{ count: number }>("select count(*) count from point_reservations");
  return Number(row?.count);
}

/** Every row is reserved once, under the id that its result names. */
async function expectStored(userId: string, rows: readonly Row[], results: readonly Result[]) {
  const stored = await storedOf(userId);
  expect(stored.map(({ id, point_amount }) => ({ id, point_amount }))).toEqual(
    rows.map(({ point_amount }, index) => ({
      id: results[index]?.reservation_id ?? "",
      point_amount: point_amount as number,
    })),
  );
}

describe.each(MODES)("POST /point/reserve/bulk, %s,", (mode) => {
  test("reserves each row, and answers for each in their order", async () => {
    const userId = newUser();
    const rows = [
      bodyOf({ user_id: userId, point_amount: 7, idempotency_key: `${userId}-a`, campaign: "summer" }),
      bodyOf({ user_id: userId, point_amount: 5, execute_at: "2029-03-01T00:00:00.250+09:00" }),
      bodyOf({ user_id: `${userId}x`, point_amount: 6 }),
    ];
    const results = await reserveBulk(mode, rows);
    expect(results).toEqual(
      [TIME, "2029-02-28T15:00:00.250Z", TIME].map((execute_at) => ({
        ...{ result: "created", reservation_id: expect.any(String), status: "PENDING", execute_at },
      })) as never,
    );
    const stories = await Promise.all(
      idsOf(results).map(async (id) => (await app.send(`/point/reservations/${id}`)).json()),
    );
    const same = { status: "PENDING", attempts: 0 };
    expect(stories).toMatchObject([
      { ...same, user_id: userId, point_amount: 7, idempotency_key: `${userId}-a`, campaign: "summer" },
      { ...same, user_id: userId, point_amount: 5, execute_at: "2029-02-28T15:00:00.250Z", campaign: null },
      { ...same, user_id: `${userId}x`, point_amount: 6, execute_at: TIME, next_scan_at: TIME },
    ]);
  });

  test("lets its rows be granted, also with the longest key", async () => {
    const userId = newUser();
    const due = rowsOf(userId, 3, () => ({ execute_at: "2001-01-01T00:00:00Z" }));
    const results = await reserveBulk(mode, due, {
      headers: { "idempotency-key": "k".repeat(100 - 4) + mode.slice(0, 4) },
    });
    const claimed = await claimDue(db.database, { limit: 1_000, leaseMs: 60_000 });
    expect(claimed.map(({ id }) => id)).toEqual(expect.arrayContaining(idsOf(results)));
    await processReservations([claimed], db);
    expect((await findBalance(db.database, userId))?.pointNum).toBe(6n);
  });

  test("takes the same key with the same content within the request for one reservation", async () => {
    const userId = newUser();
    const [row, other] = keyedRowsOf(userId, 2) as [Row, Row];
    const sameMoment = { ...row, execute_at: TIME };
    const results = await reserveBulk(mode, [row, other, sameMoment, row]);
    expect(results.map(({ result }) => result)).toEqual(["created", "created", "replayed", "replayed"]);
    const [first, second] = idsOf(results) as [string, string];
    expect(idsOf(results)).toEqual([first, second, first, first]);
    expect(await storedOf(userId)).toHaveLength(2);
  });

  test("takes it so also where the two are far apart", async () => {
    const userId = newUser();
    const rows = keyedRowsOf(userId, 2_500);
    const results = await reserveBulk(mode, [...rows, rows[0], rows[1_500]]);
    expect(kindsOf(results)).toEqual({ created: 2_500, replayed: 2 });
    expect(idsOf(results.slice(-2))).toEqual(idsOf([results[0] as Result, results[1_500] as Result]));
    await expectStored(userId, rows, results);
  });

  test("reserves rows of the same content without keys each for itself", async () => {
    const userId = newUser();
    const row = bodyOf({ user_id: userId });
    const results = await reserveBulk(mode, [row, row, row]);
    expect(new Set(idsOf(results)).size).toBe(3);
    expect(await storedOf(userId)).toHaveLength(3);
  });

  test("shares its keys with POST /point/reserve, both ways", async () => {
    const userId = newUser();
    const [before, after] = keyedRowsOf(userId, 2) as [Row, Row];
    const single = await reserve(before);
    const results = await reserveBulk(mode, [before, after]);
    expect(results).toMatchObject([{ result: "replayed", reservation_id: single.id }, { result: "created" }]);
    expect(await reserve(after)).toEqual({ id: idsOf(results)[1] as string, replayed: "true" });
  });

  test("does not take a key that it made for a key of POST /point/reserve", async () => {
    const userId = newUser();
    const headers = { "idempotency-key": userId };
    const single = await reserve(bodyOf({ user_id: userId, point_amount: 1 }), headers);
    const results = await reserveBulk(mode, rowsOf(userId, 1), { headers });
    expect(results).toMatchObject([{ result: "created" }]);
    expect(idsOf(results)).not.toContain(single.id);
    // Nor could any other of a client's.
    await reserveBulk(mode, rowsOf(userId, 2));
    const made = (await storedOf(userId)).map((row) => row.idempotency_key).filter((key) => key !== userId);
    expect(made).toHaveLength(3);
    expect(made.filter((key) => /^[A-Za-z0-9_-]*$/.test(key))).toEqual([]);
  });

  test("gives the first ids again whatever became of the reservations: patched, cancelled, granted", async () => {
    const userId = newUser();
    const rows = rowsOf(userId, 3);
    const results = await reserveBulk(mode, rows);
    const [patched, cancelled, done] = idsOf(results) as [string, string, string];
    const patch = { ...post({ point_amount: 999, execute_at: "2029-03-01T00:00:00Z" }), method: "PATCH" };
    expect((await app.send(`/point/reservations/${patched}`, patch)).status).toBe(200);
    expect((await app.send(`/point/reservations/${cancelled}`, { method: "DELETE" })).status).toBe(200);
    await db.query("update point_reservations set status = 'DONE', scan_at = null where id = ?", [done]);
    const again = await reserveBulk(mode, rows);
    expect(again).toEqual(results.map((result) => ({ ...result, result: "replayed" })));
    expect(await storedOf(userId)).toHaveLength(3);
  });

  test.each<[string, unknown[], (string | object)[]]>([
    ["null", [null], ["reservation must be a JSON object"]],
    ["a number", [5], ["reservation must be a JSON object"]],
    ["a text", ["row"], ["reservation must be a JSON object"]],
    ["an array", [[]], ["reservation must be a JSON object"]],
    [
      "an empty object",
      [{}],
      [
        "user id is invalid format",
        "point amount must be greater than 0",
        "execute at must be an RFC 3339 time with seconds and offset",
      ],
    ],
    ["an unknown field", [bodyOf({ note: 1 })], ['unknown field "note"']],
    ["a campaign that is none", [bodyOf({ campaign: "a b" })], ["campaign is invalid format"]],
    ["a key with a colon", [bodyOf({ idempotency_key: "bulk:a:0" })], ["idempotency key is invalid format"]],
    ["null as key", [bodyOf({ idempotency_key: null })], ["idempotency key is invalid format"]],
  ])("refuses a row that is %s", async (_, [broken], errors) => {
    const userId = newUser();
    const rows = [...rowsOf(userId, 1), broken, bodyOf({ user_id: userId, point_amount: 2 })];
    const response = await bulk(mode, rows);
    if (mode === "atomic") {
      await expectProblem(
        response,
        400,
        errors.map((error) => `reservations[1]: ${error}`),
      );
      expect(await storedOf(userId)).toEqual([]);
    } else {
      const results = await resultsOf(response, mode);
      expect(results).toMatchObject([{ result: "created" }, {}, { result: "created" }]);
      expect(results[1]).toEqual({ result: "refused", errors } as never);
      expect(await storedOf(userId)).toMatchObject([{ point_amount: 1 }, { point_amount: 2 }]);
    }
  });

  test("takes the largest body: 10,000 rows of the longest values, indented", async () => {
    const prefix = newUser().padEnd(15, "x");
    const rows = Array.from({ length: 10_000 }, (_, index) => ({
      user_id: `${prefix}${String(index).padStart(5, "0")}`,
      point_amount: 2_147_483_647,
      execute_at: "2029-02-22T22:59:00.000+09:00",
      idempotency_key: `${uniqueName("k")}-${index}-`.padEnd(100, "k"),
      campaign: "c".repeat(64),
    }));
    const text = JSON.stringify({ mode, reservations: rows }, null, 2);
    expect(text.length).toBeGreaterThan(3_000_000);
    for (const kind of ["created", "replayed"]) {
      const before = await countAll();
      const results = await resultsOf(await app.send(PATH, post(text)), mode);
      expect(kindsOf(results)).toEqual({ [kind]: 10_000 });
      expect(new Set(idsOf(results)).size).toBe(10_000);
      expect((await countAll()) - before).toBe(kind === "created" ? 10_000 : 0);
    }
  }, 60_000);

  test("reserves each of 10,000 rows without keys once in a real process, however often they are sent", async () => {
    const userId = newUser();
    const rows = rowsOf(userId, 10_000);
    // On a machine that is busy MySQL may take too long for the patience of a process: as told, the same again.
    async function send(): Promise<Result[]> {
      for (let tries = 1; ; tries++) {
        const response = await fetch(`${api.url}${PATH}`, post({ mode, reservations: rows }));
        if (response.status !== 503 || tries === 10) return resultsOf(response, mode);
        expect(response.headers.get("retry-after")).toBe("1");
        await expectProblem(response, 503, ["service is unavailable"]);
      }
    }
    const results = await send();
    await expectStored(userId, rows, results);
    const again = await send();
    expect(again).toEqual(results.map((result) => ({ ...result, result: "replayed" })));
    await expectStored(userId, rows, results);
  }, 90_000);

  test("gives the same ids to two that come at the same moment", async () => {
    await using another = openAnother(db);
    const sends = [app.send, appOn(another).send];
    for (const rowsFor of [keyedRowsOf, rowsOf]) {
      const userId = newUser();
      const rows = rowsFor(userId, 1_500);
      const [one, other] = (await Promise.all(sends.map((send) => reserveBulk(mode, rows, { send })))) as [
        Result[],
        Result[],
      ];
      expect(idsOf(one)).toEqual(idsOf(other));
      await expectStored(userId, rows, one);
      const kinds = one.map(({ result }, index) => [result, other[index]?.result].toSorted().join());
      expect(new Set(kinds)).toEqual(new Set(["created,replayed"]));
    }
  }, 30_000);

  test("makes each key once where the same rows come in different orders at the same moment", async () => {
    await using another = openAnother(db);
    const userId = newUser();
    const rows = keyedRowsOf(userId, 1_500);
    const [forth, back] = await Promise.all([
      reserveBulk(mode, rows),
      reserveBulk(mode, rows.toReversed(), { send: appOn(another).send }),
    ]);
    expect(idsOf(back).toReversed()).toEqual(idsOf(forth));
    await expectStored(userId, rows, forth);
  }, 30_000);

  // By their keys, one of them is in the first INSERT and one in the second.
  test.each<["the same" | "other", number]>([
    ["the same", 100],
    ["the same", 700],
    ["other", 100],
    ["other", 700],
  ])("sees a key that is taken with %s content while it is under way: row %d", async (content, index) => {
    const userId = newUser();
    const rows = keyedRowsOf(userId, 1_500);
    const taken = newReservation({ ...rows[index], ...(content === "other" && { point_amount: 9_999 }) });
    let answer: Promise<Response> | undefined;
    await db.database.transaction(async (connection) => {
      await createReservations(connection, [taken]);
      answer = bulk(mode, rows);
      await until("the bulk waits for the key", async () => {
        const [waiting] = await db.query(
          "select id from information_schema.processlist where db = ? and info like 'insert into point_reservations%'",
          [db.name],
        );
        return waiting !== undefined;
      });
    });
    const response = (await answer) as Response;
    if (content === "other" && mode === "atomic") {
      await expectProblem(response, 422, [`reservations[${index}]: ${CONFLICT}`]);
      expect((await storedOf(userId)).map(({ id }) => id)).toEqual([taken.id]);
      return;
    }
    const results = await resultsOf(response, mode);
    const others = results.toSpliced(index, 1);
    expect(kindsOf(others)).toEqual({ created: 1_499 });
    if (content === "other") {
      expect(results[index]).toEqual({ result: "refused", errors: [CONFLICT] } as never);
    } else {
      expect(results[index]).toMatchObject({ result: "replayed", reservation_id: taken.id });
    }
    const ids = (await storedOf(userId)).map(({ id }) => id);
    expect(new Set(ids)).toEqual(new Set([...idsOf(others), taken.id]));
    expect(ids).toHaveLength(1_500);
  });

  test("inserts in the order of the keys: two with the same keys wait for each other instead of deadlock", async () => {
    const userId = newUser();
    const rows = keyedRowsOf(userId, 1_500).toReversed();
    const inserted: string[] = [];
    const watched = watchInserts(async (_, values) => {
      const keys = JSON.stringify(values).match(new RegExp(`${userId}-\\d+`, "g"));
      inserted.push(...(keys ?? []));
    });
    await reserveBulk(mode, rows, { send: appOn(watched).send });
    expect(inserted).toHaveLength(1_500);
    expect(inserted).toEqual(inserted.toSorted());
  });

  test("answers 503 with Retry-After while MySQL is away", async () => {
    const [port] = await freePorts(1);
    const database = openDatabase(`mysql://u:p@127.0.0.1:${port}/d`, { acquireMs: 300 });
    const { send, log } = appOn(database);
    const response = await bulk(mode, rowsOf("Secret1", 2), { send }).finally(() => database.close());
    expect(response.headers.get("retry-after")).toBe("1");
    const { request_id } = await expectProblem(response, 503, ["service is unavailable"]);
    expect(log.map(({ requestId }) => requestId)).toEqual([request_id]);
    expect(JSON.stringify(log)).not.toContain("Secret1");
  });

  test("reserves each row once where the connection is lost amid them: the work starts again", async () => {
    const userId = newUser();
    const rows = rowsOf(userId, 2_500);
    const { database, failures } = openFailing(async (connection) => {
      // The next statement finds its connection closed by the server.
      const [row] = await connection.select<{ id: number }>("select connection_id() id");
      await db.query("kill ?", [row?.id]);
    });
    const results = await reserveBulk(mode, rows, { send: appOn(database).send });
    expect(failures()).toBe(1);
    expect(kindsOf(results)).toEqual({ created: 2_500 });
    await expectStored(userId, rows, results);
  });
});

/** A database where something happens before each INSERT. */
function watchInserts(before: (connection: Connection, values: unknown) => Promise<void>): Database {
  const watched = (connection: Connection): Connection => ({
    ...connection,
    async execute(sql, values) {
      if (sql.startsWith("insert")) await before(connection, values);
      return connection.execute(sql, values);
    },
  });
  return {
    ...db.database,
    run: (work, options) => db.database.run((connection) => work(watched(connection)), options),
    transaction: (work, options) =>
      db.database.transaction((connection) => work(watched(connection)), options),
  };
}

/** A database whose second INSERT fails, once. */
function openFailing(fail: (connection: Connection) => Promise<void>) {
  let inserts = 0;
  let failures = 0;
  const database = watchInserts(async (connection) => {
    if (++inserts !== 2) return;
    failures++;
    await fail(connection);
  });
  return { database, failures: () => failures };
}

describe("POST /point/reserve/bulk that fails amid its rows", () => {
  const away = async () => {
    throw new DatabaseError("unavailable", "MySQL is away");
  };

  test("leaves nothing where it is atomic, and the same again reserves all", async () => {
    const userId = newUser();
    const rows = rowsOf(userId, 2_500);
    const { database } = openFailing(away);
    const { send } = appOn(database);
    await expectProblem(await bulk("atomic", rows, { send }), 503, ["service is unavailable"]);
    expect(await storedOf(userId)).toEqual([]);
    const results = await reserveBulk("atomic", rows, { send });
    expect(kindsOf(results)).toEqual({ created: 2_500 });
    await expectStored(userId, rows, results);
  });

  test("goes on where it is each, when the same comes again", async () => {
    const userId = newUser();
    const rows = rowsOf(userId, 2_500);
    const { database } = openFailing(away);
    const { send } = appOn(database);
    await expectProblem(await bulk("each", rows, { send }), 503, ["service is unavailable"]);
    const first = await storedOf(userId);
    expect(first.length).toBeWithin(1, 2_500);
    const results = await reserveBulk("each", rows, { send });
    await expectStored(userId, rows, results);
    const amounts = new Set(first.map(({ point_amount }) => point_amount));
    expect(results.map(({ result }) => result)).toEqual(
      rows.map(({ point_amount }) => (amounts.has(point_amount as number) ? "replayed" : "created")),
    );
    expect(new Set(idsOf(results)).isSupersetOf(new Set(first.map(({ id }) => id)))).toBe(true);
  });

  test("leaves nothing where the body breaks off", async () => {
    const userId = newUser();
    const text = JSON.stringify({ mode: "each", reservations: rowsOf(userId, 100) });
    const body = new ReadableStream({
      start(controller) {
        controller.enqueue(Buffer.from(text));
        controller.error(new Error("cut"));
      },
    });
    await expectProblem(await app.send(PATH, { ...post(""), body }), 400, ["body is incomplete"]);
    expect(await storedOf(userId)).toEqual([]);
  });
});

describe("POST /point/reserve/bulk, atomic, reserves nothing", () => {
  test("where rules are broken, and names every broken row", async () => {
    const userId = newUser();
    const good = rowsOf(userId, 8);
    const rows = [
      good[0],
      { ...good[1], point_amount: 0, execute_at: "2029-02-30T00:00:00Z" },
      null,
      good[3],
      7,
      { ...good[5], user_id: "a b", note: 1 },
      good[6],
      { ...good[7], campaign: "" },
    ];
    const { detail } = await expectProblem(await bulk("atomic", rows), 400, [
      "reservations[1]: point amount must be greater than 0",
      "reservations[1]: execute at must be a date that exists",
      "reservations[2]: reservation must be a JSON object",
      "reservations[4]: reservation must be a JSON object",
      "reservations[5]: user id is invalid format",
      'reservations[5]: unknown field "note"',
      "reservations[7]: campaign is invalid format",
    ]);
    expect(detail).toContain(
      "reservations[1]: point_amount must be an integer from 1 to 2147483647: received 0",
    );
    expect(await storedOf(userId)).toEqual([]);
  });

  test("where all of 10,000 are broken, names each, and explains the first 20", async () => {
    const rows = rowsOf(newUser(), 10_000, () => ({ point_amount: 0 }));
    const errors = rows.map((_, index) => `reservations[${index}]: point amount must be greater than 0`);
    const { detail } = await expectProblem(await bulk("atomic", rows), 400, errors);
    expect(detail).toContain("reservations[19]: ");
    expect(detail).not.toContain("reservations[20]: ");
    expect(detail).toEndWith("; and 9980 more");
  });

  test("where keys were used with other content, and names every such row, also behind the first 1,000", async () => {
    const userId = newUser();
    const rows = keyedRowsOf(userId, 2_500);
    const taken = [3, 999, 1_000, 2_499];
    for (const index of taken) await reserve({ ...rows[index], point_amount: 9_999 });
    const before = await storedOf(userId);
    await expectProblem(
      await bulk("atomic", rows),
      422,
      taken.map((index) => `reservations[${index}]: ${CONFLICT}`),
    );
    expect(await storedOf(userId)).toEqual(before);
  });

  test("where a key comes twice within the request with other content, and names the second row", async () => {
    for (const [field, value] of [
      ["point_amount", 9_999],
      ["execute_at", "2029-02-22T22:59:00.001+09:00"],
      ["campaign", "summer"],
    ] as const) {
      const userId = newUser();
      const rows = keyedRowsOf(userId, 1_500);
      const response = await bulk("atomic", [...rows, { ...rows[0], [field]: value }]);
      await expectProblem(response, 422, [`reservations[1500]: ${CONFLICT}`]);
      expect(await storedOf(userId)).toEqual([]);
    }
  });
});

describe("POST /point/reserve/bulk, each, refuses alone", () => {
  test("the rows that break rules, and those whose keys were used with other content", async () => {
    const userId = newUser();
    const rows = keyedRowsOf(userId, 6);
    const taken = await reserve({ ...rows[1], campaign: "summer" });
    rows[3] = { ...rows[3], point_amount: 0, user_id: "" };
    rows[5] = { ...rows[5], idempotency_key: `${userId}-4` };
    const results = await reserveBulk("each", rows);
    const refused = (...errors: string[]) => ({ result: "refused", errors });
    expect(results[1]).toEqual(refused(CONFLICT) as never);
    expect(results[3]).toEqual(
      refused("user id is invalid format", "point amount must be greater than 0") as never,
    );
    expect(results[5]).toEqual(refused(CONFLICT) as never);
    expect(results.map(({ result }) => result)).toEqual([
      ...(["created", "refused", "created", "refused", "created", "refused"] as const),
    ]);
    expect((await storedOf(userId)).map(({ id, point_amount }) => [point_amount, id])).toEqual([
      [1, idsOf(results)[0] as string],
      [2, taken.id],
      [3, idsOf(results)[2] as string],
      [5, idsOf(results)[4] as string],
    ]);
  });

  test("all rows where all break rules", async () => {
    const before = await countAll();
    const results = await reserveBulk("each", [null, 5, {}]);
    expect(kindsOf(results)).toEqual({ refused: 3 });
    expect(await countAll()).toBe(before);
  });
});

describe("POST /point/reserve/bulk sent again", () => {
  const pairs = MODES.flatMap((first) => MODES.map((second) => [first, second] as const));

  describe.each(pairs)("first %s, then %s,", (first, second) => {
    test.each<[string, (userId: string) => { rows: Row[]; headers?: Record<string, string> }]>([
      ["rows with keys", (userId) => ({ rows: keyedRowsOf(userId, 5) })],
      ["rows without keys", (userId) => ({ rows: rowsOf(userId, 5) })],
      [
        "rows with and without keys",
        (userId) => ({ rows: [...keyedRowsOf(userId, 3), ...rowsOf(userId, 5).slice(3)] }),
      ],
      [
        "rows without keys and a header Idempotency-Key",
        (userId) => ({ rows: rowsOf(userId, 5), headers: { "idempotency-key": `${userId}-bulk` } }),
      ],
      [
        "rows with and without keys and a header Idempotency-Key",
        (userId) => ({
          rows: [...keyedRowsOf(userId, 3), ...rowsOf(userId, 5).slice(3)],
          headers: { "idempotency-key": `${userId}-bulk` },
        }),
      ],
    ])("gives %s the same ids, and inserts nothing", async (_, make) => {
      const userId = newUser();
      const { rows, headers = {} } = make(userId);
      const results = await reserveBulk(first, rows, { headers });
      expect(kindsOf(results)).toEqual({ created: 5 });
      await expectStored(userId, rows, results);
      // To another process, and written in another way.
      const others = rows.map((row) =>
        Object.fromEntries(Object.entries({ ...row, execute_at: TIME }).toReversed()),
      );
      const text = JSON.stringify({ reservations: others, mode: second }, null, 2);
      const response = await fetch(`${api.url}${PATH}`, post(text, headers));
      const again = await resultsOf(response, second);
      expect(again).toEqual(results.map((result) => ({ ...result, result: "replayed" })));
      expect(await storedOf(userId)).toHaveLength(5);
    });
  });

  test("with the refused rows mended under the header Idempotency-Key reserves only those", async () => {
    const userId = newUser();
    const rows = rowsOf(userId, 3);
    const headers = { "idempotency-key": `${userId}-bulk` };
    const broken = [rows[0], { ...rows[1], execute_at: "soon" }, rows[2]];
    const first = await reserveBulk("each", broken, { headers });
    const second = await reserveBulk("each", rows, { headers });
    expect(second.map(({ result }) => result)).toEqual(["replayed", "created", "replayed"]);
    expect([idsOf(second)[0], idsOf(second)[2]]).toEqual([idsOf(first)[0], idsOf(first)[2]]);
    await expectStored(userId, rows, second);
  });

  test.each<[string, Row]>([
    ["amount", { point_amount: 4 }],
    ["time", { execute_at: "2029-02-22T22:59:00.001+09:00" }],
    ["campaign", { campaign: "summer" }],
    ["user", { user_id: newUser() }],
  ])("with another %s in one row, and no key, is another request", async (_, other) => {
    const rows = rowsOf(newUser(), 3);
    const first = await reserveBulk("atomic", rows);
    const second = await reserveBulk("atomic", [rows[0], rows[1], { ...rows[2], ...other }]);
    expect(kindsOf(second)).toEqual({ created: 3 });
    expect(new Set([...idsOf(first), ...idsOf(second)]).size).toBe(6);
  });

  test("with a key for one row is another request for those without, whatever the key", async () => {
    for (const key of ["key", "false", "null", "undefined", "0"]) {
      const userId = newUser();
      const [row, other] = rowsOf(userId, 2);
      const first = await reserveBulk("atomic", [row, other]);
      const second = await reserveBulk("atomic", [{ ...row, idempotency_key: key }, other]);
      expect([key, kindsOf(first), kindsOf(second)]).toEqual([key, { created: 2 }, { created: 2 }]);
    }
  });

  test("with another header Idempotency-Key is another request", async () => {
    const userId = newUser();
    const rows = rowsOf(userId, 2);
    const ids = new Set<string>();
    for (const headers of [{}, { "idempotency-key": `${userId}-1` }, { "idempotency-key": `${userId}-2` }]) {
      for (const id of idsOf(await reserveBulk("atomic", rows, { headers }))) ids.add(id);
    }
    expect(ids.size).toBe(6);
    expect(await storedOf(userId)).toHaveLength(6);
  });

  test("with the same header Idempotency-Key and another row is refused by its index", async () => {
    const userId = newUser();
    const rows = rowsOf(userId, 3);
    const headers = { "idempotency-key": `${userId}-bulk` };
    const first = await reserveBulk("atomic", rows, { headers });
    const changed = [rows[0], { ...rows[1], point_amount: 9_999 }, rows[2]];
    await expectProblem(await bulk("atomic", changed, { headers }), 422, [`reservations[1]: ${CONFLICT}`]);
    const results = await reserveBulk("each", changed, { headers });
    expect(results.map(({ result }) => result)).toEqual(["replayed", "refused", "replayed"]);
    await expectStored(userId, rows, first);
  });
});

describe("POST /point/reserve/bulk answers", () => {
  const count = "reservations must be an array of 1 to 10000";
  const mode = "mode must be atomic or each";
  test.each<[string, unknown, string[]]>([
    ["no rows", { mode: "each", reservations: [] }, [count]],
    ["10,001 rows", { mode: "each", reservations: Array(10_001).fill(bodyOf()) }, [count]],
    ["rows that are no array", { mode: "each", reservations: { 0: bodyOf() } }, [count]],
    ["rows that are a text", { mode: "each", reservations: "rows" }, [count]],
    ["rows that are null", { mode: "each", reservations: null }, [count]],
    ["rows that are missing", { mode: "each" }, [count]],
    ["a mode that is missing", { reservations: [bodyOf()] }, [mode]],
    ["a mode that is none", { mode: "all", reservations: [bodyOf()] }, [mode]],
    ["a mode in capitals", { mode: "ATOMIC", reservations: [bodyOf()] }, [mode]],
    ["a mode that is null", { mode: null, reservations: [bodyOf()] }, [mode]],
    [
      "all broken rules at once",
      { mode: 1, reservations: [], dry_run: true },
      [count, mode, 'unknown field "dry_run"'],
    ],
    ["an array", [bodyOf()], ["body must be a JSON object"]],
    ["null", null, ["body must be a JSON object"]],
    ["half a JSON", '{"mode":"each","reservations":[', ["body must be JSON"]],
    ["no body", "", ["body must be JSON"]],
  ])("400 to %s", async (_, body, errors) => {
    const before = await countAll();
    for (const [, send] of ways) await expectProblem(await send(PATH, post(body)), 400, errors);
    expect(await countAll()).toBe(before);
  });

  test.each([[""], ["a b"], ["a:b"], ["k".repeat(101)]])(
    "400 to the header Idempotency-Key %p",
    async (key) => {
      const userId = newUser();
      const headers = { "idempotency-key": key };
      await expectProblem(await bulk("each", rowsOf(userId, 2), { headers }), 400, [
        "idempotency key is invalid format",
      ]);
      expect(await storedOf(userId)).toEqual([]);
    },
  );

  test.each([["text/plain"], ["application/x-ndjson"], ["application/json; charset=utf-16"]])(
    "415 to the content type %s",
    async (type) => {
      const headers = { "content-type": type };
      await expectProblem(await bulk("each", rowsOf("TestUser01", 1), { headers }), 415, [
        "content type must be application/json",
      ]);
    },
  );

  test("415 to a body that is compressed", async () => {
    const headers = { "content-encoding": "gzip" };
    await expectProblem(await bulk("each", rowsOf("TestUser01", 1), { headers }), 415, [
      "content type must be application/json",
    ]);
  });

  describe.each(ways)("through %s,", (_, send) => {
    function padded(userId: string, bytes: number): string {
      return JSON.stringify({ mode: "each", reservations: rowsOf(userId, 1) }).padEnd(bytes);
    }

    function streamed(text: string): RequestInit {
      const body = new ReadableStream({
        async start(controller) {
          for (let at = 0; at < text.length; at += 1_000_000) {
            controller.enqueue(Buffer.from(text.slice(at, at + 1_000_000)));
            await Bun.sleep(0);
          }
          controller.close();
        },
      });
      return { ...post(""), body };
    }

    test("200 to a body of exactly 8 MiB, in one piece and in chunks", async () => {
      const userId = newUser();
      for (const init of [post(padded(userId, MAX_BYTES)), streamed(padded(userId, MAX_BYTES))]) {
        await resultsOf(await send(PATH, init), "each");
      }
      expect(await storedOf(userId)).toHaveLength(1);
    });

    test("413 to one byte more, in one piece and in chunks", async () => {
      const userId = newUser();
      const text = padded(userId, MAX_BYTES + 1);
      for (const init of [post(text), streamed(text)]) {
        await expectProblem(await send(PATH, init), 413, ["body is too large"]);
      }
      expect(await storedOf(userId)).toEqual([]);
    });

    test("as before to a single one: 64 KiB at most", async () => {
      const text = JSON.stringify(bodyOf());
      expect((await send("/point/reserve", post(text.padEnd(65_536)))).status).toBe(201);
      await expectProblem(await send("/point/reserve", post(text.padEnd(65_537))), 413, [
        "body is too large",
      ]);
    });
  });
});

describe("POST /point/reserve/bulk, many at once:", () => {
  /** A request whose body is being read, and comes to its end when told. */
  function openSlow(userId: string, { send = app.send, mode = "each" as Mode } = {}) {
    const { promise: gate, resolve: finish } = Promise.withResolvers<void>();
    const { promise: reading, resolve: read } = Promise.withResolvers<void>();
    const text = JSON.stringify({ mode, reservations: rowsOf(userId, 1) });
    const body = new ReadableStream(
      {
        // Called only when somebody reads.
        async pull(controller) {
          read();
          await gate;
          controller.enqueue(Buffer.from(text));
          controller.close();
        },
      },
      { highWaterMark: 0 },
    );
    return { answer: send(PATH, { ...post(""), body }), mode, reading, finish };
  }

  test("the fifth is 503 with Retry-After, while the four and single ones are served", async () => {
    const slow = Array.from({ length: 4 }, () => openSlow(newUser()));
    await Promise.all(slow.map(({ reading }) => reading));
    const rows = rowsOf(newUser(), 2);
    const { length: logged } = app.log;
    for (const mode of MODES) {
      const response = await bulk(mode, rows);
      expect(response.headers.get("retry-after")).toBe("1");
      const { request_id } = await expectProblem(response, 503, ["service is unavailable"]);
      expect(app.log.at(-1)).toMatchObject({ requestId: request_id });
    }
    expect(app.log).toHaveLength(logged + MODES.length);
    expect((await reserve(bodyOf())).id).toBeString();
    slow[0]?.finish();
    await resultsOf((await slow[0]?.answer) as Response, "each");
    // One place is free again, and no more than one.
    const fifth = openSlow(newUser());
    await fifth.reading;
    expect((await bulk("each", rows)).status).toBe(503);
    for (const { finish } of [...slow, fifth]) finish();
    for (const { answer } of [...slow.slice(1), fifth]) await resultsOf(await answer, "each");
    expect(kindsOf(await reserveBulk("each", rows))).toEqual({ created: 2 });
  });

  test("MySQL gets one after the other, and the fifth is 503 also while the four wait for it", async () => {
    const { promise: gate, resolve: open } = Promise.withResolvers<void>();
    let [atOnce, most] = [0, 0];
    async function slowly<T>(work: () => Promise<T>): Promise<T> {
      most = Math.max(most, ++atOnce);
      await gate;
      return work().finally(() => atOnce--);
    }
    const { send } = appOn({
      ...db.database,
      run: (work, options) => slowly(() => db.database.run(work, options)),
      transaction: (work, options) => slowly(() => db.database.transaction(work, options)),
    });
    const slow = Array.from({ length: 4 }, (_, index) =>
      openSlow(newUser(), { send, mode: MODES[index % 2] as Mode }),
    );
    await Promise.all(slow.map(({ reading }) => reading));
    for (const { finish } of slow) finish();
    await until("one is with MySQL", () => atOnce === 1);
    await expectProblem(await bulk("atomic", rowsOf(newUser(), 2), { send }), 503, [
      "service is unavailable",
    ]);
    open();
    for (const { answer, mode } of slow) {
      expect(kindsOf(await resultsOf(await answer, mode))).toEqual({ created: 1 });
    }
    expect(most).toBe(1);
  });

  test("those that are refused give their places back", async () => {
    const requests: [number, RequestInit][] = [
      [400, post("{")],
      [400, post({ mode: "each", reservations: [] })],
      [413, post(" ".repeat(MAX_BYTES + 1))],
      [415, post("{}", { "content-type": "text/plain" })],
    ];
    for (const [status, init] of requests) {
      for (let times = 0; times < 5; times++) expect((await app.send(PATH, init)).status).toBe(status);
    }
    expect(kindsOf(await reserveBulk("atomic", rowsOf(newUser(), 2)))).toEqual({ created: 2 });
  });
});
