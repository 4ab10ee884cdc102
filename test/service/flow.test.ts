import { expect, setDefaultTimeout, test } from "bun:test";
import { insertReservation } from "../harness/fixtures.ts";
import { until } from "../harness/harness.ts";
import { expectAgreement, expectAllDoneOnce, openPipeline } from "../harness/pipeline.ts";
import { json } from "../http/client.ts";

setDefaultTimeout(60_000);

/** Starts an API; what it answers is a status and the members of its JSON. */
async function openApi(pipeline: Awaited<ReturnType<typeof openPipeline>>) {
  const { url } = await pipeline.start("api");
  async function send(method: "GET" | "POST" | "PUT" | "PATCH" | "DELETE", path: string, body?: unknown) {
    const hasBody = method === "POST" || method === "PUT" || method === "PATCH";
    const response = await fetch(url + path, hasBody ? json(method, body ?? {}) : { method });
    const members: ReturnType<typeof JSON.parse> = await response.json();
    const isReplay = response.headers.get("idempotent-replayed") === "true";
    return { http: response.status, isReplay, ...members };
  }
  return send;
}

/** The same moment, written with the offset of a place that is not the host's. */
function inOffset(time: Date, hours: number): string {
  const local = new Date(time.getTime() + hours * 3_600_000).toISOString().replace("Z", "");
  return `${local}${hours < 0 ? "-" : "+"}${String(Math.abs(hours)).padStart(2, "0")}:00`;
}

test("a reservation becomes points: reserve, wait, balance, details, replay", async () => {
  await using pipeline = await openPipeline();
  const send = await openApi(pipeline);
  const executeAt = new Date(Date.now() + 1_000);
  const time = executeAt.toISOString();
  const request = {
    user_id: "TestUser01",
    point_amount: 100,
    execute_at: inOffset(executeAt, 9),
    idempotency_key: "order-42",
  };
  const reserved = await send("POST", "/point/reserve", request);
  expect(reserved).toMatchObject({ http: 201, isReplay: false, status: "PENDING", execute_at: time });
  const path = `/point/reservations/${reserved.reservation_id}`;
  expect(await send("GET", path)).toMatchObject({
    http: 200,
    status: "PENDING",
    attempts: 0,
    execute_at: time,
    next_scan_at: time,
    last_error: null,
    granted_at: null,
    late_ms: null,
  });
  expect(await send("GET", "/users/TestUser01/points")).toMatchObject({
    http: 200,
    point_num: 0,
    reserved_point_num: 100,
    next_execute_at: time,
    updated_at: null,
  });

  await pipeline.start("scheduler");
  await pipeline.start("worker");
  const balance = await until("the balance", async () => {
    const found = await send("GET", "/users/TestUser01/points");
    return found.point_num !== 0 && found;
  });
  expect(balance).toMatchObject({ http: 200, point_num: 100, reserved_point_num: 0, next_execute_at: null });
  const details = await send("GET", path);
  expect(details).toMatchObject({ status: "DONE", attempts: 0, last_error: null, next_scan_at: null });
  expect(details.late_ms).toBe(Date.parse(details.granted_at) - executeAt.getTime());
  expect(details.late_ms).toBeGreaterThanOrEqual(0);

  const replay = await send("POST", "/point/reserve", { ...request, execute_at: inOffset(executeAt, -3) });
  expect(replay).toEqual({ ...reserved, isReplay: true });
  expect(await send("POST", "/point/reserve", { ...request, point_amount: 101 })).toMatchObject({
    http: 422,
  });
  await expectAllDoneOnce(pipeline.test, 1);
});

test("a campaign from its bulk to its end: patch, cancel, retry, add, subtract, and the lists of it all", async () => {
  await using pipeline = await openPipeline();
  const send = await openApi(pipeline);
  const soon = new Date(Date.now() + 1_000).toISOString();
  const later = new Date(Date.now() + 3_600_000).toISOString();
  const reservations = [
    { point_amount: 100, execute_at: soon },
    { point_amount: 200, execute_at: later },
    { point_amount: 300, execute_at: later },
    { point_amount: 400, execute_at: later },
  ].map((row) => ({ user_id: "TestUser01", campaign: "summer", ...row }));
  const bulk = await send("POST", "/point/reserve/bulk", { mode: "atomic", reservations });
  expect(bulk).toMatchObject({ http: 201 });
  const ids: string[] = bulk.results.map((row: { reservation_id: string }) => row.reservation_id);
  const [granted, cancelled, patched, left] = ids.map((id) => `/point/reservations/${id}`) as [
    string,
    string,
    string,
    string,
  ];
  const failed = await insertReservation(pipeline.test, { status: "FAILED", pointAmount: 7 });
  const points = () => send("GET", "/users/TestUser01/points");
  expect(await points()).toMatchObject({ point_num: 0, reserved_point_num: 1_000 });

  expect(await send("DELETE", cancelled)).toMatchObject({ http: 200, status: "CANCELLED" });
  const patch = { execute_at: soon, point_amount: 250 };
  expect(await send("PATCH", patched, patch)).toMatchObject({
    http: 200,
    status: "PENDING",
    ...patch,
    original_execute_at: later,
    original_point_amount: 300,
  });
  const retry = `/point/reservations/${failed.id}/retry`;
  expect(await send("POST", retry)).toMatchObject({ http: 200, attempts: 0 });
  const add = { user_id: "TestUser01", point_num: 50, idempotency_key: "gift-1" };
  for (const isReplay of [false, true]) {
    expect(await send("PUT", "/point/add", add)).toMatchObject({ http: 200, isReplay });
  }

  await pipeline.start("scheduler");
  await pipeline.start("worker");
  const balance = await until("all that is due is granted", async () => {
    const found = await points();
    return found.point_num === 100 + 250 + 7 + 50 && found;
  });
  expect(balance).toMatchObject({ reserved_point_num: 400, next_execute_at: later });
  const sub = { user_id: "TestUser01", point_num: 407, idempotency_key: "spend-1" };
  const tooMuch = { ...sub, point_num: 408, idempotency_key: "spend-2" };
  for (const [body, http] of [
    [tooMuch, 400],
    [sub, 200],
    [tooMuch, 400],
  ] as const) {
    expect(await send("PUT", "/point/sub", body)).toMatchObject({ http });
  }
  expect(await points()).toMatchObject({ point_num: 0, reserved_point_num: 400 });

  const { granted_at, transaction_id } = await send("GET", granted);
  const done = { http: 409, reservation_status: "DONE", granted_at, transaction_id };
  expect(await send("DELETE", granted)).toMatchObject(done);
  expect(await send("PATCH", granted, patch)).toMatchObject(done);
  const counts = { http: 200, cancelled: 2, granted: 2, failed: 0 };
  expect(await send("POST", "/point/campaigns/summer/cancel")).toMatchObject(counts);
  expect(await send("GET", left)).toMatchObject({ status: "CANCELLED", granted_at: null });

  const listed = await send("GET", "/users/TestUser01/reserved-points?campaign=summer");
  type Listed = { reservation_id: string; status: string; point: number };
  const rows = listed.reserved_points.map((row: Listed) => [row.reservation_id, row.status, row.point]);
  const ends = ["DONE 100", "CANCELLED 200", "DONE 250", "CANCELLED 400"].map((end) => end.split(" "));
  expect(rows.toSorted()).toEqual(
    ids.map((id, index) => [id, ends[index]?.[0], Number(ends[index]?.[1])]).toSorted(),
  );
  const { transactions } = await send("GET", "/users/TestUser01/transactions");
  expect(transactions[0]).toMatchObject({ kind: "sub", point: -407, idempotency_key: "spend-1" });
  type Entry = { point: number; kind: string; reservation_id: string | null };
  expect(
    new Set(
      transactions.map(({ point, kind, reservation_id }: Entry) => `${kind} ${point} ${reservation_id}`),
    ),
  ).toEqual(
    new Set([
      "sub -407 null",
      `grant 250 ${ids[2]}`,
      `grant 100 ${ids[0]}`,
      "add 50 null",
      `grant 7 ${failed.id}`,
    ]),
  );
  const at = encodeURIComponent(transactions[1].created_at);
  expect(await send("GET", `/users/TestUser01/points?at=${at}`)).toMatchObject({ http: 200, point_num: 407 });
  expect(await expectAgreement(pipeline.test)).toMatchObject({
    reservations: 357n,
    direct: -357n,
    ledger: 0n,
    balances: 0n,
  });
});
