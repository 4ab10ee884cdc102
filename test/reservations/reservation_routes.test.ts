import { describe, expect, spyOn, test } from "bun:test";
import type { Database } from "../../lib/database.ts";
import type { ReservationStatus } from "../../lib/schema.ts";
import { openTestDatabase } from "../harness/database.ts";
import { insertReservation, insertReservations, reservationOf } from "../harness/fixtures.ts";
import { until } from "../harness/harness.ts";
import { appOn, expectProblem, json } from "../http/client.ts";

// The usual answers are the examples of the description, which test/http/openapi.test.ts sends. Here is what needs another state,
// or another order of events.

const db = await openTestDatabase();
const app = appOn(db.database);

const TO_COME = new Date("2029-02-22T13:59:00.000Z");
const PATCH = { point_amount: 250, execute_at: "2029-03-01T00:00:00.000Z" };
const VERBS = {
  cancel: ["", { method: "DELETE" }],
  patch: ["", json("PATCH", PATCH)],
  retry: ["/retry", { method: "POST" }],
} as const;
type Verb = keyof typeof VERBS;

function change(verb: Verb, id: string, { send } = app): Promise<Response> {
  const [part, init] = VERBS[verb];
  return send(`/point/reservations/${id}${part}`, init);
}

async function detailsOf(id: string): Promise<Record<string, unknown>> {
  const response = await app.send(`/point/reservations/${id}`);
  return (await response.json()) as Record<string, unknown>;
}

function setStatus(id: string, status: ReservationStatus) {
  const scanAt = status === "FAILED" ? null : TO_COME;
  return db.query("update point_reservations set status = ?, scan_at = ? where id = ?", [status, scanAt, id]);
}

test("GET /point/reservations/:id tells why a reservation failed; the id may be in upper case", async () => {
  const { id } = await insertReservation(db, { status: "FAILED" });
  await db.query("update point_reservations set attempts = 3, last_error = '残高' where id = ?", [id]);
  const details = { reservation_id: id, status: "FAILED", attempts: 3, last_error: "残高", late_ms: null };
  expect(await detailsOf(id.toUpperCase())).toMatchObject(details);
});

test.each<[Verb, ReservationStatus, string]>([
  ["patch", "PROCESSING", "reservation is not PENDING"],
  ["patch", "CANCELLED", "reservation is not PENDING"],
  ["retry", "PENDING", "reservation is not FAILED"],
  ["retry", "CANCELLED", "reservation is not FAILED"],
])("a %s of a reservation that is %s is 409, and says where it stands", async (verb, status, sentence) => {
  const { id } = await insertReservation(db, { status });
  const before = await detailsOf(id);
  const problem = await expectProblem(await change(verb, id.toUpperCase()), 409, [sentence]);
  const facts = { reservation_id: id, reservation_status: status, granted_at: null, transaction_id: null };
  expect(problem).toMatchObject(facts);
  expect(problem.detail).toContain(status);
  expect(await detailsOf(id)).toEqual(before);
});

describe("a change whose COMMIT was not answered", () => {
  /** A database that runs each transaction again after something has happened, as if its first answer were lost. */
  function openForgetful(happen: () => Promise<unknown>): Database {
    return {
      ...db.database,
      async transaction(work, options) {
        await db.database.transaction(work, options);
        await happen();
        return db.database.transaction(work, options);
      },
    };
  }

  test.each<[Verb, ReservationStatus, object]>([
    ["patch", "PENDING", { ...PATCH, original_execute_at: TO_COME.toISOString() }],
    ["retry", "FAILED", { attempts: 0 }],
  ])("is 200 if it came through and the row is claimed since: %s", async (verb, status, details) => {
    const { id } = await insertReservation(db, { status, executeAt: TO_COME });
    const response = await change(verb, id, appOn(openForgetful(() => setStatus(id, "PROCESSING"))));
    expect(response.status).toBe(200);
    expect(await response.json()).toMatchObject({ status: "PROCESSING", ...details });
  });

  test("is 409 if it did not come through and the row is claimed as it was: patch", async () => {
    const { id } = await insertReservation(db, { executeAt: TO_COME });
    const before = await detailsOf(id);
    const undone = { point_amount: 100, execute_at: TO_COME, original_execute_at: null };
    const forgetful = openForgetful(async () => {
      await db.query("update point_reservations set ?, original_point_amount = null where id = ?", [
        undone,
        id,
      ]);
      await setStatus(id, "PROCESSING");
    });
    const response = await change("patch", id, appOn(forgetful));
    await expectProblem(response, 409, ["reservation is not PENDING"]);
    const after = { ...before, status: "PROCESSING", updated_at: expect.any(String) };
    expect(await detailsOf(id)).toEqual(after);
  });
});

describe("POST /point/campaigns/:campaign/cancel", () => {
  function cancel(campaign: string, { send } = app) {
    return send(`/point/campaigns/${campaign}/cancel`, { method: "POST" });
  }

  test("stops after 20 s, tells how many are open, and sent again cancels the rest", async () => {
    const reservations = Array.from({ length: 2_500 }, () => reservationOf({ campaign: "slow" }));
    await insertReservations(db, { reservations });
    const clock = spyOn(performance, "now").mockReturnValue(1_000);
    // Each transaction cancels 1,000: after the first one there is still time, after the second there is none.
    const times = [20_999];
    const slow = appOn({
      ...db.database,
      async transaction(work, options) {
        const result = await db.database.transaction(work, options);
        clock.mockReturnValue(times.shift() ?? 21_000);
        return result;
      },
    });
    const response = await cancel("slow", slow).finally(() => clock.mockRestore());
    const counts = { campaign: "slow", cancelled: 2_000, granted: 0, failed: 0, open: 500 };
    expect([response.status, await response.json()]).toEqual([200, counts]);
    expect(await (await cancel("slow")).json()).toEqual({ ...counts, cancelled: 2_500, open: 0 });
  });

  test("is 404 for a campaign whose name differs in case", async () => {
    await insertReservation(db, { campaign: "Spring" });
    await expectProblem(await cancel("spring"), 404, ["campaign not found"]);
  });

  test("at once with two others is 503, and those that end make room again", async () => {
    for (const campaign of ["a", "b", "c"]) await insertReservation(db, { campaign });
    const { promise: gate, resolve: open } = Promise.withResolvers<void>();
    let waiting = 0;
    const held = appOn({
      ...db.database,
      run(work, options) {
        waiting++;
        return gate.then(() => db.database.run(work, options));
      },
    });
    const answers = [cancel("a", held), cancel("b", held)];
    await until("two wait for MySQL", () => waiting === 2);
    const response = await cancel("c", held);
    expect(response.headers.get("retry-after")).toBe("1");
    await expectProblem(response, 503, ["service is unavailable"]);
    open();
    for (const answer of answers) expect((await answer).status).toBe(200);
    for (let times = 0; times < 3; times++) expect((await cancel("none", held)).status).toBe(404);
    expect(await (await cancel("c", held)).json()).toMatchObject({ cancelled: 1, open: 0 });
  });
});
