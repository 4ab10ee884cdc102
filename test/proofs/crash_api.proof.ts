import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { command, killAt, openProxies, relay, statementsOf } from "../harness/fault_points.ts";
import { insertReservation, insertReservations, reservationOf } from "../harness/fixtures.ts";
import { expectAgreement, openPipeline } from "../harness/pipeline.ts";
import type { RunningService } from "../harness/processes.ts";
import type { Moment } from "../harness/proxy.ts";
import { bodyOf, json } from "../http/client.ts";

setDefaultTimeout(60_000);

const pipeline = await openPipeline();
const proxies = await openProxies(pipeline.test);
const runner = relay(() => pipeline.start("api", { DATABASE_URL: proxies.mysql.url }));
const { query } = pipeline.test;
afterAll(async () => {
  await pipeline[Symbol.asyncDispose]();
  await proxies[Symbol.asyncDispose]();
});

/** One request, and the state of what it changes. */
interface Request {
  path: string;
  init: RequestInit;
  state: () => Promise<unknown>;
}

/** A kind of request: the states of what it changes, and its statements, each with the state after it. */
interface Verb {
  prepare: () => Promise<Request>;
  states: { nothing: unknown; part?: unknown; all: unknown };
  statements: Record<string, "nothing" | "part" | "all">;
  status: number;
  /** What the same request is answered if all was done the first time; the same by default. */
  again?: number;
  /** Whether the answer to a replay says so in its header. */
  saysReplayed?: true;
}

const TO_COME = "2029-02-22T13:59:00.000Z";
const LATER = "2029-03-01T00:00:00.000Z";
/** One more than goes in one statement. */
const MANY = 1_001;

let users = 0;
function newUser(): string {
  return `User${++users}`;
}

/** The number of a user's reservations in each status. */
async function statusesOf(userId: string) {
  const rows = await query<{ status: string; count: number }>(
    "select status, count(*) count from point_reservations where user_id = ? group by status",
    [userId],
  );
  return Object.fromEntries(rows.map(({ status, count }) => [status, count]));
}

async function pointsOf(userId: string) {
  const [row] = await query(
    `select (select point_num from point_root where user_id = ?) points,
       (select count(*) from point_transactions where user_id = ?) entries`,
    [userId, userId],
  );
  return row;
}

function changeOf(verb: "add" | "sub", userId: string): Request {
  const body = { user_id: userId, point_num: 30, idempotency_key: crypto.randomUUID() };
  return { path: `/point/${verb}`, init: json("PUT", body), state: () => pointsOf(userId) };
}

async function bulkOf(mode: "atomic" | "each"): Promise<Request> {
  const user_id = newUser();
  const reservations = Array.from({ length: MANY }, (_, index) =>
    bodyOf({ user_id, point_amount: index + 1 }),
  );
  const init = json("POST", { mode, reservations });
  return { path: "/point/reserve/bulk", init, state: () => statusesOf(user_id) };
}

const VERBS: Record<string, Verb> = {
  "reserve (fault 1)": {
    async prepare() {
      const user_id = newUser();
      const init = json("POST", bodyOf({ user_id, idempotency_key: crypto.randomUUID() }));
      return { path: "/point/reserve", init, state: () => statusesOf(user_id) };
    },
    states: { nothing: {}, all: { PENDING: 1 } },
    statements: { create_reservations: "all" },
    status: 201,
    saysReplayed: true,
  },
  "cancel (fault 20)": {
    async prepare() {
      const { id, userId } = await insertReservation(pipeline.test, { userId: newUser() });
      return {
        path: `/point/reservations/${id}`,
        init: { method: "DELETE" },
        state: () => statusesOf(userId),
      };
    },
    states: { nothing: { PENDING: 1 }, all: { CANCELLED: 1 } },
    statements: {
      begin: "nothing",
      cancel_reservation: "nothing",
      find_details: "nothing",
      commit: "all",
    },
    status: 200,
  },
  "patch (fault 5)": {
    async prepare() {
      const { id } = await insertReservation(pipeline.test, { executeAt: new Date(TO_COME) });
      async function state() {
        const [row] = await query<{ amount: number; at: Date; scan: Date; original: number | null }>(
          `select point_amount amount, execute_at at, scan_at scan, original_point_amount original
           from point_reservations where id = ?`,
          [id],
        );
        return row && { ...row, at: row.at.toISOString(), scan: row.scan.toISOString() };
      }
      const init = json("PATCH", { point_amount: 250, execute_at: LATER });
      return { path: `/point/reservations/${id}`, init, state };
    },
    states: {
      nothing: { amount: 100, at: TO_COME, scan: TO_COME, original: null },
      all: { amount: 250, at: LATER, scan: LATER, original: 100 },
    },
    statements: {
      begin: "nothing",
      patch_reservation: "nothing",
      find_details: "nothing",
      commit: "all",
    },
    status: 200,
  },
  "retry (fault 5)": {
    async prepare() {
      const { id, userId } = await insertReservation(pipeline.test, { userId: newUser(), status: "FAILED" });
      return {
        path: `/point/reservations/${id}/retry`,
        init: { method: "POST" },
        state: () => statusesOf(userId),
      };
    },
    states: { nothing: { FAILED: 1 }, all: { PENDING: 1 } },
    statements: {
      begin: "nothing",
      retry_reservation: "nothing",
      find_details: "nothing",
      commit: "all",
    },
    status: 200,
    // It says what the reservation is: it was retried.
    again: 409,
  },
  "add (fault 8)": {
    prepare: async () => changeOf("add", newUser()),
    states: { nothing: { points: null, entries: 0 }, all: { points: 30, entries: 1 } },
    statements: {
      begin: "nothing",
      lock_balances: "nothing",
      find_locked: "nothing",
      find_changes: "nothing",
      insert_ledger_entries: "nothing",
      upsert_balances: "nothing",
      commit: "all",
    },
    status: 200,
    saysReplayed: true,
  },
  "sub (fault 8)": {
    async prepare() {
      const userId = newUser();
      const { path, init } = changeOf("add", userId);
      await fetch((await runner()).url + path, init);
      return changeOf("sub", userId);
    },
    states: { nothing: { points: 30, entries: 1 }, all: { points: 0, entries: 2 } },
    statements: {
      begin: "nothing",
      lock_balances: "nothing",
      find_changes: "nothing",
      insert_ledger_entries: "nothing",
      add_to_known: "nothing",
      commit: "all",
    },
    status: 200,
    saysReplayed: true,
  },
  "bulk, all or none (fault 5)": {
    prepare: () => bulkOf("atomic"),
    states: { nothing: {}, all: { PENDING: MANY } },
    statements: {
      begin: "nothing",
      find_by_idempotency_keys: "nothing",
      create_reservations: "nothing",
      "create_reservations 2": "nothing",
      commit: "all",
    },
    status: 201,
  },
  "bulk, each (fault 1)": {
    prepare: () => bulkOf("each"),
    states: { nothing: {}, part: { PENDING: MANY - 1 }, all: { PENDING: MANY } },
    statements: {
      find_by_idempotency_keys: "nothing",
      create_reservations: "part",
      "create_reservations 2": "all",
    },
    status: 200,
  },
  "cancel a campaign (fault 20)": {
    async prepare() {
      const [userId, campaign] = [newUser(), `campaign-${users}`];
      const reservations = Array.from({ length: MANY }, () => reservationOf({ userId, campaign }));
      await insertReservations(pipeline.test, { reservations });
      return {
        path: `/point/campaigns/${campaign}/cancel`,
        init: { method: "POST" },
        state: () => statusesOf(userId),
      };
    },
    states: {
      nothing: { PENDING: MANY },
      part: { PENDING: 1, CANCELLED: MANY - 1 },
      all: { CANCELLED: MANY },
    },
    statements: {
      find_open_of_campaign: "nothing",
      cancel_reservations: "part",
      "find_open_of_campaign 2": "part",
      "cancel_reservations 2": "all",
      "find_open_of_campaign 3": "all",
      count_campaign: "all",
    },
    status: 200,
  },
};

function send({ url }: RunningService, { path, init }: Request) {
  return fetch(url + path, init);
}

describe.each(Object.entries(VERBS))("api.ts killed in the middle of: %s", (_, verb) => {
  const { prepare, states, statements, status, again = status, saysReplayed = false } = verb;
  const names = Object.keys(statements);
  const points: [string, Moment, "nothing" | "part" | "all"][] = [
    [names[0] ?? "", "unsent", "nothing"],
    ...Object.entries(statements).map(([name, done]): (typeof points)[number] => [name, "answered", done]),
  ];

  test.each(points)(
    "%s %s: the same again, at the next process, leaves what one alone does",
    async (statement, moment, done) => {
      const request = await prepare();
      const service = await runner();
      const [name = "", nth = 1] = statement.split(" ");
      const struck = killAt(proxies, { command: command(name, { nth: Number(nth) }), moment, service });
      const answered = send(service, request).then(
        () => true,
        () => false,
      );
      await struck();
      expect(await answered).toBe(false);
      expect(await request.state()).toEqual(states[done]);

      const response = await send(await runner(), request);
      expect(response.status).toBe(done === "all" ? again : status);
      expect(response.headers.has("idempotent-replayed")).toBe(done === "all" && saysReplayed);
      expect(await request.state()).toEqual(states.all);
    },
  );

  test("these are all of its statements", async () => {
    const request = await prepare();
    const service = await runner();
    const sent = await statementsOf(proxies.mysql, async () => {
      expect((await send(service, request)).status).toBe(status);
    });
    expect(await request.state()).toEqual(states.all);
    expect(sent).toEqual(names);
    await expectAgreement(pipeline.test);
  });
});
