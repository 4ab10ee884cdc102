import { beforeEach, describe, expect, test } from "bun:test";
import { type Queue, QueueError } from "../../lib/queue.ts";
import { claimDue } from "../../lib/reservations/claim_repository.ts";
import { cancelReservation } from "../../lib/reservations/reservation_repository.ts";
import { type ScanOptions, scanAndPublish } from "../../scheduler.ts";
import { openTestDatabase } from "../harness/database.ts";
import { command } from "../harness/fault_points.ts";
import { insertReservation, insertReservations, reservationOf } from "../harness/fixtures.ts";
import { AMQP_URL, silent, until } from "../harness/harness.ts";
import { countStatuses, processReservations } from "../harness/pipeline.ts";
import { blockedFrame, startProxy } from "../harness/proxy.ts";
import { deleteQueue, openTestQueue, takeMessages } from "../harness/queue.ts";

const HOUR_MS = 3_600_000;
const CONFIG: ScanOptions["config"] = {
  SCAN_BATCH: 100,
  SCAN_INTERVAL_MS: 10_000,
  LEASE_MS: 60_000,
  PUBLISH_CHUNK: 100,
  QUEUED_RESERVATIONS: 10_000,
};

const db = await openTestDatabase();
beforeEach(() => db.query("delete from point_reservations"));

function scan(queue: ScanOptions["queue"], config: Partial<ScanOptions["config"]> = {}) {
  return scanAndPublish({ database: db.database, queue, logger: silent, config: { ...CONFIG, ...config } });
}

/** Inserts due reservations, the first one due longest. */
async function insertDue(count: number) {
  const reservations = Array.from({ length: count }, (_, index) =>
    reservationOf({ userId: `User${index}`, executeAt: new Date(Date.now() - 60_000 + index) }),
  );
  await insertReservations(db, { reservations });
  return reservations;
}

/** The database's clock goes past the end of all leases. */
function endLeases() {
  return db.query("update point_reservations set scan_at = execute_at where status = 'PROCESSING'");
}

/** A queue, but something happens whenever it is published to. */
function publishing({ depth }: Queue, publish: Queue["publish"]): ScanOptions["queue"] {
  return { depth, publish };
}

describe("scanAndPublish() publishes", () => {
  test("what is due, in its order, PUBLISH_CHUNK reservations a message", async () => {
    await using queue = await openTestQueue();
    const due = await insertDue(5);
    await insertReservation(db, { executeAt: new Date(Date.now() + HOUR_MS) });
    await scan(queue, { PUBLISH_CHUNK: 2 });
    const fields = due.map(({ id, userId, pointAmount, idempotencyKey }) => ({
      reservation_id: id,
      user_id: userId,
      point_amount: pointAmount,
      idempotency_key: idempotencyKey,
    }));
    expect(await takeMessages(queue.name)).toEqual([fields.slice(0, 2), fields.slice(2, 4), fields[4]]);
    expect(await countStatuses(db)).toEqual({ PENDING: 1, PROCESSING: 5 });
    await scan(queue);
    expect(await queue.depth()).toBe(0);
  });

  test("again, after its lease and not before, what was claimed and never published (fault 9)", async () => {
    await using queue = await openTestQueue();
    const { id } = await insertReservation(db);
    // A scheduler that was killed between its COMMIT and its publish.
    expect(await claimDue(db.database, { limit: 10, leaseMs: HOUR_MS })).toHaveLength(1);
    await scan(queue);
    expect(await queue.depth()).toBe(0);
    await endLeases();
    await scan(queue);
    expect(await takeMessages(queue.name)).toMatchObject([{ reservation_id: id }]);
  });

  test("again, after its lease, what the broker did not confirm; it stays PROCESSING until then (fault 13)", async () => {
    await using queue = await openTestQueue();
    const due = await insertDue(3);
    const losing = publishing(queue, async (contents) => {
      await deleteQueue(queue.name);
      return queue.publish(contents);
    });
    await scan(losing);
    expect(await countStatuses(db)).toEqual({ PROCESSING: 3 });
    await until("the queue is made again", async () => (await queue.depth().catch(() => -1)) === 0);
    await endLeases();
    await scan(queue);
    const ids = due.map(({ id }) => ({ reservation_id: id }));
    expect((await takeMessages(queue.name)).flat()).toMatchObject(ids);
  });

  test("once what has arrived though its confirm was lost; cancelled then, it is not granted (fault 12)", async () => {
    await using proxy = await startProxy(AMQP_URL);
    await using queue = await openTestQueue({ url: proxy.url });
    const due = await insertDue(2);
    proxy.trap({ command: command("basic.publish"), moment: "answered", spring: () => proxy.cut() });
    await scan(queue);
    expect(await countStatuses(db)).toEqual({ PROCESSING: 2 });
    await until("its message has arrived", async () => (await queue.depth().catch(() => 0)) === 1);
    expect(await cancelReservation(db.database, due[0]?.id ?? "")).toMatchObject({ isDone: true });
    expect(await processReservations([due], db)).toEqual(["ack"]);
    expect(await countStatuses(db)).toEqual({ CANCELLED: 1, DONE: 1 });
    expect(await db.query("select user_id from point_root")).toEqual([{ user_id: "User1" }]);
  });

  test("no more than one claim while an alarm blocks it, and the rest after it (fault 15)", async () => {
    await using proxy = await startProxy(AMQP_URL);
    await using queue = await openTestQueue({ url: proxy.url, publishTimeoutMs: 300 });
    await insertDue(10);
    const blocked = publishing(queue, (contents) => {
      // RabbitMQ takes nothing any more, and says so when something is published.
      proxy.hold();
      const published = queue.publish(contents);
      proxy.inject(blockedFrame(true));
      return published;
    });
    await scan(blocked, { SCAN_BATCH: 4 });
    expect(await countStatuses(db)).toEqual({ PENDING: 6, PROCESSING: 4 });
    await expect(scan(queue, { SCAN_BATCH: 4 })).rejects.toThrow("alarm");
    expect(await countStatuses(db)).toEqual({ PENDING: 6, PROCESSING: 4 });

    await proxy.serve();
    await until("the queue is ready", () => queue.isReady());
    await scan(queue);
    expect(await countStatuses(db)).toEqual({ PROCESSING: 10 });
    expect(await queue.depth()).toBe(1);
  });
});

describe("scanAndPublish() claims nothing", () => {
  test("while RabbitMQ is away", async () => {
    await using proxy = await startProxy(AMQP_URL);
    await using queue = await openTestQueue({ url: proxy.url });
    await insertDue(3);
    await proxy.refuse();
    await expect(scan(queue)).rejects.toBeInstanceOf(QueueError);
    expect(await countStatuses(db)).toEqual({ PENDING: 3 });
  });

  test("while the queue is deep, and goes on when it is not", async () => {
    await using queue = await openTestQueue();
    await insertDue(6);
    const config = { PUBLISH_CHUNK: 2, SCAN_BATCH: 4, QUEUED_RESERVATIONS: 4 };
    await scan(queue, config);
    const { sleepMs } = await scan(queue, config);
    expect(await countStatuses(db)).toEqual({ PENDING: 2, PROCESSING: 4 });
    expect(sleepMs).toBeWithin(1, 1_000);
    await takeMessages(queue.name);
    await scan(queue, config);
    expect(await countStatuses(db)).toEqual({ PROCESSING: 6 });
  });
});

describe("scanAndPublish() says how long to sleep:", () => {
  test("not at all after a full scan", async () => {
    await using queue = await openTestQueue();
    await insertDue(3);
    expect(await scan(queue, { SCAN_BATCH: 3 })).toEqual({ sleepMs: 0 });
    expect((await scan(queue, { SCAN_BATCH: 3 })).sleepMs).toBeGreaterThan(0);
  });

  test("until the next scan_at, and at most SCAN_INTERVAL_MS", async () => {
    await using queue = await openTestQueue();
    expect(await scan(queue, { SCAN_INTERVAL_MS: 1_234 })).toMatchObject({ sleepMs: 1_234 });
    await insertReservation(db, { executeAt: new Date(Date.now() + HOUR_MS) });
    expect(await scan(queue, { SCAN_INTERVAL_MS: 1_234 })).toMatchObject({ sleepMs: 1_234 });
    const { sleepMs } = await scan(queue, { SCAN_INTERVAL_MS: 2 * HOUR_MS });
    expect(sleepMs).toBeWithin(HOUR_MS - 60_000, HOUR_MS + 2);
  });

  test("a moment if another scheduler holds what is due", async () => {
    await using queue = await openTestQueue();
    await insertDue(1);
    await db.database.transaction(async ({ select }) => {
      await select("select id from point_reservations for update");
      expect((await scan(queue)).sleepMs).toBeWithin(1, 101);
    });
    expect(await countStatuses(db)).toEqual({ PENDING: 1 });
  });
});
