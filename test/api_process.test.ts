import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { connect, createServer } from "node:net";
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
      "Cannot start as DATABASE_URL must be like mysql://user:password@host:3306/database: it is not set",
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

  test("lives before MySQL does: /health answers, all else is 503 until MySQL is there", async () => {
    const [mysql, port] = (await freePorts(2)) as [number, number];
    const away = new URL(db.url);
    const target = { hostname: away.hostname, port: Number(away.port || 3306) };
    away.hostname = "127.0.0.1";
    away.port = String(mysql);
    const url = `http://127.0.0.1:${port}`;
    await withApi(
      { DATABASE_URL: away.href, PORT: String(port) },
      async (service) => {
        await until("it says so", () => service.log().some(({ msg }) => msg === "waiting for MySQL"));
        for (const path of ["/", "/health", "/health/"]) {
          expect(await (await fetch(url + path)).json()).toEqual({ messages: ["ok"] });
        }
        for (const response of [
          await fetch(`${url}/ready`),
          await fetch(`${url}/point/reserve`, post(bodyOf())),
        ]) {
          expect(response.status).toBe(503);
          expect(response.headers.get("content-type")).toBe("application/problem+json");
          expect(response.headers.get("retry-after")).toBe("1");
        }
        const forwarder = createServer((client) => {
          const server = connect(target.port, target.hostname);
          client.pipe(server).pipe(client);
          for (const socket of [client, server]) socket.on("error", () => socket.destroy());
        }).listen(mysql, "127.0.0.1");
        await until("it is ready", async () => (await fetch(`${url}/ready`)).status === 200);
        expect((await fetch(`${url}/point/reserve`, post(bodyOf()))).status).toBe(201);
        expect(await service.kill("SIGTERM")).toBe(0);
        forwarder.close();
      },
      { waitForPort: false },
    );
  }, 30_000);

  test.each([
    ["GET /health HTTP/1.0", "200 OK", '{"messages":["ok"]}'],
    ["GET /nope HTTP/1.0", "404 Not Found", "route not found"],
    ["GET /health HTTP/1.1\r\nHost: api", "200 OK", '{"messages":["ok"]}'],
    ["GET /users/Nobody/points HTTP/1.1\r\nHost: x", "404 Not Found", "user not found"],
    ["GET /health HTTP/1.1\r\nHost: %", "400 Bad Request", "host is invalid"],
    ["DELETE /health HTTP/1.1\r\nHost: ab", "405 Method Not Allowed", "method not allowed"],
  ])("answers %j with %s, and shows nothing of the inside", (head, status, body) =>
    withApi({}, async ({ url }) => {
      const answer = await sendRaw(url, `${head}\r\nConnection: close\r\n\r\n`);
      expect(answer).toStartWith(`HTTP/1.1 ${status}\r\n`);
      expect(answer).toContain(body);
      expect(answer).not.toContain(".ts");
    }),
  );

  test("takes a body that breaks off for the client's own affair", () =>
    withApi({}, async (service) => {
      const head =
        "POST /point/reserve HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100";
      await sendRaw(service.url, `${head}\r\n\r\n{`, { hangUp: true });
      expect((await fetch(`${service.url}/health`)).status).toBe(200);
      expect(await service.kill("SIGTERM")).toBe(0);
      expect(service.log().filter(({ level }) => level === "error" || level === "warn")).toEqual([]);
    }));

  /** Sends bytes as they are; the answer, or what came of it before we hung up. */
  function sendRaw(url: string, text: string, { hangUp = false } = {}): Promise<string> {
    const { hostname, port } = new URL(url);
    const { promise, resolve } = Promise.withResolvers<string>();
    const socket = connect(Number(port), hostname, () => {
      socket.write(text, () => hangUp && setTimeout(() => socket.destroy(), 50));
    });
    let answer = "";
    socket.on("data", (bytes) => {
      answer += bytes;
    });
    socket.on("error", () => undefined);
    socket.on("close", () => resolve(answer));
    return promise;
  }

  /** Does `work` while an uncommitted row of the same key keeps a request's INSERT waiting; then that row goes. */
  async function whileInsertWaits(
    { url }: RunningService,
    key: string,
    work: (answer: Promise<Response>, hangUp: () => void) => Promise<void>,
  ) {
    const client = new AbortController();
    await db.database
      .transaction(async ({ execute }) => {
        await execute(
          "insert into point_reservations (id, user_id, point_amount, execute_at, scan_at, idempotency_key) values (?, 'a', 1, now(3), now(3), ?)",
          [key.slice(0, 36), key],
        );
        const request = { ...post(bodyOf({ idempotency_key: key })), signal: client.signal };
        const answer = fetch(`${url}/point/reserve`, request);
        await until("the INSERT waits", async () => {
          const [waiting] = await db.query(
            "select id from information_schema.processlist where db = ? and info like 'insert into point_reservations%' and id <> connection_id()",
            [db.name],
          );
          return waiting;
        });
        await work(answer, () => client.abort());
        throw new Error("roll back");
      })
      .catch((error) => expect(error.message).toBe("roll back"));
  }

  function findByKey(key: string) {
    return db.query<{ id: string; user_id: string }>(
      "select id, user_id from point_reservations where idempotency_key = ?",
      [key],
    );
  }

  test("reserves all the same where the client has gone meanwhile, and the same key finds it", () =>
    withApi({}, async (service) => {
      const key = uniqueName("key");
      await whileInsertWaits(service, key, async (answer, hangUp) => {
        hangUp();
        await expect(answer).rejects.toThrow("abort");
      });
      const [row] = await until("it is reserved", async () => {
        const rows = await findByKey(key);
        return rows.length > 0 && rows;
      });
      const again = await fetch(`${service.url}/point/reserve`, post(bodyOf({ idempotency_key: key })));
      expect(again.headers.get("idempotent-replayed")).toBe("true");
      expect(await again.json()).toMatchObject({ reservation_id: row?.id });
      expect(await findByKey(key)).toHaveLength(1);
      expect(service.log().filter(({ level }) => level === "error" || level === "warn")).toEqual([]);
    }));

  test.each(["SIGTERM", "SIGINT"] as const)(
    "ends with 0 at %s, and an open request still gets its answer",
    (signal) =>
      withApi({}, async (service) => {
        const key = uniqueName("key");
        let answered: Promise<Response> | undefined;
        let exited: Promise<number | null> | undefined;
        await whileInsertWaits(service, key, async (answer) => {
          answered = answer;
          exited = service.kill(signal);
          await until("it stops", () => service.log().some(({ msg }) => msg === "stopping"));
        });
        expect((await answered)?.status).toBe(201);
        expect(await exited).toBe(0);
        expect(service.log().at(-1)).toMatchObject({ msg: "stopped" });
        expect(await findByKey(key)).toMatchObject([{ user_id: "TestUser01" }]);
      }),
    30_000,
  );

  test.each(["Asia/Tokyo", "America/New_York", "UTC"])(
    "stores and tells the right UTC time on a host in %s (fault 7)",
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
