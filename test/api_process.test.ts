import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { freePorts } from "../lib/dev/servers.ts";
import { bodyOf, post } from "./api_client.ts";
import {
  createTestDatabase,
  type RunningService,
  startService,
  type TestDatabase,
  uniqueName,
  until,
} from "./harness.ts";

let db: TestDatabase;
beforeAll(async () => {
  db = await createTestDatabase();
});
afterAll(() => db.drop());

describe("bun run api.ts", () => {
  /** Starts it, gives it to `work`, and ends it whatever happened. */
  async function withApi(
    env: Record<string, string>,
    work: (service: RunningService) => Promise<void>,
    options?: { waitForPort: boolean },
  ) {
    const service = await startService("api", { DATABASE_URL: db.url, ...env }, options);
    await work(service).finally(() => service.kill("SIGKILL"));
  }

  async function expectFatal(env: Record<string, string>, line: string) {
    await withApi(
      env,
      async (service) => {
        expect(await service.exited).toBe(1);
        const [only] = await until("the log has its line", () => service.log().length > 0 && service.log());
        expect(service.log()).toHaveLength(1);
        expect(only).toMatchObject({ level: "fatal", msg: line });
        expect(only?.error).toBeUndefined();
      },
      { waitForPort: false },
    );
  }

  test("exits 1 with one clear line where its port is taken", async () => {
    await withApi({}, async ({ url }) => {
      const { port } = new URL(url);
      await expectFatal({ PORT: port }, `Cannot listen on 127.0.0.1:${port}: the port is taken`);
      expect((await fetch(`${url}/health`)).status).toBe(200);
    });
  }, 20_000);

  test.each([
    ["PORT", "http", 'Cannot start as PORT must be a whole number from 0 to 65535: received "http"'],
    [
      "RESERVE_BATCH",
      "0",
      'Cannot start as RESERVE_BATCH must be a whole number from 1 to 5000: received "0"',
    ],
    [
      "DATABASE_URL",
      "",
      "Cannot start as DATABASE_URL must be like mysql://user:password@host:3306/database: is not set",
    ],
    [
      "DATABASE_URL",
      "mysql://u:s3/cret@h/d",
      "Cannot start as DATABASE_URL must be like mysql://user:password@host:3306/database: received a value that is no URL (not shown, it may hold a password)",
    ],
  ])(
    "exits 1 with one clear line at %s=%p",
    (name, value, line) => expectFatal({ [name]: value }, line),
    20_000,
  );

  test("waits for a MySQL that is not there, saying so without the password, and can be stopped meanwhile", async () => {
    const url = `mysql://u:S3cret@127.0.0.1:${await freePorts(1)}/d`;
    await withApi(
      { DATABASE_URL: url },
      async (service) => {
        await until(
          "it says so",
          () => service.log().filter(({ msg }) => msg === "waiting for MySQL").length >= 2,
        );
        expect(await service.kill("SIGTERM")).toBe(0);
        expect(JSON.stringify(service.log())).not.toContain("S3cret");
      },
      { waitForPort: false },
    );
  }, 20_000);

  test.each(["SIGTERM", "SIGINT"] as const)(
    "ends with 0 at %s, and an open request still gets its answer",
    (signal) =>
      withApi({}, async (service) => {
        const key = uniqueName("key");
        let answer: Promise<Response> | undefined;
        let exited: Promise<number | null> | undefined;
        // An uncommitted row of the same key keeps the request's INSERT waiting.
        await db.database
          .transaction(async ({ execute }) => {
            await execute(
              "insert into point_reservations (id, user_id, point_amount, execute_at, scan_at, idempotency_key) values (?, 'a', 1, now(3), now(3), ?)",
              [key.slice(0, 36), key],
            );
            answer = fetch(`${service.url}/point/reserve`, post(bodyOf({ idempotency_key: key })));
            await until("the INSERT waits", async () => {
              const [waiting] = await db.query(
                "select id from information_schema.processlist where db = ? and info like 'insert into point_reservations%' and id <> connection_id()",
                [db.name],
              );
              return waiting;
            });
            exited = service.kill(signal);
            await until("it stops", () => service.log().some(({ msg }) => msg === "stopping"));
            throw new Error("roll back");
          })
          .catch((error) => expect(error.message).toBe("roll back"));
        expect((await answer)?.status).toBe(201);
        expect(await exited).toBe(0);
        expect(service.log().at(-1)).toMatchObject({ msg: "stopped" });
        expect(
          await db.query("select user_id from point_reservations where idempotency_key = ?", [key]),
        ).toEqual([{ user_id: "TestUser01" }]);
      }),
    30_000,
  );

  test.each(["Asia/Tokyo", "America/New_York", "UTC"])(
    "stores and tells the right UTC time on a host in %s",
    (TZ) =>
      withApi({ TZ }, async ({ url }) => {
        const response = await fetch(`${url}/point/reserve`, post(bodyOf()));
        const body = (await response.json()) as Record<string, string>;
        expect(body.execute_at).toBe("2029-02-22T13:59:00.000Z");
        const [row] = await db.query(
          "select cast(execute_at as char) at, cast(scan_at as char) scan from point_reservations where id = ?",
          [body.reservation_id],
        );
        expect(row).toEqual({ at: "2029-02-22 13:59:00.000", scan: "2029-02-22 13:59:00.000" });
        const story = await (await fetch(`${url}${response.headers.get("location")}`)).json();
        expect(story).toMatchObject({
          execute_at: "2029-02-22T13:59:00.000Z",
          next_scan_at: "2029-02-22T13:59:00.000Z",
        });
        const createdAt = Date.parse((story as { created_at: string }).created_at);
        expect(Math.abs(createdAt - Date.now())).toBeLessThan(60_000);
      }),
    20_000,
  );
});
