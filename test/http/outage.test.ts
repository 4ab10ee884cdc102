import { afterAll, describe, expect, test } from "bun:test";
import { validate } from "uuid";
import { type Database, openDatabase } from "../../lib/database.ts";
import { freePorts } from "../../lib/dev/servers.ts";
import { openTestDatabase } from "../harness/database.ts";
import { until } from "../harness/harness.ts";
import { appOn, bodyOf, expectProblem, post } from "./client.ts";

const SECRET = "S3cretUser";
const ID = "01890a5d-ac96-774b-bcce-b302099a8057";
const REQUESTS: [string, RequestInit?][] = [
  ["/point/reserve", post(bodyOf({ user_id: SECRET }))],
  [`/users/${SECRET}/points`],
  [`/point/reservations/${ID}`],
];

const db = await openTestDatabase();
const notMigrated = await openTestDatabase({ migrated: false });
const silentServer = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
afterAll(() => silentServer.stop(true));

/** A database that gives up soon. */
function openAt(url: string): Database {
  const database = openDatabase(url, { acquireMs: 300 });
  afterAll(() => database.close());
  return database;
}

/**
 * Checks that each request gets this problem, with a request id. The log has more under it, but no parameters: of all 500s,
 * of 503s only once a second and kind.
 */
async function expectAll({ send, log }: ReturnType<typeof appOn>, status: number, sentence: string) {
  const responses = await Promise.all(REQUESTS.map(([path, init]) => send(path, init)));
  const ids: unknown[] = [];
  for (const response of responses) {
    expect(response.headers.get("retry-after")).toBe(status === 503 ? "1" : null);
    const { request_id, detail } = await expectProblem(response, status, [sentence]);
    expect(detail).not.toContain("secret");
    expect(validate(request_id)).toBe(true);
    expect(response.headers.get("x-request-id")).toBe(request_id as string);
    ids.push(request_id);
  }
  const logged = log.map(({ requestId }) => requestId);
  expect(ids).toEqual(expect.arrayContaining(logged));
  expect(logged.length).toBeWithin(status === 503 ? 1 : responses.length, responses.length + 1);
  for (const parameter of [SECRET, ID, "2029-02-22"]) expect(JSON.stringify(log)).not.toContain(parameter);
}

describe("createApp() answers 503 with a request id, and shows no parameter,", () => {
  test.each<[string, () => Promise<string> | string]>([
    ["nobody listens", async () => `mysql://u:${SECRET}@127.0.0.1:${await freePorts(1)}/d`],
    ["MySQL says nothing", () => `mysql://u:${SECRET}@127.0.0.1:${silentServer.port}/d`],
  ])("if %s", async (_, urlOf) => {
    const app = appOn(openAt(await urlOf()));
    await expectAll(app, 503, "service is unavailable");
    expect((await app.send("/health")).status).toBe(200);
  });

  test("if the tables are gone, as in a restore", async () => {
    await expectAll(appOn(notMigrated.database), 503, "service is unavailable");
  });

  test("if more requests wait than may, and still serves those that wait", async () => {
    const { promise: gate, resolve: open } = Promise.withResolvers<void>();
    const run: Database["run"] = (work, options) => gate.then(() => db.database.run(work, options));
    const slow = appOn({ ...db.database, run });
    const refused: Response[] = [];
    const answers = Array.from({ length: 11_000 }, async () => {
      const response = await slow.send("/point/reserve", post(bodyOf()));
      if (response.status !== 201) refused.push(response);
      return response.status;
    });
    // 10,000 may wait, beside those of the INSERT that is under way: 500 at most.
    await until("the requests over the limit are refused", () => refused.length >= 500);
    open();
    const served = (await Promise.all(answers)).filter((status) => status === 201);
    expect(served.length).toBeWithin(10_000, 10_501);
    for (const response of refused) {
      expect(response.headers.get("retry-after")).toBe("1");
      await expectProblem(response, 503, ["service is unavailable"]);
    }
  }, 20_000);
});

test("createApp() answers an unforeseen error with 500 and a request id, without its text", async () => {
  const fail = () => Promise.reject(new Error("secret select"));
  const broken = appOn({ ...db.database, run: fail, transaction: fail });
  await expectAll(broken, 500, "internal error");
  expect(broken.log[0]).toMatchObject({ level: 50, error: { message: "secret select" } });
});
