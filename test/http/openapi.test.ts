import { beforeEach, describe, expect, test } from "bun:test";
import { type TSchema, Type } from "@sinclair/typebox";
import { Value, ValuePointer } from "@sinclair/typebox/value";
import { aggregate } from "../../lib/accounting/aggregate.ts";
import type { Database } from "../../lib/database.ts";
import { DatabaseError } from "../../lib/database_errors.ts";
import { compareSums } from "../../lib/dev/compare_sums.ts";
import {
  CANCELLED_ID,
  DONE_ID,
  FAILED_ID,
  FUTURE,
  PAST,
  PENDING_ID,
  PROCESSING_ID,
  SUBTRACTED,
  TRANSACTION_ID,
} from "../../lib/http/examples.ts";
import { openTestDatabase } from "../harness/database.ts";
import { appOn } from "./client.ts";

interface Schema extends Record<string, unknown> {
  type?: string;
  format?: string;
  anyOf?: Schema[];
  items?: Schema;
  properties?: Record<string, Schema>;
  required?: string[];
}

/** A schema, and values of it by the names of their examples. */
interface Described {
  schema: Schema;
  examples?: Record<string, { value: unknown }>;
}

interface Parameter extends Described {
  name: string;
  in: "path" | "query" | "header";
  required: boolean;
  description?: string;
}

interface Operation {
  operationId: string;
  summary: string;
  description: string;
  parameters?: Parameter[];
  requestBody?: { required: boolean; content: { "application/json": Described } };
  responses: Record<string, { description: string; content: Record<string, Described> }>;
}

const db = await openTestDatabase();
const app = appOn(db.database);
// The tests are made of what it says.
const document = (await (await app.send("/openapi/json")).json()) as Record<string, unknown> & {
  paths: Record<string, Record<string, Operation>>;
};

const operations = Object.entries(document.paths).flatMap(([path, methods]) =>
  Object.entries(methods).map(([lower, { parameters = [], requestBody, ...described }]) => {
    const method = lower.toUpperCase();
    const answers = Object.entries(described.responses).flatMap(([status, { content }]) =>
      Object.entries(content).map(([type, answer]) => ({ status: Number(status), type, ...answer })),
    );
    const body = requestBody?.content["application/json"];
    return { ...described, title: `${method} ${path}`, method, path, parameters, body, answers };
  }),
);
type DescribedOperation = (typeof operations)[number];
const byTitle = operations.map((operation) => [operation.title, operation] as const);
const withBody = byTitle.filter(([, { body }]) => body);

const examples = operations.flatMap((operation) =>
  operation.answers.flatMap(({ examples = {}, ...answer }) =>
    Object.entries(examples).map(([name, { value }]) => {
      return { ...answer, operation, name, title: `${operation.title}: "${name}"`, documented: value };
    }),
  ),
);
type Example = (typeof examples)[number];

/** The formats that a schema names, as patterns. */
const FORMATS: Record<string, string> = {
  uuid: "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$",
  date: String.raw`^\d{4}-\d\d-\d\d$`,
  "date-time": String.raw`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,3})?(Z|[+-]\d\d:\d\d)$`,
};

/** A schema of the description as one that can check; members that it does not name are errors in any object. */
function checkable({ type, format, anyOf, items = {}, properties = {}, ...rules }: Schema): TSchema {
  if (anyOf) return Type.Union(anyOf.map(checkable));
  if ("const" in rules) return Type.Literal(rules.const as string);
  switch (type) {
    case "null":
      return Type.Null();
    case "integer":
      return Type.Integer(rules);
    case "string": {
      const pattern = format && FORMATS[format];
      if (format && !pattern) throw new Error(`Cannot check the format ${format}`);
      return Type.String(pattern ? { ...rules, pattern } : rules);
    }
    case "array":
      return Type.Array(checkable(items), rules);
    case "object": {
      const { required = [], ...others } = rules;
      const fields = Object.entries(properties).map(([name, schema]) => {
        const field = checkable(schema);
        return [name, (required as string[]).includes(name) ? field : Type.Optional(field)] as const;
      });
      return Type.Object(Object.fromEntries(fields), { ...others, additionalProperties: false });
    }
    default:
      throw new Error(`Cannot check the type ${type}`);
  }
}

function fits(schema: Schema, value: unknown): boolean {
  return Value.Check(checkable(schema), value);
}

function expectToFit(schema: Schema, value: unknown): void {
  const errors = [...Value.Errors(checkable(schema), value)];
  expect(errors.map(({ path, message }) => `${path}: ${message}`)).toEqual([]);
}

function expectType(response: Response, type: string): void {
  expect(response.headers.get("content-type")?.split(";")[0]).toBe(type);
}

/** The parts of a request, each with its schema; undefined if its example leaves it out. */
function partsOf({ operation: { parameters, body }, name }: Example) {
  const parts = [...parameters, ...(body ? [{ ...body, name: "body", in: "body", required: true }] : [])];
  return parts.map((part) => ({ ...part, value: part.examples?.[name]?.value }));
}

/** The request of an example, as a client makes it of the values of its name. */
function requestOf(example: Example): { path: string; init: RequestInit } {
  const { method } = example.operation;
  let path = example.operation.path;
  const query = new URLSearchParams();
  const headers: Record<string, string> = {};
  let body: string | undefined;
  for (const { in: place, name, value } of partsOf(example)) {
    if (value === undefined) continue;
    if (place === "path") path = path.replace(`{${name}}`, encodeURIComponent(String(value)));
    if (place === "query") query.set(name, String(value));
    if (place === "header") headers[name] = String(value);
    if (place === "body") body = JSON.stringify(value);
  }
  if (path.includes("{")) throw new Error(`${example.title} lacks a part of its path`);
  if (query.size > 0) path += `?${query}`;
  if (body === undefined) return { path, init: { method, headers } };
  return { path, init: { method, headers: { ...headers, "content-type": "application/json" }, body } };
}

/** The first example of an operation that succeeds. */
function goodRequestOf(operation: DescribedOperation) {
  const example = examples.find((one) => one.operation === operation && one.status < 300);
  if (!example) throw new Error(`${operation.title} has no example of success`);
  return { ...requestOf(example), status: example.status };
}

const NEW_YEAR = new Date("2026-01-01T00:00:00.001Z");
const [PAST_DATE, FUTURE_DATE, SUBTRACTED_DATE] = [PAST, FUTURE, SUBTRACTED].map((time) => new Date(time));

// What the examples speak of, by table and columns.
const TABLES = ["point_reservations", "point_transactions", "point_root", "point_daily_totals"];
const SEED: Record<string, unknown[][]> = {
  "point_reservations (id, status, idempotency_key, execute_at, scan_at, attempts, last_error, user_id, point_amount, campaign, created_at, updated_at)":
    [
      [PENDING_ID, "PENDING", "order-41", FUTURE_DATE, FUTURE_DATE, 0, null],
      [PROCESSING_ID, "PROCESSING", "order-51", PAST_DATE, SUBTRACTED_DATE, 0, null],
      [DONE_ID, "DONE", "order-31", PAST_DATE, null, 0, null],
      [FAILED_ID, "FAILED", "order-32", PAST_DATE, null, 10, "The balance would be out of range"],
      [CANCELLED_ID, "CANCELLED", "order-53", FUTURE_DATE, null, 0, null],
    ].map((row) => [...row, "TestUser01", 100, "summer-2029", PAST_DATE, PAST_DATE]),
  "point_transactions (id, kind, idempotency_key, point_amount, reservation_id, created_at, user_id)": [
    ["01a20990-f000-7000-8000-000000000001", "add", "gift-0", 50, null, NEW_YEAR, "TestUser01"],
    [TRANSACTION_ID, "grant", "order-31", 100, DONE_ID, PAST_DATE, "TestUser01"],
    ["01a20990-f011-7d52-b6c8-3e1f9a7b5c08", "sub", "refund-7", -20, null, SUBTRACTED_DATE, "TestUser01"],
  ],
  "point_root (user_id, point_num, created_at, updated_at)": [["TestUser01", 130, NEW_YEAR, SUBTRACTED_DATE]],
  "point_daily_totals (day, kind, campaign, entries, points, users, generation)": [
    ["2026-01-01", "add", "", 1, 50, 1, 1],
    ["2026-02-01", "grant", "summer-2029", 1, 100, 1, 1],
    ["2026-02-01", "sub", "", 1, -20, 1, 1],
  ],
};

/** One commit: there is a seed for each of many tests. */
async function seed(): Promise<void> {
  await db.database.transaction(async ({ execute }) => {
    for (const table of TABLES) await execute(`delete from ${table}`);
    for (const [columns, rows] of Object.entries(SEED))
      await execute(`insert into ${columns} values ?`, [rows]);
    await execute(
      "update point_aggregation a, point_aggregation_turns t set a.time_zone = 'Asia/Tokyo', t.aggregated_at = '2026-02-01'",
    );
  });
}

async function stored() {
  return Promise.all(TABLES.map((table) => db.query(`select * from ${table} order by 1`)));
}

/** The places in an answer of what the service makes anew; everything else must be as documented. */
function madeIn({ operation: { title } }: Example, answer: unknown): string[] {
  const { results = [] } = answer as { results?: { result: string }[] };
  switch (title) {
    case "POST /point/reserve":
      return ["/reservation_id"];
    case "POST /point/reserve/bulk":
      return results.flatMap(({ result }, at) =>
        result === "created" ? [`/results/${at}/reservation_id`] : [],
      );
    case "PATCH /point/reservations/{id}":
    case "POST /point/reservations/{id}/retry":
      return ["/updated_at"];
    default:
      return [];
  }
}

/** What no schema can tell: it depends on what is stored, or on two values at once. */
const BEYOND_SCHEMA = [
  "points must be greater than 0",
  "user not found",
  "cursor is invalid format",
  "from must not be after to",
];

describe("an example:", () => {
  beforeEach(seed);

  test("all start from a state that the service can be in", async () => {
    expect(await compareSums(db.database)).toMatchObject({ balances: 130n, agree: true });
    const totals = () =>
      db.query("select day, kind, campaign, entries, points from point_daily_totals order by 1, 2");
    const seeded = await totals();
    await db.query("delete from point_daily_totals");
    await aggregate(db.database, { timeZone: "Asia/Tokyo" });
    expect(await totals()).toEqual(seeded);
  });

  test.each(examples.map((example) => [example.title, example.status, example] as const))(
    "%s is answered %d",
    async (_, status, example) => {
      const { operation, type, schema, documented } = example;
      expectToFit(schema, documented);
      const isValid = partsOf(example).every(({ required, schema, value }) =>
        value === undefined ? !required : fits(schema, value),
      );
      const { errors = [], results = [] } = documented as { errors?: string[]; results?: object[] };
      const isRefused = status === 400 && !errors.some((error) => BEYOND_SCHEMA.includes(error));
      // Whoever checks by the schemas before sending learns what the service would say.
      expect({ isValid }).toEqual({ isValid: !isRefused && !results.some((result) => "errors" in result) });

      const { path, init } = requestOf(example);
      const before = await stored();
      const [clock] = await db.query<{ now: Date }>("select now(3) now");
      const response = await app.send(path, init);
      const after = await stored();
      expect(response.status).toBe(status);
      expectType(response, type);
      const answer = await response.json();
      expectToFit(schema, answer);

      const isAgain = response.headers.has("idempotent-replayed") || path.endsWith(CANCELLED_ID);
      const made = status < 300 && !isAgain ? madeIn(example, answer) : [];
      let expected = JSON.stringify(documented);
      const values = made.map((place) => String(ValuePointer.Get(answer, place)));
      expect(new Set(values).size).toBe(made.length);
      for (const [index, value] of values.entries()) {
        const place = made[index] ?? "";
        expect(JSON.stringify(before)).not.toContain(value);
        expect(JSON.stringify(after)).toContain(value);
        if (place === "/updated_at") expect(Date.parse(value)).toBeGreaterThanOrEqual(Number(clock?.now));
        // In all of its places: one id of the example must be one id of the answer.
        const shown = String(ValuePointer.Get(documented, place));
        expect(expected).toContain(shown);
        expected = expected.replaceAll(shown, value);
      }
      expect(answer).toEqual(JSON.parse(expected));

      const changes = status < 300 && operation.method !== "GET" && !isAgain;
      expect({ changes: !Bun.deepEquals(after, before) }).toEqual({ changes });
    },
  );
});

test("the examples' sentences are these, which clients know; those of fields are tested with the fields", () => {
  const sentences: Record<string, string[]> = {};
  for (const { operation, status, documented } of examples) {
    const { errors = [], messages = [] } = documented as { errors?: string[]; messages?: string[] };
    for (const sentence of [...errors, ...messages]) {
      if (status === 400 && !BEYOND_SCHEMA.includes(sentence)) continue;
      sentences[`${status} ${sentence}`] ??= [];
      sentences[`${status} ${sentence}`]?.push(operation.title);
    }
  }
  const reservation = "/point/reservations/{id}";
  const conflict = "idempotency key is used with other content";
  for (const titles of Object.values(sentences)) titles.sort();
  expect(sentences).toEqual({
    "200 ok": ["GET /", "GET /health", "GET /ready"],
    "200 point updated": ["PUT /point/add"],
    "200 point subtracted": ["PUT /point/sub"],
    "200 userID: TestUser01": ["GET /point/confirm"],
    "200 pointNum: 130": ["GET /point/confirm"],
    "400 points must be greater than 0": ["PUT /point/sub"],
    "400 user not found": ["GET /point/confirm", "PUT /point/sub"],
    "400 cursor is invalid format": ["GET /users/{user_id}/transactions"],
    "400 from must not be after to": ["GET /point/totals"],
    "404 reservation not found": [
      `DELETE ${reservation}`,
      "GET /point/reservations",
      `GET ${reservation}`,
      `PATCH ${reservation}`,
      `POST ${reservation}/retry`,
    ],
    "404 campaign not found": ["POST /point/campaigns/{campaign}/cancel"],
    "404 user not found": ["GET /users/{user_id}/points"],
    "409 reservation was granted": [`DELETE ${reservation}`],
    "409 reservation is FAILED": [`DELETE ${reservation}`],
    "409 reservation is not PENDING": [`PATCH ${reservation}`],
    "409 reservation is not FAILED": [`POST ${reservation}/retry`],
    [`422 ${conflict}`]: ["POST /point/reserve", "PUT /point/add", "PUT /point/sub"],
    [`422 reservations[1]: ${conflict}`]: ["POST /point/reserve/bulk"],
  });
});

describe("an operation:", () => {
  async function expectDescribed({ answers }: DescribedOperation, response: Response) {
    const described = answers.find(({ status }) => status === response.status);
    if (!described) throw new Error(`${response.status} is not described`);
    expectType(response, described.type);
    expectToFit(described.schema, await response.json());
  }

  /** Sends a request that succeeds but for what `init` says; the answer must be as described. */
  async function expectRefusal(operation: DescribedOperation, status: number, init: RequestInit) {
    const good = goodRequestOf(operation);
    const headers = { ...(good.init.headers as Record<string, string>), ...init.headers };
    const response = await app.send(good.path, { ...good.init, ...init, headers });
    expect(response.status).toBe(status);
    await expectDescribed(operation, response);
  }

  test.each(withBody)("%s answers a body that is not JSON with 415, as described", async (_, operation) => {
    await expectRefusal(operation, 415, { headers: { "content-type": "text/plain" } });
  });

  test.each(withBody)(
    "%s takes a body of the size that it tells, and answers one more byte with 413, as described",
    async (_, operation) => {
      const { description = "" } = operation.responses[413] ?? {};
      const [, size, unit] = /(\d+) ([KM])iB/.exec(description) ?? [];
      const bytes = Number(size) * (unit === "M" ? 1024 * 1024 : 1024);
      await seed();
      const good = goodRequestOf(operation);
      const body = String(good.init.body);
      const response = await app.send(good.path, { ...good.init, body: body.padEnd(bytes) });
      expect(response.status).toBe(good.status);
      await expectRefusal(operation, 413, { body: body.padEnd(bytes + 1) });
    },
  );

  test.each(byTitle)("%s answers as described while MySQL is away", async (_, operation) => {
    const gone = () => Promise.reject(new DatabaseError("unavailable", "away"));
    const away: Database = { ...db.database, run: gone, transaction: gone };
    const { path, init, status } = goodRequestOf(operation);
    const response = await appOn(away, { unready: { reason: "away", since: new Date() } }).send(path, init);
    expect(response.status).toBe("503" in operation.responses ? 503 : status);
    if (response.status === 503) expect(response.headers.get("retry-after")).toBe("1");
    await expectDescribed(operation, response);
  });
});

describe("the description", () => {
  test("is OpenAPI 3 and says what it is of", () => {
    expect(document).toMatchObject({
      openapi: expect.stringMatching(/^3\.[01]\.\d+$/),
      info: { title: "pointservice", version: expect.stringMatching(/^\d+\.\d+\.\d+/) },
    });
    const ids = operations.map(({ operationId }) => operationId);
    expect(ids).toEqual(ids.filter((id, index) => /^\w[\w-]*$/.test(id) && ids.indexOf(id) === index));
    expect(JSON.stringify(document)).not.toContain('"$ref"');
  });

  test("has each route of the app, and nothing else", () => {
    const routes = app.app.routes
      .filter(({ path }) => !path.startsWith("/openapi"))
      .map(({ method, path }) => `${method} ${path.replace(/:(\w+)/g, "{$1}")}`);
    expect(routes.length).toBeGreaterThan(10);
    expect(operations.map(({ title }) => title).toSorted()).toEqual(routes.toSorted());
  });

  test("shows what comes as CSV too", () => {
    const asCsv = operations.filter(({ answers }) => answers.some(({ type }) => type === "text/csv"));
    expect(asCsv.map(({ title }) => title)).toEqual(["GET /point/totals"]);
  });

  test("names the parameters of each route", () => {
    const named = operations
      .map(({ title, parameters }) => [title, parameters.map((one) => `${one.in} ${one.name}`)] as const)
      .filter(([, parameters]) => parameters.length > 0);
    const id = "path id";
    const user = "path user_id";
    const key = "header Idempotency-Key";
    const paging = ["query limit", "query cursor"];
    expect(Object.fromEntries(named)).toEqual({
      "POST /point/reserve": [key],
      "POST /point/reserve/bulk": [key],
      "GET /point/reservations": ["query idempotency_key"],
      "GET /point/reservations/{id}": [id],
      "DELETE /point/reservations/{id}": [id],
      "PATCH /point/reservations/{id}": [id],
      "POST /point/reservations/{id}/retry": [id],
      "POST /point/campaigns/{campaign}/cancel": ["path campaign"],
      "GET /users/{user_id}/points": [user, "query at"],
      "GET /users/{user_id}/reserved-points": [user, "query status", "query campaign", ...paging],
      "GET /users/{user_id}/transactions": [user, ...paging],
      "GET /point/totals": ["query from", "query to", "query campaign"],
      "PUT /point/add": [key],
      "PUT /point/sub": [key],
      "GET /point/confirm": ["query user_id"],
    });
  });

  test.each(byTitle)(
    "of %s has words, examples, and the refusals that its input calls for",
    (_, operation) => {
      const { path, method, parameters, body, answers } = operation;
      expect(operation.summary).toMatch(/^[A-Z].{5,60}[^.]$/);
      expect(operation.description).toMatch(/^[A-Z1`].{20,}\.$/);
      for (const { description } of Object.values(operation.responses)) expect(description).toMatch(/\w{3}/);
      // A list of what it may be says enough.
      expect(parameters.filter(({ description, schema }) => !description && !schema.anyOf)).toEqual([]);

      const inPath = parameters.filter((parameter) => parameter.in === "path");
      const names = [...path.matchAll(/\{(\w+)\}/g)].map(([, name]) => name as string);
      expect(inPath.map(({ name, required }) => [name, required])).toEqual(names.map((name) => [name, true]));

      // A request and its answer share one name.
      const namesOf = (all: { examples?: object }[]) =>
        all.flatMap(({ examples = {} }) => Object.keys(examples));
      const answered = namesOf(answers);
      expect(answered).toEqual([...new Set(answered)]);
      const asked = namesOf([...parameters, ...(body ? [body] : [])]);
      expect(asked.filter((name) => !answered.includes(name))).toEqual([]);
      const without = answers.filter(({ examples, type }) => !examples && type !== "text/csv");
      expect(without.filter(({ status }) => ![408, 413, 415, 500, 503].includes(status))).toEqual([]);

      const refusals = answers.filter(({ status }) => status >= 300);
      expect(refusals.filter(({ type }) => type !== "application/problem+json")).toEqual([]);
      const has = Object.fromEntries(refusals.map(({ status }) => [status, true]));
      const isChange = path.includes("{id}") && method !== "GET";
      expect(has).toEqual({
        ...(parameters.length > 0 || body ? { 400: true } : {}),
        // Users and campaigns may be unknown as well.
        ...(path.includes("{id}") || has[404] ? { 404: true } : {}),
        ...(body ? { 408: true, 413: true, 415: true } : {}),
        ...(isChange ? { 409: true } : {}),
        ...(parameters.some(({ name }) => name === "Idempotency-Key") ? { 422: true } : {}),
        ...(has[500] ? { 500: true } : {}),
        ...(has[503] ? { 503: true } : {}),
      });

      const taken = [...parameters, ...(body ? [{ name: "body", schema: body.schema }] : [])];
      expect(taken.flatMap(({ name, schema }) => unlimitedIn(schema, name))).toEqual([]);
    },
  );

  /** The parts of a schema that take any length, any number or any member. */
  function unlimitedIn(schema: Schema, place: string): string[] {
    const { type, anyOf, items = {}, properties = {}, additionalProperties, maxItems } = schema;
    if (anyOf) return anyOf.flatMap((one) => unlimitedIn(one, place));
    switch (type) {
      case "integer":
        return fits(schema, Number.MAX_SAFE_INTEGER) || fits(schema, Number.MIN_SAFE_INTEGER) ? [place] : [];
      case "array":
        return [...(maxItems === undefined ? [place] : []), ...unlimitedIn(items, `${place}[]`)];
      case "object":
        return [
          ...(additionalProperties === false ? [] : [place]),
          ...Object.entries(properties).flatMap(([name, one]) => unlimitedIn(one, `${place}.${name}`)),
        ];
      default:
        return ["a", "1"].some((letter) => fits(schema, letter.repeat(1_000))) ? [place] : [];
    }
  }

  test("tells the limits that the service has", () => {
    const propertiesOf = (title: string) =>
      operations.find((operation) => operation.title === title)?.body?.schema.properties ?? {};
    const points = { minimum: 1, maximum: 2_147_483_647 };
    const user_id = { pattern: "^[A-Za-z0-9]{1,20}$" };
    const idempotency_key = { pattern: "^[A-Za-z0-9_-]{1,100}$" };
    const patch = { execute_at: { format: "date-time" }, point_amount: points };
    const campaign = { pattern: "^[A-Za-z0-9_-]{1,64}$" };
    const reservation = { user_id, idempotency_key, campaign, ...patch };
    const reservations = { minItems: 1, maxItems: 10_000, items: { properties: reservation } };
    expect(propertiesOf("POST /point/reserve")).toMatchObject(reservation);
    expect(propertiesOf("POST /point/reserve/bulk")).toMatchObject({ reservations });
    expect(propertiesOf("PATCH /point/reservations/{id}")).toMatchObject(patch);
    for (const title of ["PUT /point/add", "PUT /point/sub"]) {
      expect(propertiesOf(title)).toMatchObject({ user_id, point_num: points, idempotency_key });
    }
  });

  test("is there for people too, at /openapi", async () => {
    const response = await app.send("/openapi");
    expect(response.status).toBe(200);
    expectType(response, "text/html");
    expect(await response.text()).toContain("openapi/json");
  });
});
