import { expect, test } from "bun:test";
import { randomOf } from "./faults_random.ts";
import { reservationOf, until } from "./harness.ts";
import {
  countStatuses,
  expectAllDoneOnce,
  insertReservations,
  openPipeline,
  type Request,
  requestsOf,
  reserveAll,
  untilDone,
} from "./pipeline.ts";
import { canRestart, openRestartable } from "./restartable.ts";

/** Batches so small that 'in the middle' lasts. */
const SMALL = {
  SCAN_BATCH: "40",
  PUBLISH_CHUNK: "4",
  WORKER_BATCH: "8",
  WORKER_PREFETCH: "4",
  LEASE_MS: "2000",
};

test("scheduler.ts and worker.ts killed in the middle of 4,000 due reservations, three times: all DONE once", async () => {
  await using pipeline = await openPipeline();
  const count = 4_000;
  const reservations = Array.from({ length: count }, (_, index) =>
    reservationOf({ userId: `User${index % 17}` }),
  );
  await insertReservations(pipeline.test, { reservations });
  for (let kills = 1; kills <= 3; kills++) {
    const services = [await pipeline.start("scheduler", SMALL), await pipeline.start("worker", SMALL)];
    const { DONE: before = 0 } = await countStatuses(pipeline.test);
    await until(
      "some more are DONE",
      async () => ((await countStatuses(pipeline.test)).DONE ?? 0) > before + 50,
    );
    await Promise.all(services.map((service) => service.kill("SIGKILL")));
    expect((await countStatuses(pipeline.test)).DONE).toBeLessThan(count);
  }
  await pipeline.start("scheduler", SMALL);
  await pipeline.start("worker", SMALL);
  await untilDone(pipeline.test, { count, withinMs: 60_000 });
  await expectAllDoneOnce(pipeline.test, count);
}, 120_000);

if (!canRestart) {
  console.warn(
    "NOT TESTED: a restart of MySQL and RabbitMQ. Set START_SERVICES to a command that starts what does not run of the servers behind DATABASE_URL and AMQP_URL, or install mysqld or mariadbd and rabbitmq-server",
  );
}

test.skipIf(!canRestart)(
  "MySQL and RabbitMQ restarted in the middle of 1,000 reservations: no process is, and all are DONE once (fault 14)",
  async () => {
    await using servers = await openRestartable();
    await using pipeline = await openPipeline(servers);
    const api = await pipeline.start("api");
    const services = [api, await pipeline.start("scheduler", SMALL), await pipeline.start("worker", SMALL)];
    const half = 1_000 / servers.restarts.length / 2;
    let reserved = 0;
    for (const { restart } of servers.restarts) {
      await reserveAll(api.url, { requests: requestsOf(half, { spreadMs: 3_000 }) });
      reserved += half;
      await until("some of these are DONE", async () => {
        return ((await countStatuses(pipeline.test)).DONE ?? 0) > reserved - half + 20;
      });
      const { DONE = 0 } = await countStatuses(pipeline.test);
      expect(DONE).toBeLessThan(reserved);
      const during = reserveAll(api.url, { requests: requestsOf(half, { spreadMs: 3_000 }) });
      await Promise.all([restart(), during]);
      reserved += half;
    }
    expect(reserved).toBe(1_000);
    await untilDone(pipeline.test, { count: 1_000, withinMs: 90_000 });
    await expectAllDoneOnce(pipeline.test, 1_000);
    for (const service of services) {
      await until("ready", async () => (await fetch(`${service.url}/ready`)).status === 200);
      expect(service.log().map(({ msg }) => msg)).not.toContain("stopping");
    }
    const told = services.flatMap((service) => service.log().map(({ msg }) => msg));
    expect(told).toContain("waiting for RabbitMQ");
    expect(told).toContain("not consuming");
  },
  300_000,
);

const seed = Number(Bun.env.FAULTS_SEED ?? 20_290_222);

test(`messages purged, duplicated, reordered and forged at random (FAULTS_SEED=${seed}): 500 reservations are DONE once`, async () => {
  await using pipeline = await openPipeline();
  const random = randomOf(seed);
  const { below } = random;
  // So slow that messages wait in the queue, where they can be tampered with.
  const env = {
    ...{ PUBLISH_CHUNK: "1", SCAN_BATCH: "50", QUEUED_RESERVATIONS: "50", LEASE_MS: "1000" },
    ...{ WORKER_BATCH: "1", WORKER_PREFETCH: "1" },
  };
  const [api] = [
    await pipeline.start("api"),
    await pipeline.start("scheduler", env),
    await pipeline.start("worker", env),
  ];
  await using operator = await pipeline.openChannel();
  const { channel } = operator;
  const requests = requestsOf(500, { spreadMs: 3_000 });
  const ids = await reserveAll(api.url, { requests });
  const later = reservationOf({ executeAt: new Date(Date.now() + 3_600_000) });
  await insertReservations(pipeline.test, { reservations: [later] });
  const known = requests.map((request, index) => messageOf(ids[index] ?? "", request));
  const pick = () => known[below(known.length)] ?? known[0];

  const did = { purged: 0, duplicated: 0, reordered: 0, forged: 0, unreadable: 0 };
  const deeds = [
    async () => {
      did.purged += (await channel.purgeQueue(pipeline.queueName)).messageCount;
    },
    async () => {
      const messages = Array.from({ length: 1 + below(5) }, pick);
      did.duplicated += messages.length;
      send(messages);
    },
    async () => {
      const taken = [];
      for (let wanted = 2 + below(10); taken.length < wanted; ) {
        const message = await channel.get(pipeline.queueName);
        if (!message) break;
        taken.push(message);
      }
      for (const message of taken.toReversed()) {
        channel.sendToQueue(pipeline.queueName, message.content, { persistent: true });
        channel.ack(message);
      }
      if (taken.length > 1) did.reordered += taken.length;
    },
    async () => {
      did.forged++;
      send({ ...pick(), user_id: "Thief", point_amount: 1_000_000, idempotency_key: "forged" });
      send([pick(), messageOf(later.id, { user_id: "Thief", point_amount: 5, idempotency_key: "early" })]);
      send(messageOf(crypto.randomUUID(), { user_id: "Thief", point_amount: 5, idempotency_key: "unknown" }));
    },
    async () => {
      did.unreadable++;
      channel.sendToQueue(pipeline.queueName, Buffer.from(`{"reservation_id":${below(1_000)}`));
    },
  ];
  function send(content: unknown) {
    channel.sendToQueue(pipeline.queueName, Buffer.from(JSON.stringify(content)), { persistent: true });
  }
  function messageOf(id: string, { user_id, point_amount, idempotency_key }: Omit<Request, "execute_at">) {
    return { reservation_id: id, user_id, point_amount, idempotency_key };
  }
  for (let done = 0; done < 500; done = (await countStatuses(pipeline.test)).DONE ?? 0) {
    // Most deeds only disturb; a purge that comes all the time would be an outage.
    await deeds[random() < 0.1 ? 0 : 1 + below(deeds.length - 1)]?.();
  }
  expect(Math.min(...Object.values(did))).toBeGreaterThan(0);
  await until(
    "the queue is empty",
    async () => (await channel.checkQueue(pipeline.queueName)).messageCount === 0,
  );
  // Some of them were purged before a worker had them.
  await until("dead letters", async () => (await pipeline.countDead()) > 0);
  expect(await pipeline.countDead()).toBeLessThanOrEqual(did.forged + did.unreadable);
  await pipeline.test.query("delete from point_reservations where id = ? and status = 'PENDING'", [later.id]);
  const sums = await expectAllDoneOnce(pipeline.test, 500);
  const promised = requests.reduce((sum, { point_amount }) => sum + point_amount, 0);
  expect(sums.balances).toBe(BigInt(promised));
  const [thief] = await pipeline.test.query("select user_id from point_root where user_id = 'Thief'");
  expect(thief).toBeUndefined();
}, 120_000);
