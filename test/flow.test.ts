import { expect, test } from "bun:test";
import { until } from "./harness.ts";
import {
  expectAllDoneOnce,
  openPipeline,
  type Request,
  requestsOf,
  reserveAll,
  untilDone,
} from "./pipeline.ts";

const TEN_SECONDS = 10_000;

function post(url: string, body: unknown): Promise<Response> {
  return fetch(`${url}/point/reserve`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  });
}

async function getJson(url: string): Promise<Record<string, unknown>> {
  const response = await fetch(url);
  return { httpStatus: response.status, ...((await response.json()) as object) };
}

/** The same moment, written with the offset of a place that is not the host's. */
function inOffset(time: Date, hours: number): string {
  const local = new Date(time.getTime() + hours * 3_600_000).toISOString().replace("Z", "");
  return `${local}${hours < 0 ? "-" : "+"}${String(Math.abs(hours)).padStart(2, "0")}:00`;
}

test("a reservation becomes points: reserve, wait, balance, story, replay", async () => {
  await using pipeline = await openPipeline();
  const { url } = await pipeline.start("api");
  const services = [await pipeline.start("scheduler"), await pipeline.start("worker")];
  for (const service of services) {
    await until("ready", async () => (await fetch(`${service.url}/ready`)).status === 200);
  }
  const executeAt = new Date(Date.now() + 1_500);
  const request = {
    user_id: "TestUser01",
    point_amount: 100,
    execute_at: inOffset(executeAt, 9),
    idempotency_key: "order-42",
  };
  const answer = await post(url, request);
  expect(answer.status).toBe(201);
  const reserved = (await answer.json()) as { reservation_id: string };
  expect(reserved).toMatchObject({ status: "PENDING", execute_at: executeAt.toISOString() });
  const storyUrl = `${url}/point/reservations/${reserved.reservation_id}`;
  expect(await getJson(storyUrl)).toMatchObject({
    ...{ httpStatus: 200, status: "PENDING", attempts: 0, last_error: null, granted_at: null, late_ms: null },
    ...{ execute_at: executeAt.toISOString(), next_scan_at: executeAt.toISOString() },
  });
  expect(await getJson(`${url}/users/TestUser01/points`)).toMatchObject({ httpStatus: 404 });

  const balance = await until("the balance", async () => {
    const found = await getJson(`${url}/users/TestUser01/points`);
    return found.httpStatus === 200 && found;
  });
  expect(balance).toMatchObject({ user_id: "TestUser01", point_num: 100 });
  const story = await getJson(storyUrl);
  expect(story).toMatchObject({
    ...{ status: "DONE", user_id: "TestUser01", point_amount: 100, idempotency_key: "order-42" },
    ...{ attempts: 0, last_error: null, next_scan_at: null },
  });
  const lateMs = new Date(String(story.granted_at)).getTime() - executeAt.getTime();
  expect(story.late_ms).toBe(lateMs);
  expect(lateMs).toBeGreaterThanOrEqual(0);
  expect(lateMs).toBeLessThan(5_000);

  const replay = await post(url, { ...request, execute_at: inOffset(executeAt, -3) });
  expect(replay.status).toBe(201);
  expect(replay.headers.get("idempotent-replayed")).toBe("true");
  expect(await replay.json()).toEqual(reserved);
  expect((await post(url, { ...request, point_amount: 101 })).status).toBe(422);
  await expectAllDoneOnce(pipeline.test, 1);
  expect(await getJson(`${url}/users/TestUser01/points`)).toMatchObject({ point_num: 100 });
}, 60_000);

test("2,000 reservations of many users, due and ahead, by two schedulers and two workers: all DONE once, each process exits 0", async () => {
  await using pipeline = await openPipeline();
  const api = await pipeline.start("api");
  const env = { SCAN_BATCH: "100", PUBLISH_CHUNK: "20", WORKER_BATCH: "100" };
  const schedulers = [await pipeline.start("scheduler", env), await pipeline.start("scheduler", env)];
  const workers = [await pipeline.start("worker", env), await pipeline.start("worker", env)];
  const due = requestsOf(1_000, { spreadMs: 0 });
  const ahead = requestsOf(1_000, { spreadMs: 3_000 });
  const requests: Request[] = due.flatMap((request, index) => {
    const user_id = `User${index % 100}`;
    return [{ ...request, user_id }, ...ahead.slice(index, index + 1)];
  });
  const ids = await reserveAll(api.url, { requests });
  expect(new Set(ids).size).toBe(2_000);
  await untilDone(pipeline.test, { count: 2_000 });
  const sums = await expectAllDoneOnce(pipeline.test, 2_000);
  expect(sums.balances).toBe(BigInt(requests.reduce((sum, { point_amount }) => sum + point_amount, 0)));
  for (const worker of workers) {
    expect(worker.log().some(({ granted }) => Number(granted) > 0)).toBe(true);
  }
  for (const service of [api, ...schedulers, ...workers]) {
    const startedAt = performance.now();
    expect(await service.kill("SIGTERM")).toBe(0);
    expect(performance.now() - startedAt).toBeLessThan(TEN_SECONDS);
    expect(service.log().at(-1)).toMatchObject({ msg: "stopped" });
    // Every line is JSON.
    expect(service.log().filter(({ line }) => line !== undefined)).toEqual([]);
  }
}, 90_000);
