import { describe, expect, test } from "bun:test";
import type { ReservationStatus } from "../../lib/schema.ts";
import { command, killAt, killPoints, openCrashing, statementsOf } from "../harness/fault_points.ts";
import { insertReservation, insertReservations, reservationOf } from "../harness/fixtures.ts";
import { expectAgreement } from "../harness/pipeline.ts";
import type { RunningService } from "../harness/processes.ts";
import { bodyOf, json } from "../http/client.ts";

const { pipeline, proxies, runner } = await openCrashing("api");
const { query } = pipeline.test;

/** One request, and the state of what it changes. */
interface Request {
  path: string;
  init: RequestInit;
  state: () => Promise<unknown>;
}

interface Verb {
  prepare: () => Promise<Request>;
  /** The states of what it changes: before, perhaps in the middle, and in the end. */
  states: unknown[];
  /** All of its statements, as `killPoints` takes them. */
  work: string;
  status: number;
  /** What the same request is answered if all was done the first time; the same by default. */
  again?: number;
  /** Whether the answer to a replay says so in its header. */
  saysReplayed?: true;
}

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

/** A request about one reservation of a new user. */
async function requestAbout(
  status: ReservationStatus,
  { what = "", ...init }: RequestInit & { what?: string },
): Promise<Request> {
  const { id, userId } = await insertReservation(pipeline.test, { userId: newUser(), status });
  return { path: `/point/reservations/${id}${what}`, init, state: () => statusesOf(userId) };
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
    states: [{}, { PENDING: 1 }],
    work: "create_reservations!",
    status: 201,
    saysReplayed: true,
  },
  "cancel (fault 20)": {
    prepare: () => requestAbout("PENDING", { method: "DELETE" }),
    states: [{ PENDING: 1 }, { CANCELLED: 1 }],
    work: "begin lock_reservation cancel_reservation find_details commit!",
    status: 200,
  },
  "retry (fault 5)": {
    prepare: () => requestAbout("FAILED", { method: "POST", what: "/retry" }),
    states: [{ FAILED: 1 }, { PENDING: 1 }],
    work: "begin lock_reservation retry_reservation find_details commit!",
    status: 200,
    // It says that the reservation is PENDING: it was retried.
    again: 409,
  },
  "add (fault 8)": {
    prepare: async () => changeOf("add", newUser()),
    states: [
      { points: null, entries: 0 },
      { points: 30, entries: 1 },
    ],
    work: [
      "begin lock_balances commit read_uncommitted find_taken_balances",
      "begin lock_balances find_changes insert_ledger_entries upsert_balances commit!",
    ].join(" "),
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
    states: [
      { points: 30, entries: 1 },
      { points: 0, entries: 2 },
    ],
    work: "begin lock_balances find_changes insert_ledger_entries add_to_known commit!",
    status: 200,
    saysReplayed: true,
  },
  "bulk, all or none (fault 5)": {
    prepare: () => bulkOf("atomic"),
    states: [{}, { PENDING: MANY }],
    work: "begin find_by_idempotency_keys create_reservations create_reservations commit!",
    status: 201,
  },
  "bulk, each (fault 1)": {
    prepare: () => bulkOf("each"),
    states: [{}, { PENDING: MANY - 1 }, { PENDING: MANY }],
    work: "find_by_idempotency_keys create_reservations! create_reservations!",
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
    states: [{ PENDING: MANY }, { PENDING: 1, CANCELLED: MANY - 1 }, { CANCELLED: MANY }],
    work: [
      "begin lock_open_of_campaign cancel_reservations commit!",
      "begin lock_open_of_campaign cancel_reservations commit!",
      "begin lock_open_of_campaign commit count_campaign",
    ].join(" "),
    status: 200,
  },
};

function send({ url }: RunningService, { path, init }: Request) {
  return fetch(url + path, init);
}

describe.each(Object.entries(VERBS))("api.ts killed in the middle of: %s", (_, verb) => {
  const { prepare, states, work, status, again = status, saysReplayed = false } = verb;
  const all = states.at(-1);

  test.each(killPoints(work, states))(
    "$statement $nth $moment: the same again, at the next process, leaves what one alone does",
    async ({ statement, nth, moment, state }) => {
      const request = await prepare();
      const service = await runner();
      const struck = killAt(proxies, { command: command(statement, { nth }), moment, service });
      const answered = send(service, request).then(
        () => true,
        () => false,
      );
      await struck();
      expect(await answered).toBe(false);
      expect(await request.state()).toEqual(state);

      const response = await send(await runner(), request);
      expect(response.status).toBe(state === all ? again : status);
      expect(response.headers.has("idempotent-replayed")).toBe(state === all && saysReplayed);
      expect(await request.state()).toEqual(all);
    },
  );

  test("these are all of its statements", async () => {
    const request = await prepare();
    const service = await runner();
    const sent = await statementsOf(proxies.mysql, async () => {
      expect((await send(service, request)).status).toBe(status);
    });
    expect(await request.state()).toEqual(all);
    expect(sent).toBe(work.replaceAll("!", ""));
    await expectAgreement(pipeline.test);
  });
});
