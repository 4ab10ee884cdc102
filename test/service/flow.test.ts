import { expect, setDefaultTimeout, test } from "bun:test";
import { until } from "../harness/harness.ts";
import { expectAllDoneOnce, openPipeline } from "../harness/pipeline.ts";
import { post } from "../http/client.ts";

setDefaultTimeout(60_000);

/** The same moment, written with the offset of a place that is not the host's. */
function inOffset(time: Date, hours: number): string {
  const local = new Date(time.getTime() + hours * 3_600_000).toISOString().replace("Z", "");
  return `${local}${hours < 0 ? "-" : "+"}${String(Math.abs(hours)).padStart(2, "0")}:00`;
}

test("a reservation becomes points: reserve, wait, balance, details, replay; every line of the logs is JSON", async () => {
  await using pipeline = await openPipeline();
  const { url } = await pipeline.start("api");
  async function send(path: string, init?: RequestInit) {
    const response = await fetch(url + path, init);
    const members: ReturnType<typeof JSON.parse> = await response.json();
    const isReplay = response.headers.get("idempotent-replayed") === "true";
    return { http: response.status, isReplay, ...members };
  }
  const executeAt = new Date(Date.now() + 1_000);
  const time = executeAt.toISOString();
  const request = {
    user_id: "TestUser01",
    point_amount: 100,
    execute_at: inOffset(executeAt, 9),
    idempotency_key: "order-42",
  };
  const reserved = await send("/point/reserve", post(request));
  expect(reserved).toMatchObject({ http: 201, isReplay: false, status: "PENDING", execute_at: time });
  const path = `/point/reservations/${reserved.reservation_id}`;
  expect(await send(path)).toMatchObject({
    http: 200,
    status: "PENDING",
    attempts: 0,
    execute_at: time,
    next_scan_at: time,
    last_error: null,
    granted_at: null,
    late_ms: null,
  });
  expect(await send("/users/TestUser01/points")).toMatchObject({
    http: 200,
    point_num: 0,
    reserved_point_num: 100,
    next_execute_at: time,
    updated_at: null,
  });

  await pipeline.start("scheduler");
  await pipeline.start("worker");
  const balance = await until("the balance", async () => {
    const found = await send("/users/TestUser01/points");
    return found.point_num !== 0 && found;
  });
  expect(balance).toMatchObject({ http: 200, point_num: 100, reserved_point_num: 0, next_execute_at: null });
  const details = await send(path);
  expect(details).toMatchObject({ status: "DONE", attempts: 0, last_error: null, next_scan_at: null });
  expect(details.late_ms).toBe(Date.parse(details.granted_at) - executeAt.getTime());
  expect(details.late_ms).toBeGreaterThanOrEqual(0);

  const replay = await send("/point/reserve", post({ ...request, execute_at: inOffset(executeAt, -3) }));
  expect(replay).toEqual({ ...reserved, isReplay: true });
  expect(await send("/point/reserve", post({ ...request, point_amount: 101 }))).toMatchObject({
    http: 422,
  });
  await expectAllDoneOnce(pipeline.test, 1);
  const lines = pipeline.services.flatMap(({ service }) => service.log());
  expect(lines.filter(({ line }) => line !== undefined)).toEqual([]);
});
