import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { join } from "node:path";
import { freePorts } from "../../lib/dev/servers.ts";
import { untilRunning } from "../harness/database.ts";
import { insertReservation, insertReservations, reservationOf } from "../harness/fixtures.ts";
import { until } from "../harness/harness.ts";
import { countStatuses, openPipeline, publishReservations, untilDone } from "../harness/pipeline.ts";
import { temporaryFolder } from "../harness/temporary_folder.ts";

// What a setting does in a real process, for those whose effect no other test shows.

setDefaultTimeout(60_000);

const ROOT = join(import.meta.dir, "..", "..");

describe("a process", () => {
  test.each([
    ["api", "PORT"],
    ["scheduler", "SCHEDULER_PORT"],
    ["worker", "WORKER_PORT"],
  ] as const)(
    "%s.ts listens on HOST and %s, and logs nothing below LOG_LEVEL",
    async (entry, portSetting) => {
      await using pipeline = await openPipeline();
      const [port = 0] = await freePorts(1);
      // One of the addresses of the loopback interface that is not the default.
      const env = { HOST: "127.0.0.2", [portSetting]: String(port), LOG_LEVEL: "error" };
      const service = await pipeline.start(entry, env, { waitForPort: false });
      const isReady = async () =>
        (await fetch(`http://127.0.0.2:${port}/ready`).catch(() => undefined))?.status === 200;
      await until("it is ready", isReady);
      await expect(fetch(`http://127.0.0.1:${port}/ready`)).rejects.toThrow();
      expect(await service.kill("SIGTERM")).toBe(0);
      expect(service.log()).toEqual([]);
    },
  );

  test("uses DATABASE_CONNECTIONS at most: with one, a read waits for the read before it", async () => {
    await using pipeline = await openPipeline();
    const { url } = await pipeline.start("api", { DATABASE_CONNECTIONS: "1" });
    const { id } = await insertReservation(pipeline.test);
    const answered: number[] = [];
    const read = async () => answered.push((await fetch(`${url}/point/reservations/${id}`)).status);
    const sent = await pipeline.test.database.run(async ({ execute }) => {
      await execute("lock tables point_reservations write");
      const reads = [read(), read()];
      await untilRunning(pipeline.test, "find_details");
      // The process is at work, and has had the time to send the other one.
      for (let times = 0; times < 20; times++) await fetch(`${url}/health`);
      const running = await pipeline.test.query(
        "select id from information_schema.processlist where db = ? and info like '/* find_details */%'",
        [pipeline.test.name],
      );
      expect([running.length, answered]).toEqual([1, []]);
      await execute("unlock tables");
      return reads;
    });
    await Promise.all(sent);
    expect(answered).toEqual([200, 200]);
  });
});

test("scheduler.ts claims SCAN_BATCH reservations for LEASE_MS, PUBLISH_CHUNK a message, until the queue has QUEUED_RESERVATIONS", async () => {
  await using pipeline = await openPipeline();
  const reservations = Array.from({ length: 9 }, () => reservationOf());
  await insertReservations(pipeline.test, { reservations });
  const settings = { SCAN_BATCH: "3", PUBLISH_CHUNK: "2", QUEUED_RESERVATIONS: "8", LEASE_MS: "600000" };
  const scheduler = await pipeline.start("scheduler", { ...settings, SCAN_INTERVAL_MS: "10" });
  const queue = await pipeline.openQueue();
  await until("the queue is full", async () => (await queue.depth()) === 4);
  expect(await scheduler.kill("SIGTERM")).toBe(0);
  const claims = scheduler.log().filter(({ claimed }) => claimed);
  expect(claims).toMatchObject(Array(2).fill({ claimed: 3, messages: 2 }));
  expect(await countStatuses(pipeline.test)).toEqual({ PENDING: 3, PROCESSING: 6 });
  const [lease] = await pipeline.test.query<{ seconds: number }>(
    "select max(timestampdiff(second, now(3), scan_at)) seconds from point_reservations",
  );
  expect(lease?.seconds).toBeWithin(500, 601);
});

test("worker.ts grants WORKER_BATCH reservations in one transaction, and gives one up after MAX_ATTEMPTS", async () => {
  await using pipeline = await openPipeline();
  await pipeline.test.query(
    "alter table point_transactions add constraint not_cursed check (user_id <> 'Cursed')",
  );
  const queue = await pipeline.openQueue();
  const reservations = Array.from({ length: 9 }, () => reservationOf());
  await insertReservations(pipeline.test, { reservations, status: "PROCESSING" });
  await publishReservations(queue, { reservations, chunk: 1 });
  const worker = await pipeline.start("worker", { WORKER_BATCH: "2", PUBLISH_CHUNK: "1", MAX_ATTEMPTS: "1" });
  await untilDone(pipeline.test, { count: 9 });
  const batches = () => worker.log().flatMap(({ granted }) => (granted ? [Number(granted)] : []));
  // The log comes a moment after its COMMIT.
  await until("all are logged", () => batches().reduce((sum, count) => sum + count, 0) === 9);
  expect(Math.max(...batches())).toBe(2);
  const cursed = await insertReservation(pipeline.test, { status: "PROCESSING", userId: "Cursed" });
  await publishReservations(queue, { reservations: [cursed] });
  await until("it is FAILED", async () => (await countStatuses(pipeline.test)).FAILED === 1);
  expect(
    await pipeline.test.query("select last_error from point_reservations where attempts > 0"),
  ).toMatchObject([{ last_error: expect.stringContaining("Gave up at attempt 1") }]);
});

test.each(["development", "production"])(
  "a variable that is set wins over .env.local, .env.%s and .env, which Bun reads in this order",
  async (NODE_ENV) => {
    await using folder = await temporaryFolder();
    const files = {
      ".env": ["PORT", "DATABASE_CONNECTIONS", "LOG_LEVEL", "ALLOW_LOSSY_DATABASE"],
      [`.env.${NODE_ENV}`]: ["PORT", "DATABASE_CONNECTIONS", "LOG_LEVEL"],
      ".env.local": ["PORT", "DATABASE_CONNECTIONS"],
    };
    for (const [file, names] of Object.entries(files)) {
      await Bun.write(`${folder.path}/${file}`, names.map((name) => `${name}="${file}"\n`).join(""));
    }
    const urls = { DATABASE_URL: "mysql://u@h/d", AMQP_URL: "amqp://h" };
    const env = { PATH: Bun.env.PATH, NODE_ENV, ...urls, PORT: "set" };
    const child = Bun.spawn([process.execPath, join(ROOT, "api.ts")], { cwd: folder.path, env });
    expect(await child.exited).toBe(1);
    const { msg } = await child.stdout.json();
    const received = msg.matchAll(/as (\w+) must be .*?: received "(.*?)"/g);
    expect(Object.fromEntries([...received].map(([, name, value]) => [name, value]))).toEqual({
      PORT: "set",
      DATABASE_CONNECTIONS: ".env.local",
      LOG_LEVEL: `.env.${NODE_ENV}`,
      ALLOW_LOSSY_DATABASE: ".env",
    });
  },
);
