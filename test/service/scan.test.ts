import { beforeEach, describe, expect, test } from "bun:test";
import { openDatabaseClock } from "../../lib/database_clock.ts";
import { type Queue, QueueError } from "../../lib/queue.ts";
import { decodeMessage } from "../../lib/reservations/message.ts";
import type { Reservation } from "../../lib/reservations/reservation.ts";
import { cancelReservation } from "../../lib/reservations/reservation_repository.ts";
import { BEGINNING, claimDue, isBefore, type ScanPosition } from "../../lib/reservations/scan_repository.ts";
import { openSweeper, type ScanPositions } from "../../lib/reservations/sweep.ts";
import { type ScanOptions, scanAndPublish } from "../../scheduler.ts";
import { openTestDatabase } from "../harness/database.ts";
import { command } from "../harness/fault_points.ts";
import { insertReservation, insertReservations, reservationOf } from "../harness/fixtures.ts";
import { AMQP_URL, silent, until } from "../harness/harness.ts";
import { countStatuses, processReservations } from "../harness/pipeline.ts";
import { blockedFrame, startProxy } from "../harness/proxy.ts";
import { deleteQueue, openTestQueue, takeMessages } from "../harness/queue.ts";
import { countPages, leaveEntries, openSnapshot } from "../harness/snapshot.ts";

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

function scan(
  queue: ScanOptions["queue"],
  { from, ...config }: Partial<ScanOptions["config"]> & { from?: ScanPosition } = {},
) {
  const { database } = db;
  return scanAndPublish({ database, queue, logger: silent, config: { ...CONFIG, ...config }, from });
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
    expect((await scan(queue, { SCAN_BATCH: 3 })).sleepMs).toBe(0);
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

/** A queue that takes everything, with what it has taken. */
function openTakingQueue() {
  const taken: string[] = [];
  const queue: ScanOptions["queue"] = {
    depth: async () => 0,
    async publish(contents) {
      for (const content of contents)
        for (const one of decodeMessage(content)) taken.push(one.reservation_id);
      return contents.length;
    },
  };
  return { queue, taken };
}

describe("scanAndPublish() says where the next scan starts:", () => {
  const at = (ms: number): ScanPosition => ({ scanAt: new Date(Date.now() + ms), id: "" });

  test("after a full scan at its last reservation", async () => {
    const { queue } = openTakingQueue();
    const [, last] = (await insertDue(3)) as [Reservation, Reservation];
    expect((await scan(queue, { SCAN_BATCH: 2 })).from).toEqual({ scanAt: last.executeAt, id: last.id });
  });

  test("the same if it has claimed as many as were due: others may have been committed since", async () => {
    const { queue } = openTakingQueue();
    const [, , last] = (await insertDue(3)) as [Reservation, Reservation, Reservation];
    const { from } = await scan(queue);
    expect(from).toEqual({ scanAt: last.executeAt, id: last.id });
    expect(isBefore(at(-30_000), (await scan(queue, { from })).from)).toBe(true);
  });

  test("else a moment ago, also if another scheduler holds what is due", async () => {
    const { queue } = openTakingQueue();
    await insertDue(2);
    await db.database.transaction(async ({ select }) => {
      await select("select id from point_reservations limit 1 for update");
      const { from } = await scan(queue);
      expect(isBefore(at(-60_000), from) && isBefore(from, at(0))).toBe(true);
      // What commits a little late is still found.
      expect(isBefore(from, at(-500))).toBe(true);
    });
  });

  test("as before while the queue is deep", async () => {
    const { queue } = openTakingQueue();
    const from = at(-5_000);
    expect((await scan({ ...queue, depth: async () => 1e9 }, { from })).from).toBe(from);
  });
});

test("scans and sweeps of several schedulers publish all that is due, once, whatever is held, late or rolled back", async () => {
  const { queue, taken } = openTakingQueue();
  const done = new AbortController();
  async function runScheduler() {
    const positions: ScanPositions = { from: BEGINNING, openFrom: BEGINNING };
    const scanFrom = (from: ScanPosition) => scan(queue, { from, SCAN_BATCH: 40 });
    const { sweep } = openSweeper({
      database: db.database,
      logger: silent,
      leaseMs: CONFIG.LEASE_MS,
      clock: openDatabaseClock(() => {}),
      positions,
      claimFrom: async (from) => (await scanFrom(from)).sleepMs === 0,
      wakeScan: () => {},
    });
    async function loop(step: () => Promise<unknown>) {
      while (!done.signal.aborted) await step();
    }
    await Promise.all([
      loop(async () => {
        positions.from = (await scanFrom(positions.from)).from;
      }),
      loop(sweep),
    ]);
  }
  const inserted: string[] = [];
  async function insertMore(ms: number) {
    const executeAt = new Date(Date.now() + ms);
    const reservations = Array.from({ length: 60 }, () => reservationOf({ executeAt }));
    await insertReservations(db, { reservations });
    inserted.push(...reservations.map(({ id }) => id));
  }
  await insertMore(-90_000);
  const schedulers = [runScheduler(), runScheduler(), runScheduler()];
  for (let round = 0; round < 5; round++) {
    await insertMore(-2_000 * round);
    await db.database.transaction(async ({ select }) => {
      await select("select id from point_reservations where crc32(id) % 3 = 0 order by id for update");
      await insertMore(300);
    });
    // A claim that is rolled back.
    const died = db.database.transaction(async ({ execute, select }) => {
      const sql = `select id from point_reservations force index (point_reservations_scan_at)
        where scan_at <= now(3) order by scan_at, id limit 50 for update skip locked`;
      const claimed = await select<{ id: string }>(sql);
      const ids = [...claimed.map(({ id }) => id), ""];
      await execute("update point_reservations set scan_at = scan_at + interval 1 hour where id in (?)", [
        ids,
      ]);
      throw new Error("died");
    });
    await expect(died).rejects.toThrow("died");
  }
  try {
    await until("all are published", () => taken.length >= inserted.length);
  } finally {
    done.abort();
    await Promise.all(schedulers);
  }
  expect(taken.toSorted()).toEqual(inserted.toSorted());
});

test("scanAndPublish() does not look at what is long over, though a snapshot keeps it in the index (fault 42)", async () => {
  await using _ = await openSnapshot(db);
  const { queue, taken } = openTakingQueue();
  await leaveEntries(db, new Date(Date.now() - 30_000));
  const fromBeginning = await countPages(db, () => scan(queue));
  expect(fromBeginning).toBeGreaterThan(80);
  const { from } = await scan(queue);
  for (const isDue of [false, true]) {
    await until("it looks at few pages", async () => {
      const due = isDue ? [await insertReservation(db, { executeAt: new Date() })] : [];
      taken.length = 0;
      // Other work on the server counts as well, so some try must show few.
      const pages = await countPages(db, () => scan(queue, { from }));
      expect(taken).toEqual(due.map(({ id }) => id));
      return pages < 80;
    });
  }
});
