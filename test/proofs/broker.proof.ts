import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { hostname } from "node:os";
import type { Channel } from "amqplib";
import { pino } from "pino";
import { openQueue } from "../../lib/queue.ts";
import { insertReservation } from "../harness/fixtures.ts";
import { uniqueName, until } from "../harness/harness.ts";
import { listenerOf } from "../harness/listener.ts";
import {
  countStatuses,
  expectAllDoneOnce,
  openPipeline,
  type Pipeline,
  requestsOf,
  reserveAll,
  untilDone,
} from "../harness/pipeline.ts";
import { type RunningService, untilLogged, untilReady } from "../harness/processes.ts";
import { openChannel } from "../harness/queue.ts";
import { rabbitmqctl } from "../harness/rabbitmqctl.ts";
import { canRestart, openRestartable } from "../harness/restartable.ts";

// What an operator of RabbitMQ does to the processes: rights, deletions, and a broker that is frozen.

setDefaultTimeout(300_000);

if (!canRestart) console.warn("NOT TESTED: rights on RabbitMQ, deletions and a frozen broker");

/** Only hints, and the times that a scheduler has seen, wake it. */
const HOUR = { SCAN_INTERVAL_MS: "3600000" };
/** Characters that a URL encodes, one by one and in UTF-8. */
const PASSWORD = "pässwörd €/@:%";
/** The longest time until something that is missing is said, in milliseconds. */
const NOTICED_MS = 5_000;
const HINTS_FAIL = "hints do not work; the next scan finds what they would announce";

interface Rights {
  configure: string;
  write: string;
  read: string;
}

/** The least rights of each process, which README names; `Q` is the queue. */
const LEAST = {
  api: { configure: "^Q\\.hints$", write: "^Q\\.hints$", read: "^$" },
  scheduler: {
    configure: "^Q(\\..*)?$",
    write: "^(Q\\.hints(\\..*)?|amq\\.default)$",
    read: "^Q(\\.hints(\\..*)?)?$",
  },
  worker: { configure: "^Q(\\.dead)?$", write: "^amq\\.default$", read: "^Q$" },
} satisfies Record<string, Rights>;

/** The least rights if the queues and the exchange were declared before, by somebody else. */
const LEAST_LATER = {
  api: { configure: "^$", write: "^Q\\.hints$", read: "^$" },
  // RabbitMQ 4 shows the number of messages only to those who may configure the queue.
  scheduler: {
    configure: "^(Q|Q\\.hints\\..*)$",
    write: "^(Q\\.hints(\\..*)?|amq\\.default)$",
    read: "^Q\\.hints(\\..*)?$",
  },
  worker: { configure: "^$", write: "^$", read: "^Q$" },
} satisfies Record<string, Rights>;

/** Makes users of RabbitMQ, with rights on the queue of a pipeline; deleted in the end. */
async function openUsers(amqpUrl: string, { queueName }: Pipeline) {
  const users: string[] = [];
  async function grant(user: string, { configure, write, read }: Rights) {
    const patterns = [configure, write, read].map((pattern) => pattern.replaceAll("Q", queueName));
    await rabbitmqctl(amqpUrl, "set_permissions", user, ...patterns);
  }
  return {
    grant,
    /** Makes a user; resolves to its name and URL. */
    async add(rights: Rights) {
      const user = uniqueName("user");
      await rabbitmqctl(amqpUrl, "add_user", user, PASSWORD);
      users.push(user);
      await grant(user, rights);
      const account = { username: user, password: encodeURIComponent(PASSWORD) };
      return { user, url: Object.assign(new URL(amqpUrl), account).href };
    },
    async [Symbol.asyncDispose]() {
      for (const user of users) await rabbitmqctl(amqpUrl, "delete_user", user);
    },
  };
}

/** Reserves for now until there are `total` reservations, and waits until all are DONE. */
async function expectGranted({ test }: Pipeline, api: RunningService, total: number) {
  const { DONE: done = 0 } = await countStatuses(test);
  await reserveAll(api.url, { requests: requestsOf(total - done, { spreadMs: 0 }) });
  await untilDone(test, { count: total });
}

/** What a process logged as a warning or worse. */
function warningsOf({ log }: RunningService) {
  return log().filter(({ level }) => level !== "info");
}

const restartable = canRestart ? await openRestartable() : undefined;
afterAll(() => restartable?.[Symbol.asyncDispose]());
const amqpUrl = restartable?.amqpUrl ?? "";

describe.skipIf(!canRestart)("rights on RabbitMQ", () => {
  test("the least rights suffice, with a password of any characters, and connections have names", async () => {
    await using pipeline = await openPipeline(restartable);
    await using users = await openUsers(amqpUrl, pipeline);
    for (const [index, rights] of [LEAST, LEAST_LATER].entries()) {
      async function start(entry: keyof typeof rights) {
        const { url } = await users.add(rights[entry]);
        return pipeline.start(entry, { ...HOUR, AMQP_URL: url });
      }
      const [scheduler, worker, api] = await Promise.all([start("scheduler"), start("worker"), start("api")]);
      const services = [scheduler, worker, api];
      await untilReady(...services);
      await untilLogged(api, "connected to RabbitMQ");
      await expectGranted(pipeline, api, 20 * (index + 1));
      const connections = await rabbitmqctl(amqpUrl, "list_connections", "client_properties");
      for (const [entry, { pid }] of Object.entries({ scheduler, worker, api })) {
        expect(connections).toContain(`"pointservice-${entry} ${hostname()} ${pid}"`);
      }
      expect(services.flatMap(warningsOf)).toEqual([]);
      for (const service of services) expect(await service.kill("SIGTERM")).toBe(0);
    }
    await expectAllDoneOnce(pipeline.test, 40);
  });

  test("a scheduler without rights for hints publishes, says so once, and hears hints once it has them (fault 48)", async () => {
    await using pipeline = await openPipeline(restartable);
    await using users = await openUsers(amqpUrl, pipeline);
    const { user, url } = await users.add(LEAST.worker);
    const scheduler = await pipeline.start("scheduler", { AMQP_URL: url });
    await untilReady(scheduler, await pipeline.start("worker"));
    await insertReservation(pipeline.test);
    await untilDone(pipeline.test, { count: 1 });
    // A few more attempts.
    await Bun.sleep(5_000);
    expect(warningsOf(scheduler)).toMatchObject([
      { msg: HINTS_FAIL, reason: expect.stringMatching(/ACCESS_REFUSED.*\.hints/) },
    ]);
    await users.grant(user, LEAST.scheduler);
    await until("it hears hints", () => untilLogged(scheduler, "hints work again"), 60_000);
    expect(warningsOf(scheduler)).toHaveLength(1);
  });
});

describe.skipIf(!canRestart)("deleted on RabbitMQ, noticed within 5 s and declared again:", () => {
  const deletions: [what: string, said: RegExp, act: (channel: Channel, name: string) => Promise<unknown>][] =
    [
      [
        "the exchange of the hints",
        /^hints do not work.*no exchange/,
        (channel, name) => channel.deleteExchange(`${name}.hints`),
      ],
      [
        "a binding",
        /^hints do not work.*(binding|no exchange)/,
        async (channel, name) => {
          await channel.deleteExchange(`${name}.hints`);
          await channel.assertExchange(`${name}.hints`, "fanout", { durable: true });
        },
      ],
      [
        "the queue of a listener",
        /^hints do not work.*was deleted/,
        async (_, name) => {
          const queues = (await rabbitmqctl(amqpUrl, "list_queues", "name")).split("\n");
          const listener = queues.find((queue) => queue.startsWith(`${name}.hints.`));
          await rabbitmqctl(amqpUrl, "delete_queue", listener ?? "");
        },
      ],
      [
        "the dead-letter queue",
        /^the dead-letter queue is missing/,
        (channel, name) => channel.deleteQueue(`${name}.dead`),
      ],
      ["the queue", /the queue \S+ is missing/, (channel, name) => channel.deleteQueue(name)],
    ];

  test.each(deletions)("%s (fault 47)", async (what, said, act) => {
    await using pipeline = await openPipeline(restartable);
    const scheduler = await pipeline.start("scheduler", HOUR);
    const [worker, api] = [await pipeline.start("worker"), await pipeline.start("api")];
    await untilReady(scheduler, worker, api);
    await untilLogged(api, "connected to RabbitMQ");
    await expectGranted(pipeline, api, 1);
    const lines = () =>
      [scheduler, worker].flatMap(({ log }) => log()).map(({ msg, reason }) => `${msg} ${reason}`);
    await using operator = await openChannel(amqpUrl);
    await act(operator.channel, pipeline.queueName);
    await until(`${what} is missed`, () => lines().some((line) => said.test(line)), NOTICED_MS);
    await until("all is there", async () => {
      const isConnected = scheduler.log().at(-1)?.level === "info" && worker.log().at(-1)?.level === "info";
      return (
        isConnected &&
        (await pipeline.countDead().then(
          () => true,
          () => false,
        ))
      );
    });
    await untilReady(scheduler, worker);
    await expectGranted(pipeline, api, 2);
  });
});

describe.skipIf(!canRestart)("a frozen RabbitMQ", () => {
  /** Does something while the broker is stopped, as SIGSTOP does. */
  async function whileFrozen(work: () => Promise<unknown>) {
    const pid = listenerOf(amqpUrl) ?? 0;
    process.kill(pid, "SIGSTOP");
    try {
      await work();
    } finally {
      process.kill(pid, "SIGCONT");
    }
  }

  test("check() says so within 2 s each time, and nothing is lost: the session goes on when it comes back", async () => {
    await using pipeline = await openPipeline(restartable);
    const events: string[] = [];
    const queue = openQueue(amqpUrl, {
      name: pipeline.queueName,
      onConnected: () => events.push("connected"),
      onDisconnected: (reason) => events.push(reason),
      onHint() {},
      logger: pino({}, { write: (line: string) => events.push(line) }),
    });
    await using _ = { [Symbol.asyncDispose]: () => queue.close() };
    const gate = Promise.withResolvers<"ack">();
    const received: string[] = [];
    queue.consume({
      prefetch: 10,
      before: async () => {},
      async handle(content) {
        received.push(content.toString());
        return gate.promise;
      },
    });
    await until("it consumes", () => events.length > 0);
    expect(await queue.publish([Buffer.from("one"), Buffer.from("two")])).toBe(2);
    await until("both are in hand", () => received.length === 2);
    await whileFrozen(async () => {
      for (const _ of [1, 2, 3]) {
        const startedAt = performance.now();
        await expect(queue.check()).rejects.toThrow("did not answer");
        expect(performance.now() - startedAt).toBeLessThan(2_200);
      }
      // Sent to a broker that does not read them.
      gate.resolve("ack");
    });
    await queue.check();
    expect(await queue.publish([Buffer.from("three")])).toBe(1);
    await until("the next one", () => received.length === 3);
    expect(received).toEqual(["one", "two", "three"]);
    await until("all are acknowledged", async () => {
      const listed = await rabbitmqctl(amqpUrl, "list_queues", "name", "messages");
      return listed.split("\n").includes(`${pipeline.queueName}\t0`);
    });
    expect(events).toEqual(["connected"]);
  });

  test("for longer than any deadline: no process ends, and all are DONE once", async () => {
    await using pipeline = await openPipeline(restartable);
    const api = await pipeline.start("api");
    const lease = { LEASE_MS: "2000" };
    const services = [api, await pipeline.start("scheduler", lease), await pipeline.start("worker", lease)];
    await untilReady(...services);
    const reserve = () => reserveAll(api.url, { requests: requestsOf(200, { spreadMs: 1_000 }) });
    await reserve();
    await whileFrozen(async () => {
      await reserve();
      await Bun.sleep(12_000);
    });
    await untilDone(pipeline.test, { count: 400, withinMs: 60_000 });
    await expectAllDoneOnce(pipeline.test, 400);
    await untilReady(...services);
  });
});
