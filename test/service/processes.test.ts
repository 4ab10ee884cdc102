import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { join } from "node:path";
import { insertReservation, insertReservations, reservationOf } from "../harness/fixtures.ts";
import { AMQP_URL, DATABASE_URL, until } from "../harness/harness.ts";
import {
  countStatuses,
  expectAllDoneOnce,
  openPipeline,
  type Pipeline,
  publishReservations,
  untilDone,
} from "../harness/pipeline.ts";
import { untilLogged, untilReady } from "../harness/processes.ts";
import { startProxy } from "../harness/proxy.ts";
import { expectProblem } from "../http/client.ts";

setDefaultTimeout(60_000);

async function statusOf(url: string): Promise<number> {
  return (await fetch(url)).status;
}

/** Holds the row of a reservation locked while some work is done. */
function whileLocked({ test }: Pipeline, { id }: { id: string }, work: () => Promise<unknown>) {
  return test.database.transaction(async ({ select }) => {
    await select("select id from point_reservations where id = ? for update", [id]);
    await work();
  });
}

describe("worker.ts", () => {
  test("moves garbage, poison and unknown ids to the dead letters, and grants the others (fault 31)", async () => {
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
    await untilReady(worker);
    await expectAllDoneOnce(pipeline.test, 1);
  });

  test("at SIGTERM in the middle of a grant finishes it, takes nothing more, and exits 0 (fault 36)", async () => {
    await using pipeline = await openPipeline();
    // One message in hand.
    const env = { WORKER_BATCH: "1", PUBLISH_CHUNK: "10" };
    const worker = await pipeline.start("worker", env);
    const queue = await pipeline.openQueue();
    const reservations = [reservationOf(), reservationOf()] as const;
    await insertReservations(pipeline.test, { reservations, status: "PROCESSING" });
    const exited = Promise.withResolvers<number | null>();
    await whileLocked(pipeline, reservations[0], async () => {
      await publishReservations(queue, { reservations });
      await until("the first is in hand", async () => (await queue.depth()) === 1);
      exited.resolve(worker.kill("SIGTERM"));
      await untilLogged(worker, "stopping");
      expect(await countStatuses(pipeline.test)).toEqual({ PROCESSING: 2 });
    });
    expect(await exited.promise).toBe(0);
    expect(worker.log().at(-1)).toMatchObject({ msg: "stopped" });
    expect(await countStatuses(pipeline.test)).toEqual({ DONE: 1, PROCESSING: 1 });
    expect(await queue.depth()).toBe(1);
    await pipeline.start("worker", env);
    await untilDone(pipeline.test, { count: 2 });
    await expectAllDoneOnce(pipeline.test, 2);
  });

  test("gives back what it holds if MySQL goes, is not ready meanwhile, and recovers by itself (fault 37)", async () => {
    await using pipeline = await openPipeline();
    await using proxy = await startProxy(pipeline.test.url);
    const worker = await pipeline.start("worker", { DATABASE_URL: proxy.url });
    await untilReady(worker);
    const queue = await pipeline.openQueue();
    const reservations = [reservationOf(), reservationOf(), reservationOf()] as const;
    await insertReservations(pipeline.test, { reservations, status: "PROCESSING" });
    await whileLocked(pipeline, reservations[0], async () => {
      await publishReservations(queue, { reservations: [reservations[0]] });
      await until("it is in hand", async () => (await queue.depth()) === 0);
      await proxy.refuse();
      await publishReservations(queue, { reservations: reservations.slice(1) });
      await untilLogged(worker, "waiting for MySQL");
      await until("all are given back", async () => (await queue.depth()) === 3);
    });
    await until("it is not ready", async () => (await statusOf(`${worker.url}/ready`)) === 503);
    expect(await statusOf(`${worker.url}/health`)).toBe(200);
    expect(await countStatuses(pipeline.test)).toEqual({ PROCESSING: 3 });
    await proxy.serve();
    await untilDone(pipeline.test, { count: 3 });
    await untilReady(worker);
    await expectAllDoneOnce(pipeline.test, 3);
    expect(await pipeline.countDead()).toBe(0);
  });
});

describe("scheduler.ts and worker.ts", () => {
  test("wait for MySQL and RabbitMQ that are not there at the start, and say so", async () => {
    await using pipeline = await openPipeline();
    await using mysql = await startProxy(pipeline.test.url, { serving: false });
    await using rabbitmq = await startProxy(AMQP_URL, { serving: false });
    const env = { DATABASE_URL: mysql.url, AMQP_URL: rabbitmq.url };
    const [scheduler, worker] = [await pipeline.start("scheduler", env), await pipeline.start("worker", env)];
    await insertReservation(pipeline.test);
    for (const service of [scheduler, worker]) {
      await untilLogged(service, "waiting for MySQL");
      expect(await statusOf(`${service.url}/health`)).toBe(200);
      expect(await statusOf(`${service.url}/ready`)).toBe(503);
    }
    await mysql.serve();
    await untilLogged(scheduler, "waiting for RabbitMQ");
    await untilLogged(worker, "not consuming");
    expect(await countStatuses(pipeline.test)).toEqual({ PENDING: 1 });
    for (const { url } of [scheduler, worker]) expect(await statusOf(`${url}/ready`)).toBe(503);
    await rabbitmq.serve();
    await untilReady(scheduler, worker);
    await untilDone(pipeline.test, { count: 1 });
    for (const [{ url }, paths] of [
      [scheduler, "/health, /ready and /metrics"],
      [worker, "/health and /ready"],
    ] as const) {
      const { detail } = await expectProblem(await fetch(`${url}/elsewhere`), 404, ["route not found"]);
      expect(detail).toBe(`The paths are ${paths}`);
    }
    await expectAllDoneOnce(pipeline.test, 1);
  });

  const nowhere = Object.assign(new URL(DATABASE_URL), { port: "1" }).href;
  test.each([
    ["scheduler", "SIGINT", "connected to RabbitMQ", {}],
    ["scheduler", "SIGTERM", "waiting for MySQL", { DATABASE_URL: nowhere }],
    ["scheduler", "SIGTERM", "waiting for RabbitMQ", { AMQP_URL: "amqp://guest:guest@127.0.0.1:1" }],
    ["worker", "SIGINT", "consuming", {}],
    ["worker", "SIGTERM", "waiting for MySQL", { DATABASE_URL: nowhere }],
    ["worker", "SIGTERM", "not consuming", { AMQP_URL: "amqp://guest:guest@127.0.0.1:1" }],
  ] as const)("%s.ts exits 0 at %s after %j", async (entry, signal, msg, env) => {
    await using pipeline = await openPipeline();
    const service = await pipeline.start(entry, env);
    await untilLogged(service, msg);
    expect(await service.kill(signal)).toBe(0);
    expect(service.log().at(-1)).toMatchObject({ msg: "stopped" });
  });

  test.each(["scheduler", "worker"] as const)(
    "%s.ts refuses a schema that is behind, and says which command mends it",
    async (entry) => {
      await using pipeline = await openPipeline();
      await pipeline.test.query("drop table schema_migrations");
      const service = await pipeline.start(entry, {}, { waitForPort: false });
      expect(await service.exited).toBe(1);
      expect(service.log().at(-1)).toMatchObject({ msg: expect.stringContaining("bun run migrate") });
    },
  );
});

test("scheduler.ts and worker.ts go by the database's clock on a host whose clock is an hour fast (fault 19)", async () => {
  await using pipeline = await openPipeline();
  const executeAt = new Date(Date.now() + 1_800_000);
  await insertReservation(pipeline.test, { executeAt });
  const claimed = await insertReservation(pipeline.test, { executeAt, status: "PROCESSING" });
  await publishReservations(await pipeline.openQueue(), { reservations: [claimed] });
  const clock = { CLOCK_OFF_MS: "3600000" };
  const options = { bunArgs: ["--preload", join(import.meta.dir, "../faults/clock.ts")] };
  const worker = await pipeline.start("worker", clock, options);
  expect(await untilLogged(worker, "processed")).toMatchObject({ not_due: 1 });
  await insertReservation(pipeline.test);
  const scheduler = await pipeline.start("scheduler", clock, options);
  const published = await untilLogged(scheduler, "published");
  expect(published).toMatchObject({ claimed: 1 });
  await untilDone(pipeline.test, { count: 1 });
  expect(await countStatuses(pipeline.test)).toEqual({ PENDING: 1, PROCESSING: 1, DONE: 1 });
  expect(Date.parse(String(published.time))).toBeGreaterThan(Date.now() + 3_000_000);
});
