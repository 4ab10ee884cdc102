import { describe, expect, test } from "bun:test";
import { withDeadline } from "../lib/loop.ts";
import { AMQP_URL, type RunningService, reservationOf, until } from "./harness.ts";
import {
  countStatuses,
  expectAllDoneOnce,
  insertReservations,
  openPipeline,
  publishReservations,
  type Request,
  requestsOf,
  reserveAll,
  untilDone,
} from "./pipeline.ts";
import { type Moment, startProxy, type TcpProxy } from "./proxy.ts";
import { canRestart, openRestartable } from "./restartable.ts";

const SELECT = /^select [\s\S]* for update/;
const INSERT_LEDGER = /^insert into point_transactions/;
const INSERT_BALANCE = /^insert into point_root/;
const INSERT_RESERVATION = /^insert into point_reservations/;
const UPDATE = /^update `?point_reservations`?/;

/** A proxy to the server that a trap is for, and the setting that leads a process through it. */
async function proxyFor(command: RegExp, databaseUrl: string) {
  const isAmqp = command.source.startsWith("^basic");
  const proxy = await startProxy(isAmqp ? AMQP_URL : databaseUrl);
  const env: Record<string, string> = isAmqp ? { AMQP_URL: proxy.url } : { DATABASE_URL: proxy.url };
  return { proxy, env, [Symbol.asyncDispose]: () => proxy.close() };
}

/** Kills a process, as kill -9 does, when its command is at that moment; `struck` resolves when it is dead. */
function killAt(proxy: TcpProxy, trap: { command: RegExp; moment: Moment; service: RunningService }) {
  const { command, moment, service } = trap;
  const { promise, resolve } = Promise.withResolvers<void>();
  const spring = () => {
    process.kill(service.pid, "SIGKILL");
    resolve();
  };
  proxy.trap({ command, moment, spring });
  return async function struck() {
    await withDeadline(promise, 20_000, () => new Error(`${command} did not come to be ${moment}`));
    // No exit code: the signal ended it, not an error of its own.
    expect(await service.exited).toBeNull();
  };
}

function threeReservations() {
  return ["One", "Two", "One"].map((userId) => reservationOf({ userId }));
}

describe("worker.ts killed in the middle of a grant", () => {
  test.each<[string, RegExp, Moment, "nothing" | "all"]>([
    ["before BEGIN", /^begin/, "unsent", "nothing"],
    ["BEGIN │ lock rows", /^begin/, "answered", "nothing"],
    ["before rows are locked", SELECT, "unsent", "nothing"],
    ["lock rows │ ledger", SELECT, "answered", "nothing"],
    ["before the ledger has its entries", INSERT_LEDGER, "unsent", "nothing"],
    ["ledger │ balance", INSERT_LEDGER, "answered", "nothing"],
    ["before the balances are raised", INSERT_BALANCE, "unsent", "nothing"],
    ["balance │ DONE", INSERT_BALANCE, "answered", "nothing"],
    ["before rows are DONE", UPDATE, "unsent", "nothing"],
    ["DONE │ COMMIT", UPDATE, "answered", "nothing"],
    ["before COMMIT", /^commit/, "unsent", "nothing"],
    ["COMMIT │ ack", /^commit/, "answered", "all"],
    ["before the ack is sent", /^basic.ack/, "unsent", "all"],
    ["after the ack", /^basic.ack/, "sent", "all"],
  ])(
    "%s: the next worker grants once",
    async (_, command, moment, committed) => {
      await using pipeline = await openPipeline();
      await using through = await proxyFor(command, pipeline.test.url);
      const service = await pipeline.start("worker", through.env);
      const queue = await pipeline.openQueue();
      const reservations = threeReservations();
      await insertReservations(pipeline.test, { reservations, status: "PROCESSING" });
      const struck = killAt(through.proxy, { command, moment, service });
      await publishReservations(queue, { reservations, chunk: 3 });
      await struck();
      expect(await countStatuses(pipeline.test)).toEqual(
        committed === "all" ? { DONE: 3 } : { PROCESSING: 3 },
      );

      const next = await pipeline.start("worker");
      const outcome = committed === "all" ? { over: 3 } : { granted: 3 };
      if (moment !== "sent") {
        const processed = await until("the message comes again", () =>
          next.log().find(({ msg }) => msg === "processed"),
        );
        expect(processed).toMatchObject({ messages: 1, ...outcome });
      }
      await untilDone(pipeline.test, { count: 3 });
      expect(await next.kill("SIGTERM")).toBe(0);
      expect(await queue.depth()).toBe(0);
      await expectAllDoneOnce(pipeline.test, 3);
    },
    60_000,
  );
});

describe("scheduler.ts killed in the middle of a scan", () => {
  test.each<[string, RegExp, Moment, "PENDING" | "PROCESSING"]>([
    ["select │ claim", SELECT, "answered", "PENDING"],
    ["before the claim", UPDATE, "unsent", "PENDING"],
    ["claim │ COMMIT", UPDATE, "answered", "PENDING"],
    ["before COMMIT", /^commit/, "unsent", "PENDING"],
    ["COMMIT │ publish", /^commit/, "answered", "PROCESSING"],
    ["before the publish is sent", /^basic.publish/, "unsent", "PROCESSING"],
    ["publish │ confirm", /^basic.publish/, "answered", "PROCESSING"],
  ])(
    "%s: another scheduler brings all that is due",
    async (_, command, moment, status) => {
      await using pipeline = await openPipeline();
      const { test } = pipeline;
      await using through = await proxyFor(command, test.url);
      // Nothing is claimed until the broker is there: the trap is set before the first claim.
      await using gate = await proxyFor(/^basic/, test.url);
      await gate.proxy.refuse();
      const env = { AMQP_URL: gate.proxy.url, ...through.env, LEASE_MS: "1000" };
      await insertReservations(test, { reservations: threeReservations() });
      if (through.env.AMQP_URL) await through.proxy.refuse();
      const service = await pipeline.start("scheduler", env);
      const struck = killAt(through.proxy, { command, moment, service });
      await (through.env.AMQP_URL ? through.proxy : gate.proxy).serve();
      await struck();
      expect(await countStatuses(test)).toEqual({ [status]: 3 });
      const [lease] = await test.query<{ ends: Date }>("select max(scan_at) ends from point_reservations");

      await pipeline.start("scheduler", { LEASE_MS: "1000" });
      await pipeline.start("worker");
      await untilDone(test, { count: 3 });
      await expectAllDoneOnce(test, 3);
      const [first] = await test.query<{ at: Date }>("select min(created_at) at from point_transactions");
      const wasPublished = moment === "answered" && command.source === "^basic.publish";
      if (status === "PROCESSING" && !wasPublished) {
        // Only the end of the lease, no clean-up of anybody's, brought them again.
        expect(first?.at.getTime()).toBeGreaterThanOrEqual(lease?.ends.getTime() ?? Number.NaN);
      }
    },
    60_000,
  );
});

describe("api.ts killed in the middle of a request", () => {
  test.each<[string, Moment, number]>([
    ["before INSERT", "unsent", 0],
    ["INSERT │ 201", "answered", 1],
  ])(
    "%s: the same idempotency key reserves once",
    async (_, moment, inserted) => {
      await using pipeline = await openPipeline();
      await using through = await proxyFor(INSERT_RESERVATION, pipeline.test.url);
      const service = await pipeline.start("api", through.env);
      const struck = killAt(through.proxy, { command: INSERT_RESERVATION, moment, service });
      const [request] = requestsOf(1, { spreadMs: 0 });
      const send = ({ url }: RunningService) =>
        fetch(`${url}/point/reserve`, {
          method: "POST",
          headers: { "content-type": "application/json" },
          body: JSON.stringify(request),
        });
      const answered = send(service).then(
        () => true,
        () => false,
      );
      await struck();
      expect(await answered).toBe(false);
      const rows = await pipeline.test.query<{ id: string }>("select id from point_reservations");
      expect(rows).toHaveLength(inserted);
      const response = await send(await pipeline.start("api"));
      expect(response.status).toBe(201);
      expect(response.headers.get("idempotent-replayed")).toBe(inserted === 1 ? "true" : null);
      const after = await pipeline.test.query<{ id: string }>("select id from point_reservations");
      expect(after).toMatchObject([{ id: rows[0]?.id ?? after[0]?.id }]);
    },
    60_000,
  );
});

/** Batches so small that 'in the middle' lasts. */
const SMALL = {
  SCAN_BATCH: "40",
  PUBLISH_CHUNK: "4",
  WORKER_BATCH: "8",
  WORKER_PREFETCH: "4",
  LEASE_MS: "2000",
};

test("scheduler.ts and worker.ts killed in the middle of 1,000 due reservations, three times: all DONE once", async () => {
  await using pipeline = await openPipeline();
  const reservations = Array.from({ length: 1_000 }, (_, index) =>
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
    expect((await countStatuses(pipeline.test)).DONE).toBeLessThan(1_000);
  }
  await pipeline.start("scheduler", SMALL);
  await pipeline.start("worker", SMALL);
  await untilDone(pipeline.test, { count: 1_000 });
  await expectAllDoneOnce(pipeline.test, 1_000);
}, 90_000);

if (!canRestart) {
  console.warn(
    "NOT TESTED: a restart of MySQL and RabbitMQ. Set RESTART_SERVICES to a command that restarts the servers behind DATABASE_URL and AMQP_URL, or install mysqld or mariadbd and rabbitmq-server",
  );
}

test.skipIf(!canRestart)(
  "MySQL and RabbitMQ restarted in the middle of 1,000 reservations: no process is, and all are DONE once",
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

/** The same numbers for the same seed, from 0 up to 1 (mulberry32). */
function randomOf(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

const seed = Number(Bun.env.FAULTS_SEED ?? 20_290_222);

test(`messages purged, duplicated, reordered and forged at random (FAULTS_SEED=${seed}): 500 reservations are DONE once`, async () => {
  await using pipeline = await openPipeline();
  const random = randomOf(seed);
  const below = (limit: number) => Math.floor(random() * limit);
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
