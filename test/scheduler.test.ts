import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from "bun:test";
import { connect } from "amqplib";
import { findReservation } from "../lib/history.ts";
import { decodeMessage } from "../lib/message.ts";
import { openQueue, type Queue, QueueError } from "../lib/queue.ts";
import type { Reservation } from "../lib/reservation.ts";
import { claimDue } from "../lib/reservation_repository.ts";
import { type ScanOptions, scanAndPublish } from "../scheduler.ts";
import { processMessages } from "../worker.ts";
import {
  AMQP_URL,
  createTestDatabase,
  deleteQueue,
  insertReservation,
  reservationOf,
  silent,
  type TestDatabase,
  uniqueName,
  until,
} from "./harness.ts";
import { countStatuses, insertReservations, openAnother, openPipeline } from "./pipeline.ts";
import { startProxy } from "./proxy.ts";

const CONFIG: ScanOptions["config"] = {
  SCAN_BATCH: 100,
  SCAN_INTERVAL_MS: 10_000,
  LEASE_MS: 60_000,
  PUBLISH_CHUNK: 100,
  QUEUED_RESERVATIONS: 10_000,
};
let db: TestDatabase;
let queueName: string;
let queue: Queue;

beforeAll(async () => {
  db = await createTestDatabase();
}, 30_000);
afterAll(() => db.drop(), 30_000);
beforeEach(async () => {
  await db.query("delete from point_reservations");
  queueName = uniqueName("scheduler_test");
  queue = openQueue(AMQP_URL, { name: queueName, onConnected() {}, onDisconnected() {} });
  await until("the queue is ready", () => queue.isReady());
}, 20_000);
afterEach(async () => {
  await queue.close();
  await deleteQueue(queueName);
}, 20_000);

async function scan(
  config: Partial<ScanOptions["config"]> = {},
  others: Partial<Omit<ScanOptions, "config">> = {},
): Promise<number> {
  const { sleepMs } = await scanAndPublish({
    ...{ database: db.database, queue, logger: silent },
    ...others,
    config: { ...CONFIG, ...config },
  });
  return sleepMs;
}

/** Takes all messages that wait in the queue, each parsed. */
async function takeAll(name = queueName): Promise<unknown[]> {
  const connection = await connect(AMQP_URL);
  const channel = await connection.createChannel();
  const taken: unknown[] = [];
  for (;;) {
    const message = await channel.get(name, { noAck: true });
    if (!message) break;
    taken.push(JSON.parse(message.content.toString()));
  }
  await connection.close();
  return taken;
}

/** Due reservations, the first one longest. */
async function insertDue(count: number) {
  const reservations = Array.from({ length: count }, (_, index) =>
    reservationOf({ executeAt: new Date(Date.now() - 60_000 + index), pointAmount: index + 1 }),
  );
  await insertReservations(db, { reservations });
  return reservations;
}

describe("scanAndPublish() publishes", () => {
  test("what is due, in its order, PUBLISH_CHUNK reservations a message", async () => {
    const due = await insertDue(5);
    await insertReservation(db, { executeAt: new Date(Date.now() + 60_000) });
    await scan({ PUBLISH_CHUNK: 2 });
    const fields = due.map(({ id, userId, pointAmount, idempotencyKey }) => ({
      reservation_id: id,
      user_id: userId,
      point_amount: pointAmount,
      idempotency_key: idempotencyKey,
    }));
    expect(await takeAll()).toEqual([fields.slice(0, 2), fields.slice(2, 4), fields[4]]);
    expect(await countStatuses(db)).toEqual({ PENDING: 1, PROCESSING: 5 });
    await scan();
    expect(await queue.depth()).toBe(0);
  }, 20_000);

  test("the plain object of the original with a chunk of 1", async () => {
    const [first, second] = await insertDue(2);
    await scan({ PUBLISH_CHUNK: 1 });
    const messages = await takeAll();
    expect(messages).toMatchObject([{ reservation_id: first?.id }, { reservation_id: second?.id }]);
    for (const message of messages) {
      expect(Object.keys(message as object)).toEqual([
        ...["reservation_id", "user_id", "point_amount", "idempotency_key"],
      ]);
    }
  }, 20_000);

  test("again, after its lease and not before, what was claimed and never published (fault 9)", async () => {
    const reservation = await insertReservation(db);
    // A scheduler that was killed between its COMMIT and its publish.
    expect(await claimDue(db.database, { limit: 10, leaseMs: 3_000 })).toHaveLength(1);
    const leaseEnd = (await findReservation(db.database, reservation.id))?.scanAt?.getTime() ?? 0;
    const sleepMs = await scan();
    expect(await queue.depth()).toBe(0);
    expect(sleepMs).toBeGreaterThan(0);
    expect(sleepMs).toBeLessThanOrEqual(3_000);
    await until("it is published", async () => {
      await scan();
      return (await queue.depth()) === 1;
    });
    const [message] = await takeAll();
    const messages = [decodeMessage(Buffer.from(JSON.stringify(message)))];
    await processMessages(messages, { database: db.database, logger: silent, maxAttempts: 10 });
    const granted = await findReservation(db.database, reservation.id);
    expect(granted?.status).toBe("DONE");
    expect(granted?.grantedAt?.getTime()).toBeGreaterThanOrEqual(leaseEnd);
  }, 20_000);

  test("again, after its lease, what the broker did not confirm; it stays PROCESSING until then (fault 13)", async () => {
    const due = await insertDue(3);
    const losing: ScanOptions["queue"] = {
      depth: () => queue.depth(),
      async publish(contents) {
        await deleteQueue(queueName);
        return queue.publish(contents);
      },
    };
    await scan({ LEASE_MS: 1_000 }, { queue: losing });
    expect(await countStatuses(db)).toEqual({ PROCESSING: 3 });
    await until("all are published", async () => {
      await scan().catch((error) => expect(error).toBeInstanceOf(QueueError));
      return (await queue.depth().catch(() => 0)) > 0;
    });
    expect((await takeAll()).flat()).toMatchObject(due.map(({ id }) => ({ reservation_id: id })));
  }, 20_000);
});

describe("scanAndPublish() claims nothing", () => {
  test("while RabbitMQ is away", async () => {
    await insertDue(3);
    await using proxy = Object.assign(await startProxy(AMQP_URL), {
      [Symbol.asyncDispose]: () => proxy.close(),
    });
    const through = openQueue(proxy.url, { name: queueName, onConnected() {}, onDisconnected() {} });
    await until("ready", () => through.isReady());
    await proxy.refuse();
    const error = await scan({}, { queue: through }).catch((thrown) => thrown);
    expect(error).toBeInstanceOf(QueueError);
    expect(await countStatuses(db)).toEqual({ PENDING: 3 });
    await proxy.serve();
    await until("ready", () => through.isReady());
    await scan({}, { queue: through });
    expect(await countStatuses(db)).toEqual({ PROCESSING: 3 });
    await through.close();
  }, 30_000);

  test("while the queue is deep, and goes on when it is not", async () => {
    await insertDue(6);
    const config = { PUBLISH_CHUNK: 2, SCAN_BATCH: 4, QUEUED_RESERVATIONS: 4 };
    expect(await scan(config)).toBe(0);
    const sleepMs = await scan(config);
    expect(await countStatuses(db)).toEqual({ PENDING: 2, PROCESSING: 4 });
    expect(sleepMs).toBeGreaterThan(0);
    expect(sleepMs).toBeLessThanOrEqual(1_000);
    await takeAll();
    await scan(config);
    expect(await countStatuses(db)).toEqual({ PROCESSING: 6 });
  }, 20_000);
});

describe("scanAndPublish() returns", () => {
  test("0 where the scan came back full", async () => {
    await insertDue(3);
    expect(await scan({ SCAN_BATCH: 3 })).toBe(0);
    expect(await scan({ SCAN_BATCH: 3 })).toBeGreaterThan(0);
  }, 20_000);

  test("the scan interval where nothing waits, or nothing sooner", async () => {
    expect(await scan({ SCAN_INTERVAL_MS: 1_234 })).toBe(1_234);
    await insertReservation(db, { executeAt: new Date(Date.now() + 60_000) });
    expect(await scan({ SCAN_INTERVAL_MS: 1_234 })).toBe(1_234);
  }, 20_000);

  test("the time until the next scan_at", async () => {
    const inMs = 5_000;
    await insertReservation(db, { executeAt: new Date(Date.now() + inMs) });
    const sleepMs = await scan();
    expect(sleepMs).toBeLessThanOrEqual(inMs + 1);
    expect(sleepMs).toBeGreaterThan(inMs - 2_000);
  }, 20_000);

  test("a short sleep, not 0, where what is due is held by another scheduler", async () => {
    await insertDue(1);
    await using another = openAnother(db);
    const gate = Promise.withResolvers<void>();
    const locked = Promise.withResolvers<void>();
    const holding = another.transaction(async (connection) => {
      await connection.select("select id from point_reservations for update");
      locked.resolve();
      await gate.promise;
    });
    await locked.promise;
    const sleepMs = await scan();
    gate.resolve();
    await holding;
    expect(sleepMs).toBeGreaterThan(0);
    expect(sleepMs).toBeLessThanOrEqual(100);
    expect(await countStatuses(db)).toEqual({ PENDING: 1 });
  }, 20_000);
});

describe("two scheduler processes", () => {
  test("publish each of thousands of rows exactly once between them (fault 10)", async () => {
    await using pipeline = await openPipeline();
    const env = { SCAN_INTERVAL_MS: "10", SCAN_BATCH: "20", PUBLISH_CHUNK: "7" };
    const schedulers = [await pipeline.start("scheduler", env), await pipeline.start("scheduler", env)];
    for (const { url } of schedulers) {
      await until("ready", async () => (await fetch(`${url}/ready`)).status === 200);
    }
    const claims = () =>
      schedulers.map((scheduler) =>
        scheduler.log().reduce((sum, { claimed }) => sum + Number(claimed ?? 0), 0),
      );
    const reservations: Reservation[] = [];
    // Again, as one of them may just have slept while the other took all.
    for (let wave = 1; wave <= 10 && (wave === 1 || Math.min(...claims()) === 0); wave++) {
      const more = Array.from({ length: 1_000 }, () => reservationOf());
      reservations.push(...more);
      await insertReservations(pipeline.test, { reservations: more });
      await until(
        "all are claimed",
        async () => (await countStatuses(pipeline.test)).PROCESSING === reservations.length,
      );
    }
    // What is claimed is published before the process ends.
    for (const scheduler of schedulers) expect(await scheduler.kill("SIGTERM")).toBe(0);
    const published = (await takeAll(pipeline.queueName)).flat() as { reservation_id: string }[];
    const ids = published.map(({ reservation_id }) => reservation_id).sort();
    expect(ids).toEqual(reservations.map(({ id }) => id).sort());
    expect(Math.min(...claims())).toBeGreaterThan(0);
  }, 60_000);
});
