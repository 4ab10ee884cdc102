import { expect, test } from "bun:test";
import fc from "fast-check";
import { compareSums } from "../../lib/dev/compare_sums.ts";
import { findBalance, findHoldings, listTransactions } from "../../lib/points/balance_queries.ts";
import { type ChangeOutcome, changePoints } from "../../lib/points/change_repository.ts";
import { MAX_POINT_NUM, type PointTransaction } from "../../lib/points/point.ts";
import { decodeMessage, encodeMessage, type ReservationMessage } from "../../lib/reservations/message.ts";
import type { Reservation, ReservationPatch } from "../../lib/reservations/reservation.ts";
import {
  findReservation,
  findReservationByKey,
  listReservations,
} from "../../lib/reservations/reservation_queries.ts";
import {
  type CreateOutcome,
  cancelCampaign,
  cancelReservation,
  createBulk,
  createReservations,
  patchReservation,
  retryReservation,
  type Transitioned,
} from "../../lib/reservations/reservation_repository.ts";
import { claimDue } from "../../lib/reservations/scan_repository.ts";
import { RESERVATION_STATUSES, type ReservationStatus } from "../../lib/schema.ts";
import { processMessages } from "../../worker.ts";
import { openTestDatabase } from "../harness/database.ts";
import { reservationOf } from "../harness/fixtures.ts";
import { silent } from "../harness/harness.ts";

// Random sequences of what clients, scheduler and worker do, each on empty tables, beside a model of what must come back
// and what must be true afterwards. The model is a few maps in memory and goes one step at a time.
//
// A failure prints its seed and path; the same again:
//   MODEL_SEED=-123 MODEL_PATH=4:1:0 bun test test/reservations/model.test.ts
// and more than usual:
//   MODEL_RUNS=5000 bun test test/reservations/model.test.ts

const { MODEL_SEED, MODEL_PATH, MODEL_RUNS = "120" } = Bun.env;
const NUM_RUNS = Number(MODEL_RUNS);
/** Bun would end a test that shrinks for too long without a word about what it had found. */
const LIMIT_MS = 60_000 + NUM_RUNS * 600;

const db = await openTestDatabase();
/** What happened at all, so that a model which never gets anywhere does not pass for one that finds nothing. */
const seen = new Set<string>();

/** Few names, or nothing would meet anything. */
const USERS = ["Ann", "Bob", "Rich"];
/** Nobody reserves for this one: only forged messages do. */
const THIEF = "Thief";
/** Reservations and direct changes use the same ones, which must not matter. */
const KEYS = ["k1", "k2", "k3", "k4", "k5", "k6"];
const CAMPAIGNS = ["spring", "autumn"];
/** Far from now, so that nothing falls due during a sequence. */
const PAST = ["2001-01-01T00:00:00Z", "2015-06-15T12:30:00.250Z", "2015-06-15T12:30:00.251Z"];
const FUTURE = ["2090-01-01T00:00:00Z", "2095-12-31T23:59:59.999Z"];
/** Where the balance of Rich is planted, there is room for a few points. */
const PLANTED = MAX_POINT_NUM - 20n;
const HELD_MS = 3_600_000;

/** A reservation as the model knows it. */
interface Reserved extends Reservation {
  status: ReservationStatus;
  originalPointAmount: number | null;
  originalExecuteAt: Date | null;
  attempts: number;
  lastError: string | null;
  /** Whether a client has changed it. */
  isChanged: boolean;
  /** When a claim takes it while it is open: at its time, at once, or not as long as its lease holds. */
  scan: "at its time" | "at once" | "held";
}

interface World {
  /** By their keys, in the order in which they were made. */
  reserved: Map<string, Reserved>;
  changes: Map<string, PointTransaction>;
  /** Those who ever got points. */
  balances: Map<string, bigint>;
  ledger: PointTransaction[];
  /** Every message that was ever made. */
  messages: ReservationMessage[][];
}

// What may be asked for

/** Rich more often: a grant that fails, and comes to pass after all, takes several steps with the same user. */
const userId = fc.constantFrom(...USERS, "Rich");
const pointAmount = fc.integer({ min: 1, max: 120 });
/** More often past, or little would be granted. */
const executeAt = fc.constantFrom(...PAST, ...PAST, ...FUTURE).map((time) => new Date(time));
const idempotencyKey = fc.constantFrom(...KEYS);
const campaign = fc.constantFrom(...CAMPAIGNS);
/** One of what there is: the number is taken modulo their count. */
const nth = fc.nat({ max: 40 });
const content = { userId, pointAmount, executeAt, idempotencyKey, campaign };
const row = fc.record(content, { requiredKeys: ["userId", "pointAmount", "executeAt"] });
type Row = Omit<Partial<Reservation>, "id">;
/** The one that differs in a repeated request. */
const field = fc.constantFrom(undefined, undefined, "userId", "pointAmount", "executeAt", "campaign");
const way = fc.constantFrom("single", "all", "each");
type Way = "single" | "all" | "each";
/** One reservation, preferably one of a status: the rare ones as often as the others. */
const among = fc.constantFrom<ReservationStatus[]>(...RESERVATION_STATUSES, "FAILED", "PROCESSING");
const target = fc.record({ nth, among }, { requiredKeys: ["nth"] });
interface Target {
  nth: number;
  among?: ReservationStatus;
}
const points = fc.integer({ min: -120, max: 120 }).filter((points) => points !== 0);
const change = fc.record({ userId, points, key: idempotencyKey }, { requiredKeys: ["userId", "points"] });
const lease = fc.record({
  limit: fc.integer({ min: 1, max: 12 }),
  isHeld: fc.boolean(),
  chunk: fc.integer({ min: 1, max: 3 }),
});
interface Lease {
  limit: number;
  isHeld: boolean;
  chunk: number;
}

const patches = fc.oneof(
  fc.record({ pointAmount, executeAt }, { requiredKeys: ["pointAmount"] }),
  fc.record({ executeAt }),
);

/** Binds what a step may be given to what it does. */
function step<Input>(
  weight: number,
  input: fc.Arbitrary<Input>,
  run: (world: World, input: Input) => Promise<unknown>,
) {
  return { weight, input, run: run as (world: World, input: unknown) => Promise<unknown> };
}

const STEPS: Record<string, ReturnType<typeof step>> = {
  reserve: step(12, fc.tuple(way, fc.array(row, { minLength: 1, maxLength: 4, size: "max" })), reserve),
  repeat: step(6, fc.tuple(way, nth, row, field), repeat),
  change: step(6, fc.array(change, { minLength: 1, maxLength: 4 }), (world, changes) => {
    const batch = changes.map(({ userId, points, key = crypto.randomUUID() }) =>
      changeOf(key, userId, points),
    );
    return changeTogether(world, batch);
  }),
  changeAgain: step(2, nth, async (world, nth) => {
    const first = pick([...world.changes.values()], nth);
    if (first) await changeTogether(world, [first]);
  }),
  cancel: step(3, target, cancel),
  patch: step(5, fc.tuple(target, patches), patch),
  retry: step(3, target, retry),
  // What an operator does about a balance that is too large: make room, try again.
  mend: step(3, nth, async (world, nth) => {
    await changeTogether(world, [changeOf(crypto.randomUUID(), "Rich", -120)]);
    await retry(world, { nth, among: "FAILED" });
    await deliver(world, await claim(world, { limit: 20, isHeld: true, chunk: 3 }));
  }),
  cancelCampaign: step(2, campaign, cancelAll),
  claim: step(4, lease, claim),
  grant: step(6, fc.tuple(lease, nth), async (world, [lease, nth]) => {
    const messages = await claim(world, lease);
    const duplicate = pick(world.messages, nth);
    await deliver(world, duplicate ? [...messages, duplicate] : messages);
  }),
  deliver: step(3, nth, async (world, nth) => {
    const message = pick(world.messages, nth);
    if (message) await deliver(world, [message, ...world.messages.slice(0, 1)]);
  }),
  // All but the id is a lie.
  forge: step(1, fc.tuple(target, pointAmount), (world, [target, point_amount]) => {
    const reservation_id = find(world, target)?.id ?? crypto.randomUUID();
    const idempotency_key = crypto.randomUUID();
    return deliver(world, [[{ reservation_id, user_id: THIEF, point_amount, idempotency_key }]]);
  }),
};

const anyStep = Object.entries(STEPS).map(([name, { weight, input }]) => ({
  weight,
  arbitrary: fc.tuple(fc.constant(name), input),
}));
const sequence = fc.array(fc.oneof(...anyStep), { minLength: 5, maxLength: 30, size: "max" });

test(
  "any sequence of requests, claims and messages is answered and ends as the model says",
  async () => {
    const isPlanted = fc.constantFrom(false, true, true, true);
    const property = fc.asyncProperty(isPlanted, sequence, async (isPlanted, steps) => {
      const world = await emptyWorld(isPlanted);
      for (const [name, input] of steps) await STEPS[name]?.run(world, input);
      await Promise.all([...world.reserved.values()].map(checkReservation));
      await Promise.all([...USERS, THIEF].map((userId) => checkUser(world, userId)));
      await checkTables(world);
    });
    await fc.assert(property, {
      numRuns: NUM_RUNS,
      interruptAfterTimeLimit: LIMIT_MS,
      markInterruptAsFailure: true,
      ...(MODEL_SEED && { seed: Number(MODEL_SEED) }),
      ...(MODEL_PATH && { path: MODEL_PATH }),
    });
    if (MODEL_PATH === undefined && NUM_RUNS >= 120) expectMet();
  },
  LIMIT_MS + 30_000,
);

/** By chance a rare one may be missing, but not more than a few. */
const MAX_UNSEEN = 3;

/** Checks that the sequences met what matters. */
function expectMet(): void {
  const expected = {
    single: "created replayed conflict",
    all: "created replayed conflict refused",
    each: "created replayed conflict",
    change: "changed replayed conflict unknown_user too_few too_many",
    cancel: "PENDING PROCESSING DONE FAILED CANCELLED none",
    patch: "PENDING PROCESSING DONE FAILED CANCELLED none",
    retry: "PENDING PROCESSING DONE FAILED CANCELLED none",
    campaign: "found none",
    message: "PENDING PROCESSING DONE FAILED CANCELLED none",
    grant: "DONE FAILED again",
    claim: "again",
    replay: "patched",
  };
  const met = Object.entries(expected).flatMap(([what, how]) =>
    how.split(" ").map((one) => `${what} ${one}`),
  );
  expect(met.filter((one) => !seen.has(one)).slice(MAX_UNSEEN)).toEqual([]);
}

// Steps: what is done, what must come back, what is true from then on

const WAYS: Record<Way, (batch: Reservation[]) => Promise<CreateOutcome[]>> = {
  single: (batch) => db.database.run((connection) => createReservations(connection, batch)),
  all: (batch) => createBulk(db.database, batch, { allOrNone: true }),
  each: (batch) => createBulk(db.database, batch, { allOrNone: false }),
};

async function reserve(world: World, [way, rows]: [Way, Row[]]) {
  const reserved = new Map(world.reserved);
  const batch = rows.map((row) => reservationOf(row));
  const outcomes = batch.map((reservation): CreateOutcome => {
    const first = reserved.get(reservation.idempotencyKey);
    if (first) {
      const isSame = Bun.deepEquals(firstOf(first), { ...reservation, id: first.id });
      if (!isSame) return { kind: "conflict" };
      if (first.originalPointAmount !== null) seen.add("replay patched");
      return { kind: "replayed", reservation: firstOf(first) };
    }
    const fresh = { status: "PENDING", scan: "at its time", attempts: 0, lastError: null } as const;
    const originals = { originalPointAmount: null, originalExecuteAt: null, isChanged: false };
    reserved.set(reservation.idempotencyKey, { ...reservation, ...fresh, ...originals });
    return { kind: "created", reservation };
  });
  for (const { kind } of outcomes) seen.add(`${way} ${kind}`);
  expect(await WAYS[way](batch)).toEqual(outcomes);
  if (way === "all" && outcomes.some(({ kind }) => kind === "conflict")) seen.add("all refused");
  else world.reserved = reserved;
}

/** The same request again, or with one other value. */
async function repeat(world: World, [way, nth, other, field]: [Way, number, Row, keyof Row | undefined]) {
  const keyed = [...world.reserved.values()].filter((one) => KEYS.includes(one.idempotencyKey));
  // Those that were patched since are the ones that matter.
  const patched = keyed.filter((one) => one.originalPointAmount ?? one.originalExecuteAt);
  const reserved = pick(patched.length > 0 ? patched : keyed, nth);
  if (!reserved) return;
  const { id: _, ...first } = firstOf(reserved);
  await reserve(world, [way, [field ? { ...first, [field]: other[field] ?? null } : first]]);
}

async function changeTogether(world: World, batch: PointTransaction[]) {
  const outcomes = batch.map((change): ChangeOutcome => {
    const first = world.changes.get(change.idempotencyKey);
    if (first) {
      return first.userId === change.userId && first.pointAmount === change.pointAmount
        ? "replayed"
        : "conflict";
    }
    const balance = world.balances.get(change.userId);
    const after = (balance ?? 0n) + BigInt(change.pointAmount);
    if (balance === undefined && change.pointAmount < 0) return "unknown_user";
    if (after < 0n) return "too_few";
    if (after > MAX_POINT_NUM) return "too_many";
    world.changes.set(change.idempotencyKey, change);
    enter(world, change);
    return "changed";
  });
  for (const outcome of outcomes) seen.add(`change ${outcome}`);
  expect(await changePoints(db.database, batch)).toEqual(outcomes);
}

/** What a change of a reservation must give; the model has changed already if `isDone`. */
function transitionOf(reserved: Reserved | undefined, isDone: boolean) {
  return reserved && ({ isDone, details: detailsOf(reserved) } as Transitioned);
}

/** The reservation that a step means, and what it is then. */
function meet(world: World, what: string, target: Target): [id: string, Reserved | undefined] {
  const reserved = find(world, target);
  seen.add(`${what} ${reserved?.status ?? "none"}`);
  return [reserved?.id ?? crypto.randomUUID(), reserved];
}

async function cancel(world: World, target: Target) {
  const [id, reserved] = meet(world, "cancel", target);
  if (reserved && isOpen(reserved)) reserved.status = "CANCELLED";
  const isDone = reserved?.status === "CANCELLED";
  expect(await cancelReservation(db.database, id)).toEqual(transitionOf(reserved, isDone));
}

async function patch(world: World, [target, patch]: [Target, ReservationPatch]) {
  const [id, reserved] = meet(world, "patch", target);
  const isDone = reserved?.status === "PENDING";
  if (isDone) {
    if (patch.pointAmount !== undefined) reserved.originalPointAmount ??= reserved.pointAmount;
    if (patch.executeAt !== undefined) {
      reserved.originalExecuteAt ??= reserved.executeAt;
      reserved.scan = "at its time";
    }
    Object.assign(reserved, patch, { isChanged: true });
  }
  expect(await patchReservation(db.database, id, patch)).toEqual(transitionOf(reserved, isDone));
}

async function retry(world: World, target: Target) {
  const [id, reserved] = meet(world, "retry", target);
  const isDone = reserved?.status === "FAILED";
  if (isDone) Object.assign(reserved, { status: "PENDING", scan: "at once", attempts: 0, isChanged: true });
  expect(await retryReservation(db.database, id)).toEqual(transitionOf(reserved, isDone));
}

async function cancelAll(world: World, campaign: string) {
  const all = [...world.reserved.values()].filter((one) => one.campaign === campaign);
  seen.add(all.length > 0 ? "campaign found" : "campaign none");
  for (const reserved of all.filter(isOpen)) reserved.status = "CANCELLED";
  const count = (status: ReservationStatus) => all.filter((one) => one.status === status).length;
  const counts = { cancelled: count("CANCELLED"), granted: count("DONE"), failed: count("FAILED"), open: 0 };
  const untilMs = Number.POSITIVE_INFINITY;
  expect(await cancelCampaign(db.database, campaign, { untilMs })).toEqual(counts);
}

/** As the scheduler does; a lease that is not held ends at once, as after a crash. */
async function claim(world: World, { limit, isHeld, chunk }: Lease): Promise<ReservationMessage[][]> {
  const claimed = await claimDue(db.database, { limit, leaseMs: isHeld ? HELD_MS : 0 });
  const due = [...world.reserved.values()].filter(
    ({ status, scan, executeAt }) =>
      (status === "PENDING" && (scan === "at once" || executeAt < new Date())) ||
      (status === "PROCESSING" && scan !== "held"),
  );
  expect(new Set(claimed.map(({ id }) => id)).size).toBe(Math.min(limit, due.length));
  for (const { lateMs, scanAt, ...reservation } of claimed) {
    const reserved = due.find(({ id }) => id === reservation.id);
    if (!reserved) throw new Error(`A claim took ${reservation.id}, which is not due`);
    expect(reservation).toEqual(reservationIn(reserved));
    if (reserved.status === "PROCESSING") seen.add("claim again");
    Object.assign(reserved, { status: "PROCESSING", scan: isHeld ? "held" : "at once" });
  }
  const messages: ReservationMessage[][] = [];
  for (let at = 0; at < claimed.length; at += chunk) {
    messages.push(decodeMessage(encodeMessage(claimed.slice(at, at + chunk))));
  }
  world.messages.push(...messages);
  return messages;
}

/** As the worker does. */
async function deliver(world: World, messages: ReservationMessage[][]) {
  if (messages.length === 0) return;
  const outcomes = await processMessages(messages, { database: db.database, logger: silent, maxAttempts: 3 });
  const byId = new Map([...world.reserved.values()].map((one) => [one.id, one]));
  const isKnown = (message: ReservationMessage[]) => message.every((one) => byId.has(one.reservation_id));
  expect(outcomes).toEqual(messages.map((message) => (isKnown(message) ? "ack" : "dead")));
  for (const { reservation_id } of messages.flat()) {
    const reserved = byId.get(reservation_id);
    seen.add(`message ${reserved?.status ?? "none"}`);
    if (reserved?.status === "PROCESSING") grant(world, reserved);
  }
}

function grant(world: World, reserved: Reserved) {
  const { id, userId, pointAmount, idempotencyKey } = reserved;
  if ((world.balances.get(userId) ?? 0n) + BigInt(pointAmount) > MAX_POINT_NUM) {
    const lastError = "The balance would be out of range";
    Object.assign(reserved, { status: "FAILED", attempts: reserved.attempts + 1, lastError });
  } else {
    if (reserved.lastError) seen.add("grant again");
    reserved.status = "DONE";
    enter(world, { idempotencyKey, userId, pointAmount, kind: "grant", reservationId: id });
  }
  seen.add(`grant ${reserved.status}`);
}

// The model

async function emptyWorld(isPlanted: boolean): Promise<World> {
  await db.database.transaction(async ({ execute }) => {
    for (const table of ["point_transactions", "point_reservations", "point_root"]) {
      await execute(`delete from ${table}`);
    }
    if (isPlanted)
      await execute("insert into point_root (user_id, point_num) values ('Rich', ?)", [String(PLANTED)]);
  });
  const balances = new Map(isPlanted ? [["Rich", PLANTED]] : []);
  return { reserved: new Map(), changes: new Map(), balances, ledger: [], messages: [] };
}

function changeOf(idempotencyKey: string, userId: string, pointAmount: number): PointTransaction {
  return { idempotencyKey, userId, pointAmount, kind: pointAmount < 0 ? "sub" : "add", reservationId: null };
}

function enter(world: World, entry: PointTransaction) {
  world.ledger.push(entry);
  world.balances.set(entry.userId, (world.balances.get(entry.userId) ?? 0n) + BigInt(entry.pointAmount));
}

function reservationIn(reserved: Reserved): Reservation {
  const { id, userId, pointAmount, executeAt, idempotencyKey, campaign } = reserved;
  return { id, userId, pointAmount, executeAt, idempotencyKey, campaign };
}

/** What was reserved at first, whatever it was patched to. */
function firstOf(reserved: Reserved): Reservation {
  const pointAmount = reserved.originalPointAmount ?? reserved.pointAmount;
  const executeAt = reserved.originalExecuteAt ?? reserved.executeAt;
  return { ...reservationIn(reserved), pointAmount, executeAt };
}

function isOpen({ status }: Pick<Reserved, "status">): boolean {
  return status === "PENDING" || status === "PROCESSING";
}

function byTime(a: Reserved, b: Reserved): number {
  return a.executeAt.getTime() - b.executeAt.getTime() || (a.id < b.id ? -1 : 1);
}

function pick<T>(all: readonly T[], nth: number): T | undefined {
  return all[nth % all.length];
}

/** The reservation that a step means; none where there is none at all. */
function find({ reserved }: World, { nth, among }: Target): Reserved | undefined {
  const all = [...reserved.values()];
  const preferred = all.filter(({ status }) => status === among);
  return pick(preferred.length > 0 ? preferred : all, nth);
}

// What must be true

function detailsOf({ scan, isChanged, ...reserved }: Reserved) {
  const isToCome = scan === "at its time" && reserved.executeAt > new Date();
  // Never in the past, also if its time is.
  const scanAt = isToCome ? reserved.executeAt : expect.any(Date);
  const isDone = reserved.status === "DONE";
  return {
    ...reserved,
    changedAt: isChanged ? expect.any(Date) : null,
    scanAt: isOpen(reserved) ? scanAt : null,
    transactionId: isDone ? expect.any(String) : null,
    grantedAt: isDone ? expect.any(Date) : null,
    createdAt: expect.any(Date),
    updatedAt: expect.any(Date),
  };
}

async function checkReservation(reserved: Reserved) {
  const details = await findReservation(db.database, reserved.id);
  expect(details).toEqual(detailsOf(reserved));
  expect(await findReservationByKey(db.database, reserved.idempotencyKey)).toEqual(details);
}

async function checkUser({ balances, ledger, reserved }: World, userId: string) {
  const balance = balances.get(userId);
  expect((await findBalance(db.database, userId))?.pointNum).toEqual(balance);
  const all = [...reserved.values()].filter((one) => one.userId === userId).sort(byTime);
  const toCome = all.filter(isOpen);
  const isKnown = balance !== undefined || toCome.length > 0;
  expect(await findHoldings(db.database, userId)).toEqual(
    isKnown
      ? {
          pointNum: balance ?? 0n,
          reservedPointNum: sumOf(toCome),
          nextExecuteAt: toCome[0]?.executeAt ?? null,
          updatedAt: balance === undefined ? null : expect.any(Date),
        }
      : undefined,
  );
  const listed = await listReservations(db.database, userId, ALL);
  expect(listed.map(({ id, status }) => `${id} ${status}`)).toEqual(
    all.map(({ id, status }) => `${id} ${status}`),
  );
  const entries = await listTransactions(db.database, userId, ALL);
  const expected = ledger.filter((entry) => entry.userId === userId);
  expect(entries.map(describeEntry).sort()).toEqual(expected.map(describeEntry).sort());
}

const ALL = { limit: 1_000, after: undefined };

type Described = Pick<PointTransaction, "kind" | "idempotencyKey" | "reservationId" | "pointAmount">;
function describeEntry({ kind, idempotencyKey, reservationId, pointAmount }: Described): string {
  return `${kind} ${idempotencyKey} ${reservationId} ${pointAmount}`;
}

/** Nothing but what the model knows of, and the sums that the operator looks at. */
async function checkTables({ reserved, ledger, balances }: World) {
  const [counts] = await db.query(
    `select (select count(*) from point_reservations) reservations, (select count(*) from point_transactions) ledger,
       (select count(*) from point_root) balances`,
  );
  expect(counts).toEqual({ reservations: reserved.size, ledger: ledger.length, balances: balances.size });
  const total = [...balances.values()].reduce((sum, points) => sum + points, 0n);
  const isPlanted = total !== sumOf(ledger);
  expect(await compareSums(db.database)).toEqual({
    reservations: sumOf([...reserved.values()].filter(({ status }) => status === "DONE")),
    direct: sumOf(ledger.filter(({ kind }) => kind !== "grant")),
    ledger: sumOf(ledger),
    balances: total,
    balanceMismatches: isPlanted ? 1 : 0,
    reservationMismatches: 0,
    early: 0,
    agree: !isPlanted,
  });
}

function sumOf(all: readonly { pointAmount: number }[]): bigint {
  return BigInt(all.reduce((sum, { pointAmount }) => sum + pointAmount, 0));
}
