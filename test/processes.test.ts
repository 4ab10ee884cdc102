import { describe, expect, test } from "bun:test";
import { AMQP_URL, DATABASE_URL, insertReservation, reservationOf, until } from "./harness.ts";
import {
  countStatuses,
  expectAllDoneOnce,
  insertReservations,
  openPipeline,
  type Pipeline,
  publishReservations,
  untilDone,
} from "./pipeline.ts";
import { startProxy, type TcpProxy } from "./proxy.ts";

const TEN_SECONDS = 10_000;

/** The test's database, but through a proxy. */
async function proxyTo({ test: { url } }: Pipeline, options?: { serving: boolean }) {
  return disposable(await startProxy(url, options));
}

function disposable(proxy: TcpProxy) {
  return Object.assign(proxy, { [Symbol.asyncDispose]: () => proxy.close() });
}

async function statusOf(url: string): Promise<number> {
  return (await fetch(url)).status;
}

function messagesOf(service: { log(): Record<string, unknown>[] }): unknown[] {
  return service.log().map(({ msg }) => msg);
}

describe("worker.ts", () => {
  test("moves garbage, poison and unknown ids to the dead-letter queue, and grants the others (fault 31)", async () => {
    await using pipeline = await openPipeline();
    const worker = await pipeline.start("worker");
    const queue = await pipeline.openQueue();
    const good = await insertReservation(pipeline.test, { status: "PROCESSING" });
    const bad = [
      Buffer.from([0xff, 0xfe, 0x00]),
      Buffer.from("not JSON"),
      Buffer.from("[]"),
      Buffer.from(JSON.stringify({ reservation_id: good.id })),
      Buffer.from("[".repeat(100_000)),
    ];
    expect(await queue.publish(bad)).toBe(bad.length);
    await publishReservations(queue, { reservations: [reservationOf(), good] });
    await untilDone(pipeline.test, { count: 1 });
    await until("all bad are dead letters", async () => (await pipeline.countDead()) === bad.length + 1);
    expect(await queue.depth()).toBe(0);
    expect(await statusOf(`${worker.url}/ready`)).toBe(200);
    await expectAllDoneOnce(pipeline.test, 1);
  }, 30_000);

  test("SIGTERM while busy: exit 0 within 10 s, and nothing is lost or granted twice (fault 36)", async () => {
    await using pipeline = await openPipeline();
    const env = { WORKER_BATCH: "5", WORKER_PREFETCH: "20" };
    const worker = await pipeline.start("worker", env);
    const queue = await pipeline.openQueue();
    // So many that it is not through with them in a moment that this process, or its connection, is held up.
    const count = 5_000;
    const reservations = Array.from({ length: count }, (_, index) =>
      reservationOf({ userId: `User${index % 7}` }),
    );
    await insertReservations(pipeline.test, { reservations, status: "PROCESSING" });
    await publishReservations(queue, { reservations, chunk: 5 });
    await until("some are DONE", async () => ((await countStatuses(pipeline.test)).DONE ?? 0) > 50);
    const startedAt = performance.now();
    expect(await worker.kill("SIGTERM")).toBe(0);
    expect(performance.now() - startedAt).toBeLessThan(TEN_SECONDS);
    expect((await countStatuses(pipeline.test)).PROCESSING).toBeGreaterThan(0);
    expect(messagesOf(worker)).toContain("stopped");
    await pipeline.start("worker", env);
    await untilDone(pipeline.test, { count });
    await expectAllDoneOnce(pipeline.test, count);
    await until("the queue is empty", async () => (await queue.depth()) === 0);
  }, 60_000);

  test("SIGTERM while MySQL does not answer: exits within 10 s, a second signal exits at once", async () => {
    await using pipeline = await openPipeline();
    await using proxy = await proxyTo(pipeline);
    const workers = [
      await pipeline.start("worker", { DATABASE_URL: proxy.url, WORKER_PREFETCH: "1" }),
      await pipeline.start("worker", { DATABASE_URL: proxy.url, WORKER_PREFETCH: "1" }),
    ];
    await until("both consume", () => workers.every((worker) => messagesOf(worker).includes("consuming")));
    const queue = await pipeline.openQueue();
    const reservations = [reservationOf(), reservationOf()];
    await insertReservations(pipeline.test, { reservations, status: "PROCESSING" });
    proxy.hold();
    await publishReservations(queue, { reservations });
    await until("both messages are in hand", async () => (await queue.depth()) === 0);
    const [patient, hasty] = workers;
    const startedAt = performance.now();
    const patientEnd = patient?.kill("SIGTERM");
    hasty?.kill("SIGTERM");
    await until("stopping", () => hasty && messagesOf(hasty).includes("stopping"));
    expect(await hasty?.kill("SIGTERM")).toBe(143);
    expect(performance.now() - startedAt).toBeLessThan(3_000);
    expect(await patientEnd).toBe(0);
    expect(performance.now() - startedAt).toBeLessThan(TEN_SECONDS);
    await pipeline.start("worker");
    await untilDone(pipeline.test, { count: 2 });
    await expectAllDoneOnce(pipeline.test, 2);
  }, 60_000);

  test("MySQL's connections cut: not ready, nothing acknowledged, then recovers by itself (fault 37)", async () => {
    await using pipeline = await openPipeline();
    await using proxy = await proxyTo(pipeline);
    const worker = await pipeline.start("worker", { DATABASE_URL: proxy.url, WORKER_BATCH: "5" });
    await until("ready", async () => (await statusOf(`${worker.url}/ready`)) === 200);
    const queue = await pipeline.openQueue();
    const count = 5_000;
    const reservations = Array.from({ length: count }, (_, index) =>
      reservationOf({ userId: `User${index % 9}` }),
    );
    await insertReservations(pipeline.test, { reservations, status: "PROCESSING" });
    await publishReservations(queue, { reservations, chunk: 5 });
    await until("some are DONE", async () => ((await countStatuses(pipeline.test)).DONE ?? 0) > 20);
    await proxy.refuse();
    await until("not ready", async () => (await statusOf(`${worker.url}/ready`)) === 503);
    expect(await statusOf(`${worker.url}/health`)).toBe(200);
    const { DONE = 0 } = await countStatuses(pipeline.test);
    expect(DONE).toBeLessThan(count);
    // All that is not granted is in the queue: what was in hand has come back.
    await until("given back", async () => (await queue.depth()) * 5 >= count - DONE);
    await until("it says what it waits for", () => messagesOf(worker).includes("waiting for MySQL"));
    await proxy.serve();
    await untilDone(pipeline.test, { count });
    await until("ready again", async () => (await statusOf(`${worker.url}/ready`)) === 200);
    await expectAllDoneOnce(pipeline.test, count);
  }, 60_000);
});

describe("scheduler.ts and worker.ts", () => {
  test("wait for MySQL and RabbitMQ that are not there at the start, and say so", async () => {
    await using pipeline = await openPipeline();
    await using mysql = await proxyTo(pipeline, { serving: false });
    await using rabbitmq = disposable(await startProxy(AMQP_URL, { serving: false }));
    const env = { DATABASE_URL: mysql.url, AMQP_URL: rabbitmq.url };
    const services = [await pipeline.start("scheduler", env), await pipeline.start("worker", env)];
    await insertReservation(pipeline.test);
    await until("both wait", () => services.every((one) => messagesOf(one).includes("waiting for MySQL")));
    for (const { url } of services) {
      expect(await statusOf(`${url}/health`)).toBe(200);
      expect(await statusOf(`${url}/ready`)).toBe(503);
    }
    await mysql.serve();
    const reasons = ["waiting for RabbitMQ", "not consuming"];
    await until("both wait", () =>
      services.every((one) => messagesOf(one).some((message) => reasons.includes(String(message)))),
    );
    expect(await countStatuses(pipeline.test)).toEqual({ PENDING: 1 });
    for (const { url } of services) expect(await statusOf(`${url}/ready`)).toBe(503);
    await rabbitmq.serve();
    await untilDone(pipeline.test, { count: 1 });
    for (const { url } of services) {
      await until("ready", async () => (await statusOf(`${url}/ready`)) === 200);
      expect(await statusOf(`${url}/elsewhere`)).toBe(404);
    }
    await expectAllDoneOnce(pipeline.test, 1);
  }, 60_000);

  test.each(["scheduler", "worker"] as const)(
    "%s exits 0 on SIGTERM and on SIGINT, also while it waits for MySQL or RabbitMQ",
    async (entry) => {
      await using pipeline = await openPipeline();
      const nowhere = new URL(DATABASE_URL);
      nowhere.port = "1";
      const settings: Record<string, string>[] = [
        {},
        { DATABASE_URL: nowhere.href },
        { AMQP_URL: "amqp://guest:guest@127.0.0.1:1" },
      ];
      for (const [index, env] of settings.entries()) {
        const service = await pipeline.start(entry, env);
        await until("it is at work, or waits", () => messagesOf(service).length >= 2);
        const startedAt = performance.now();
        expect(await service.kill(index === 0 ? "SIGINT" : "SIGTERM")).toBe(0);
        expect(performance.now() - startedAt).toBeLessThan(TEN_SECONDS);
      }
    },
    60_000,
  );

  test.each(["scheduler", "worker"] as const)(
    "%s refuses a schema that is behind, and says which command mends it",
    async (entry) => {
      await using pipeline = await openPipeline();
      await pipeline.test.query("drop table schema_migrations");
      const service = await pipeline.start(entry, {}, { waitForPort: false });
      expect(await service.exited).toBe(1);
      expect(JSON.stringify(service.log())).toContain("bun run migrate");
    },
    30_000,
  );
});
