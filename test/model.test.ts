import { afterAll, beforeAll, expect, test } from "bun:test";
import fc from "fast-check";
import { v7 as uuidv7 } from "uuid";
import { decodeMessage, encodeMessage, type ReservationMessage } from "../lib/message.ts";
import { MAX_POINT_NUM, newPointChange } from "../lib/point.ts";
import { type ChangeOutcome, changePoints, compareSums } from "../lib/point_repository.ts";
import { RESERVATION_STATUSES, type ReservationStatus } from "../lib/reservation.ts";
import { claimDue } from "../lib/reservation_repository.ts";
import { processMessages } from "../worker.ts";
import { appOn, post, type Send } from "./api_client.ts";
import { createTestDatabase, silent, type TestDatabase } from "./harness.ts";

// Random sequences of what clients, scheduler and worker do, each on empty tables, beside a model of what must be
// answered and what must be true afterwards. The model is a few maps in memory and goes one step at a time.
//
// A failure prints its seed and path; the same again:
//   MODEL_SEED=-123 MODEL_PATH=4:1:0 bun test test/model.test.ts
// and more than usual:
//   MODEL_RUNS=5000 bun test test/model.test.ts

const { MODEL_SEED, MODEL_PATH, MODEL_RUNS = "200" } = Bun.env;
const NUM_RUNS = Number(MODEL_RUNS);
/** Bun would end a test that shrinks for too long without a word about what it had found. */
const LIMIT_MS = 60_000 + NUM_RUNS * 600;

/** Few names, or nothing would meet anything. */
const USERS = ["Ann", "Bob", "Rich"];
/** Nobody reserves for this one: only forged messages do. */
const THIEF = "Thief";
/** Reservations and direct changes use the same ones, which must not matter. */
const KEYS = ["k1", "k2", "k3", "k4", "k5", "k6"];
const CAMPAIGNS = ["spring", "autumn"];
/** Far from now, so that nothing falls due during a sequence. The second one is the first one in other words. */
const PAST = ["2001-01-01T00:00:00Z", "2001-01-01T09:00:00+09:00", "2015-06-15T12:30:00.250Z"];
const FUTURE = ["2090-01-01T00:00:00Z", "2095-12-31T23:59:59.999Z"];
/** What Rich may still get where the balance is planted. */
const ROOM = 20n;
const PLANTED = MAX_POINT_NUM - ROOM;
const HELD_MS = 3_600_000;

/** What is reserved, as the client says it. */
interface Content {
  user: string;
  amount: number;
  time: string;
  campaign?: string | undefined;
}

/** A reservation as the model knows it. */
interface Reserved {
  id: string;
  /** As the API shows it; no more than the prefix where a bulk made it. */
  key: string;
  /** What was reserved at first, whatever it was patched to. */
  first: Content;
  amount: number;
  time: string;
  originalAmount: number | null;
  originalTime: string | null;
  status: ReservationStatus;
  /** When a claim takes it while it is open: at its time, at once, or not as long as its lease holds. */
  scan: "at its time" | "at once" | "held";
  attempts: number;
  lastError: string | null;
}

interface Entry {
  user: string;
  point: number;
  kind: "grant" | "add" | "sub";
  key: string;
  by: Reserved | null;
  /** The step that made it: entries of one step may come in any order. */
  step: number;
}

interface Change {
  user: string;
  points: number;
  key?: string;
}

/** Nobody holds a balance here. */
type Outcome = Exclude<ChangeOutcome, "busy">;

/** The model, and what may come again. */
interface World {
  step: number;
  reservations: Reserved[];
  /** The reservation that each key stands for: a client's key, or whatever else makes a request the same one. */
  byKey: Map<string, Reserved>;
  changes: Map<string, Change>;
  /** Those who ever got points. */
  balances: Map<string, bigint>;
  ledger: Entry[];
  /** Every message that was ever made. */
  messages: ReservationMessage[][];
  /** Every reserve, bulk, add and sub, to be sent again exactly. */
  requests: (() => Promise<void>)[];
  /** Every reserve with a key. */
  keyed: ReserveInput[];
}

let db: TestDatabase;
let send: Send;
/** What happened at all, so that a model which never gets anywhere does not pass for one that finds nothing. */
const seen = new Set<string>();

beforeAll(async () => {
  db = await createTestDatabase();
  send = appOn(db.database).send;
}, 30_000);
afterAll(() => db.drop(), 30_000);

// What may be asked for

/** Objects that have the required fields, and each of the others or not. */
function record<Fields, Required extends keyof Fields>(
  fields: { [Field in keyof Fields]: fc.Arbitrary<Fields[Field]> },
  requiredKeys: Required[],
) {
  return fc.record(fields, { requiredKeys, noNullPrototype: true });
}

/** Rich more often: a grant that fails, and comes to pass after all, takes several steps with the same user. */
const user = fc.constantFrom(...USERS, "Rich");
const amount = fc.integer({ min: 1, max: 120 });
/** More often past, or little would be granted. */
const time = fc.constantFrom(...PAST, ...PAST, ...FUTURE);
const campaign = fc.constantFrom(...CAMPAIGNS);
const key = fc.constantFrom(...KEYS);
/** Which one of those there are: the number is taken modulo their count, so that any number names one. */
const nth = fc.nat({ max: 40 });
const change = record({ user, points: amount, key }, ["user", "points"]);
const signed = fc.tuple(fc.constantFrom<(1 | -1)[]>(1, -1), change);
const content = { user, amount, time, campaign, key };
const required: ("user" | "amount" | "time")[] = ["user", "amount", "time"];
const keyless = record({ user, amount, time, campaign }, required);
const isBroken = fc.oneof({ weight: 5, arbitrary: fc.constant(false) }, fc.constant(true));
const rows = fc.array(record({ ...content, isBroken }, required), {
  minLength: 1,
  maxLength: 4,
  size: "max",
});
/** The field that shall be another. */
const other = fc.constantFrom("user", "amount", "time", "campaign");
/** One reservation, preferably one of a status: the rare ones as often as the others. */
const among = fc.oneof(
  fc.constantFrom(...RESERVATION_STATUSES),
  fc.constantFrom<ReservationStatus[]>("FAILED", "PROCESSING"),
);
const target = { nth, among };
const claimed = {
  limit: fc.integer({ min: 1, max: 12 }),
  isHeld: fc.boolean(),
  chunk: fc.integer({ min: 1, max: 3 }),
};
const lease = record(claimed, ["limit", "isHeld", "chunk"]);

type ReserveInput = Content & { key?: string; keyIn: "body" | "header" | "both" };

interface BulkInput {
  mode: "atomic" | "each";
  rows: (Content & { key?: string; isBroken?: boolean })[];
  /** The row that comes a second time, at the end. */
  again?: number;
  headerKey?: string;
}

interface Target {
  nth: number;
  among?: ReservationStatus;
}

interface ClaimInput {
  limit: number;
  isHeld: boolean;
  chunk: number;
}

/** Binds what a step may be given to what it does. */
function step<Input>(
  weight: number,
  input: fc.Arbitrary<Input>,
  run: (world: World, input: Input) => Promise<void>,
) {
  return { weight, input, run: run as (world: World, input: unknown) => Promise<void> };
}

const STEPS: Record<string, ReturnType<typeof step>> = {
  reserve: step(
    8,
    record({ ...content, keyIn: fc.constantFrom("body", "header", "both") }, [...required, "keyIn"]),
    async (world, input: ReserveInput) => {
      world.requests.push(() => reserve(world, input));
      if (input.key) world.keyed.push(input);
      await reserve(world, input);
    },
  ),
  bulk: step(
    4,
    record({ mode: fc.constantFrom("atomic", "each"), rows, again: nth, headerKey: key }, ["mode", "rows"]),
    async (world, input: BulkInput) => {
      world.requests.push(() => reserveBulk(world, input));
      await reserveBulk(world, input);
    },
  ),
  add: step(3, change, (world, input) => sendChange(world, input, 1)),
  sub: step(3, change, (world, input) => sendChange(world, input, -1)),
  together: step(1, fc.array(signed, { minLength: 2, maxLength: 5 }), changeTogether),
  again: step(3, nth, async (world, input) => {
    await pick(world.requests, input)?.();
  }),
  replay: step(3, nth, async (world, nth) => {
    // Those that were patched since are the ones that matter.
    const isPatched = ({ key = "" }: ReserveInput) => {
      const { originalAmount, originalTime } = world.byKey.get(key) ?? {};
      return (originalAmount ?? originalTime ?? null) !== null;
    };
    const patched = world.keyed.filter(isPatched);
    const input = pick(patched.length > 0 ? patched : world.keyed, nth);
    if (input) await reserve(world, input);
  }),
  conflict: step(2, record({ nth, other }, ["nth", "other"]), async (world, { nth, other }) => {
    const input = pick(world.keyed, nth);
    if (input) await reserve(world, { ...input, ...otherThan(input, other) });
  }),
  // Without any key two requests are the same only if all their rows are.
  bulksWithoutKeys: step(
    1,
    fc.tuple(fc.array(keyless, { minLength: 1, maxLength: 3 }), nth, other),
    async (world, [rows, nth, other]) => {
      const others = rows.map((row, at) =>
        at === nth % rows.length ? { ...row, ...otherThan(row, other) } : row,
      );
      for (const some of [rows, rows, others]) await reserveBulk(world, { mode: "each", rows: some });
    },
  ),
  cancel: step(3, record(target, ["nth"]), cancel),
  patch: step(5, record({ ...target, amount, time }, ["nth"]), patch),
  retry: step(
    3,
    record({ nth, among: fc.constantFrom<ReservationStatus[]>("FAILED", "DONE") }, ["nth"]),
    retry,
  ),
  // What an operator does about a balance that is too large: make room, try again.
  mend: step(3, nth, async (world, nth) => {
    await changeBalance(world, { user: "Rich", points: 120 }, -1);
    await retry(world, { nth, among: "FAILED" });
    await deliver(world, await claim(world, { limit: 20, isHeld: true, chunk: 3 }));
  }),
  cancelCampaign: step(2, campaign, cancelCampaign),
  claim: step(4, lease, async (world, input) => {
    await claim(world, input);
  }),
  grant: step(5, record({ lease, duplicate: nth }, ["lease"]), async (world, { lease, duplicate }) => {
    const messages = await claim(world, lease);
    const old = duplicate === undefined ? undefined : pick(world.messages, duplicate);
    await deliver(world, old ? [...messages, old] : messages);
  }),
  deliver: step(2, fc.array(nth, { minLength: 1, maxLength: 3 }), async (world, numbers) => {
    const messages = numbers.map((number) => pick(world.messages, number));
    await deliver(
      world,
      messages.filter((message) => message !== undefined),
    );
  }),
  forge: step(1, fc.tuple(record(target, ["nth"]), amount), async (world, [target, amount]) => {
    await deliver(world, [[forgedFor(targetId(world, target), amount)]]);
  }),
  race: step(2, fc.tuple(lease, nth, fc.nat({ max: 3 })), async (world, [lease, nth, looks]) => {
    await claim(world, lease);
    await cancelDuringGrant(world, nth, looks);
  }),
};

const anyStep = Object.entries(STEPS).map(([name, { weight, input }]) => ({
  weight,
  arbitrary: fc.tuple(fc.constant(name), input),
}));
const sequence = fc.array(fc.oneof(...anyStep), { minLength: 5, maxLength: 30, size: "max" });
/** How the lists and the past are read at the end. */
const at = fc.constantFrom("2000-01-01T00:00:00.000Z", "2999-12-31T23:59:59.999Z");
const status = fc.constantFrom(...RESERVATION_STATUSES);
const look = record({ key, at, limit: fc.integer({ min: 2, max: 6 }), status, campaign }, [
  "key",
  "at",
  "limit",
]);
type Look = { key: string; at: string; limit: number; status?: ReservationStatus; campaign?: string };

test(
  "any sequence of requests, claims and messages is answered and ends as the model says",
  async () => {
    const isPlanted = fc.constantFrom(false, true, true, true);
    const property = fc.asyncProperty(isPlanted, sequence, look, async (isPlanted, steps, look) => {
      const world = await emptyWorld(isPlanted);
      for (const [name, input] of steps) {
        world.step++;
        await STEPS[name]?.run(world, input);
      }
      await Promise.all([
        ...world.reservations.map(checkReservation),
        checkKey(world, look),
        ...[...USERS, THIEF].map((user) => checkBalance(world, user, look)),
        ...USERS.map((user) => checkReservedPoints(world, user, look)),
        ...USERS.map((user) => checkTransactions(world, user, look)),
      ]);
      await checkTables(world);
    });
    await fc.assert(property, {
      numRuns: NUM_RUNS,
      interruptAfterTimeLimit: LIMIT_MS,
      markInterruptAsFailure: true,
      ...(MODEL_SEED && { seed: Number(MODEL_SEED) }),
      ...(MODEL_PATH && { path: MODEL_PATH }),
    });
  },
  LIMIT_MS + 30_000,
);

const MAX_UNSEEN = 3;

test.skipIf(MODEL_PATH !== undefined || NUM_RUNS < 200)("those sequences met what matters", () => {
  const common = [
    ...["reserve created", "reserve replayed", "reserve conflict", "reserve replayed after a patch"],
    ...["atomic created", "atomic replayed", "atomic broken", "atomic conflict"],
    ...["each created", "each replayed", "each conflict", "each broken"],
    ...["change changed", "change replayed", "change conflict", "change unknown_user"],
    ...["change too_few", "change too_many", "campaign found", "campaign not found"],
    ...["cancel PENDING", "cancel DONE", "cancel CANCELLED", "cancel none"],
    ...["patch PENDING", "patch PROCESSING", "patch DONE", "patch CANCELLED", "patch none"],
    ...["retry PENDING", "retry FAILED", "retry DONE", "retry CANCELLED", "retry none"],
    ...["message for PENDING", "message for PROCESSING", "message for DONE", "message for none"],
    ...["message for FAILED", "message for CANCELLED", "race cancelled", "race granted"],
    ...["grant DONE", "grant FAILED", "grant DONE after FAILED", "claim again"],
  ];
  // By chance a rare one may be missing, but not more than a few.
  expect(common.filter((one) => !seen.has(one)).slice(MAX_UNSEEN)).toEqual([]);
});

// Steps: what is sent, what must be answered, what is true from then on

async function reserve(world: World, { keyIn, key, ...content }: ReserveInput) {
  const body = bodyOf({ ...content, ...(keyIn !== "header" && { key }) });
  const response = await send(
    "/point/reserve",
    post(body, key && keyIn !== "body" ? { "idempotency-key": key } : {}),
  );
  const known = key === undefined ? undefined : world.byKey.get(key);
  if (known && !isSame(known.first, content)) {
    seen.add("reserve conflict");
    return expectRefused(response, 422, ["idempotency key is used with other content"]);
  }
  expect(response.status).toBe(201);
  const answer = (await response.json()) as Record<string, string>;
  const { reservation_id: id = "" } = answer;
  const reserved = known ?? remember(world, id, content, { key, shown: key ?? id });
  expect(answer).toEqual({ reservation_id: reserved.id, status: "PENDING", execute_at: isoOf(content.time) });
  expect(response.headers.get("idempotent-replayed")).toBe(known ? "true" : null);
  expect(response.headers.get("location")).toBe(`/point/reservations/${reserved.id}`);
  seen.add(known ? "reserve replayed" : "reserve created");
  if (known && known.amount !== known.first.amount) seen.add("reserve replayed after a patch");
}

async function reserveBulk(world: World, { mode, rows: given, again, headerKey }: BulkInput) {
  const repeated = again === undefined ? undefined : pick(given, again);
  const rows = repeated ? [...given, repeated] : given;
  const reservations = rows.map(({ isBroken, ...row }) => ({
    ...bodyOf(row),
    ...(isBroken && { point_amount: 0 }),
  }));
  const response = await send(
    "/point/reserve/bulk",
    post({ mode, reservations }, headerKey ? { "idempotency-key": headerKey } : {}),
  );
  // The same request is one with the same key, or else one whose rows say the same.
  const meanings = rows.map(({ isBroken, ...row }) =>
    isBroken ? "broken" : { ...row, time: isoOf(row.time) },
  );
  const requestKey = headerKey ?? JSON.stringify(meanings);
  const keys = rows.map(({ key }, index) => key ?? `row ${index} of ${requestKey}`);

  const first = new Map<string, Content>([...world.byKey].map(([key, { first }]) => [key, first]));
  const kinds = rows.map((row, index) => {
    const key = keys[index] as string;
    const known = first.get(key);
    if (row.isBroken) return "broken";
    if (!known) first.set(key, row);
    if (!known) return "created";
    return isSame(known, row) ? "replayed" : "conflict";
  });
  const worst = (["broken", "conflict", "replayed", "created"] as const).find((kind) => kinds.includes(kind));
  seen.add(`${mode} ${worst}`);
  if (mode === "atomic" && (worst === "broken" || worst === "conflict")) {
    const errors = kinds.flatMap((kind, index) =>
      kind === worst ? [`reservations[${index}]: ${SENTENCES[worst]}`] : [],
    );
    return expectRefused(response, worst === "broken" ? 400 : 422, errors);
  }
  expect(response.status).toBe(mode === "atomic" ? 201 : 200);
  const { results } = (await response.json()) as { results: Record<string, unknown>[] };
  const expected = kinds.map((kind, index) => {
    if (kind === "broken" || kind === "conflict") return { result: "refused", errors: [SENTENCES[kind]] };
    const { key: shown = "bulk:", ...content } = rows[index] as BulkInput["rows"][number];
    const key = keys[index] as string;
    const { id } =
      kind === "replayed"
        ? (world.byKey.get(key) as Reserved)
        : remember(world, String(results[index]?.reservation_id), content, { key, shown });
    return { result: kind, reservation_id: id, status: "PENDING", execute_at: isoOf(content.time) };
  });
  expect(results).toEqual(expected);
}

const SENTENCES = {
  broken: "point amount must be greater than 0",
  conflict: "idempotency key is used with other content",
};

/** A request to add or to subtract, which may come again. */
async function sendChange(world: World, change: Change, sign: 1 | -1) {
  world.requests.push(() => changeBalance(world, change, sign));
  await changeBalance(world, change, sign);
}

async function changeBalance(world: World, change: Change, sign: 1 | -1) {
  const response = await send(`/point/${sign > 0 ? "add" : "sub"}`, {
    ...post(changeBodyOf(change)),
    method: "PUT",
  });
  const outcome = applyChange(world, { ...change, points: sign * change.points });
  if (outcome === "changed" || outcome === "replayed") {
    expect(response.status).toBe(200);
    expect(await response.json()).toEqual({ messages: [sign > 0 ? "point updated" : "point subtracted"] });
    expect(response.headers.get("idempotent-replayed")).toBe(outcome === "replayed" ? "true" : null);
    return;
  }
  const sentences = {
    conflict: "idempotency key is used with other content",
    unknown_user: "user not found",
    too_few: "points must be greater than 0",
    too_many: "points must be at most 9223372036854775807",
  };
  await expectRefused(response, outcome === "conflict" ? 422 : 400, [sentences[outcome]]);
}

/** Many changes in one transaction, as the API makes of those that come at the same time; there their order is chance. */
async function changeTogether(world: World, changes: [1 | -1, Change][]) {
  const batch = changes.map(([sign, change]) => newPointChange(changeBodyOf(change), { sign }));
  const outcomes = await changePoints(db.database, batch);
  expect(outcomes).toEqual(
    changes.map(([sign, change]) => applyChange(world, { ...change, points: sign * change.points })),
  );
}

async function cancel(world: World, target: Target) {
  const response = await send(`/point/reservations/${targetId(world, target)}`, { method: "DELETE" });
  const reserved = targetOf(world, target);
  seen.add(`cancel ${reserved?.status ?? "none"}`);
  if (reserved && isOpen(reserved)) reserved.status = "CANCELLED";
  await expectCancelled(response, reserved);
}

async function patch(world: World, { amount, time, ...target }: Target & { amount?: number; time?: string }) {
  const body = { ...(amount !== undefined && { point_amount: amount }), ...(time && { execute_at: time }) };
  const init = { ...post(body), method: "PATCH" };
  const response = await send(`/point/reservations/${targetId(world, target)}`, init);
  if (Object.keys(body).length === 0) {
    return expectRefused(response, 400, ["execute at or point amount is required"]);
  }
  const reserved = targetOf(world, target);
  seen.add(`patch ${reserved?.status ?? "none"}`);
  if (reserved?.status !== "PENDING") {
    return expectStandsAgainst(response, reserved, "reservation is not PENDING");
  }
  if (amount !== undefined) {
    reserved.originalAmount ??= reserved.amount;
    reserved.amount = amount;
  }
  if (time !== undefined) {
    reserved.originalTime ??= reserved.time;
    reserved.time = isoOf(time);
    reserved.scan = "at its time";
  }
  expect(response.status).toBe(200);
  expect(await response.json()).toEqual(storyOf(reserved));
}

async function retry(world: World, target: Target) {
  const response = await send(`/point/reservations/${targetId(world, target)}/retry`, { method: "POST" });
  const reserved = targetOf(world, target);
  seen.add(`retry ${reserved?.status ?? "none"}`);
  if (reserved?.status !== "FAILED")
    return expectStandsAgainst(response, reserved, "reservation is not FAILED");
  Object.assign(reserved, { status: "PENDING", scan: "at once", attempts: 0 });
  expect(response.status).toBe(200);
  expect(await response.json()).toEqual(storyOf(reserved));
}

async function cancelCampaign(world: World, campaign: string) {
  const response = await send(`/point/campaigns/${campaign}/cancel`, { method: "POST" });
  const all = world.reservations.filter(({ first }) => first.campaign === campaign);
  seen.add(all.length > 0 ? "campaign found" : "campaign not found");
  if (all.length === 0) return expectRefused(response, 404, ["campaign not found"]);
  for (const reserved of all.filter(isOpen)) reserved.status = "CANCELLED";
  const count = (status: ReservationStatus) => all.filter((reserved) => reserved.status === status).length;
  expect(response.status).toBe(200);
  const counts = { cancelled: count("CANCELLED"), granted: count("DONE"), failed: count("FAILED") };
  expect(await response.json()).toEqual({ campaign, ...counts, open: 0 });
}

/** As the scheduler does; a lease that is not held ends at once, as after a crash. */
async function claim(world: World, { limit, isHeld, chunk }: ClaimInput): Promise<ReservationMessage[][]> {
  const claimed = await claimDue(db.database, { limit, leaseMs: isHeld ? HELD_MS : 0 });
  const due = world.reservations.filter(
    ({ status, scan, time }) =>
      (status === "PENDING" && (scan === "at once" || isPast(time))) ||
      (status === "PROCESSING" && scan !== "held"),
  );
  // What is due by its time is due for years, hence comes before what has just been made due.
  const waiting = due.filter(({ scan }) => scan === "at its time").sort(byTime);
  const ids = claimed.map(({ id }) => id);
  expect(ids).toHaveLength(Math.min(limit, due.length));
  expect(new Set(ids).size).toBe(ids.length);
  expect(ids.slice(0, waiting.length)).toEqual(waiting.slice(0, limit).map(({ id }) => id));
  for (const { id, userId, pointAmount, executeAt, campaign } of claimed) {
    const reserved = due.find((one) => one.id === id);
    if (!reserved) throw new Error(`A claim took ${id}, which is not due`);
    const { first, amount, time, status } = reserved;
    expect([userId, pointAmount, executeAt.toISOString(), campaign]).toEqual([
      ...[first.user, amount, time, first.campaign ?? null],
    ]);
    if (status === "PROCESSING") seen.add("claim again");
    Object.assign(reserved, { status: "PROCESSING", scan: isHeld ? "held" : "at once" });
  }
  const messages: ReservationMessage[][] = [];
  for (let at = 0; at < claimed.length; at += chunk) {
    messages.push(decodeMessage(encodeMessage(claimed.slice(at, at + chunk))));
  }
  world.messages.push(...messages);
  return messages;
}

function work(messages: ReservationMessage[][]) {
  return processMessages(messages, { database: db.database, logger: silent, maxAttempts: 3 });
}

/** A message as anybody may write it: all but the id is a lie. */
function forgedFor(id: string, amount: number): ReservationMessage {
  return { reservation_id: id, user_id: THIEF, point_amount: amount, idempotency_key: uuidv7() };
}

/** As the worker does. */
async function deliver(world: World, messages: ReservationMessage[][]) {
  if (messages.length === 0) return;
  const outcomes = await work(messages);
  const find = (message: ReservationMessage) =>
    world.reservations.find(({ id }) => id === message.reservation_id);
  expect(outcomes).toEqual(messages.map((message) => (message.every(find) ? "ack" : "dead")));
  for (const message of messages.flat()) {
    const reserved = find(message);
    seen.add(`message for ${reserved?.status ?? "none"}`);
    if (reserved) applyGrant(world, reserved);
  }
}

/**
 * A cancellation and a grant at the same time: the answer says which of the two was first. A client who looks at it
 * before comes just late enough that either may be.
 */
async function cancelDuringGrant(world: World, nth: number, looks: number) {
  const reserved = pick(
    world.reservations.filter(({ status }) => status === "PROCESSING"),
    nth,
  );
  if (!reserved) return;
  const path = `/point/reservations/${reserved.id}`;
  const cancelled = async () => {
    for (let look = 0; look < looks; look++) await send(path);
    return send(path, { method: "DELETE" });
  };
  const [response] = await Promise.all([cancelled(), work([[forgedFor(reserved.id, 1)]])]);
  const isCancelled = response.status === 200;
  seen.add(isCancelled ? "race cancelled" : "race granted");
  if (isCancelled) reserved.status = "CANCELLED";
  else applyGrant(world, reserved);
  await expectCancelled(response, reserved);
}

// The model

async function emptyWorld(isPlanted: boolean): Promise<World> {
  await db.database.transaction(async ({ execute }) => {
    for (const table of ["point_transactions", "point_reservations", "point_root"]) {
      await execute(`delete from ${table}`);
    }
    if (isPlanted)
      await execute("insert into point_root (user_id, point_num) values (?)", [["Rich", String(PLANTED)]]);
  });
  return {
    step: 0,
    reservations: [],
    byKey: new Map(),
    changes: new Map(),
    balances: new Map(isPlanted ? [["Rich", PLANTED]] : []),
    ledger: [],
    messages: [],
    requests: [],
    keyed: [],
  };
}

/** @param names.key by which the same request is known again, if it can be; `names.shown` is what the API calls it */
function remember(
  world: World,
  id: string,
  content: Content,
  names: { key: string | undefined; shown: string },
): Reserved {
  expect(world.reservations.map((one) => one.id)).not.toContain(id);
  const reserved: Reserved = {
    id,
    key: names.shown,
    first: content,
    amount: content.amount,
    time: isoOf(content.time),
    originalAmount: null,
    originalTime: null,
    status: "PENDING",
    scan: "at its time",
    attempts: 0,
    lastError: null,
  };
  world.reservations.push(reserved);
  if (names.key !== undefined) world.byKey.set(names.key, reserved);
  return reserved;
}

function applyGrant(world: World, reserved: Reserved) {
  if (reserved.status !== "PROCESSING") return;
  const { user } = reserved.first;
  const balance = (world.balances.get(user) ?? 0n) + BigInt(reserved.amount);
  if (balance > MAX_POINT_NUM) {
    reserved.status = "FAILED";
    reserved.attempts++;
    reserved.lastError = "The balance would be out of range";
  } else {
    reserved.status = "DONE";
    world.balances.set(user, balance);
    world.ledger.push({
      user,
      point: reserved.amount,
      kind: "grant",
      key: reserved.key,
      by: reserved,
      step: world.step,
    });
  }
  seen.add(`grant ${reserved.status}`);
  if (reserved.status === "DONE" && reserved.lastError) seen.add("grant DONE after FAILED");
}

function applyChange(world: World, change: Change): Outcome {
  const outcome = outcomeOf(world, change);
  seen.add(`change ${outcome}`);
  if (outcome === "changed") {
    const { user, points, key } = change;
    world.balances.set(user, (world.balances.get(user) ?? 0n) + BigInt(points));
    if (key) world.changes.set(key, change);
    const kind = points > 0 ? "add" : "sub";
    world.ledger.push({ user, point: points, kind, key: key ?? uuidv7(), by: null, step: world.step });
  }
  return outcome;
}

function outcomeOf(world: World, { user, points, key }: Change): Outcome {
  const known = key === undefined ? undefined : world.changes.get(key);
  if (known) return known.user === user && known.points === points ? "replayed" : "conflict";
  const balance = world.balances.get(user);
  if (balance === undefined && points < 0) return "unknown_user";
  const after = (balance ?? 0n) + BigInt(points);
  if (after < 0n) return "too_few";
  return after > MAX_POINT_NUM ? "too_many" : "changed";
}

function isSame(first: Content, second: Content): boolean {
  return (
    first.user === second.user &&
    first.amount === second.amount &&
    isoOf(first.time) === isoOf(second.time) &&
    first.campaign === second.campaign
  );
}

function isOpen({ status }: Reserved): boolean {
  return status === "PENDING" || status === "PROCESSING";
}

function isPast(time: string): boolean {
  return time < "2026";
}

function isoOf(time: string): string {
  return new Date(time).toISOString();
}

function byTime(a: Reserved, b: Reserved): number {
  return a.time < b.time || (a.time === b.time && a.id < b.id) ? -1 : 1;
}

function pick<T>(all: readonly T[], nth: number): T | undefined {
  return all[nth % all.length];
}

/** The reservation that a step means; none where there is none at all. */
function targetOf({ reservations }: World, { nth, among }: Target): Reserved | undefined {
  const preferred = reservations.filter(({ status }) => status === among);
  return pick(preferred.length > 0 ? preferred : reservations, nth);
}

function targetId(world: World, target: Target): string {
  return targetOf(world, target)?.id ?? uuidv7();
}

/** Another value for one field. */
function otherThan({ user, amount, time, campaign }: Content, field: string): Partial<Content> {
  const others: Record<string, Partial<Content>> = {
    user: { user: user === "Ann" ? "Bob" : "Ann" },
    amount: { amount: amount + 1 },
    time: {
      time: time === "2015-06-15T12:30:00.250Z" ? "2015-06-15T12:30:00.251Z" : "2015-06-15T12:30:00.250Z",
    },
    campaign: { campaign: campaign === undefined ? "spring" : undefined },
  };
  return others[field] ?? {};
}

function bodyOf({ user, amount, time, campaign, key }: Content & { key?: string | undefined }) {
  return {
    ...{ user_id: user, point_amount: amount, execute_at: time },
    ...(campaign && { campaign }),
    ...(key && { idempotency_key: key }),
  };
}

function changeBodyOf({ user, points, key }: Change) {
  return { user_id: user, point_num: points, ...(key && { idempotency_key: key }) };
}

// What must be true

/** A problem with these sentences; `facts` are what a 409 adds. */
async function expectRefused(response: Response, status: number, errors: string[], facts: object = {}) {
  expect(response.headers.get("content-type")).toBe("application/problem+json");
  const { type, title, detail, ...rest } = (await response.json()) as Record<string, unknown>;
  expect(rest).toEqual({ status, errors, ...facts });
  expect(response.status).toBe(status);
}

async function expectStandsAgainst(response: Response, reserved: Reserved | undefined, sentence: string) {
  if (!reserved) return expectRefused(response, 404, ["reservation not found"]);
  const { transaction_id, granted_at } = storyOf(reserved);
  await expectRefused(response, 409, [sentence], {
    ...{ reservation_id: reserved.id, reservation_status: reserved.status },
    ...{ transaction_id, granted_at },
  });
}

async function expectCancelled(response: Response, reserved: Reserved | undefined) {
  if (reserved?.status !== "CANCELLED") {
    const sentence = reserved?.status === "DONE" ? "reservation was granted" : "reservation is FAILED";
    return expectStandsAgainst(response, reserved, sentence);
  }
  expect(response.status).toBe(200);
  expect(await response.json()).toEqual({ reservation_id: reserved.id, status: "CANCELLED" });
}

/** What the API must tell of a reservation. */
function storyOf(reserved: Reserved) {
  const isDone = reserved.status === "DONE";
  const nextScanAt = reserved.scan === "at its time" ? reserved.time : expect.any(String);
  return {
    reservation_id: reserved.id,
    user_id: reserved.first.user,
    point_amount: reserved.amount,
    idempotency_key: reserved.key === "bulk:" ? expect.stringMatching(/^bulk:/) : reserved.key,
    campaign: reserved.first.campaign ?? null,
    status: reserved.status,
    execute_at: reserved.time,
    original_point_amount: reserved.originalAmount,
    original_execute_at: reserved.originalTime,
    next_scan_at: isOpen(reserved) ? nextScanAt : null,
    attempts: reserved.attempts,
    last_error: reserved.lastError,
    transaction_id: isDone ? expect.any(String) : null,
    granted_at: isDone ? expect.any(String) : null,
    late_ms: isDone ? expect.any(Number) : null,
    created_at: expect.any(String),
    updated_at: expect.any(String),
  };
}

async function checkReservation(reserved: Reserved) {
  const response = await send(`/point/reservations/${reserved.id}`);
  expect(response.status).toBe(200);
  expect(await response.json()).toEqual(storyOf(reserved));
}

async function checkKey({ byKey }: World, { key }: Look) {
  const response = await send(`/point/reservations?idempotency_key=${key}`);
  const reserved = byKey.get(key);
  if (!reserved) return expectRefused(response, 404, ["reservation not found"]);
  expect(response.status).toBe(200);
  expect(await response.json()).toEqual(storyOf(reserved));
}

async function checkBalance(world: World, user: string, { at }: Look) {
  const balance = world.balances.get(user);
  const toCome = world.reservations.filter((reserved) => reserved.first.user === user).filter(isOpen);
  const confirmed = await send(`/point/confirm?user_id=${user}`);
  if (balance === undefined) await expectRefused(confirmed, 400, ["user not found"]);
  else expect(await confirmed.json()).toEqual({ messages: [`userID: ${user}`, `pointNum: ${balance}`] });

  const now = await send(`/users/${user}/points`);
  const then = await send(`/users/${user}/points?at=${at}`);
  if (balance === undefined && toCome.length === 0) {
    await expectRefused(now, 404, ["user not found"]);
    return expectRefused(then, 404, ["user not found"]);
  }
  expect(await readDigits(now)).toEqual({
    user_id: user,
    point_num: balance ?? 0n,
    reserved_point_num: sum(toCome.map(({ amount }) => amount)),
    next_execute_at: toCome.map(({ time }) => time).sort()[0] ?? null,
    updated_at: balance === undefined ? null : expect.any(String),
  });
  // What was planted is in no ledger.
  const entries = world.ledger.filter((entry) => entry.user === user && !isPast(at));
  expect(await readDigits(then)).toEqual({
    user_id: user,
    point_num: sum(entries.map(({ point }) => point)),
    at,
    updated_at: entries.length === 0 ? null : expect.any(String),
  });
}

async function checkReservedPoints(
  world: World,
  user: string,
  { limit, status: onlyStatus, campaign: onlyCampaign }: Look,
) {
  const all = world.reservations.filter(({ first }) => first.user === user).sort(byTime);
  for (const { status, campaign } of [{}, { status: onlyStatus, campaign: onlyCampaign }]) {
    const query = new URLSearchParams({ ...(status && { status }), ...(campaign && { campaign }) });
    const path = `/users/${user}/reserved-points?${query}`;
    expect(await readPages(path, { list: "reserved_points", limit })).toEqual(
      all
        .filter((reserved) => status === undefined || reserved.status === status)
        .filter(({ first }) => campaign === undefined || first.campaign === campaign)
        .map(({ id, amount, status, time, first }) => ({
          ...{ reservation_id: id, point: amount, status, add_date: time, campaign: first.campaign ?? null },
        })),
    );
  }
}

async function checkTransactions(world: World, user: string, { limit }: Look) {
  const found = await readPages(`/users/${user}/transactions?`, { list: "transactions", limit });
  const steps = Map.groupBy(
    world.ledger.filter((entry) => entry.user === user),
    (entry) => entry.step,
  );
  // Entries of one step may have come at the same moment: their order is that of their ids, which the model has not.
  for (const entries of [...steps.values()].toReversed()) {
    const shown = found
      .splice(0, entries.length)
      .map((entry) => [
        ...[
          entry.kind,
          entry.point,
          entry.reservation_id,
          entry.campaign,
          nameOf(String(entry.idempotency_key)),
        ],
      ]);
    const expected = entries.map(({ kind, point, by, key }) => [
      ...[kind, point, by?.id ?? null, by?.first.campaign ?? null, nameOf(key)],
    ]);
    expect(shown.sort(byText)).toEqual(expected.sort(byText));
  }
  expect(found).toEqual([]);
}

function byText(a: unknown, b: unknown): number {
  return String(a) < String(b) ? -1 : 1;
}

/** A key as far as the model knows it: what is made, and how, is nobody's business. */
function nameOf(key: string): string {
  if (key.startsWith("bulk:")) return "made for a bulk";
  return key.length === 36 ? "made" : key;
}

/** Nothing but what the model knows of, and the sums that the operator looks at. */
async function checkTables({ reservations, ledger, balances }: World) {
  const [counts] = await db.query(
    `select (select count(*) from point_reservations) reservations, (select count(*) from point_transactions) ledger,
       (select count(*) from point_root) balances`,
  );
  expect(counts).toEqual({
    reservations: reservations.length,
    ledger: ledger.length,
    balances: balances.size,
  } as never);
  const done = reservations.filter(({ status }) => status === "DONE");
  const total = [...balances.values()].reduce((sum, points) => sum + points, 0n);
  const inLedger = sum(ledger.map(({ point }) => point));
  const isPlanted = total !== inLedger;
  expect(await compareSums(db.database)).toEqual({
    reservations: sum(done.map(({ amount }) => amount)),
    direct: sum(ledger.filter(({ by }) => !by).map(({ point }) => point)),
    ledger: inLedger,
    balances: total,
    usersApart: isPlanted ? 1 : 0,
    reservationsApart: 0,
    early: 0,
    agree: !isPlanted,
  });
}

/** All pages of a list. */
async function readPages(path: string, { list, limit }: { list: string; limit: number }) {
  const found: Record<string, unknown>[] = [];
  for (let cursor: string | null = "", pages = 1; cursor !== null; pages++) {
    expect(pages).toBeLessThan(1_000);
    const response = await send(`${path}&limit=${limit}${cursor && `&cursor=${cursor}`}`);
    expect(response.status).toBe(200);
    const answer = (await response.json()) as Record<string, unknown>;
    found.push(...(answer[list] as Record<string, unknown>[]));
    cursor = answer.next_cursor as string | null;
    // Full but for the last one, and no empty one at the end.
    expect(found.length).toBeLessThanOrEqual(pages * limit);
    expect(pages).toBeLessThanOrEqual(Math.max(1, Math.ceil(found.length / limit)));
  }
  return found;
}

/** JSON whose integers keep all their digits. */
async function readDigits(response: Response): Promise<unknown> {
  expect(response.status).toBe(200);
  const toBigInt = (_: string, value: unknown, { source }: { source: string }) =>
    typeof value === "number" ? BigInt(source) : value;
  // TypeScript does not know the third argument yet.
  return JSON.parse(await response.text(), toBigInt as never);
}

function sum(points: number[]): bigint {
  return BigInt(points.reduce((sum, one) => sum + one, 0));
}
