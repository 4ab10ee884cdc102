import { expect, test } from "bun:test";
import { compareSums } from "../lib/point_repository.ts";
import { insertReservation, until } from "./harness.ts";
import {
  expectAllDoneOnce,
  openPipeline,
  type Request,
  requestsOf,
  reserveAll,
  untilDone,
} from "./pipeline.ts";

const TEN_SECONDS = 10_000;

function send(method: string, url: string, body?: unknown): Promise<Response> {
  const json = { headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  return fetch(url, { method, ...(body !== undefined && json) });
}

function post(url: string, body: unknown): Promise<Response> {
  return send("POST", `${url}/point/reserve`, body);
}

type Answer = Record<string, unknown> & { httpStatus: number };

async function sendJson(method: string, url: string, body?: unknown): Promise<Answer> {
  const response = await send(method, url, body);
  return { httpStatus: response.status, ...((await response.json()) as object) };
}

function getJson(url: string): Promise<Answer> {
  return sendJson("GET", url);
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
  const toCome = { point_num: 0, reserved_point_num: 100, next_execute_at: executeAt.toISOString() };
  expect(await getJson(`${url}/users/TestUser01/points`)).toEqual({
    ...{ httpStatus: 200, user_id: "TestUser01", ...toCome, updated_at: null },
  });
  expect(await getJson(`${url}/users/TestUser02/points`)).toMatchObject({ httpStatus: 404 });

  const balance = await until("the balance", async () => {
    const found = await getJson(`${url}/users/TestUser01/points`);
    return found.point_num !== 0 && found;
  });
  const nothing = { reserved_point_num: 0, next_execute_at: null };
  expect(balance).toMatchObject({ httpStatus: 200, user_id: "TestUser01", point_num: 100, ...nothing });
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

test("a campaign from its bulk to its end: patch, cancel, retry, add, subtract, and lists that tell all of it", async () => {
  await using pipeline = await openPipeline();
  const { url } = await pipeline.start("api");
  for (const entry of ["scheduler", "worker"] as const) await pipeline.start(entry);
  const user = `${url}/users/TestUser01`;
  const soon = new Date(Date.now() + 1_500).toISOString();
  const later = new Date(Date.now() + 3_600_000).toISOString();
  const rows = [
    { point_amount: 100, execute_at: soon },
    { point_amount: 200, execute_at: later },
    { point_amount: 300, execute_at: later },
    { point_amount: 400, execute_at: later },
  ].map((row) => ({ user_id: "TestUser01", campaign: "summer", ...row }));
  const bulk = await sendJson("POST", `${url}/point/reserve/bulk`, { mode: "atomic", reservations: rows });
  expect(bulk.httpStatus).toBe(201);
  const ids = (bulk.results as { reservation_id: string }[]).map(({ reservation_id }) => reservation_id);
  const [granted, cancelled, patched, left] = ids.map((id) => `${url}/point/reservations/${id}`) as [
    ...[string, string, string, string],
  ];
  const failed = await insertReservation(pipeline.test, { status: "FAILED", pointAmount: 7 });
  expect(await getJson(`${user}/points`)).toMatchObject({ point_num: 0, reserved_point_num: 1_000 });

  expect(await sendJson("DELETE", cancelled)).toMatchObject({ httpStatus: 200, status: "CANCELLED" });
  const patch = { execute_at: soon, point_amount: 250 };
  expect(await sendJson("PATCH", patched, patch)).toMatchObject({
    ...{ httpStatus: 200, status: "PENDING", execute_at: soon, point_amount: 250 },
    ...{ original_execute_at: later, original_point_amount: 300 },
  });
  const retried = await sendJson("POST", `${url}/point/reservations/${failed.id}/retry`);
  expect(retried).toMatchObject({ httpStatus: 200, attempts: 0 });
  const add = { user_id: "TestUser01", point_num: 50, idempotency_key: "gift-1" };
  for (let again = 0; again < 2; again++) {
    expect(await sendJson("PUT", `${url}/point/add`, add)).toMatchObject({ httpStatus: 200 });
  }

  const balance = await until("all that is due is granted", async () => {
    const found = await getJson(`${user}/points`);
    return found.point_num === 100 + 250 + 7 + 50 && found;
  });
  expect(balance).toMatchObject({ reserved_point_num: 400, next_execute_at: later });
  const sub = { user_id: "TestUser01", point_num: 407, idempotency_key: "spend-1" };
  const tooMuch = { ...sub, point_num: 408, idempotency_key: "spend-2" };
  expect(await sendJson("PUT", `${url}/point/sub`, tooMuch)).toMatchObject({ httpStatus: 400 });
  expect(await sendJson("PUT", `${url}/point/sub`, sub)).toMatchObject({ httpStatus: 200 });
  expect(await sendJson("PUT", `${url}/point/sub`, tooMuch)).toMatchObject({ httpStatus: 400 });
  expect(await getJson(`${user}/points`)).toMatchObject({ point_num: 0, reserved_point_num: 400 });

  const story = await getJson(granted);
  for (const [method, body] of [["DELETE"], ["PATCH", patch]] as const) {
    expect(await sendJson(method, granted, body)).toMatchObject({
      ...{ httpStatus: 409, reservation_status: "DONE" },
      ...{ granted_at: story.granted_at, transaction_id: story.transaction_id },
    });
  }
  const counts = { httpStatus: 200, cancelled: 2, granted: 2, failed: 0 };
  expect(await sendJson("POST", `${url}/point/campaigns/summer/cancel`)).toMatchObject(counts);
  expect(await getJson(left)).toMatchObject({ status: "CANCELLED", granted_at: null, transaction_id: null });

  const listed = await getJson(`${user}/reserved-points?campaign=summer`);
  expect(listed.next_cursor).toBeNull();
  const found = listed.reserved_points as { reservation_id: string; status: string; point: number }[];
  expect(new Map(found.map((row) => [row.reservation_id, `${row.status} ${row.point}`]))).toEqual(
    new Map(
      ids.map((id, index) => [id, ["DONE 100", "CANCELLED 200", "DONE 250", "CANCELLED 400"][index]]),
    ) as never,
  );
  const ledger = (await getJson(`${user}/transactions`)).transactions as Record<string, unknown>[];
  expect(ledger[0]).toMatchObject({ kind: "sub", point: -407, idempotency_key: "spend-1" });
  expect(new Map(ledger.map(({ point, kind, reservation_id }) => [point, [kind, reservation_id]]))).toEqual(
    new Map<unknown, unknown[]>([
      [-407, ["sub", null]],
      [250, ["grant", ids[2]]],
      [100, ["grant", ids[0]]],
      [50, ["add", null]],
      [7, ["grant", failed.id]],
    ]),
  );
  const at = encodeURIComponent(String(ledger[1]?.created_at));
  expect(await getJson(`${user}/points?at=${at}`)).toMatchObject({ httpStatus: 200, point_num: 407 });
  expect(await compareSums(pipeline.test.database)).toMatchObject({
    ...{ agree: true, reservations: 357n, direct: -357n, ledger: 0n, balances: 0n },
  });
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
    await until("each has granted some", () => worker.log().some(({ granted }) => Number(granted) > 0));
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
