import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { openDatabase } from "../lib/database.ts";
import { findReservation } from "../lib/history.ts";
import { compareSums, findBalance } from "../lib/point_repository.ts";
import { openQueue } from "../lib/queue.ts";
import { cancelReservation } from "../lib/reservation_repository.ts";
import { type ScanOptions, scanAndPublish } from "../scheduler.ts";
import { COMMIT, PUBLISH } from "./fault_points.ts";
import {
  AMQP_URL,
  createTestDatabase,
  deleteQueue,
  insertReservation,
  type RunningService,
  reservationOf,
  silent,
  type TestDatabase,
  uniqueName,
  until,
} from "./harness.ts";
import {
  countStatuses,
  insertReservations,
  openPipeline,
  processReservations,
  publishReservations,
} from "./pipeline.ts";
import { blockedFrame, type Moment, startProxy } from "./proxy.ts";

// What a process cannot know: whether a lost answer was a yes, and whether its own clock is right.

let db: TestDatabase;
beforeAll(async () => {
  db = await createTestDatabase();
}, 30_000);
afterAll(async () => {
  await db.drop();
}, 30_000);

/** A queue of its own behind a proxy, ready. */
async function openThrough({ publishTimeoutMs = 5_000 } = {}) {
  const proxy = await startProxy(AMQP_URL);
  const name = uniqueName("doubts_test");
  const queue = openQueue(proxy.url, { name, publishTimeoutMs, onConnected() {}, onDisconnected() {} });
  await until("the queue is ready", () => queue.isReady());
  return {
    ...{ proxy, queue },
    async [Symbol.asyncDispose]() {
      await queue.close();
      await deleteQueue(name);
      await proxy.close();
    },
  };
}

function scan(queue: ScanOptions["queue"], config: Partial<ScanOptions["config"]> = {}) {
  return scanAndPublish({
    ...{ database: db.database, queue, logger: silent },
    config: {
      ...{ SCAN_BATCH: 100, SCAN_INTERVAL_MS: 10_000, LEASE_MS: 60_000 },
      ...{ PUBLISH_CHUNK: 100, QUEUED_RESERVATIONS: 10_000 },
      ...config,
    },
  });
}

async function insertDue(count: number) {
  await db.query("delete from point_reservations");
  const reservations = Array.from({ length: count }, () => reservationOf({ userId: uniqueName("U") }));
  await insertReservations(db, { reservations });
  return reservations;
}

async function statusOf({ id }: { id: string }, { database } = db) {
  const story = await findReservation(database, id);
  return story && { status: story.status, attempts: story.attempts, lastError: story.lastError };
}

describe("scanAndPublish()", () => {
  test("leaves claimed what has arrived though its confirm was lost; cancelled then, it is not granted (fault 12)", async () => {
    await using through = await openThrough();
    const due = await insertDue(2);
    through.proxy.trap({ command: PUBLISH, moment: "answered", spring: () => through.proxy.cut() });
    await scan(through.queue);
    expect(await countStatuses(db)).toEqual({ PROCESSING: 2 });
    const depth = () => through.queue.depth().catch(() => 0);
    await until("its message has arrived", async () => (await depth()) === 1);

    const [cancelled, other] = due as [(typeof due)[0], (typeof due)[0]];
    expect(await cancelReservation(db.database, cancelled.id)).toBe(true);
    expect(await processReservations([due], { database: db.database })).toEqual(["ack"]);
    expect(await countStatuses(db)).toEqual({ CANCELLED: 1, DONE: 1 });
    expect(await findBalance(db.database, cancelled.userId)).toBeUndefined();
    expect((await findBalance(db.database, other.userId))?.pointNum).toBe(100n);
  }, 30_000);

  test("has no more than one claim in flight where an alarm blocks its publishing, and goes on after it (fault 15)", async () => {
    await using through = await openThrough({ publishTimeoutMs: 300 });
    const { proxy, queue } = through;
    await insertDue(10);
    const blocking: ScanOptions["queue"] = {
      depth: () => queue.depth(),
      publish(contents) {
        // RabbitMQ takes nothing any more, and says so when something is published.
        proxy.hold();
        const published = queue.publish(contents);
        proxy.inject(blockedFrame(true));
        return published;
      },
    };
    await scan(blocking, { SCAN_BATCH: 4 });
    expect(await countStatuses(db)).toEqual({ PENDING: 6, PROCESSING: 4 });
    for (let scans = 0; scans < 3; scans++) {
      await expect(scan(queue, { SCAN_BATCH: 4 })).rejects.toThrow("alarm");
    }
    expect(await countStatuses(db)).toEqual({ PENDING: 6, PROCESSING: 4 });

    await proxy.serve();
    await until("the queue is ready", () => queue.isReady());
    await scan(queue);
    expect(await countStatuses(db)).toEqual({ PROCESSING: 10 });
    expect(await queue.depth()).toBe(1);
  }, 30_000);
});

describe("on a host whose clock is an hour fast,", () => {
  // Processes of their own: the ids that this one makes would be of that hour ever after.
  const clock = { CLOCK_OFF_MS: "3600000" };
  const options = { bunArgs: ["--preload", join(import.meta.dir, "faults_clock.ts")] };
  const executeAt = () => new Date(Date.now() + 1_800_000);

  function told(service: RunningService, msg: string) {
    return until(`it has ${msg}`, () => service.log().find((line) => line.msg === msg));
  }

  function expectFast({ time }: Record<string, unknown>) {
    expect(Date.parse(String(time))).toBeGreaterThan(Date.now() + 3_000_000);
  }

  test("scheduler.ts claims what is due by the database's clock only (fault 19)", async () => {
    await using pipeline = await openPipeline();
    const early = await insertReservation(pipeline.test, { executeAt: executeAt() });
    const due = await insertReservation(pipeline.test);
    const scheduler = await pipeline.start("scheduler", clock, options);
    const published = await told(scheduler, "published");
    expect(published).toMatchObject({ claimed: 1 });
    expectFast(published);
    expect(await statusOf(early, pipeline.test)).toMatchObject({ status: "PENDING" });
    expect(await statusOf(due, pipeline.test)).toMatchObject({ status: "PROCESSING" });
  }, 30_000);

  test("worker.ts grants what is due by the database's clock only (fault 19)", async () => {
    await using pipeline = await openPipeline();
    const early = await insertReservation(pipeline.test, { executeAt: executeAt(), status: "PROCESSING" });
    const due = await insertReservation(pipeline.test, { status: "PROCESSING" });
    const worker = await pipeline.start("worker", clock, options);
    await publishReservations(await pipeline.openQueue(), { reservations: [early, due], chunk: 2 });
    const processed = await told(worker, "processed");
    expect(processed).toMatchObject({ granted: 1, not_due: 1 });
    expectFast(processed);
    expect(await statusOf(early, pipeline.test)).toMatchObject({ status: "PROCESSING", attempts: 0 });
    expect(await statusOf(due, pipeline.test)).toMatchObject({ status: "DONE" });
  }, 30_000);
});

describe("processMessages() whose connection is lost at its COMMIT reads the rows again, and grants once:", () => {
  test.each<[string, Moment]>([
    ["MySQL never had it (fault 25)", "unsent"],
    ["only its answer is lost (fault 25)", "answered"],
  ])(
    "%s",
    async (_, moment) => {
      await using proxy = Object.assign(await startProxy(db.url), {
        [Symbol.asyncDispose]: () => proxy.close(),
      });
      const retries: string[] = [];
      const database = openDatabase(proxy.url, { onRetry: ({ kind }) => retries.push(kind) });
      const reservation = await insertReservation(db, { userId: uniqueName("U"), status: "PROCESSING" });
      proxy.trap({ command: COMMIT, moment, spring: () => proxy.cut() });
      expect(await processReservations([[reservation]], { database })).toEqual(["ack"]);
      await database.close();
      expect(retries).toEqual(["lost"]);
      expect(await statusOf(reservation)).toEqual({ status: "DONE", attempts: 0, lastError: null });
      expect((await findBalance(db.database, reservation.userId))?.pointNum).toBe(100n);
    },
    30_000,
  );

  test("leaves ledger, balances and reservations in agreement", async () => {
    expect(await compareSums(db.database)).toMatchObject({ usersApart: 0, reservationsApart: 0, early: 0 });
  });
});
