import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { treaty } from "@elysiajs/eden";
import type { App } from "../api.ts";
import { freePorts } from "../lib/dev/servers.ts";
import {
  createTestDatabase,
  insertReservation,
  type RunningService,
  startService,
  type TestDatabase,
  uniqueName,
} from "./harness.ts";

// What a program of TypeScript gets of the types of api.ts: `tsc` checks that they fit the answers that are read here, and
// that each line under @ts-expect-error does not compile.

function clientOf(url: string) {
  return treaty<App>(url, { parseDate: false });
}

const ROW = { user_id: "TestUser01", point_amount: 100, execute_at: "2029-02-22T22:59:00+09:00" };
const TIME = "2029-02-22T13:59:00.000Z";

let db: TestDatabase;
let api: RunningService;
let client: ReturnType<typeof clientOf>;
beforeAll(async () => {
  db = await createTestDatabase();
  api = await startService("api", { DATABASE_URL: db.url });
  client = clientOf(api.url);
}, 30_000);
afterAll(async () => {
  await api?.kill("SIGKILL");
  await db?.drop();
}, 30_000);

function newUser(): string {
  return uniqueName("u").replaceAll("_", "");
}

/** What an answer says; throws where it is a problem. */
function told<Data>({ data, error }: { data: Data | null; error: unknown }): Data {
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

  test("reserves, tells the story, changes it and tells what is to come, all typed", async () => {
    const user_id = newUser();
    const reserved = told(await client.point.reserve.post({ ...ROW, user_id, campaign: "summer-2029" }));
    const id: string = reserved.reservation_id;
    const time: string = reserved.execute_at;
    expect([reserved.status satisfies "PENDING", time]).toEqual(["PENDING", TIME]);

    const reservation = client.point.reservations({ id });
    const story = told(await reservation.get());
    const status: "PENDING" | "PROCESSING" | "DONE" | "FAILED" | "CANCELLED" = story.status;
    const campaign: string | null = story.campaign;
    const nothing: (number | string | null)[] = [
      story.late_ms,
      story.granted_at,
      story.original_point_amount,
    ];
    expect([status, campaign, ...nothing]).toEqual(["PENDING", "summer-2029", null, null, null]);
    // @ts-expect-error a status that there is none of
    expect(story.status === "OPEN").toBe(false);

    const patched = told(await reservation.patch({ point_amount: 250 }));
    expect([patched.point_amount, patched.original_point_amount]).toEqual([250, 100]);
    const points = told(await client.users({ user_id }).points.get());
    const toCome: number | undefined = points.reserved_point_num;
    expect([points.point_num, toCome, points.next_execute_at]).toEqual([0, 250, TIME]);
  });

  test("lists by a typed query, page by page", async () => {
    const user_id = newUser();
    const user = client.users({ user_id });
    const ids: string[] = [];
    for (let at = 0; at < 3; at++)
      ids.push(told(await client.point.reserve.post({ ...ROW, user_id })).reservation_id);
    const list = user["reserved-points"];
    const first = told(await list.get({ query: { status: "PENDING", limit: 2 } }));
    const cursor: string | null = first.next_cursor;
    const second = told(await list.get({ query: { limit: 2, ...(cursor && { cursor }) } }));
    const listed = [...first.reserved_points, ...second.reserved_points];
    expect(listed.map(({ reservation_id }) => reservation_id).toSorted()).toEqual(ids.toSorted());
    expect([first.reserved_points.length, second.next_cursor]).toEqual([2, null]);
    // @ts-expect-error a status that there is none of
    const { error } = await list.get({ query: { status: "OPEN" } });
    expect(error?.status).toBe(400);
    expect(told(await user.transactions.get()).transactions).toEqual([]);
  });

  test("reserves many, and tells by `result` what became of each", async () => {
    const reservations = [ROW, { ...ROW, point_amount: 0 }];
    const { results } = told(await client.point.reserve.bulk.post({ mode: "each", reservations }));
    const outcomes = results.map((row) => (row.result === "refused" ? row.errors : row.reservation_id));
    expect(outcomes).toEqual([
      expect.stringMatching(/^[\da-f-]{36}$/),
      ["point amount must be greater than 0"],
    ]);
    // @ts-expect-error a mode that there is none of
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
    told(await client.point.sub.put({ user_id, point_num: 30 }));
    const { messages } = told(await client.point.confirm.get({ query: { user_id } }));
    expect(messages).toEqual([`userID: ${user_id}`, "pointNum: 70"]);
  });

  test("tells all broken rules of a 400", async () => {
    const { data, error } = await client.point.reserve.post({ ...ROW, user_id: "?", point_amount: 0 });
    expect(data).toBeNull();
    expect(error?.value.errors).toEqual(["user id is invalid format", "point amount must be greater than 0"]);
    expect(error?.status).toBe(400);
  });

  test("tells with a 409 where the reservation stands", async () => {
    const { id } = await insertReservation(db, { status: "FAILED" });
    const { error } = await client.point.reservations({ id }).delete();
    if (error?.status !== 409) throw new Error(`Not a 409 but a ${error?.status}`);
    expect(error.value.errors).toEqual(["reservation is FAILED"]);
    expect(error.value.reservation_status satisfies string).toBe("FAILED");
    const grantedAt: string | null = error.value.granted_at;
    expect(grantedAt).toBeNull();
  });

  test("lets a FAILED reservation be retried and a campaign be cancelled, without a body", async () => {
    const campaign = uniqueName("campaign");
    const { id } = await insertReservation(db, { status: "FAILED", campaign });
    expect(told(await client.point.reservations({ id }).retry.post()).status).toBe("PENDING");
    const counts = told(await client.point.campaigns({ campaign }).cancel.post());
    expect(counts).toEqual({ campaign, cancelled: 1, granted: 0, failed: 0, open: 0 });
  });

  test("gives no answer at all as a 503, which calls for the same thing: to send it again", async () => {
    const { error, response } = await clientOf(`http://127.0.0.1:${await freePorts(1)}`).health.get();
    expect([error?.status as number | undefined, response]).toEqual([503, undefined as never]);
  });

  test("compiles no body with a wrong type, a missing field or an unknown one; sent all the same, it is 400", async () => {
    const { reserve } = client.point;
    const { user_id, ...nobodys } = ROW;
    const answers = [
      // @ts-expect-error a number, not a string
      await reserve.post({ ...ROW, point_amount: "100" }),
      // @ts-expect-error a string, not a number
      await reserve.post({ ...ROW, execute_at: 0 }),
      // @ts-expect-error for nobody
      await reserve.post(nobodys),
      // @ts-expect-error no such field
      await reserve.post({ ...ROW, note: "for you" }),
      // @ts-expect-error no body
      await reserve.post(),
      // @ts-expect-error `point_num` is what it is called here
      await client.point.add.put({ user_id, point_amount: 1 }),
      // @ts-expect-error of no user
      await client.point.confirm.get(),
    ];
    expect(answers.map(({ error }) => error?.status as number)).toEqual([400, 400, 400, 400, 415, 400, 400]);
  });

  test("compiles no route and no method that there is none of; called all the same, it is 404 or 405", async () => {
    const answers = [
      // @ts-expect-error no such route
      await client.point.give.post(ROW),
      // @ts-expect-error no such method
      await client.point.reserve.put(ROW),
      // @ts-expect-error a reservation has no such part
      await client.point.reservations({ id: "42" }).story.get(),
    ];
    expect(answers.map(({ error }) => error?.status)).toEqual([404, 405, 404]);
  });
});
