import { afterAll, afterEach, describe, expect, jest, test } from "bun:test";
import { openTestDatabase } from "../harness/database.ts";
import { uniqueName } from "../harness/harness.ts";
import { startService } from "../harness/processes.ts";
import { appOn, bodyOf, expectProblem, json, post, type Send, streamed } from "./client.ts";

const db = await openTestDatabase();
const app = appOn(db.database);
const api = await startService("api", { DATABASE_URL: db.url });
afterAll(() => api.kill("SIGKILL"));

/** Bun's server sees a request before the app does. */
const ways: [string, Send][] = [
  ["app.handle()", app.send],
  ["a real process", (path, init) => fetch(`${api.url}${path}`, init)],
];

describe.each(ways)("readJson() through %s", (_, send) => {
  test.each<[string, string | Buffer]>([
    ["no JSON", "{'user_id': 1}"],
    ["half a JSON", '{"user_id":"a"'],
    ["no body", ""],
    ["JSON that is too deep to parse", "[".repeat(60_000)],
    // Repaired, it would be another reservation.
    ["invalid UTF-8", Buffer.from(JSON.stringify(bodyOf({ idempotency_key: "order-\xff" })), "latin1")],
  ])("refuses %s with 400", async (_, body) => {
    const init = { ...post(""), body };
    await expectProblem(await send("/point/reserve", init), 400, ["body must be JSON"]);
  });

  test.each(["application/json", "application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"'])(
    "takes the content type %s",
    async (type) => {
      expect((await send("/point/reserve", post(bodyOf(), { "content-type": type }))).status).toBe(201);
    },
  );

  test.each<[string, Record<string, string>]>([
    ["none", {}],
    ["text", { "content-type": "text/plain" }],
    ["a form", { "content-type": "application/x-www-form-urlencoded" }],
    ["a multipart form", { "content-type": "multipart/form-data; boundary=x" }],
    ["another JSON", { "content-type": "application/problem+json" }],
    ["another charset", { "content-type": "application/json; charset=iso-8859-1" }],
    ["compression", { "content-type": "application/json", "content-encoding": "gzip" }],
  ])("refuses the content type %s with 415", async (_, headers) => {
    // Bytes: Request would add a content type to a text.
    const init = { method: "POST", body: Buffer.from(JSON.stringify(bodyOf())), headers };
    await expectProblem(await send("/point/reserve", init), 415, ["content type must be application/json"]);
  });

  test.each([
    ["/point/reserve", 64 * 1024, bodyOf()],
    ["/point/reserve/bulk", 8 * 1024 * 1024, { mode: "atomic", reservations: [bodyOf()] }],
  ])("of %s takes %d bytes, whole or in chunks, and refuses one more with 413", async (path, bytes, body) => {
    const text = JSON.stringify(body);
    for (const write of [post, streamed]) {
      expect((await send(path, write(text.padEnd(bytes)))).status).toBe(201);
      await expectProblem(await send(path, write(text.padEnd(bytes + 1))), 413, ["body is too large"]);
    }
  });

  test("refuses a body of 10 MB with 413", async () => {
    for (const write of [post, streamed]) {
      const init = write(" ".repeat(10_000_000));
      await expectProblem(await send("/point/reserve", init), 413, ["body is too large"]);
    }
  });
});

describe("readJson()", () => {
  afterEach(() => {
    jest.useRealTimers();
  });

  /** A body of which the first part comes, and no end. */
  function openBody() {
    const { promise, resolve } = Promise.withResolvers<ReadableStreamDefaultController>();
    const body = new ReadableStream({
      start: (controller) => controller.enqueue(Buffer.from("{")),
      pull: resolve,
    });
    return { reading: promise, answer: app.send("/point/reserve", { ...post(""), body }) };
  }

  test("refuses a body that breaks off with 400", async () => {
    const { reading, answer } = openBody();
    (await reading).error(new Error("cut"));
    await expectProblem(await answer, 400, ["body is incomplete"]);
  });

  test("refuses a body that takes longer than 10 s with 408", async () => {
    jest.useFakeTimers();
    const { reading, answer } = openBody();
    await reading;
    jest.advanceTimersByTime(9_999);
    expect(await Promise.race([answer, "no answer"])).toBe("no answer");
    jest.advanceTimersByTime(1);
    await expectProblem(await answer, 408, ["body is too slow"]);
  });
});

describe("headerKeyOf()", () => {
  const routes: ["POST" | "PUT", string, object][] = [
    ["POST", "/point/reserve", bodyOf()],
    ["POST", "/point/reserve/bulk", { mode: "each", reservations: [bodyOf()] }],
    ["PUT", "/point/add", { user_id: "TestUser01", point_num: 1 }],
  ];

  test.each(routes)("%s %s refuses a key that breaks a rule", async (method, path, body) => {
    for (const key of ["a b", ""]) {
      await expectProblem(await app.send(path, json(method, body, { "Idempotency-Key": key })), 400, [
        "idempotency key is invalid format",
      ]);
    }
  });

  test.each(routes.filter(([, path]) => !path.endsWith("bulk")))(
    "%s %s takes the same key in header and body, and refuses two",
    async (method, path, body) => {
      const key = uniqueName("key");
      for (const [withKey, headers, replayed] of [
        [body, { "idempotency-key": key }, null],
        [{ ...body, idempotency_key: key }, {}, "true"],
        [{ ...body, idempotency_key: key }, { "idempotency-key": key }, "true"],
      ] as [object, Record<string, string>, string | null][]) {
        const response = await app.send(path, json(method, withKey, headers));
        expect([response.ok, response.headers.get("idempotent-replayed")]).toEqual([true, replayed]);
      }
      const init = json(method, { ...body, idempotency_key: key }, { "idempotency-key": `${key}-2` });
      await expectProblem(await app.send(path, init), 400, [
        "idempotency key differs between header and body",
      ]);
    },
  );
});

describe("parseQuery()", () => {
  const path = "/users/Nobody/transactions";

  test.each(["1", "1000", "007"])("takes the number %s", async (limit) => {
    expect((await app.send(`${path}?limit=${limit}`)).status).toBe(200);
  });

  test.each(["", "x", "-1", "+1", "1.5", "1e2", "0x10", "%205", "5%0A", "%D9%A3", "9999999999999999999"])(
    "refuses %p, which is no number",
    async (limit) => {
      await expectProblem(await app.send(`${path}?limit=${limit}`), 400, ["limit must be an integer"]);
    },
  );

  test.each([
    ["limit=1&limit=1", "a parameter is given twice"],
    ["x=1&cursor=2&x=2", "a parameter is given twice"],
    ["LIMIT=1", 'unknown field "LIMIT"'],
    ["constructor=1", 'unknown field "constructor"'],
    ["__proto__=1", 'unknown field "__proto__"'],
  ])("refuses ?%s", async (query, sentence) => {
    await expectProblem(await app.send(`${path}?${query}`), 400, [sentence]);
  });

  test("refuses an offset whose + has become a blank, and takes it as %2B", async () => {
    const at = "/users/Nobody/points?at=2026-03-01T09:00:00";
    await expectProblem(await app.send(`${at}+09:00`), 400, [
      "at must be an RFC 3339 time with seconds and offset",
    ]);
    await expectProblem(await app.send(`${at}%2B09:00`), 404, ["user not found"]);
  });
});

test.each([
  ["/users/a%20b/points", "user id is invalid format"],
  ["/users/a%2Fb/points", "user id is invalid format"],
  ["/users/%zz/transactions", "user id is invalid format"],
  ["/point/reservations/%zz", "reservation id is invalid format"],
  ["/users/%E5%A4%8F/reserved-points", "user id is invalid format"],
])("GET %s is 400", async (path, sentence) => {
  for (const [, send] of ways) await expectProblem(await send(path), 400, [sentence]);
});

describe.each(ways)("noRoute() through %s", (_, send) => {
  test.each(["/", "/health", "/health/", "/ready"])("GET %s is 200", async (path) => {
    const response = await send(path);
    expect([response.status, await response.json()]).toEqual([200, { messages: ["ok"] }]);
  });

  test.each([
    ["/", 200],
    ["/ready", 200],
    ["/users/Nobody/points", 404],
    ["/point/reservations/42", 400],
  ])("HEAD %s is %d as its GET, without a body", async (path, status) => {
    expect((await send(path)).status).toBe(status);
    const response = await send(path, { method: "HEAD" });
    expect([response.status, await response.text()]).toEqual([status, ""]);
  });

  test.each([
    ["GET", "/point/reserve", "POST"],
    ["OPTIONS", "/point/reserve", "POST"],
    ["POST", "/", "GET, HEAD"],
    ["POST", "/health/", "GET, HEAD"],
    ["POST", "/users/TestUser01/points", "GET, HEAD"],
    ["POST", "/point/reservations/42", "GET, HEAD, DELETE, PATCH"],
    ["GET", "/point/campaigns/c/cancel", "POST"],
    ["POST", "/point/add", "PUT"],
  ])("%s %s is 405 and allows %s", async (method, path, allow) => {
    const response = await send(path, { method });
    expect(response.headers.get("allow")).toBe(allow);
    await expectProblem(response, 405, ["method not allowed"]);
  });

  test.each(["/nope", "/point", "/users/a", "/users//points", "/point/reserve/x", "/__proto__", "/.env"])(
    "%s is 404, whatever the method",
    async (path) => {
      for (const method of ["GET", "POST", "DELETE"]) {
        await expectProblem(await send(path, { method }), 404, ["route not found"]);
      }
    },
  );
});
