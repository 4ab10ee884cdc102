import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { changePoints, compareSums } from "../lib/point_repository.ts";
import { bodyOf, post } from "./api_client.ts";
import {
  BEGIN,
  COMMIT,
  INSERT_BALANCE,
  INSERT_LEDGER,
  INSERT_RESERVATION,
  killAt,
  LOCK,
  nth,
  openProxies,
  type Proxies,
  READ,
  relay,
  statementsOf,
  UPDATE,
  UPDATE_BALANCE,
} from "./fault_points.ts";
import { insertReservation, type RunningService } from "./harness.ts";
import { openPipeline, type Pipeline } from "./pipeline.ts";
import type { Moment } from "./proxy.ts";

const STATEMENTS = {
  ...{ BEGIN, LOCK, READ, UPDATE, UPDATE_BALANCE, COMMIT },
  ...{ INSERT: INSERT_RESERVATION, INSERT_LEDGER, INSERT_BALANCE },
};
type Name = keyof typeof STATEMENTS;

let pipeline: Pipeline;
let proxies: Proxies;
let runner: () => Promise<RunningService>;

beforeAll(async () => {
  pipeline = await openPipeline();
  proxies = await openProxies(pipeline);
  runner = relay(() => pipeline.start("api", { DATABASE_URL: proxies.mysql.url }));
}, 30_000);
afterAll(async () => {
  await pipeline[Symbol.asyncDispose]();
  await proxies[Symbol.asyncDispose]();
}, 30_000);

/** One request, and how what it changes stands. */
interface Deed {
  path: string;
  init: RequestInit;
  stand: () => Promise<unknown>;
}

/** A kind of request: how what it changes stands before, in the middle and in the end, and what it is answered. */
interface Verb {
  prepare: () => Promise<Deed>;
  nothing: unknown;
  part?: unknown;
  all: unknown;
  status: number;
  /** What the same request is answered when all was done the first time. */
  again?: number;
  /** Whether an answer that is a replay says so in the header. */
  saysReplayed?: true;
}

const query = <Row extends object>(sql: string, values: unknown[]) => pipeline.test.query<Row>(sql, values);
let users = 0;
const newUser = () => `User${++users}`;
const TO_COME = "2029-02-22T13:59:00.000Z";
const LATER = "2029-03-01T00:00:00.000Z";
/** One more than goes in one statement. */
const MANY = 1_001;

/** How many reservations of a user stand where. */
async function reservationsOf(userId: string) {
  const rows = await query<{ status: string; count: number }>(
    "select status, count(*) count from point_reservations where user_id = ? group by status",
    [userId],
  );
  return Object.fromEntries(rows.map(({ status, count }) => [status, Number(count)]));
}

async function pointsOf(userId: string) {
  const [row] = await query<{ points: number | null; entries: number }>(
    `select (select point_num from point_root where user_id = ?) points,
       (select count(*) from point_transactions where user_id = ?) entries`,
    [userId, userId],
  );
  return { points: row?.points ?? null, entries: Number(row?.entries) };
}

async function bulkOf(mode: "atomic" | "each"): Promise<Deed> {
  const user_id = newUser();
  const reservations = Array.from({ length: MANY }, (_, index) =>
    bodyOf({ user_id, point_amount: index + 1 }),
  );
  return {
    path: "/point/reserve/bulk",
    init: post({ mode, reservations }),
    stand: () => reservationsOf(user_id),
  };
}

const VERBS = {
  reserve: {
    async prepare() {
      const user_id = newUser();
      const body = bodyOf({ user_id, idempotency_key: crypto.randomUUID() });
      return { path: "/point/reserve", init: post(body), stand: () => reservationsOf(user_id) };
    },
    nothing: {},
    all: { PENDING: 1 },
    status: 201,
    saysReplayed: true,
  },
  cancel: {
    async prepare() {
      const { id, userId } = await insertReservation(pipeline.test, { userId: newUser() });
      const path = `/point/reservations/${id}`;
      return { path, init: { method: "DELETE" }, stand: () => reservationsOf(userId) };
    },
    nothing: { PENDING: 1 },
    all: { CANCELLED: 1 },
    status: 200,
  },
  patch: {
    async prepare() {
      const { id } = await insertReservation(pipeline.test, { executeAt: new Date(TO_COME) });
      const body = { point_amount: 250, execute_at: LATER };
      return {
        path: `/point/reservations/${id}`,
        init: { ...post(body), method: "PATCH" },
        async stand() {
          type Row = { amount: number; at: Date; scan: Date; original: number | null };
          const [row] = await query<Row>(
            `select point_amount amount, execute_at at, scan_at scan, original_point_amount original
             from point_reservations where id = ?`,
            [id],
          );
          return row && { ...row, at: row.at.toISOString(), scan: row.scan.toISOString() };
        },
      };
    },
    nothing: { amount: 100, at: TO_COME, scan: TO_COME, original: null },
    all: { amount: 250, at: LATER, scan: LATER, original: 100 },
    status: 200,
  },
  retry: {
    async prepare() {
      const { id, userId } = await insertReservation(pipeline.test, { userId: newUser(), status: "FAILED" });
      const path = `/point/reservations/${id}/retry`;
      return { path, init: { method: "POST" }, stand: () => reservationsOf(userId) };
    },
    nothing: { FAILED: 1 },
    all: { PENDING: 1 },
    status: 200,
    // It says where the reservation stands: it was retried.
    again: 409,
  },
  add: {
    async prepare() {
      const user_id = newUser();
      const body = { user_id, point_num: 30, idempotency_key: crypto.randomUUID() };
      return {
        path: "/point/add",
        init: { ...post(body), method: "PUT" },
        stand: () => pointsOf(user_id),
      };
    },
    nothing: { points: null, entries: 0 },
    all: { points: 30, entries: 1 },
    status: 200,
    saysReplayed: true,
  },
  sub: {
    async prepare() {
      const userId = newUser();
      await changePoints(pipeline.test.database, [
        { userId, pointAmount: 100, idempotencyKey: `direct:${userId}` },
      ]);
      const body = { user_id: userId, point_num: 30, idempotency_key: crypto.randomUUID() };
      return {
        path: "/point/sub",
        init: { ...post(body), method: "PUT" },
        stand: () => pointsOf(userId),
      };
    },
    nothing: { points: 100, entries: 1 },
    all: { points: 70, entries: 2 },
    status: 200,
    saysReplayed: true,
  },
  atomic: {
    prepare: () => bulkOf("atomic"),
    nothing: {},
    all: { PENDING: MANY },
    status: 201,
  },
  each: {
    prepare: () => bulkOf("each"),
    nothing: {},
    part: { PENDING: MANY - 1 },
    all: { PENDING: MANY },
    status: 200,
  },
  campaign: {
    async prepare() {
      const [userId, campaign] = [newUser(), `campaign-${users}`];
      await query(
        `insert into point_reservations
         (id, user_id, point_amount, execute_at, idempotency_key, campaign, scan_at) values ?`,
        [
          Array.from({ length: MANY }, () => {
            const id = crypto.randomUUID();
            return [id, userId, 1, new Date(TO_COME), id, campaign, new Date(TO_COME)];
          }),
        ],
      );
      const path = `/point/campaigns/${campaign}/cancel`;
      return { path, init: { method: "POST" }, stand: () => reservationsOf(userId) };
    },
    nothing: { PENDING: MANY },
    part: { PENDING: 1, CANCELLED: MANY - 1 },
    all: { CANCELLED: MANY },
    status: 200,
  },
} satisfies Record<string, Verb>;

type Line = [string, keyof typeof VERBS, Name, number, Moment, "nothing" | "part" | "all"];

const LINES: Line[] = [
  ["reserve: before INSERT (fault 1)", "reserve", "INSERT", 1, "unsent", "nothing"],
  ["reserve: INSERT │ 201 (fault 1)", "reserve", "INSERT", 1, "answered", "all"],
  ["cancel: before UPDATE (fault 20)", "cancel", "UPDATE", 1, "unsent", "nothing"],
  ["cancel: UPDATE │ 200 (fault 20)", "cancel", "UPDATE", 1, "answered", "all"],
  ["patch: BEGIN │ lock (fault 5)", "patch", "BEGIN", 1, "answered", "nothing"],
  ["patch: lock │ UPDATE (fault 5)", "patch", "LOCK", 1, "answered", "nothing"],
  ["patch: UPDATE │ COMMIT (fault 5)", "patch", "UPDATE", 1, "answered", "nothing"],
  ["patch: COMMIT │ read its story (fault 5)", "patch", "COMMIT", 1, "answered", "all"],
  ["patch: read its story │ 200 (fault 5)", "patch", "READ", 1, "answered", "all"],
  ["retry: BEGIN │ lock (fault 5)", "retry", "BEGIN", 1, "answered", "nothing"],
  ["retry: lock │ UPDATE (fault 5)", "retry", "LOCK", 1, "answered", "nothing"],
  ["retry: UPDATE │ COMMIT (fault 5)", "retry", "UPDATE", 1, "answered", "nothing"],
  ["retry: COMMIT │ read its story (fault 5)", "retry", "COMMIT", 1, "answered", "all"],
  ["retry: read its story │ 200 (fault 5)", "retry", "READ", 1, "answered", "all"],
  ["add: BEGIN │ lock (fault 8)", "add", "BEGIN", 1, "answered", "nothing"],
  ["add: lock │ look who is new (fault 8)", "add", "LOCK", 1, "answered", "nothing"],
  ["add: look who is new │ look in the ledger (fault 8)", "add", "READ", 1, "answered", "nothing"],
  ["add: look in the ledger │ ledger (fault 8)", "add", "READ", 2, "answered", "nothing"],
  ["add: ledger │ balance (fault 8)", "add", "INSERT_LEDGER", 1, "answered", "nothing"],
  ["add: balance │ COMMIT (fault 8)", "add", "INSERT_BALANCE", 1, "answered", "nothing"],
  ["add: COMMIT │ 200 (fault 5)", "add", "COMMIT", 1, "answered", "all"],
  ["sub: BEGIN │ lock (fault 8)", "sub", "BEGIN", 1, "answered", "nothing"],
  ["sub: lock │ look in the ledger (fault 8)", "sub", "LOCK", 1, "answered", "nothing"],
  ["sub: look in the ledger │ ledger (fault 8)", "sub", "READ", 1, "answered", "nothing"],
  ["sub: ledger │ balance (fault 8)", "sub", "INSERT_LEDGER", 1, "answered", "nothing"],
  ["sub: balance │ COMMIT (fault 8)", "sub", "UPDATE_BALANCE", 1, "answered", "nothing"],
  ["sub: COMMIT │ 200 (fault 5)", "sub", "COMMIT", 1, "answered", "all"],
  ["bulk, atomic: BEGIN │ look for keys (fault 5)", "atomic", "BEGIN", 1, "answered", "nothing"],
  ["bulk, atomic: look for keys │ INSERT (fault 5)", "atomic", "READ", 1, "answered", "nothing"],
  ["bulk, atomic: INSERT │ INSERT (fault 5)", "atomic", "INSERT", 1, "answered", "nothing"],
  ["bulk, atomic: INSERT │ COMMIT (fault 5)", "atomic", "INSERT", 2, "answered", "nothing"],
  ["bulk, atomic: COMMIT │ 201 (fault 5)", "atomic", "COMMIT", 1, "answered", "all"],
  ["bulk, each: look for keys │ INSERT (fault 1)", "each", "READ", 1, "answered", "nothing"],
  ["bulk, each: INSERT │ INSERT (fault 1)", "each", "INSERT", 1, "answered", "part"],
  ["bulk, each: INSERT │ 200 (fault 1)", "each", "INSERT", 2, "answered", "all"],
  ["campaign: look for open ones │ cancel (fault 20)", "campaign", "READ", 1, "answered", "nothing"],
  ["campaign: cancel │ look for more (fault 20)", "campaign", "UPDATE", 1, "answered", "part"],
  ["campaign: look for more │ cancel (fault 20)", "campaign", "READ", 2, "answered", "part"],
  ["campaign: cancel the last │ look for more (fault 20)", "campaign", "UPDATE", 2, "answered", "all"],
  ["campaign: none is open │ count (fault 20)", "campaign", "READ", 3, "answered", "all"],
  ["campaign: count │ 200 (fault 20)", "campaign", "READ", 4, "answered", "all"],
];

const send = ({ url }: RunningService, { path, init }: Deed) => fetch(`${url}${path}`, init);

describe("api.ts killed in the middle of a request: the same again, at the next process, leaves what one alone does:", () => {
  test.each(LINES)(
    "%s",
    async (_, verb, name, n, moment, done) => {
      const { prepare, status, all, ...rest }: Verb = VERBS[verb];
      const deed = await prepare();
      const service = await runner();
      const struck = killAt(proxies, { command: nth(STATEMENTS[name], n), moment, service });
      const answered = send(service, deed).then(
        () => true,
        () => false,
      );
      await struck();
      expect(await answered).toBe(false);
      expect(await deed.stand()).toEqual({ ...rest, all }[done]);

      const response = await send(await runner(), deed);
      expect(response.status).toBe((done === "all" && rest.again) || status);
      const isReplay = done === "all" && rest.saysReplayed;
      expect(response.headers.get("idempotent-replayed")).toBe(isReplay ? "true" : null);
      expect(await deed.stand()).toEqual(all);
    },
    30_000,
  );

  test.each(Object.keys(VERBS) as (keyof typeof VERBS)[])(
    "these are all statements of: %s",
    async (verb) => {
      const { prepare, status, all }: Verb = VERBS[verb];
      const deed = await prepare();
      const service = await runner();
      const sent = await statementsOf(proxies.mysql, STATEMENTS, async () => {
        expect((await send(service, deed)).status).toBe(status);
      });
      expect(await deed.stand()).toEqual(all);
      const killed = LINES.filter(([, of, , , moment]) => of === verb && moment === "answered");
      expect(sent).toEqual(killed.map(([, , name, n]) => `${name} ${n}`));
    },
    30_000,
  );

  test("ledger and balances agree after all of the above", async () => {
    const sums = await compareSums(pipeline.test.database);
    expect(sums).toMatchObject({ usersApart: 0, reservationsApart: 0, early: 0, agree: true });
    expect(sums.ledger).toBeGreaterThan(0n);
  });
});
