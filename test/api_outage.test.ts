import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { validate } from "uuid";
import { type Database, openDatabase } from "../lib/database.ts";
import { freePorts } from "../lib/dev/servers.ts";
import { appOn, bodyOf, expectProblem, post } from "./api_client.ts";
import { createTestDatabase, type TestDatabase, until } from "./harness.ts";

let db: TestDatabase;
beforeAll(async () => {
  db = await createTestDatabase();
});
afterAll(() => db.drop());

describe("where MySQL is away, the app", () => {
  const secret = "S3cretUser";
  const paths = [`/users/${secret}/points`, "/point/reservations/01890a5d-ac96-774b-bcce-b302099a8057"];

  /** Checks that everything that needs MySQL is 503 with a request id that the log has too, and that nothing leaks. */
  async function expectUnavailable({ send, log }: ReturnType<typeof appOn>) {
    await expectUnready(await send("/ready"));
    const requests = [
      send("/point/reserve", post(bodyOf({ user_id: secret }))),
      ...paths.map((path) => send(path)),
    ];
    for (const response of await Promise.all(requests)) {
      expect(response.headers.get("retry-after")).toBe("1");
      const { request_id } = await expectProblem(response, 503, ["service is unavailable"]);
      expect(validate(request_id)).toBe(true);
      expect(response.headers.get("x-request-id")).toBe(request_id as string);
      expect(log.filter(({ requestId }) => requestId === request_id)).toHaveLength(1);
    }
    const logged = JSON.stringify(log);
    for (const parameter of [secret, "01890a5d", "2029-02-22"]) expect(logged).not.toContain(parameter);
    expect((await send("/health")).status).toBe(200);
  }

  async function expectUnready(response: Response) {
    expect(response.headers.get("retry-after")).toBe("1");
    await expectProblem(response, 503, ["not ready"]);
  }

  async function withAway(url: string, work: (away: ReturnType<typeof appOn>) => Promise<void>) {
    const database = openDatabase(url, { acquireMs: 300 });
    await work(appOn(database)).finally(() => database.close());
  }

  test("answers 503 with a request id while nobody listens", async () => {
    await withAway(`mysql://u:S3cretUser@127.0.0.1:${await freePorts(1)}/d`, expectUnavailable);
  });

  test("answers 503 with a request id while the server takes connections and says nothing", async () => {
    const server = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
    await withAway(`mysql://u:S3cretUser@127.0.0.1:${server.port}/d`, expectUnavailable).finally(() =>
      server.stop(true),
    );
  }, 10_000);

  test("answers /ready within the patience of a probe, however long MySQL takes", async () => {
    const hanging = appOn({ ...db.database, run: () => new Promise<never>(() => {}) });
    const startedAt = performance.now();
    await expectUnready(await hanging.send("/ready"));
    expect(performance.now() - startedAt).toBeLessThan(3_000);
  }, 10_000);

  test("answers 503 with a request id while the tables are gone, as in a restore", async () => {
    const empty = await createTestDatabase({ migrated: false });
    const gone = appOn(empty.database);
    const init = post(bodyOf({ user_id: secret }));
    const responses = await Promise.all([
      gone.send("/point/reserve", init),
      ...paths.map((path) => gone.send(path)),
    ]);
    await empty.drop();
    for (const response of responses) await expectProblem(response, 503, ["service is unavailable"]);
    expect(gone.log).toHaveLength(3);
    expect(JSON.stringify(gone.log)).not.toMatch(/S3cretUser|01890a5d/);
  });

  test("answers 503 to those who would wait too long, and still serves those who wait", async () => {
    const { promise: gate, resolve: open } = Promise.withResolvers<undefined>();
    const slow = appOn({ ...db.database, run: (work) => gate.then(() => db.database.run(work)) });
    let refused = 0;
    const answers = Array.from({ length: 11_000 }, async () => {
      const response = await slow.send("/point/reserve", post(bodyOf()));
      if (response.status === 201) return 201;
      refused++;
      expect(response.headers.get("retry-after")).toBe("1");
      await expectProblem(response, 503, ["service is unavailable"]);
      return 503;
    });
    // 10,000 may wait, beside those of the INSERT that is under way: 500 at most.
    await until("those who are too many are refused", () => refused >= 500);
    open(undefined);
    const statuses = await Promise.all(answers);
    expect(statuses.filter((status) => status === 201).length).toBeWithin(10_000, 10_501);
    expect(statuses.filter((status) => status === 503)).toHaveLength(refused);
  }, 20_000);
});

describe("an unforeseen error", () => {
  const broken: Database = {
    run: () => Promise.reject(new Error("secret select")),
    transaction: () => Promise.reject(new Error("secret select")),
    close: async () => {},
  };

  test.each<[string, RequestInit]>([
    ["/point/reserve", post(bodyOf())],
    ["/users/TestUser01/points", {}],
    ["/point/reservations/01890a5d-ac96-774b-bcce-b302099a8057", {}],
  ])("at %s is 500 with a request id that the log has too, and without its text", async (path, init) => {
    const { send, log } = appOn(broken);
    const response = await send(path, init);
    const { request_id, detail } = await expectProblem(response, 500, ["internal error"]);
    expect(detail).not.toContain("secret");
    expect(validate(request_id)).toBe(true);
    expect(response.headers.get("x-request-id")).toBe(request_id as string);
    expect(log).toHaveLength(1);
    expect(log[0]).toMatchObject({ requestId: request_id, error: { message: "secret select" } });
  });
});
