import { afterAll, beforeAll, beforeEach, describe, expect, test } from "bun:test";
import { type TSchema, Type } from "@sinclair/typebox";
import { Value, ValuePointer } from "@sinclair/typebox/value";
import { createApp } from "../api.ts";
import { aggregate } from "../lib/aggregate.ts";
import { type Database, DatabaseError, openDatabase } from "../lib/database.ts";
import { compareSums } from "../lib/point_repository.ts";
import { appOn } from "./api_client.ts";
import { createTestDatabase, DATABASE_URL, silent, type TestDatabase } from "./harness.ts";

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
  responses?: Record<string, { description: string; content: Record<string, Described> }>;
}

// The tests are made of what it says: it must be there before they are. Nothing asks this database anything.
const describing = createApp({ database: openDatabase(DATABASE_URL), logger: silent, reserveBatch: 1 });
const document = (await (
  await describing.handle(new Request("http://localhost/openapi/json"))
).json()) as Record<string, unknown> & { paths: Record<string, Record<string, Operation>> };

const operations = Object.entries(document.paths).flatMap(([path, methods]) =>
  Object.entries(methods).map(([method, described]) => ({
    ...{ title: `${method.toUpperCase()} ${path}`, method: method.toUpperCase(), path },
    ...{ parameters: [] as Parameter[], ...described, responses: described.responses ?? {} },
    body: described.requestBody?.content["application/json"],
    answers: Object.entries(described.responses ?? {}).flatMap(([status, { content }]) =>
      Object.entries(content).map(([type, answer]) => ({ status: Number(status), type, ...answer })),
    ),
  })),
);
type DescribedOperation = (typeof operations)[number];

const examples = operations.flatMap((operation) =>
  operation.answers.flatMap(({ status, type, schema, examples = {} }) =>
    Object.entries(examples).map(([name, { value }]) => ({
      ...{ operation, name, title: `${operation.title}: "${name}"`, status, type, schema, documented: value },
    })),
  ),
);
type Example = (typeof examples)[number];

const byTitle = operations.map((operation) => [operation.title, operation] as const);
const withBody = byTitle.filter(([, { body }]) => body);

/** What must look how, where a schema says nothing but a format's name. */
const FORMATS: Record<string, string> = {
  uuid: "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$",
  date: String.raw`^\d{4}-\d\d-\d\d$`,
  "date-time": String.raw`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,3})?(Z|[+-]\d\d:\d\d)$`,
};

/** A schema of the description as one that can check. Members that it does not name are faults in any object. */
function checkable({
  type,
  format,
  anyOf,
  items = {},
  properties = {},
  required = [],
  ...rules
}: Schema): TSchema {
  if (anyOf) return Type.Union(anyOf.map(checkable));
  if ("const" in rules) return Type.Literal(rules.const as string);
  switch (type) {
    case "null":
      return Type.Null();
    case "integer":
      return Type.Integer(rules);
    case "string": {
      if (format === undefined) return Type.String(rules);
      const pattern = FORMATS[format];
      if (pattern === undefined) throw new Error(`Cannot check the format ${format}`);
      return Type.String({ ...rules, pattern });
    }
    case "array":
      return Type.Array(checkable(items), rules);
    case "object": {
      const fields = Object.entries(properties).map(([name, schema]) => {
        const field = checkable(schema);
        return [name, required.includes(name) ? field : Type.Optional(field)] as const;
      });
      return Type.Object(Object.fromEntries(fields), { ...rules, additionalProperties: false });
    }
    default:
      throw new Error(`Cannot check the type ${type}`);
  }
}

function fits(schema: Schema, value: unknown): boolean {
  return Value.Check(checkable(schema), value);
}

function expectToFit(schema: Schema, value: unknown): void {
  expect(
    [...Value.Errors(checkable(schema), value)].map(({ path, message }) => `${path}: ${message}`),
  ).toEqual([]);
}

/** The parts of a request, each with its schema; undefined where its example leaves it out. */
function partsOf({ operation, name }: Example) {
  const { parameters, body } = operation;
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
    if (place === "path" && value === undefined)
      throw new Error(`${example.title} lacks the ${name} of its path`);
    if (value === undefined) continue;
    if (place === "path") path = path.replace(`{${name}}`, encodeURIComponent(String(value)));
    if (place === "query") query.set(name, String(value));
    if (place === "header") headers[name] = String(value);
    if (place === "body") body = JSON.stringify(value);
  }
  if (body !== undefined) headers["content-type"] = "application/json";
  return {
    path: query.size > 0 ? `${path}?${query}` : path,
    init: { method, headers, ...(body !== undefined && { body }) },
  };
}

/** The first example of an operation that gets what it asks for. */
function goodRequestOf(operation: DescribedOperation) {
  const example = examples.find((one) => one.operation === operation && one.status < 300);
  if (!example) throw new Error(`${operation.title} has no example of success`);
  return { ...requestOf(example), status: example.status };
}

function expectType(response: Response, type: string): void {
  expect(response.headers.get("content-type")?.split(";")[0]).toBe(type);
}

// What the examples speak of, as lib/routes.ts has it.
const PENDING = "01a20990-e435-753e-b29b-6ac429ed0c37";
const PROCESSING = "01a20990-e436-7a01-9c55-1f0c6e1b7d02";
const DONE = "01a20990-e437-7c44-8a3e-94b5f7a2c603";
const FAILED = "01a20990-e438-7e19-b7d0-2c8e5d3f9a04";
const CANCELLED = "01a20990-e439-71b2-a6f4-7d9c0b8e1505";
const GRANT = "01a20990-f00d-7b3a-8e21-5a6c4d2e1f06";
const SUBTRACTION = "01a20990-f011-7d52-b6c8-3e1f9a7b5c08";
const GIFT = "01a20990-f000-7000-8000-000000000001";
const TO_COME = new Date("2029-02-22T13:59:00.000Z");
const PAST = new Date("2026-01-31T15:00:00.000Z");
const LATER = new Date("2026-01-31T16:00:00.000Z");
const NEW_YEAR = new Date("2026-01-01T00:00:00.001Z");

const RESERVATIONS = [
  [PENDING, "PENDING", "order-41", TO_COME, TO_COME, 0, null],
  [PROCESSING, "PROCESSING", "order-51", PAST, LATER, 0, null],
  [DONE, "DONE", "order-31", PAST, null, 0, null],
  [FAILED, "FAILED", "order-32", PAST, null, 10, "The balance would be out of range"],
  [CANCELLED, "CANCELLED", "order-53", TO_COME, null, 0, null],
].map((row) => [...row, "TestUser01", 100, "summer-2029", PAST, PAST]);
const ENTRIES = [
  [GIFT, "direct:gift-0", 50, NEW_YEAR],
  [GRANT, "order-31", 100, PAST],
  [SUBTRACTION, "direct:refund-7", -20, LATER],
].map((row) => [...row, "TestUser01"]);
const BALANCES = [["TestUser01", 130, NEW_YEAR, LATER]];
const TOTALS = [
  ["2026-01-01", "add", "", 1, 50],
  ["2026-02-01", "grant", "summer-2029", 1, 100],
  ["2026-02-01", "sub", "", 1, -20],
].map((row) => [...row, 1, 1]);
const TABLES = ["point_reservations", "point_transactions", "point_root", "point_daily_totals"];

/** Values that the service makes anew, by their first place in the answer. Everything else must be as documented. */
const MADE: Record<string, string[]> = {
  'POST /point/reserve: "a key in the body"': ["/reservation_id"],
  'POST /point/reserve: "a key in the header, and a campaign"': ["/reservation_id"],
  'POST /point/reserve/bulk: "one of three is refused"': ["/results/0/reservation_id"],
  'POST /point/reserve/bulk: "all of them"': ["/results/0/reservation_id", "/results/1/reservation_id"],
  'PATCH /point/reservations/{id}: "another time and amount"': ["/updated_at"],
  'POST /point/reservations/{id}/retry: "it was FAILED"': ["/updated_at"],
};

/** Requests whose fate no schema can tell: it depends on what is there, or the example is about a broken part. */
const BEYOND_SCHEMA = [
  'POST /point/reserve/bulk: "one of three is refused"',
  'GET /users/{user_id}/transactions: "a cursor that is none"',
  'GET /point/totals: "the wrong order"',
  'PUT /point/sub: "more than there are"',
  'PUT /point/sub: "an unknown user"',
  'GET /point/confirm: "an unknown user"',
];

let db: TestDatabase;
let app: ReturnType<typeof appOn>;
beforeAll(async () => {
  db = await createTestDatabase();
  app = appOn(db.database);
}, 30_000);
afterAll(() => db?.drop(), 30_000);

/** One commit: there is a seed for each of many tests. */
async function seed(): Promise<void> {
  await db.database.transaction(async (connection) => {
    for (const table of TABLES) await connection.execute(`delete from ${table}`);
    await connection.execute(
      `insert into point_reservations (id, status, idempotency_key, execute_at, scan_at, attempts, last_error,
         user_id, point_amount, campaign, created_at, updated_at) values ?`,
      [RESERVATIONS],
    );
    await connection.execute(
      "insert into point_transactions (id, idempotency_key, point_amount, created_at, user_id) values ?",
      [ENTRIES],
    );
    await connection.execute("insert into point_root (user_id, point_num, created_at, updated_at) values ?", [
      BALANCES,
    ]);
    await connection.execute(
      "insert into point_daily_totals (day, kind, campaign, entries, points, users, generation) values ?",
      [TOTALS],
    );
    await connection.execute(
      "update point_aggregation a, point_aggregation_turns t set a.time_zone = 'Asia/Tokyo', t.aggregated_at = '2026-02-01'",
    );
  });
}

/** All that is stored. */
async function stored() {
  return Promise.all(TABLES.map((table) => db.query(`select * from ${table} order by 1`)));
}

/** The documented answer with what the service made where the example shows something else, and what it made. */
function withMade({ title, documented }: Example, answer: object) {
  let expected = JSON.stringify(documented);
  const made = (MADE[title] ?? []).map((place) => {
    const value = String(ValuePointer.Get(answer, place));
    // In all of its places: what is one id in the example must be one id in the answer.
    expected = expected.replaceAll(String(ValuePointer.Get(documented, place)), value);
    return value;
  });
  return { expected: JSON.parse(expected), made };
}

async function databaseTime(): Promise<number> {
  const [row] = await db.query<{ now: Date }>("select now(3) now");
  return Number(row?.now);
}

describe("the examples:", () => {
  beforeEach(seed);

  test("the state that they start from is one that the service can be in", async () => {
    expect(await compareSums(db.database)).toMatchObject({ balances: 130n, agree: true });
    const totals = () =>
      db.query("select day, kind, campaign, entries, points from point_daily_totals order by 1, 2");
    const documented = await totals();
    await db.query("delete from point_daily_totals");
    await aggregate(db.database, { timeZone: "Asia/Tokyo" });
    expect(await totals()).toEqual(documented);
  });

  test.each(examples.map((example) => [example.title, example.status, example] as const))(
    "%s is answered %d",
    async (title, status, example) => {
      const { operation, type, schema, documented } = example;
      expectToFit(schema, documented);
      const parts = partsOf(example);
      const isValid = parts.every(({ required, schema, value }) =>
        value === undefined ? !required : fits(schema, value),
      );
      // Who checks by the schemas before sending learns what the service would say, as far as schemas can tell.
      expect({ isValid }).toEqual({ isValid: (status !== 400) !== BEYOND_SCHEMA.includes(title) });

      const { path, init } = requestOf(example);
      const before = await stored();
      const startedAt = await databaseTime();
      const response = await app.send(path, init);
      const after = await stored();
      expect(response.status).toBe(status);
      expectType(response, type);
      const answer = (await response.json()) as object;
      expectToFit(schema, answer);

      const { expected, made } = withMade(example, answer);
      expect(answer).toEqual(expected);
      for (const value of made) {
        expect(JSON.stringify(before)).not.toContain(value);
        expect(JSON.stringify(after)).toContain(value);
        if (Date.parse(value)) expect(Date.parse(value)).toBeWithin(startedAt, (await databaseTime()) + 1);
      }
      expect(made).toEqual([...new Set(made)]);

      const changes = status < 300 && operation.method !== "GET" && example.name !== "the same again";
      expect({ changes: !Bun.deepEquals(after, before) }).toEqual({ changes });
    },
  );

  test("MADE and BEYOND_SCHEMA name only what is there", () => {
    const titles = examples.map(({ title }) => title);
    expect([...Object.keys(MADE), ...BEYOND_SCHEMA].filter((title) => !titles.includes(title))).toEqual([]);
  });
});

describe("the other refusals:", () => {
  /** Sends a request that succeeds but for what `init` says; the answer must be as its operation describes it. */
  async function expectRefusal(operation: DescribedOperation, status: number, init: RequestInit) {
    const good = goodRequestOf(operation);
    const headers = { ...(good.init.headers as Record<string, string>), ...init.headers };
    const response = await app.send(good.path, { ...good.init, ...init, headers });
    expect(response.status).toBe(status);
    await expectDescribed(operation, response);
  }

  async function expectDescribed({ answers }: DescribedOperation, response: Response) {
    const described = answers.find(({ status }) => status === response.status);
    if (!described) throw new Error(`${response.status} is not described`);
    expectType(response, described.type);
    expectToFit(described.schema, await response.json());
  }

  test.each(withBody)("%s answers 415, as described, to a body that is not JSON", async (_, operation) => {
    await expectRefusal(operation, 415, { headers: { "content-type": "text/plain" } });
  });

  test.each(withBody)(
    "%s takes a body of the size that it tells, and answers 413 to one more byte",
    async (_, operation) => {
      const [, size, unit] =
        /larger than (\d+) ([KM])iB/.exec(operation.responses[413]?.description ?? "") ?? [];
      const bytes = Number(size) * (unit === "M" ? 1024 * 1024 : 1024);
      await seed();
      const good = goodRequestOf(operation);
      const { body } = good.init as { body: string };
      const init = { ...good.init, body: body.padEnd(bytes) };
      expect((await app.send(good.path, init)).status).toBe(good.status);
      await expectRefusal(operation, 413, { body: body.padEnd(bytes + 1) });
    },
  );

  test.each(byTitle)("%s answers while MySQL is away what it describes for then", async (_, operation) => {
    const gone = () => Promise.reject(new DatabaseError("unavailable", "away"));
    const away: Database = { ...db.database, run: gone, transaction: gone };
    const { path, init, status } = goodRequestOf(operation);
    const response = await appOn(away).send(path, init);
    expect(response.status).toBe("503" in operation.responses ? 503 : status);
    await expectDescribed(operation, response);
  });
});

describe("the description", () => {
  const KNOWN = [400, 404, 408, 409, 413, 415, 422, 500, 503];

  test("is OpenAPI 3 and says what it is of", () => {
    expect(document).toMatchObject({
      openapi: expect.stringMatching(/^3\.[01]\.\d+$/),
      info: { title: "pointservice", version: expect.stringMatching(/^\d+\.\d+\.\d+/) },
    });
    const ids = operations.map(({ operationId }) => operationId);
    expect(ids).toEqual(ids.filter((id, index) => /^\w[\w-]*$/.test(id) && ids.indexOf(id) === index));
    expect(JSON.stringify(document)).not.toContain('"$ref"');
  });

  test("has each route of the app, and nothing that is none", () => {
    const routes = describing.routes
      .filter(({ path }) => !path.startsWith("/openapi"))
      .map(({ method, path }) => `${method} ${path.replace(/:(\w+)/g, "{$1}")}`);
    expect(routes.length).toBeGreaterThan(10);
    expect(operations.map(({ title }) => title).toSorted()).toEqual(routes.toSorted());
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

  describe.each(byTitle)("of %s", (_, { path, method, summary, description, parameters, body, ...rest }) => {
    test("has a summary, a description, and words for each parameter and answer", () => {
      expect(summary).toMatch(/^[A-Z].{5,60}[^.]$/);
      expect(description).toMatch(/^[A-Z1`].{20,}\.$/);
      // A list of what it may be says enough.
      const wordless = parameters.filter(({ description, schema }) => !description && !schema.anyOf);
      expect(wordless).toEqual([]);
      for (const { description } of Object.values(rest.responses)) expect(description).toMatch(/\w{3}/);
    });

    test("demands each parameter of its path, and has no other there", () => {
      const inPath = parameters.filter((parameter) => parameter.in === "path");
      const names = [...path.matchAll(/\{(\w+)\}/g)].map(([, name]) => name as string);
      expect(inPath.map(({ name }) => name)).toEqual(names);
      expect(inPath.every(({ required }) => required)).toBe(true);
    });

    test("gives each example one name, which its request and its answer share", () => {
      const answered = rest.answers.flatMap(({ examples = {} }) => Object.keys(examples));
      expect(answered).toEqual([...new Set(answered)]);
      const asked = [...parameters, ...(body ? [body] : [])].flatMap(({ examples = {} }) =>
        Object.keys(examples),
      );
      expect(asked.filter((name) => !answered.includes(name))).toEqual([]);
    });

    test("has an example of each answer but those to any body, or any request, alike", () => {
      const without = rest.answers
        .filter(({ examples, type }) => !examples && type !== "text/csv")
        .map(({ status }) => status);
      expect(without.filter((status) => ![408, 413, 415, 500, 503].includes(status))).toEqual([]);
      expect(rest.answers.some(({ status }) => status < 300)).toBe(true);
    });

    test("refuses with statuses that are known, and with all that what it takes calls for", () => {
      const refusals = rest.answers.filter(({ status }) => status >= 300);
      expect(refusals.filter(({ type }) => type !== "application/problem+json")).toEqual([]);
      const statuses = refusals.map(({ status }) => status);
      expect(statuses.filter((status) => !KNOWN.includes(status))).toEqual([]);
      const takesKey = parameters.some(({ name }) => name === "Idempotency-Key");
      const calls: [boolean, number][] = [
        [parameters.length > 0 || body !== undefined, 400],
        [body !== undefined, 408],
        [body !== undefined, 413],
        [body !== undefined, 415],
        [takesKey, 422],
        [path.includes("{id}"), 404],
        [path.includes("{id}") && method !== "GET", 409],
      ];
      for (const [isCalled, status] of calls) {
        // Others have a 404 too: users and campaigns that are not known.
        if (isCalled || status !== 404)
          expect([status, statuses.includes(status)]).toEqual([status, isCalled]);
      }
    });

    test("puts a limit on everything that it takes", () => {
      const taken = parameters.map(({ name, schema }) => ({ name, schema }));
      for (const { name, schema } of [...taken, ...(body ? [{ name: "body", schema: body.schema }] : [])]) {
        expect(unlimitedIn(schema, name)).toEqual([]);
      }
    });
  });

  /** The parts of a schema that take any length, any number or any member. */
  function unlimitedIn(schema: Schema, place: string): string[] {
    const { type, anyOf, items, properties = {}, additionalProperties, maxItems } = schema;
    if (anyOf) return anyOf.flatMap((one) => unlimitedIn(one, place));
    switch (type) {
      case "integer":
        return fits(schema, Number.MAX_SAFE_INTEGER) || fits(schema, Number.MIN_SAFE_INTEGER) ? [place] : [];
      case "array":
        return [...(maxItems === undefined ? [place] : []), ...unlimitedIn(items ?? {}, `${place}[]`)];
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
    const bodyOf = (title: string) => {
      const schema = operations.find((operation) => operation.title === title)?.body?.schema;
      return { ...schema?.properties };
    };
    const points = { minimum: 1, maximum: 2_147_483_647 };
    const reservation = {
      user_id: { pattern: "^[A-Za-z0-9]{1,20}$" },
      point_amount: points,
      execute_at: { format: "date-time" },
      idempotency_key: { pattern: "^[A-Za-z0-9_-]{1,100}$" },
      campaign: { pattern: "^[A-Za-z0-9_-]{1,64}$" },
    };
    const change = {
      user_id: reservation.user_id,
      point_num: points,
      idempotency_key: reservation.idempotency_key,
    };
    expect(bodyOf("POST /point/reserve")).toMatchObject(reservation);
    expect(bodyOf("POST /point/reserve/bulk").reservations).toMatchObject({
      minItems: 1,
      maxItems: 10_000,
      items: { properties: reservation },
    });
    expect(bodyOf("PATCH /point/reservations/{id}")).toMatchObject({
      execute_at: reservation.execute_at,
      point_amount: points,
    });
    for (const title of ["PUT /point/add", "PUT /point/sub"]) expect(bodyOf(title)).toMatchObject(change);
  });

  test("is there for people too, at /openapi", async () => {
    const response = await app.send("/openapi");
    expect(response.status).toBe(200);
    expectType(response, "text/html");
    expect(await response.text()).toContain("openapi/json");
  });
});
