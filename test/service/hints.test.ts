import { expect, test } from "bun:test";
import { openApp } from "../harness/app.ts";
import { openTestDatabase } from "../harness/database.ts";
import { insertReservation } from "../harness/fixtures.ts";
import { AMQP_URL, until } from "../harness/harness.ts";
import { countStatuses, openPipeline, untilDone } from "../harness/pipeline.ts";
import { untilLogged, untilReady } from "../harness/processes.ts";
import { startProxy } from "../harness/proxy.ts";
import { openChannel } from "../harness/queue.ts";
import { bodyOf, post } from "../http/client.ts";

const db = await openTestDatabase();

const HOUR_MS = 3_600_000;
const SOON = "2029-01-01T00:00:00.000Z";
const LATER = "2029-01-02T00:00:00.000Z";

test("createApp() hints at the soonest time of what it has committed, and of nothing that it refused", async () => {
  const { send, hints } = openApp(db);
  async function hintsOf(...request: Parameters<typeof send>) {
    const { body } = await send(...request);
    return { body, hints: hints.splice(0).map((time) => time.toISOString()) };
  }
  const reserved = await hintsOf("POST", "/point/reserve", { body: bodyOf({ execute_at: SOON }) });
  expect(reserved.hints).toEqual([SOON]);
  const path = `/point/reservations/${reserved.body.reservation_id}`;
  const failed = await insertReservation(db, { status: "FAILED", executeAt: new Date(SOON) });
  const rows = [LATER, SOON].map((time) => bodyOf({ execute_at: time }));
  for (const [method, url, body, expected] of [
    ["POST", "/point/reserve", bodyOf({ user_id: "" }), []],
    ["POST", "/point/reserve/bulk", { mode: "each", reservations: [...rows, {}] }, [SOON]],
    ["PATCH", path, { execute_at: LATER }, [LATER]],
    ["POST", `${path}/retry`, undefined, []],
    ["POST", `/point/reservations/${failed.id}/retry`, undefined, [SOON]],
  ] as const) {
    expect((await hintsOf(method, url, { body })).hints).toEqual([...expected]);
  }
});

test("what is reserved, patched or retried for now is granted now, however long the schedulers sleep", async () => {
  await using pipeline = await openPipeline();
  const api = await pipeline.start("api");
  // Only a hint, or the time of a reservation that it has seen, wakes a scheduler.
  const interval = { SCAN_INTERVAL_MS: String(HOUR_MS) };
  await untilReady(
    await pipeline.start("scheduler", interval),
    await pipeline.start("scheduler", interval),
    await pipeline.start("worker"),
  );
  await untilLogged(api, "connected to RabbitMQ");
  let count = 0;
  async function expectGranted(method: string, path: string, body?: unknown) {
    const response = await fetch(api.url + path, { ...post(body ?? {}), method });
    expect(response.ok).toBe(true);
    await untilDone(pipeline.test, { count: ++count });
  }
  const inMs = (ms: number) => ({ execute_at: new Date(Date.now() + ms).toISOString() });

  await expectGranted("POST", "/point/reserve", bodyOf(inMs(0)));
  // Not due yet when its hint comes.
  await expectGranted("POST", "/point/reserve", bodyOf(inMs(700)));
  await expectGranted("POST", "/point/reserve/bulk", { mode: "atomic", reservations: [bodyOf(inMs(0))] });
  const later = await insertReservation(pipeline.test, { executeAt: new Date(Date.now() + HOUR_MS) });
  await expectGranted("PATCH", `/point/reservations/${later.id}`, inMs(0));
  const failed = await insertReservation(pipeline.test, { status: "FAILED" });
  await expectGranted("POST", `/point/reservations/${failed.id}/retry`);
});

test("without RabbitMQ the API is ready and reserves, and the schedulers' interval finds it", async () => {
  await using pipeline = await openPipeline();
  await using proxy = await startProxy(AMQP_URL, { serving: false });
  const api = await pipeline.start("api", { AMQP_URL: proxy.url });
  await untilLogged(api, "cannot wake schedulers");
  await untilReady(api);
  const body = bodyOf({ execute_at: new Date().toISOString() });
  const reserve = async () => (await fetch(`${api.url}/point/reserve`, post(body))).status;
  expect(await Promise.all(Array.from({ length: 20 }, reserve))).toEqual(Array(20).fill(201));
  expect(await countStatuses(pipeline.test)).toEqual({ PENDING: 20 });
  await pipeline.start("scheduler");
  await pipeline.start("worker");
  await untilDone(pipeline.test, { count: 20 });
});

test("after somebody has deleted the exchange of the hints, what is reserved is granted now again (fault 47)", async () => {
  await using pipeline = await openPipeline();
  const api = await pipeline.start("api");
  const scheduler = await pipeline.start("scheduler", { SCAN_INTERVAL_MS: String(HOUR_MS) });
  await untilReady(scheduler, await pipeline.start("worker"));
  await untilLogged(api, "connected to RabbitMQ");
  await using operator = await openChannel();
  await operator.channel.deleteExchange(`${pipeline.queueName}.hints`);
  await untilLogged(scheduler, "hints work again");
  // Whether it has noticed the deletion, too, depends on the moment of its last probe.
  await until("the API can send hints", () => api.log().at(-1)?.level === "info");
  const body = bodyOf({ execute_at: new Date().toISOString() });
  expect((await fetch(`${api.url}/point/reserve`, post(body))).status).toBe(201);
  await untilDone(pipeline.test, { count: 1 });
});
