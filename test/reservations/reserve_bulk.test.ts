import { afterAll, describe, expect, test } from "bun:test";
import type { Connection, Database } from "../../lib/database.ts";
import { DatabaseError } from "../../lib/database_errors.ts";
import { newReservation } from "../../lib/reservations/reservation.ts";
import { createReservations } from "../../lib/reservations/reservation_repository.ts";
import { openTestDatabase } from "../harness/database.ts";
import { uniqueName, until } from "../harness/harness.ts";
import { startService } from "../harness/processes.ts";
import { appOn, bodyOf, expectProblem, post, type Send } from "../http/client.ts";

const db = await openTestDatabase();
const app = appOn(db.database);
const api = await startService("api", { DATABASE_URL: db.url });
afterAll(() => api.kill("SIGKILL"));
const sendToProcess: Send = (path, init) => fetch(`${api.url}${path}`, init);

const PATH = "/point/reserve/bulk";
const MODES = ["atomic", "each"] as const;
type Mode = (typeof MODES)[number];
const CONFLICT = "idempotency key is used with other content";
const TIME = "2029-02-22T13:59:00.000Z";

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

/** Rows of one user, with the amounts 1, 2, 3 and so on. */
function rowsOf(userId: string, count: number, fieldsOf: (index: number) => Row = () => ({})): Row[] {
  return Array.from({ length: count }, (_, index) =>
    bodyOf({ user_id: userId, point_amount: index + 1, ...fieldsOf(index) }),
  );
}

/** Rows that each have a key. */
function keyedRowsOf(userId: string, count: number): Row[] {
  return rowsOf(userId, count, (index) => ({ idempotency_key: `${userId}-${index}` }));
}

function bulk(mode: Mode, reservations: unknown[], { headers = {}, send = app.send }: BulkOptions = {}) {
  return send(PATH, post({ mode, reservations }, headers));
}

/** The results of a request that is taken. */
async function resultsOf(answer: Response | Promise<Response>, mode: Mode): Promise<Result[]> {
  const response = await answer;
  expect(response.status).toBe(mode === "atomic" ? 201 : 200);
  expect(response.headers.get("content-type")).toStartWith("application/json");
  return ((await response.json()) as { results: Result[] }).results;
}

async function reserveBulk(mode: Mode, reservations: unknown[], options?: BulkOptions): Promise<Result[]> {
  const results = await resultsOf(bulk(mode, reservations, options), mode);
  expect(results).toHaveLength(reservations.length);
  return results;
}

/** Reserves one; resolves to its id. */
async function reserve(row: Row): Promise<string> {
  const response = await app.send("/point/reserve", post(row));
  return ((await response.json()) as { reservation_id: string }).reservation_id;
}

function idsOf(results: readonly Result[]): string[] {
  return results.map(({ reservation_id }) => reservation_id);
}

function kindsOf(results: readonly Result[]): string[] {
  return results.map(({ result }) => result);
}

function replaysOf(results: readonly Result[]) {
  return results.map((result) => ({ ...result, result: "replayed" as const }));
}

/** The ids that are stored for a user, by amount. */
async function storedOf(userId: string): Promise<string[]> {
  const rows = await db.query<{ id: string }>(
    "select id from point_reservations where user_id = ? order by point_amount",
    [userId],
  );
  return rows.map(({ id }) => id);
}

/** A database where something happens before each INSERT of reservations. */
function watchInserts(before: (connection: Connection, values: unknown) => Promise<void>): Database {
  const watched = <C extends Connection>(connection: C): C => ({
    ...connection,
    async execute(sql, values) {
      if (sql.startsWith("/* create_reservations */")) await before(connection, values);
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

/** An app whose second INSERT of reservations fails, once. */
function appFailing(fail: (connection: Connection) => Promise<void>) {
  let inserts = 0;
  const { send } = appOn(
    watchInserts(async (connection) => {
      if (++inserts === 2) await fail(connection);
    }),
  );
  return { send, failed: () => inserts > 2 };
}

describe.each(MODES)("POST /point/reserve/bulk, %s,", (mode) => {
  test("reserves each row, in order, each with its own content", async () => {
    const user_id = newUser();
    const key = `${user_id}-a`;
    const rows = [
      bodyOf({ user_id, point_amount: 7, execute_at: TIME, idempotency_key: key, campaign: "summer" }),
      bodyOf({ user_id, execute_at: "2029-02-28T15:00:00.250Z" }),
      bodyOf({ user_id: `${user_id}x`, point_amount: 5, execute_at: TIME }),
    ];
    const results = await reserveBulk(mode, rows);
    const ids = idsOf(results);
    const created = rows.map(({ execute_at }, index) => {
      return { result: "created", reservation_id: ids[index], status: "PENDING", execute_at };
    });
    expect(results).toEqual(created as never);
    const details = ids.map(async (id) => (await app.send(`/point/reservations/${id}`)).json());
    expect(await Promise.all(details)).toMatchObject(rows);
  });

  test("takes the same key and content within the request for one reservation, however far apart", async () => {
    const userId = newUser();
    const rows = keyedRowsOf(userId, 2_500);
    const sameTime = { ...rows[0], execute_at: TIME };
    const results = await reserveBulk(mode, [...rows, sameTime, rows[1_500]]);
    expect(kindsOf(results)).toEqual([...Array(2_500).fill("created"), "replayed", "replayed"]);
    const ids = idsOf(results);
    expect(ids.slice(2_500)).toEqual([ids[0], ids[1_500]] as string[]);
    expect(await storedOf(userId)).toEqual(ids.slice(0, 2_500));
  });

  test("shares its keys with POST /point/reserve, both ways", async () => {
    const [before, after] = keyedRowsOf(newUser(), 2) as [Row, Row];
    const id = await reserve(before);
    const results = await reserveBulk(mode, [before, after]);
    expect(results).toMatchObject([{ result: "replayed", reservation_id: id }, { result: "created" }]);
    expect(await reserve(after)).toBe(idsOf(results)[1] as string);
  });

  test("gives the first ids again if the reservations were patched, cancelled or granted since", async () => {
    const userId = newUser();
    const rows = rowsOf(userId, 3);
    const results = await reserveBulk(mode, rows);
    const [patched, cancelled, done] = idsOf(results);
    const patch = { ...post({ point_amount: 999, execute_at: "2029-03-01T00:00:00Z" }), method: "PATCH" };
    expect((await app.send(`/point/reservations/${patched}`, patch)).status).toBe(200);
    expect((await app.send(`/point/reservations/${cancelled}`, { method: "DELETE" })).status).toBe(200);
    await db.query("update point_reservations set status = 'DONE', scan_at = null where id = ?", [done]);
    expect(await reserveBulk(mode, rows)).toEqual(replaysOf(results));
    expect(await storedOf(userId)).toHaveLength(3);
  });

  test("takes the largest body, 10,000 rows of the longest values, indented, and sent again changes nothing", async () => {
    const prefix = newUser().padEnd(15, "x");
    const rows = Array.from({ length: 10_000 }, (_, index) => ({
      user_id: `${prefix}${String(index).padStart(5, "0")}`,
      point_amount: 2_147_483_647,
      execute_at: "2029-02-22T22:59:00.000+09:00",
      // The others get a key of the service's.
      ...(index % 2 && { idempotency_key: `${uniqueName("k")}-${index}-`.padEnd(100, "k") }),
      campaign: "c".repeat(64),
    }));
    const init = post(JSON.stringify({ mode, reservations: rows }, null, 2));
    /** MySQL on a busy machine may take longer than the process waits; the client then sends the same again. */
    async function send(): Promise<Result[]> {
      const response = await sendToProcess(PATH, init);
      return response.status === 503 ? send() : resultsOf(response, mode);
    }
    const results = await send();
    expect(new Set(idsOf(results)).size).toBe(10_000);
    expect(await send()).toEqual(replaysOf(results));
    const stored = await db.query<{ id: string }>(
      "select id from point_reservations where user_id like ? order by user_id",
      [`${prefix}%`],
    );
    expect(stored.map(({ id }) => id)).toEqual(idsOf(results));
  }, 90_000);

  test.each(["the same", "other"])(
    "sees that a key of its second INSERT is taken meanwhile with %s content",
    async (content) => {
      const userId = newUser();
      const rows = keyedRowsOf(userId, 1_500);
      const at = 700;
      const taken = newReservation({ ...rows[at], ...(content === "other" && { point_amount: 9_999 }) });
      let answer: Promise<Response> | undefined;
      await db.database.transaction(async (transaction) => {
        await createReservations(transaction, [taken]);
        answer = bulk(mode, rows);
        await until("the bulk waits for the key", async () => {
          const [waiting] = await db.query(
            "select id from information_schema.processlist where db = ? and info like '/* create_reservations */%'",
            [db.name],
          );
          return waiting;
        });
      });
      const response = (await answer) as Response;
      if (content === "other" && mode === "atomic") {
        await expectProblem(response, 422, [`reservations[${at}]: ${CONFLICT}`]);
        expect(await storedOf(userId)).toEqual([taken.id]);
        return;
      }
      const results = await resultsOf(response, mode);
      expect(kindsOf(results.toSpliced(at, 1))).toEqual(Array(1_499).fill("created"));
      const refused = { result: "refused", errors: [CONFLICT] };
      const replayed = { result: "replayed", reservation_id: taken.id };
      expect(results[at]).toMatchObject(content === "other" ? refused : replayed);
      const ids = [...idsOf(results.toSpliced(at, 1)), taken.id];
      expect((await storedOf(userId)).toSorted()).toEqual(ids.toSorted());
    },
  );

  test("inserts in the order of the keys: two with the same keys wait for each other, without a deadlock", async () => {
    const userId = newUser();
    const inserted: string[] = [];
    const watched = watchInserts(async (_, values) => {
      inserted.push(...(JSON.stringify(values).match(new RegExp(`${userId}-\\d+`, "g")) ?? []));
    });
    await reserveBulk(mode, keyedRowsOf(userId, 1_500).toReversed(), { send: appOn(watched).send });
    expect(inserted).toHaveLength(1_500);
    expect(inserted).toEqual(inserted.toSorted());
  });

  test("reserves each row once if the connection is lost between its INSERTs", async () => {
    const userId = newUser();
    const { send, failed } = appFailing(async (connection) => {
      const [row] = await connection.select<{ id: number }>("select connection_id() id");
      await db.query("kill ?", [row?.id]);
    });
    const results = await reserveBulk(mode, rowsOf(userId, 2_500), { send });
    expect(failed()).toBe(true);
    expect(kindsOf(results)).toEqual(Array(2_500).fill("created"));
    expect(await storedOf(userId)).toEqual(idsOf(results));
  });

  const left = mode === "atomic" ? 0 : 1_000;
  test(`that fails at its second INSERT leaves ${left} rows, and sent again reserves the rest`, async () => {
    const userId = newUser();
    const rows = rowsOf(userId, 2_500);
    const { send } = appFailing(async () => {
      throw new DatabaseError("unavailable", "MySQL is away");
    });
    await expectProblem(await bulk(mode, rows, { send }), 503, ["service is unavailable"]);
    const first = new Set(await storedOf(userId));
    expect(first.size).toBe(left);
    const results = await reserveBulk(mode, rows, { send });
    expect(kindsOf(results)).toEqual(idsOf(results).map((id) => (first.has(id) ? "replayed" : "created")));
    expect(await storedOf(userId)).toEqual(idsOf(results));
  });

  test("sent again in the other mode, to another process and in other words, gives the same ids", async () => {
    for (const headers of [{}, { "idempotency-key": newUser() }]) {
      const userId = newUser();
      const rows = [...keyedRowsOf(userId, 3), ...rowsOf(userId, 5).slice(3)];
      const results = await reserveBulk(mode, rows, { headers });
      const others = rows.map((row) =>
        Object.fromEntries(Object.entries({ ...row, execute_at: TIME }).toReversed()),
      );
      const otherMode = mode === "atomic" ? "each" : "atomic";
      const text = JSON.stringify({ reservations: others, mode: otherMode }, null, 2);
      const again = await resultsOf(sendToProcess(PATH, post(text, headers)), otherMode);
      expect(again).toEqual(replaysOf(results));
      expect(await storedOf(userId)).toEqual(idsOf(results));
    }
  });
});

test("POST /point/reserve/bulk, atomic, names every row whose key was used with other content, and reserves nothing", async () => {
  const userId = newUser();
  const rows = keyedRowsOf(userId, 2_500);
  const taken = [3, 999, 1_000, 2_499];
  for (const index of taken) await reserve({ ...rows[index], point_amount: 9_999 });
  const before = await storedOf(userId);
  const response = await bulk("atomic", [...rows, { ...rows[7], campaign: "summer" }]);
  const errors = [...taken, 2_500].map((index) => `reservations[${index}]: ${CONFLICT}`);
  await expectProblem(response, 422, errors);
  expect(await storedOf(userId)).toEqual(before);
});

test("POST /point/reserve/bulk, atomic, is 503 if others take one of its keys in each of five tries, and reserves nothing", async () => {
  const userId = newUser();
  const rows = keyedRowsOf(userId, 9);
  const taken: string[] = [];
  const { send } = appOn(watchInserts(async () => void taken.push(await reserve(rows[taken.length] as Row))));
  await expectProblem(await bulk("atomic", rows, { send }), 503, ["service is unavailable"]);
  expect(taken).toHaveLength(5);
  expect(await storedOf(userId)).toEqual(taken);
  const results = await reserveBulk("atomic", rows);
  expect(kindsOf(results)).toEqual([...Array(5).fill("replayed"), ...Array(4).fill("created")]);
});

test("POST /point/reserve/bulk, each, refuses only the rows that break rules, or whose key was used with other content", async () => {
  const userId = newUser();
  const rows = keyedRowsOf(userId, 6);
  const taken = await reserve({ ...rows[1], campaign: "summer" });
  rows[3] = { ...rows[3], point_amount: 0, user_id: "" };
  rows[5] = { ...rows[5], idempotency_key: `${userId}-4` };
  const results = await reserveBulk("each", rows);
  const refused = (...errors: string[]) => ({ result: "refused", errors });
  const created = { result: "created" };
  const broken = refused("user id is invalid format", "point amount must be greater than 0");
  const expected = [created, refused(CONFLICT), created, broken, created, refused(CONFLICT)];
  expect(results).toMatchObject(expected);
  const [first, , third, , fifth] = idsOf(results) as [string, string, string, string, string];
  expect(await storedOf(userId)).toEqual([first, taken, third, fifth]);

  expect(kindsOf(await reserveBulk("each", [null, 5, {}]))).toEqual(Array(3).fill("refused"));
});

test("POST /point/reserve/bulk under one Idempotency-Key takes a row that was mended, and refuses one that was changed", async () => {
  const userId = newUser();
  const rows = rowsOf(userId, 3);
  const headers = { "idempotency-key": `${userId}-bulk` };
  const broken = [rows[0], { ...rows[1], execute_at: "soon" }, rows[2]];
  const first = await reserveBulk("each", broken, { headers });
  const second = await reserveBulk("each", rows, { headers });
  expect(kindsOf(second)).toEqual(["replayed", "created", "replayed"]);
  expect(idsOf(second).toSpliced(1, 1)).toEqual(idsOf(first).toSpliced(1, 1));
  const changed = [rows[0], { ...rows[1], point_amount: 9_999 }, rows[2]];
  await expectProblem(await bulk("atomic", changed, { headers }), 422, [`reservations[1]: ${CONFLICT}`]);
  const results = await reserveBulk("each", changed, { headers });
  expect(kindsOf(results)).toEqual(["replayed", "refused", "replayed"]);
  expect(await storedOf(userId)).toEqual(idsOf(second));
});

describe("POST /point/reserve/bulk, many at once:", () => {
  /** A request whose body is being read, and ends when told. */
  function openSlow({ send = app.send, mode = "each" as Mode } = {}) {
    const { promise: gate, resolve: finish } = Promise.withResolvers<void>();
    const { promise: reading, resolve: read } = Promise.withResolvers<void>();
    const text = JSON.stringify({ mode, reservations: rowsOf(newUser(), 1) });
    async function pull(controller: ReadableStreamDefaultController) {
      read();
      await gate;
      controller.enqueue(Buffer.from(text));
      controller.close();
    }
    // Nothing is pulled before somebody reads.
    const body = new ReadableStream({ pull }, { highWaterMark: 0 });
    return { answer: send(PATH, { ...post(""), body }), mode, reading, finish };
  }

  async function expectBusy(answer: Promise<Response>) {
    const response = await answer;
    expect(response.headers.get("retry-after")).toBe("1");
    await expectProblem(response, 503, ["service is unavailable"]);
  }

  test("the fifth is 503 while the four and single ones are served; each that ends makes room for one", async () => {
    const slow = Array.from({ length: 4 }, () => openSlow());
    await Promise.all(slow.map(({ reading }) => reading));
    const rows = rowsOf(newUser(), 2);
    for (const mode of MODES) await expectBusy(bulk(mode, rows));
    expect(await reserve(bodyOf())).toBeString();
    slow[0]?.finish();
    await slow[0]?.answer;
    const fifth = openSlow();
    await fifth.reading;
    await expectBusy(bulk("each", rows));
    for (const { finish } of [...slow, fifth]) finish();
    for (const { answer } of [...slow, fifth]) expect((await answer).status).toBe(200);
    expect(kindsOf(await reserveBulk("each", rows))).toEqual(["created", "created"]);
  });

  test("MySQL gets one after the other, and the fifth is 503 while the four wait for it", async () => {
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
    const slow = [...MODES, ...MODES].map((mode) => openSlow({ send, mode }));
    await Promise.all(slow.map(({ reading }) => reading));
    for (const { finish } of slow) finish();
    await until("one is with MySQL", () => atOnce === 1);
    await expectBusy(bulk("atomic", rowsOf(newUser(), 2), { send }));
    open();
    for (const { answer, mode } of slow) expect(kindsOf(await resultsOf(answer, mode))).toEqual(["created"]);
    expect(most).toBe(1);
  });
});
