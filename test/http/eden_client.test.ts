import { afterAll, describe, expect, test } from "bun:test";
import { treaty } from "@elysiajs/eden";
import type { App } from "../../api.ts";
import { freePorts } from "../../lib/dev/servers.ts";
import { openTestDatabase } from "../harness/database.ts";
import { insertReservation } from "../harness/fixtures.ts";
import { uniqueName } from "../harness/harness.ts";
import { startService } from "../harness/processes.ts";

// What a TypeScript program gets from the types of api.ts: `tsc` checks that they fit the answers that are read here, and that
// each line under @ts-expect-error does not compile.

const ROW = { user_id: "TestUser01", point_amount: 100, execute_at: "2029-02-22T22:59:00+09:00" };

const db = await openTestDatabase();
const api = await startService("api", { DATABASE_URL: db.url });
afterAll(() => api.kill("SIGKILL"));
const client = clientOf(api.url);

function clientOf(url: string) {
  return treaty<App>(url, { parseDate: false });
}

function newUser(): string {
  return uniqueName("u").replaceAll("_", "");
}

/** The data of an answer; throws if it is a problem. */
function dataOf<Data>({ data, error }: { data: Data | null; error: unknown }): Data {
  if (data === null) throw error;
  return data;
}

describe("treaty<App>()", () => {
  test("reserves and cancels in the lines of the README", async () => {
    const { point } = client;
    const { data, error } = await point.reserve.post(ROW);
    if (error) throw new Error(`${error.status}: ${error.value.errors}`);
    const { data: cancelled } = await point.reservations({ id: data.reservation_id }).delete();
    expect(cancelled).toEqual({ reservation_id: data.reservation_id, status: "CANCELLED" });
  });

  test("reserves, reads, patches and sums up, all typed", async () => {
    const user_id = newUser();
    const reserved = dataOf(await client.point.reserve.post({ ...ROW, user_id, campaign: "summer-2029" }));
    const { reservation_id: id, execute_at: time }: { reservation_id: string; execute_at: string } = reserved;
    expect([reserved.status satisfies "PENDING", time]).toEqual(["PENDING", "2029-02-22T13:59:00.000Z"]);

    const reservation = client.point.reservations({ id });
    const details = dataOf(await reservation.get());
    const status: "PENDING" | "PROCESSING" | "DONE" | "FAILED" | "CANCELLED" = details.status;
    const campaign: string | null = details.campaign;
    const lateMs: number | null = details.late_ms;
    const grantedAt: string | null = details.granted_at;
    expect([status, campaign, lateMs, grantedAt]).toEqual(["PENDING", "summer-2029", null, null]);
    // @ts-expect-error no such status
    expect(details.status === "OPEN").toBe(false);

    const patched = dataOf(await reservation.patch({ point_amount: 250 }));
    expect([patched.point_amount, patched.original_point_amount]).toEqual([250, 100]);
    const points = dataOf(await client.users({ user_id }).points.get());
    const reservedPoints: number | undefined = points.reserved_point_num;
    expect([points.point_num, reservedPoints, points.next_execute_at]).toEqual([0, 250, time]);
  });

  test("lists by a typed query, page by page", async () => {
    const user_id = newUser();
    const user = client.users({ user_id });
    for (let at = 0; at < 3; at++) dataOf(await client.point.reserve.post({ ...ROW, user_id }));
    const list = user["reserved-points"];
    const first = dataOf(await list.get({ query: { status: "PENDING", limit: 2 } }));
    const cursor: string | null = first.next_cursor;
    const second = dataOf(await list.get({ query: { limit: 2, ...(cursor && { cursor }) } }));
    const ids = [...first.reserved_points, ...second.reserved_points].map((row) => row.reservation_id);
    expect([new Set(ids).size, second.next_cursor]).toEqual([3, null]);
    // @ts-expect-error no such status
    const { error } = await list.get({ query: { status: "OPEN" } });
    expect(error?.status).toBe(400);
    expect(dataOf(await user.transactions.get()).transactions).toEqual([]);
  });

  test("reserves many, and tells the results apart by `result`", async () => {
    const reservations = [ROW, { ...ROW, point_amount: 0 }];
    const { results } = dataOf(await client.point.reserve.bulk.post({ mode: "each", reservations }));
    const outcomes = results.map((row) => (row.result === "refused" ? row.errors : row.reservation_id));
    const refused = ["point amount must be greater than 0"];
    expect(outcomes).toEqual([expect.stringMatching(/^[\da-f-]{36}$/), refused]);
    // @ts-expect-error no such mode
    const { error } = await client.point.reserve.bulk.post({ mode: "some", reservations });
    expect(error?.value.errors).toEqual(["mode must be atomic or each"]);
  });

  test("adds with the key in the header, once, and subtracts", async () => {
    const user_id = newUser();
    const headers = { "idempotency-key": uniqueName("gift") };
    for (const replayed of [null, "true"]) {
      const { data, response } = await client.point.add.put({ user_id, point_num: 100 }, { headers });
      expect(data?.messages).toEqual(["point updated"]);
      expect(response.headers.get("idempotent-replayed")).toBe(replayed);
    }
    dataOf(await client.point.sub.put({ user_id, point_num: 30 }));
    const { messages } = dataOf(await client.point.confirm.get({ query: { user_id } }));
    expect(messages).toEqual([`userID: ${user_id}`, "pointNum: 70"]);
  });

  test("gives the sentences of a 400, and the facts of a 409", async () => {
    const { data, error } = await client.point.reserve.post({ ...ROW, user_id: "?", point_amount: 0 });
    expect([data, error?.status]).toEqual([null, 400]);
    expect(error?.value.errors).toEqual(["user id is invalid format", "point amount must be greater than 0"]);

    const { id } = await insertReservation(db, { status: "FAILED" });
    const { error: conflict } = await client.point.reservations({ id }).delete();
    if (conflict?.status !== 409) throw new Error(`Not a 409 but a ${conflict?.status}`);
    expect(conflict.value.errors).toEqual(["reservation is FAILED"]);
    expect(conflict.value.reservation_status satisfies string).toBe("FAILED");
    const grantedAt: string | null = conflict.value.granted_at;
    expect(grantedAt).toBeNull();
  });

  test("retries and cancels a campaign without a body", async () => {
    const campaign = uniqueName("campaign");
    const { id } = await insertReservation(db, { status: "FAILED", campaign });
    expect(dataOf(await client.point.reservations({ id }).retry.post()).status).toBe("PENDING");
    const counts = dataOf(await client.point.campaigns({ campaign }).cancel.post());
    expect(counts).toEqual({ campaign, cancelled: 1, granted: 0, failed: 0, open: 0 });
  });

  test("gives no answer at all as a 503, which also means: send it again", async () => {
    const { error, response } = await clientOf(`http://127.0.0.1:${await freePorts(1)}`).health.get();
    expect([error?.status as number | undefined, response]).toEqual([503, undefined as never]);
  });

  test("compiles no wrong body, route or method; sent all the same, it is refused", async () => {
    const { point } = client;
    const { user_id, ...nobodys } = ROW;
    const answers = [
      // @ts-expect-error a number, not a string
      await point.reserve.post({ ...ROW, point_amount: "100" }),
      // @ts-expect-error a string, not a number
      await point.reserve.post({ ...ROW, execute_at: 0 }),
      // @ts-expect-error no user
      await point.reserve.post(nobodys),
      // @ts-expect-error no such field
      await point.reserve.post({ ...ROW, note: "for you" }),
      // @ts-expect-error no body
      await point.reserve.post(),
      // @ts-expect-error `point_num` is its name here
      await point.add.put({ user_id, point_amount: 1 }),
      // @ts-expect-error no user
      await point.confirm.get(),
      // @ts-expect-error no such route
      await point.give.post(ROW),
      // @ts-expect-error no such method
      await point.reserve.put(ROW),
      // @ts-expect-error a reservation has no such part
      await point.reservations({ id: "42" }).details.get(),
    ];
    const statuses = [400, 400, 400, 400, 415, 400, 400, 404, 405, 404];
    expect(answers.map(({ error }) => error?.status as number)).toEqual(statuses);
  });
});
