import { afterAll, describe, expect, test } from "bun:test";
import { connect } from "node:net";
import { freePorts } from "../../lib/dev/servers.ts";
import { openTestDatabase } from "../harness/database.ts";
import { uniqueName, until } from "../harness/harness.ts";
import { type RunningService, startService } from "../harness/processes.ts";
import { startProxy } from "../harness/proxy.ts";
import { bodyOf, expectProblem, post } from "./client.ts";

const db = await openTestDatabase();
const shared = await startService("api", { DATABASE_URL: db.url });
afterAll(() => shared.kill("SIGKILL"));

/** Starts a process of its own, and ends it whatever happens. */
async function withApi<T>(
  env: Record<string, string>,
  work: (service: RunningService) => Promise<T>,
  { waitForPort = true } = {},
): Promise<T> {
  const service = await startService("api", { DATABASE_URL: db.url, ...env }, { waitForPort });
  return work(service).finally(() => service.kill("SIGKILL"));
}

function messagesOf(service: RunningService): unknown[] {
  return service.log().map(({ msg }) => msg);
}

function complaintsOf(service: RunningService) {
  return service.log().filter(({ level }) => level === "error" || level === "warn");
}

/** Sends bytes as they are; `hangUp` ends the connection after them. */
function sendRaw(url: string, text: string, { hangUp = false } = {}): Promise<string> {
  const { hostname, port } = new URL(url);
  const { promise, resolve } = Promise.withResolvers<string>();
  let answer = "";
  const socket = connect(Number(port), hostname, () => (hangUp ? socket.end(text) : socket.write(text)));
  socket.on("data", (bytes) => {
    answer += bytes;
  });
  socket.on("error", () => undefined);
  socket.on("close", () => resolve(answer));
  return promise;
}

test("api.ts exits 1 with one clear line if its port is taken or a setting is wrong", async () => {
  const { port } = new URL(shared.url);
  for (const [PORT, msg] of [
    [port, `Cannot listen on 127.0.0.1:${port}: the port is taken`],
    ["http", 'Cannot start as PORT must be a whole number from 0 to 65535: received "http"'],
  ] as const) {
    await withApi(
      { PORT },
      async (service) => {
        expect(await service.exited).toBe(1);
        expect(service.log()).toMatchObject([{ level: "fatal", msg }]);
        expect(service.log()[0]?.error).toBeUndefined();
      },
      { waitForPort: false },
    );
  }
}, 20_000);

describe("api.ts starts", () => {
  test("before MySQL does: it says so without the password, and can be stopped meanwhile", async () => {
    const url = `mysql://u:S3cret@127.0.0.1:${await freePorts(1)}/d`;
    const log = await withApi(
      { DATABASE_URL: url },
      async (service) => {
        await until("it waits", () => messagesOf(service).includes("waiting for MySQL"));
        expect(await service.kill("SIGTERM")).toBe(0);
        return service.log();
      },
      { waitForPort: false },
    );
    expect(JSON.stringify(log)).not.toContain("S3cret");
  }, 20_000);

  test("before MySQL does: /health answers, all else is 503 until MySQL is there", async () => {
    const proxy = await startProxy(db.url, { serving: false });
    const [port] = await freePorts(1);
    const url = `http://127.0.0.1:${port}`;
    const reserve = () => fetch(`${url}/point/reserve`, post(bodyOf()));
    await withApi(
      { DATABASE_URL: proxy.url, PORT: String(port) },
      async (service) => {
        await until("it waits", () => messagesOf(service).includes("waiting for MySQL"));
        for (const path of ["/", "/health", "/health/"]) {
          expect(await (await fetch(url + path)).json()).toEqual({ messages: ["ok"] });
        }
        for (const response of [await fetch(`${url}/ready`), await reserve()]) {
          expect(response.headers.get("retry-after")).toBe("1");
          await expectProblem(response, 503, ["not ready"]);
        }
        await proxy.serve();
        await until("it is ready", async () => (await fetch(`${url}/ready`)).status === 200);
        expect((await reserve()).status).toBe(201);
      },
      { waitForPort: false },
    ).finally(() => proxy.close());
  }, 30_000);
});

describe("api.ts answers", () => {
  test.each([
    ["GET /health HTTP/1.0", "200 OK", '{"messages":["ok"]}'],
    ["GET /nope HTTP/1.0", "404 Not Found", "route not found"],
    ["GET /health HTTP/1.1\r\nHost: api", "200 OK", '{"messages":["ok"]}'],
    ["GET /users/Nobody/points HTTP/1.1\r\nHost: x", "404 Not Found", "user not found"],
    ["GET /health HTTP/1.1\r\nHost: %", "400 Bad Request", "host is invalid"],
    ["DELETE /health HTTP/1.1\r\nHost: ab", "405 Method Not Allowed", "method not allowed"],
  ])("%j with %s, and shows nothing of the inside", async (head, status, body) => {
    const answer = await sendRaw(shared.url, `${head}\r\nConnection: close\r\n\r\n`);
    expect(answer).toStartWith(`HTTP/1.1 ${status}\r\n`);
    expect(answer).toContain(body);
    expect(answer).not.toContain(".ts");
  });

  test("others after a body that broke off, and logs nothing of it", async () => {
    const head =
      "POST /point/reserve HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100";
    await sendRaw(shared.url, `${head}\r\n\r\n{`, { hangUp: true });
    expect((await fetch(`${shared.url}/health`)).status).toBe(200);
    expect(complaintsOf(shared)).toEqual([]);
  });
});

/** Does `work` while an uncommitted row of the same key keeps a request's INSERT waiting; then that row goes. */
async function whileInsertWaits(
  { url }: RunningService,
  key: string,
  work: (answer: Promise<Response>, hangUp: () => void) => Promise<void>,
): Promise<void> {
  const client = new AbortController();
  const blocked = db.database.transaction(async ({ execute }) => {
    await execute(
      `insert into point_reservations (id, user_id, point_amount, execute_at, scan_at, idempotency_key)
       values (?, 'a', 1, now(3), now(3), ?)`,
      [crypto.randomUUID(), key],
    );
    const request = { ...post(bodyOf({ idempotency_key: key })), signal: client.signal };
    const answer = fetch(`${url}/point/reserve`, request);
    await until("the INSERT waits", async () => {
      const [waiting] = await db.query(
        "select id from information_schema.processlist where db = ? and info like '/* create_reservations */%'",
        [db.name],
      );
      return waiting;
    });
    await work(answer, () => client.abort());
    throw new Error("roll back");
  });
  await expect(blocked).rejects.toThrow("roll back");
}

function findByKey(key: string) {
  return db.query<{ id: string; user_id: string }>(
    "select id, user_id from point_reservations where idempotency_key = ?",
    [key],
  );
}

test("api.ts reserves even if the client has gone, and the same key finds the reservation", async () => {
  const key = uniqueName("key");
  await whileInsertWaits(shared, key, async (answer, hangUp) => {
    hangUp();
    await expect(answer).rejects.toThrow("abort");
  });
  const [row] = await until("it is reserved", async () => {
    const rows = await findByKey(key);
    return rows.length > 0 && rows;
  });
  const again = await fetch(`${shared.url}/point/reserve`, post(bodyOf({ idempotency_key: key })));
  expect(again.headers.get("idempotent-replayed")).toBe("true");
  expect(await again.json()).toMatchObject({ reservation_id: row?.id });
  expect(complaintsOf(shared)).toEqual([]);
});

test.each(["SIGTERM", "SIGINT"] as const)(
  "api.ts exits 0 at %s, and first answers an open request",
  (signal) =>
    withApi({}, async (service) => {
      const key = uniqueName("key");
      let answered: Promise<Response> | undefined;
      let exited: Promise<number | null> | undefined;
      await whileInsertWaits(service, key, async (answer) => {
        answered = answer;
        exited = service.kill(signal);
        await until("it stops", () => messagesOf(service).includes("stopping"));
      });
      expect((await answered)?.status).toBe(201);
      expect(await exited).toBe(0);
      expect(messagesOf(service).at(-1)).toBe("stopped");
      expect(await findByKey(key)).toMatchObject([{ user_id: "TestUser01" }]);
    }),
  30_000,
);

test.each(["Asia/Tokyo", "America/New_York"])(
  "api.ts stores and shows times in UTC on a host in %s (fault 7)",
  (TZ) =>
    withApi({ TZ }, async ({ url }) => {
      const response = await fetch(`${url}/point/reserve`, post(bodyOf()));
      const body = (await response.json()) as Record<string, string>;
      const time = "2029-02-22T13:59:00.000Z";
      expect(body.execute_at).toBe(time);
      const [row] = await db.query(
        "select cast(execute_at as char) at, cast(scan_at as char) scan from point_reservations where id = ?",
        [body.reservation_id],
      );
      expect(row).toEqual({ at: "2029-02-22 13:59:00.000", scan: "2029-02-22 13:59:00.000" });
      const details = await (await fetch(`${url}${response.headers.get("location")}`)).json();
      expect(details).toMatchObject({ execute_at: time, next_scan_at: time });
      const [clock] = await db.query<{ now: Date }>("select now(3) now");
      const createdAt = Date.parse((details as { created_at: string }).created_at);
      expect(createdAt).toBeWithin(Number(clock?.now) - 60_000, Number(clock?.now) + 1);
    }),
  20_000,
);
