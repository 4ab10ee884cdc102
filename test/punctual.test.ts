import { afterAll, beforeAll, expect, test } from "bun:test";
import { appOn, bodyOf, post } from "./api_client.ts";
import { AMQP_URL, createTestDatabase, insertReservation, type TestDatabase, until } from "./harness.ts";
import { countStatuses, openPipeline, untilDone } from "./pipeline.ts";
import { startProxy } from "./proxy.ts";

let db: TestDatabase;
beforeAll(async () => {
  db = await createTestDatabase();
});
afterAll(() => db.drop());

const HOUR_MS = 3_600_000;
const SOON = "2029-01-01T00:00:00.000Z";
const LATER = "2029-01-02T00:00:00.000Z";

test("the app tells of the soonest time of what it has committed, and of nothing that it refused", async () => {
  const { send, hints } = appOn(db.database);
  const told = () => hints.splice(0).map((time) => time.toISOString());
  const reserved = await send("/point/reserve", post(bodyOf({ execute_at: SOON })));
  const { reservation_id: id } = (await reserved.json()) as { reservation_id: string };
  expect(told()).toEqual([SOON]);
  await send("/point/reserve", post(bodyOf({ user_id: "" })));
  await send("/point/reservations/no-id/retry", { method: "POST" });
  expect(told()).toEqual([]);
  const rows = [LATER, SOON].map((time) => bodyOf({ execute_at: time }));
  await send("/point/reserve/bulk", post({ mode: "each", reservations: [...rows, {}] }));
  expect(told()).toEqual([SOON]);
  await send(`/point/reservations/${id}`, { ...post({ execute_at: LATER }), method: "PATCH" });
  expect(told()).toEqual([LATER]);
  expect((await send(`/point/reservations/${id}/retry`, { method: "POST" })).status).toBe(409);
  expect(told()).toEqual([]);
  const failed = await insertReservation(db, { status: "FAILED", executeAt: new Date(SOON) });
  expect((await send(`/point/reservations/${failed.id}/retry`, { method: "POST" })).status).toBe(200);
  expect(told()).toEqual([SOON]);
});

/** Long enough that only a hint, or the time of a reservation that it has seen, brings a scheduler back. */
const INTERVAL = { SCAN_INTERVAL_MS: String(HOUR_MS) };

test("what is reserved, changed or tried again for now is granted now, however long the schedulers sleep", async () => {
  await using pipeline = await openPipeline();
  const { url } = await pipeline.start("api");
  const services = [
    await pipeline.start("scheduler", INTERVAL),
    await pipeline.start("scheduler", INTERVAL),
    await pipeline.start("worker"),
  ];
  for (const service of services) {
    await until("ready", async () => (await fetch(`${service.url}/ready`)).status === 200);
  }
  const api = pipeline.services[0]?.service;
  await until("the API can tell", () => api?.log().some(({ msg }) => msg === "connected to RabbitMQ"));
  let count = 0;
  const expectDone = () => untilDone(pipeline.test, { count: ++count });
  const send = async (method: string, path: string, body?: unknown) => {
    const init = body === undefined ? {} : post(body);
    const response = await fetch(`${url}${path}`, { ...init, method });
    expect(response.ok).toBe(true);
    return (await response.json()) as { reservation_id: string };
  };
  const inMs = (ms: number) => new Date(Date.now() + ms).toISOString();

  await send("POST", "/point/reserve", bodyOf({ execute_at: inMs(0) }));
  await expectDone();
  // The scheduler sleeps until this one: it is not due yet when its hint comes.
  await send("POST", "/point/reserve", bodyOf({ execute_at: inMs(700) }));
  await expectDone();
  const reservations = [bodyOf({ execute_at: inMs(0) })];
  await send("POST", "/point/reserve/bulk", { mode: "atomic", reservations });
  await expectDone();
  const later = await send("POST", "/point/reserve", bodyOf({ execute_at: inMs(HOUR_MS) }));
  await send("PATCH", `/point/reservations/${later.reservation_id}`, { execute_at: inMs(0) });
  await expectDone();
  const failed = await insertReservation(pipeline.test, { status: "FAILED" });
  await send("POST", `/point/reservations/${failed.id}/retry`);
  await expectDone();
}, 60_000);

test("without RabbitMQ the API reserves all the same, and the schedulers' interval brings it", async () => {
  await using pipeline = await openPipeline();
  const proxy = await startProxy(AMQP_URL, { serving: false });
  await using _ = { [Symbol.asyncDispose]: () => proxy.close() };
  const { url, log } = await pipeline.start("api", { AMQP_URL: proxy.url });
  await until("it says so", () => log().some(({ msg }) => msg === "cannot wake schedulers"));
  expect((await fetch(`${url}/ready`)).status).toBe(200);
  const now = new Date().toISOString();
  const answers = await Promise.all(
    Array.from({ length: 20 }, () => fetch(`${url}/point/reserve`, post(bodyOf({ execute_at: now })))),
  );
  expect(answers.map(({ status }) => status)).toEqual(Array(20).fill(201));
  expect(await countStatuses(pipeline.test)).toEqual({ PENDING: 20 });
  await pipeline.start("scheduler", { SCAN_INTERVAL_MS: "100" });
  await pipeline.start("worker");
  await untilDone(pipeline.test, { count: 20 });
}, 60_000);
