import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { validate } from "uuid";
import { appOn, bodyOf, expectProblem, post, type Send } from "./api_client.ts";
import {
  createTestDatabase,
  insertReservation,
  type RunningService,
  startService,
  type TestDatabase,
  uniqueName,
} from "./harness.ts";

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
});

const ways: [string, Send][] = [
  ["app.handle()", (path, init) => app.send(path, init)],
  ["a real process", (path, init) => fetch(`${api.url}${path}`, init)],
];

async function reserve(fields: Record<string, unknown> = {}, headers: Record<string, string> = {}) {
  const response = await app.send("/point/reserve", post(bodyOf(fields), headers));
  return { response, body: (await response.json()) as Record<string, unknown> };
}

describe("POST /point/reserve", () => {
  test("answers 201 with id, status and time in UTC, and where to ask for more", async () => {
    const key = uniqueName("key");
    const { response, body } = await reserve({ idempotency_key: key });
    expect(response.status).toBe(201);
    expect(response.headers.get("content-type")).toStartWith("application/json");
    expect(response.headers.get("idempotent-replayed")).toBeNull();
    expect(body).toEqual({
      reservation_id: expect.any(String),
      status: "PENDING",
      execute_at: "2029-02-22T13:59:00.000Z",
    });
    expect(validate(body.reservation_id)).toBe(true);
    expect(response.headers.get("location")).toBe(`/point/reservations/${body.reservation_id}`);
    const [row] = await db.query(
      `select user_id, point_amount, status, idempotency_key, cast(execute_at as char) execute_at, cast(scan_at as char) scan_at
       from point_reservations where id = ?`,
      [body.reservation_id],
    );
    expect(row).toEqual({
      user_id: "TestUser01",
      point_amount: 100,
      status: "PENDING",
      idempotency_key: key,
      execute_at: "2029-02-22 13:59:00.000",
      scan_at: "2029-02-22 13:59:00.000",
    });
  });

  test("takes a time that has passed: it is due at once", async () => {
    const { response, body } = await reserve({ execute_at: "2001-01-01T00:00:00.250Z" });
    expect([response.status, body.execute_at]).toEqual([201, "2001-01-01T00:00:00.250Z"]);
  });

  test("answers the first answer again to the same key with the same content, also when it is DONE", async () => {
    const key = uniqueName("key");
    const first = await reserve({ idempotency_key: key });
    const sameMoment = { idempotency_key: key, execute_at: "2029-02-22T13:59:00.000Z" };
    for (const status of ["PENDING", "PROCESSING", "DONE"]) {
      const scanAt = status === "DONE" ? null : new Date("2029-02-22T13:59:00Z");
      await db.query("update point_reservations set status = ?, scan_at = ? where idempotency_key = ?", [
        status,
        scanAt,
        key,
      ]);
      const again = await reserve(sameMoment);
      expect(again.response.status).toBe(201);
      expect(again.response.headers.get("idempotent-replayed")).toBe("true");
      expect(again.response.headers.get("location")).toBe(first.response.headers.get("location"));
      expect(again.body).toEqual(first.body);
    }
    expect(await db.query("select id from point_reservations where idempotency_key = ?", [key])).toHaveLength(
      1,
    );
  });

  test("gives ten requests with one key at the same moment one reservation (fault 2)", async () => {
    const key = uniqueName("key");
    const send = async (index: number) => {
      const init = post(bodyOf({ idempotency_key: key }));
      // Two processes at once: only the database can decide between them.
      const response = await (index % 2
        ? app.send("/point/reserve", init)
        : fetch(`${api.url}/point/reserve`, init));
      const body = (await response.json()) as { reservation_id: string };
      return {
        status: response.status,
        replayed: response.headers.get("idempotent-replayed"),
        id: body.reservation_id,
      };
    };
    const answers = await Promise.all(Array.from({ length: 10 }, (_, index) => send(index)));
    expect(new Set(answers.map(({ status }) => status))).toEqual(new Set([201]));
    expect(new Set(answers.map(({ id }) => id)).size).toBe(1);
    expect(answers.filter(({ replayed }) => replayed === null)).toHaveLength(1);
    expect(answers.filter(({ replayed }) => replayed === "true")).toHaveLength(9);
  });

  test.each([
    ["user_id", { user_id: "testuser01" }],
    ["point_amount", { point_amount: 101 }],
    ["execute_at", { execute_at: "2029-02-22T22:59:00.001+09:00" }],
  ])("answers 422 to the same key with another %s (fault 3)", async (_, other) => {
    const key = uniqueName("key");
    await reserve({ idempotency_key: key });
    const init = post(bodyOf({ idempotency_key: key, ...other }));
    await expectProblem(await app.send("/point/reserve", init), 422, [
      "idempotency key is used with other content",
    ]);
  });

  test("takes the key from the header Idempotency-Key as well, and both where they are equal", async () => {
    const key = uniqueName("key");
    const { body } = await reserve({}, { "idempotency-key": key });
    const both = await reserve({ idempotency_key: key }, { "Idempotency-Key": key });
    expect(both.body).toEqual(body);
    expect(both.response.headers.get("idempotent-replayed")).toBe("true");
  });

  test("without a key reserves each time", async () => {
    const [first, second] = [await reserve(), await reserve()];
    expect(first.body.reservation_id).not.toBe(second.body.reservation_id);
  });

  test.each<[string, unknown, Record<string, string>, string[]]>([
    [
      "all broken rules at once",
      { user_id: "", point_amount: 0, execute_at: "2029-02-30T00:00:00Z", idempotency_key: "?", note: 1 },
      {},
      [
        "user id is invalid format",
        "point amount must be greater than 0",
        "execute at must be a date that exists",
        "idempotency key is invalid format",
        'unknown field "note"',
      ],
    ],
    ["an amount that is a string", bodyOf({ point_amount: "100" }), {}, ["point amount must be an integer"]],
    [
      "a time without a zone",
      bodyOf({ execute_at: "2029-02-22T22:59:00" }),
      {},
      ["execute at must be an RFC 3339 time with seconds and offset"],
    ],
    [
      "a bad key in the header",
      bodyOf(),
      { "idempotency-key": "a b" },
      ["idempotency key is invalid format"],
    ],
    [
      "an empty key in the header",
      bodyOf(),
      { "idempotency-key": "" },
      ["idempotency key is invalid format"],
    ],
    [
      "two different keys",
      bodyOf({ idempotency_key: "a" }),
      { "idempotency-key": "b" },
      ["idempotency key differs between header and body"],
    ],
    ["an array", [bodyOf()], {}, ["body must be a JSON object"]],
    ["null", null, {}, ["body must be a JSON object"]],
    ["no JSON", "{'user_id': 1}", {}, ["body must be JSON"]],
    ["half a JSON", '{"user_id":"a"', {}, ["body must be JSON"]],
    ["no body", "", {}, ["body must be JSON"]],
    ["JSON that is too deep to read", "[".repeat(60_000), {}, ["body must be JSON"]],
  ])("answers 400 to %s", async (_, body, headers, errors) => {
    for (const [, send] of ways) {
      await expectProblem(await send("/point/reserve", post(body, headers)), 400, errors);
    }
  });

  test("answers 400 to invalid UTF-8, and does not repair it into another reservation", async () => {
    const text = JSON.stringify(bodyOf({ idempotency_key: "order-X" }));
    const body = Buffer.from(text.replace("order-X", "order-\xff"), "latin1");
    const init = { method: "POST", body, headers: { "content-type": "application/json" } };
    await expectProblem(await app.send("/point/reserve", init), 400, ["body must be JSON"]);
  });

  test("tells rule and value of each broken rule in its detail", async () => {
    const { detail } = await expectProblem(
      await app.send("/point/reserve", post(bodyOf({ point_amount: 0, user_id: "x y" }))),
      400,
      ["user id is invalid format", "point amount must be greater than 0"],
    );
    expect(detail).toContain('user_id must be 1 to 20 of A-Z, a-z and 0-9: received "x y"');
    expect(detail).toContain("point_amount must be an integer from 1 to 2147483647: received 0");
  });

  test.each([
    ["application/json"],
    ["application/json; charset=utf-8"],
    ['Application/JSON;charset="UTF-8"'],
  ])("takes the content type %s", async (type) => {
    expect((await reserve({}, { "content-type": type })).response.status).toBe(201);
  });

  test.each<[string, Record<string, string>]>([
    ["none", {}],
    ["text", { "content-type": "text/plain" }],
    ["a form", { "content-type": "application/x-www-form-urlencoded" }],
    ["a multipart form", { "content-type": "multipart/form-data; boundary=x" }],
    ["another JSON", { "content-type": "application/problem+json" }],
    ["another charset", { "content-type": "application/json; charset=iso-8859-1" }],
    ["compression", { "content-type": "application/json", "content-encoding": "gzip" }],
  ])("answers 415 to the content type %s", async (_, headers) => {
    for (const [, send] of ways) {
      // Bytes: for a text, Request would add a content type by itself.
      const init = { method: "POST", body: Buffer.from(JSON.stringify(bodyOf())), headers };
      await expectProblem(await send("/point/reserve", init), 415, ["content type must be application/json"]);
    }
  });

  describe.each(ways)("through %s", (_, send) => {
    function padded(bytes: number): string {
      const text = JSON.stringify(bodyOf());
      return text + " ".repeat(bytes - text.length);
    }

    function streamed(text: string): RequestInit {
      const body = new ReadableStream({
        async start(controller) {
          for (let at = 0; at < text.length; at += 10_000) {
            controller.enqueue(Buffer.from(text.slice(at, at + 10_000)));
            await Bun.sleep(0);
          }
          controller.close();
        },
      });
      return { ...post(""), body };
    }

    test("takes a body of exactly 64 KiB, in one piece and in chunks", async () => {
      for (const init of [post(padded(65_536)), streamed(padded(65_536))]) {
        expect((await send("/point/reserve", init)).status).toBe(201);
      }
    });

    test.each([[65_537], [10_000_000]])(
      "answers 413 to one of %d bytes, in one piece and in chunks",
      async (bytes) => {
        for (const init of [post(padded(bytes)), streamed(padded(bytes))]) {
          await expectProblem(await send("/point/reserve", init), 413, ["body is too large"]);
        }
      },
    );
  });

  test("answers 1,000 at once with 201, each with a row of its own", async () => {
    const user = `u${Date.now()}`;
    const answers = await Promise.all(
      Array.from({ length: 1_000 }, async (_, index) => {
        const init = post(bodyOf({ user_id: user, point_amount: index + 1 }));
        const response = await fetch(`${api.url}/point/reserve`, init);
        const body = (await response.json()) as { reservation_id: string };
        return { status: response.status, id: body.reservation_id, point_amount: index + 1 };
      }),
    );
    expect(answers.every(({ status }) => status === 201)).toBe(true);
    const rows = await db.query<{ id: string; point_amount: number }>(
      "select id, point_amount from point_reservations where user_id = ?",
      [user],
    );
    const byId = (a: { id: string }, b: { id: string }) => (a.id < b.id ? -1 : 1);
    expect(rows.toSorted(byId)).toEqual(
      answers.map(({ id, point_amount }) => ({ id, point_amount })).toSorted(byId),
    );
  }, 20_000);
});

describe("GET /point/reservations/:id", () => {
  test("tells the whole story of one that waits", async () => {
    const key = uniqueName("key");
    const { body, response } = await reserve({ idempotency_key: key });
    const story = await app.send(response.headers.get("location") ?? "");
    expect(story.status).toBe(200);
    expect(await story.json()).toEqual({
      reservation_id: body.reservation_id,
      user_id: "TestUser01",
      point_amount: 100,
      idempotency_key: key,
      campaign: null,
      status: "PENDING",
      execute_at: "2029-02-22T13:59:00.000Z",
      original_point_amount: null,
      original_execute_at: null,
      transaction_id: null,
      next_scan_at: "2029-02-22T13:59:00.000Z",
      attempts: 0,
      last_error: null,
      granted_at: null,
      late_ms: null,
      created_at: expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/),
      updated_at: expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/),
    });
  });

  test("tells when one was granted, and how late", async () => {
    const { id, executeAt, idempotencyKey } = await insertReservation(db, { status: "DONE" });
    await db.query("insert into point_transactions set ?", [
      {
        id,
        idempotency_key: idempotencyKey,
        user_id: "TestUser01",
        point_amount: 100,
        created_at: new Date(executeAt.getTime() + 1_234),
      },
    ]);
    const story = await (await app.send(`/point/reservations/${id.toUpperCase()}`)).json();
    expect(story).toMatchObject({
      reservation_id: id,
      status: "DONE",
      next_scan_at: null,
      granted_at: new Date(executeAt.getTime() + 1_234).toISOString(),
      late_ms: 1_234,
    });
  });

  test("tells why one failed", async () => {
    const { id } = await insertReservation(db, { status: "FAILED" });
    await db.query("update point_reservations set attempts = 3, last_error = '残高' where id = ?", [id]);
    const story = await (await app.send(`/point/reservations/${id}`)).json();
    expect(story).toMatchObject({
      status: "FAILED",
      attempts: 3,
      last_error: "残高",
      granted_at: null,
      late_ms: null,
    });
  });

  test("answers 404 where there is none, and 400 to what is no id", async () => {
    const unknown = "/point/reservations/01890a5d-ac96-774b-bcce-b302099a8057";
    await expectProblem(await app.send(unknown), 404, ["reservation not found"]);
    await expectProblem(await app.send("/point/reservations/42"), 400, ["reservation id is invalid format"]);
  });
});

describe("GET /users/:user_id/points", () => {
  test.each([["0"], ["100"], ["9007199254740993"], ["9223372036854775807"]])(
    "keeps all digits of %s",
    async (points) => {
      const user = `u${points}`;
      await db.query("insert into point_root (user_id, point_num, updated_at) values (?, ?, ?)", [
        user,
        points,
        new Date("2029-02-22T13:59:00.123Z"),
      ]);
      const response = await app.send(`/users/${user}/points`);
      expect(response.status).toBe(200);
      expect(response.headers.get("content-type")).toStartWith("application/json");
      // As text: JSON.parse() would round the digits.
      expect(await response.text()).toBe(
        `{"user_id":"${user}","point_num":${points},"reserved_point_num":0,"next_execute_at":null,"updated_at":"2029-02-22T13:59:00.123Z"}`,
      );
    },
  );

  test("answers 404 to a user without points, in the original's sentence; case matters", async () => {
    await db.query("insert into point_root (user_id, point_num) values ('Case1', 1)");
    expect((await app.send("/users/Case1/points")).status).toBe(200);
    await expectProblem(await app.send("/users/case1/points"), 404, ["user not found"]);
  });

  test.each([["x".repeat(21)], ["a%20b"], ["a%2Fb"], ["%zz"], ["a_b"]])(
    "answers 400 to the user id %s",
    async (id) => {
      await expectProblem(await app.send(`/users/${id}/points`), 400, ["user id is invalid format"]);
    },
  );
});

describe("the other routes:", () => {
  test.each([["/"], ["/health"], ["/health/"], ["/ready"]])("GET %s is 200", async (path) => {
    for (const [, send] of ways) {
      const response = await send(path);
      expect(response.status).toBe(200);
      expect(await response.json()).toEqual({ messages: ["ok"] });
    }
  });

  test.each([
    ["/", 200],
    ["/health", 200],
    ["/ready", 200],
    ["/users/Nobody/points", 404],
    ["/point/reservations/42", 400],
  ])("HEAD %s is %d as its GET, without a body", async (path, status) => {
    for (const [, send] of ways) {
      expect((await send(path)).status).toBe(status);
      const response = await send(path, { method: "HEAD" });
      expect(response.status).toBe(status);
      expect(await response.text()).toBe("");
    }
  });

  test.each([
    ["GET", "/point/reserve", "POST"],
    ["PUT", "/point/reserve", "POST"],
    ["DELETE", "/point/reserve", "POST"],
    ["PATCH", "/point/reserve", "POST"],
    ["OPTIONS", "/point/reserve", "POST"],
    ["POST", "/", "GET, HEAD"],
    ["POST", "/health", "GET, HEAD"],
    ["POST", "/health/", "GET, HEAD"],
    ["POST", "/ready", "GET, HEAD"],
    ["POST", "/users/TestUser01/points", "GET, HEAD"],
    ["POST", "/point/reservations/42", "GET, HEAD, DELETE, PATCH"],
    ["GET", "/point/reservations/42/retry", "POST"],
    ["GET", "/point/campaigns/c/cancel", "POST"],
    ["GET", "/point/reserve/bulk", "POST"],
    ["POST", "/point/add", "PUT"],
    ["GET", "/point/sub", "PUT"],
  ])("%s %s is 405 and allows %s", async (method, path, allow) => {
    for (const [, send] of ways) {
      const response = await send(path, { method });
      expect(response.headers.get("allow")).toBe(allow);
      await expectProblem(response, 405, ["method not allowed"]);
    }
  });

  test.each([
    ["/nope"],
    ["/point"],
    ["/users/a"],
    ["/users//points"],
    ["/point/reserve/x"],
    ["/__proto__"],
    ["/.env"],
  ])("%s is 404, whatever the method", async (path) => {
    for (const method of ["GET", "POST", "DELETE"]) {
      await expectProblem(await app.send(path, { method }), 404, ["route not found"]);
    }
  });
});
