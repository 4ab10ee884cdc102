import { afterEach, expect, test } from "bun:test";
import { type Channel, connect } from "amqplib";
import { type Outcome, openQueue, type Queue, QueueError, type QueueOptions } from "../lib/queue.ts";
import { AMQP_URL, deleteQueue, uniqueName, until } from "./harness.ts";
import { blockedFrame, startProxy, type TcpProxy } from "./proxy.ts";

const cleanups: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

interface Opened {
  queue: Queue;
  name: string;
  /** How often it connected, and why it was disconnected each time. */
  events: { connected: number; reasons: string[] };
}

/** An open queue of its own name, closed and deleted when the test ends. */
function open({ url = AMQP_URL, ...options }: Partial<QueueOptions> & { url?: string } = {}): Opened {
  const name = options.name ?? uniqueName("queue_test");
  const events: Opened["events"] = { connected: 0, reasons: [] };
  const queue = openQueue(url, {
    ...options,
    name,
    onConnected: () => events.connected++,
    onDisconnected: (reason) => events.reasons.push(reason),
  });
  cleanups.push(async () => {
    await queue.close();
    await deleteQueue(name);
  });
  return { queue, name, events };
}

async function openReady(options: Parameters<typeof open>[0] = {}): Promise<Opened> {
  const opened = open(options);
  await until("the queue is ready", () => opened.queue.isReady());
  return opened;
}

async function openProxy(options?: { serving: boolean }): Promise<TcpProxy> {
  const proxy = await startProxy(AMQP_URL, options);
  cleanups.push(() => proxy.close());
  return proxy;
}

/** Does something past our own code, on a connection of its own. */
async function asOperator<T>(work: (channel: Channel) => Promise<T>): Promise<T> {
  const connection = await connect(AMQP_URL);
  connection.on("error", () => {});
  const channel = await connection.createChannel();
  channel.on("error", () => {});
  try {
    return await work(channel);
  } finally {
    await connection.close();
  }
}

function messages(...texts: string[]): Buffer[] {
  return texts.map((text) => Buffer.from(text));
}

/** A handler that notes what comes, and answers what it is told. */
function recorder(outcome: (text: string) => Outcome | Promise<Outcome> = () => "ack") {
  const received: string[] = [];
  return {
    received,
    async handle(content: Buffer) {
      received.push(content.toString());
      return outcome(content.toString());
    },
  };
}
const before = async () => {};

test("publish() confirms what is persistent, routed and labelled (fault 14)", async () => {
  const { queue, name } = await openReady();
  expect(await queue.publish(messages("one", "two", "three"))).toBe(3);
  expect(await queue.depth()).toBe(3);
  await asOperator(async (channel) => {
    for (const text of ["one", "two", "three"]) {
      const message = await channel.get(name, { noAck: true });
      if (!message) throw new Error(`${text} is not in the queue`);
      expect(message.content.toString()).toBe(text);
      expect(message.properties.deliveryMode).toBe(2);
      expect(message.properties.contentType).toBe("application/json");
      expect(message.properties.messageId).toMatch(/^[0-9a-f-]{36}$/);
    }
  });
}, 20_000);

test("openQueue() makes durable quorum queues whose dead letters cannot get lost", async () => {
  const { name } = await openReady();
  // A queue with other arguments would be refused here.
  await asOperator(async (channel) => {
    await channel.assertQueue(name, {
      durable: true,
      arguments: {
        "x-queue-type": "quorum",
        "x-max-length": 1_000_000,
        "x-delivery-limit": 20,
        "x-overflow": "reject-publish",
        "x-dead-letter-strategy": "at-least-once",
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": `${name}.dead`,
      },
    });
  });
}, 20_000);

test("consume() acknowledges what was handled and moves what is dead to the dead-letter queue", async () => {
  const { queue, name } = await openReady();
  const { received, handle } = recorder((text) => (text === "bad" ? "dead" : "ack"));
  await queue.publish(messages("good", "bad", "fine"));
  queue.consume({ prefetch: 10, before, handle });
  await until("all came", () => received.length === 3);
  expect(received).toEqual(["good", "bad", "fine"]);
  const dead = await until("the dead letter", () =>
    asOperator((channel) => channel.get(`${name}.dead`, { noAck: true })),
  );
  expect(dead.content.toString()).toBe("bad");
  await queue.close();
  await asOperator(async (channel) => {
    expect((await channel.checkQueue(name)).messageCount).toBe(0);
    expect((await channel.checkQueue(`${name}.dead`)).messageCount).toBe(0);
  });
}, 20_000);

test("consume() hands over no more than prefetch at once", async () => {
  const { queue } = await openReady();
  const gate = Promise.withResolvers<Outcome>();
  const { received, handle } = recorder(() => gate.promise);
  queue.consume({ prefetch: 3, before, handle });
  await until("consuming", () => queue.isReady());
  await queue.publish(messages("1", "2", "3", "4", "5"));
  await until("two wait", async () => received.length === 3 && (await queue.depth()) === 2);
  gate.resolve("ack");
  await until("the rest", () => received.length === 5);
}, 20_000);

test("a handler that throws gives all open messages back, and consumption resumes after `before` (fault 34)", async () => {
  const { queue, events } = await openReady();
  const gate = Promise.withResolvers<Outcome>();
  let failing = true;
  let befores = 0;
  const { received, handle } = recorder(async (text) => {
    if (!failing) return "ack";
    if (text !== "5") return gate.promise;
    throw new Error("MySQL is away");
  });
  queue.consume({
    prefetch: 10,
    async before() {
      befores++;
      if (befores > 1) failing = false;
    },
    handle,
  });
  await until("consuming", () => queue.isReady());
  await queue.publish(messages("1", "2", "3", "4", "5"));
  await until("all came again", () => received.length === 10);
  expect(received.slice(0, 5)).toEqual(["1", "2", "3", "4", "5"]);
  expect(received.slice(5).sort()).toEqual(["1", "2", "3", "4", "5"]);
  expect(befores).toBe(2);
  expect(events.reasons).toContain("MySQL is away");
  // The handlers of the lost subscription end late: their acknowledgements are dropped, not sent on the new channel.
  const { connected } = events;
  gate.resolve("ack");
  expect(await queue.publish(messages("6"))).toBe(1);
  await until("the next one", () => received.includes("6"));
  expect(await queue.depth()).toBe(0);
  // RabbitMQ would have closed a channel that acknowledges what it was not given.
  expect(events.connected).toBe(connected);
  expect(queue.isReady()).toBe(true);
}, 20_000);

test("publish() does not count what no queue took, and the queue is made again (fault 13)", async () => {
  const { queue, name, events } = await openReady();
  await deleteQueue(name);
  expect(await queue.publish(messages("lost", "lost too"))).toBe(0);
  await until("connected again", () => events.connected === 2);
  expect(await queue.publish(messages("kept"))).toBe(1);
  expect(await queue.depth()).toBe(1);
}, 20_000);

test("depth() rejects where the queue is missing, and the queue is made again", async () => {
  const { queue, name } = await openReady();
  await deleteQueue(name);
  expect(queue.depth()).rejects.toBeInstanceOf(QueueError);
  await until("the queue is there", () => queue.depth().catch(() => undefined));
}, 20_000);

test("a connection that is cut is not ready, and comes back by itself", async () => {
  const proxy = await openProxy();
  const { queue, events } = await openReady({ url: proxy.url });
  const { received, handle } = recorder();
  queue.consume({ prefetch: 10, before, handle });
  await until("consuming", () => events.connected === 2 && queue.isReady());
  await proxy.refuse();
  await until("not ready", () => !queue.isReady());
  expect(await queue.publish(messages("never"))).toBe(0);
  await expect(queue.depth()).rejects.toBeInstanceOf(QueueError);
  await until("several tries", () => events.reasons.length >= 3);
  await proxy.serve();
  await until("ready again", () => queue.isReady());
  expect(await queue.publish(messages("after"))).toBe(1);
  await until("it comes", () => received.length === 1);
  expect(received).toEqual(["after"]);
}, 30_000);

test("openQueue() waits for a broker that is not there at the start", async () => {
  const proxy = await openProxy({ serving: false });
  const { queue, events } = open({ url: proxy.url });
  await until("a try has failed", () => events.reasons.length > 0);
  expect(queue.isReady()).toBe(false);
  expect(events.connected).toBe(0);
  await proxy.serve();
  await until("ready", () => queue.isReady());
  expect(await queue.publish(messages("first"))).toBe(1);
}, 30_000);

test("a consumer that the broker cancels subscribes again (fault 35)", async () => {
  const { queue, name, events } = open();
  const { received, handle } = recorder();
  const gate = Promise.withResolvers<void>();
  let befores = 0;
  queue.consume({ prefetch: 10, before: async () => (++befores > 1 ? gate.promise : undefined), handle });
  await until("consuming", () => queue.isReady());
  await deleteQueue(name);
  await until("it would subscribe again", () => befores === 2);
  expect(events.reasons).toContain("RabbitMQ cancelled the consumer");
  expect(queue.isReady()).toBe(false);
  gate.resolve();
  await until("consuming again", () => queue.isReady());
  expect(await queue.publish(messages("after"))).toBe(1);
  await until("it comes", () => received.length === 1);
}, 20_000);

test("publish() resolves within its deadline where no confirm comes (fault 11)", async () => {
  const proxy = await openProxy();
  const { queue, events } = await openReady({ url: proxy.url, publishTimeoutMs: 300 });
  proxy.hold();
  const startedAt = performance.now();
  expect(await queue.publish(messages("one", "two"))).toBe(0);
  const tookMs = performance.now() - startedAt;
  expect(tookMs).toBeGreaterThanOrEqual(290);
  expect(tookMs).toBeLessThan(2_000);
  await until("the session ends", () => !queue.isReady());
  await proxy.serve();
  await until("connected again", () => events.connected === 2);
  expect(await queue.publish(messages("three"))).toBe(1);
}, 30_000);

test("an alarm of the broker refuses publishing at once, until it is over (fault 15)", async () => {
  const proxy = await openProxy();
  const { queue } = await openReady({ url: proxy.url });
  proxy.inject(blockedFrame(true));
  await until("not ready", () => !queue.isReady());
  expect(await queue.publish(messages("never"))).toBe(0);
  await expect(queue.depth()).rejects.toThrow("alarm");
  expect(queue.depth()).rejects.toBeInstanceOf(QueueError);
  proxy.inject(blockedFrame(false));
  await until("ready", () => queue.isReady());
  expect(await queue.publish(messages("after"))).toBe(1);
  expect(await queue.depth()).toBe(1);
}, 20_000);

test("a queue of that name with other properties is reported, not a crash", async () => {
  const name = uniqueName("queue_test");
  await asOperator((channel) => channel.assertQueue(name, { durable: true }));
  const { queue, events } = open({ name });
  const [reason] = await until("the report", () => events.reasons.length > 0 && events.reasons);
  expect(reason).toContain("PRECONDITION");
  expect(reason).toContain(name);
  expect(queue.isReady()).toBe(false);
  expect(events.connected).toBe(0);
  await asOperator((channel) => channel.deleteQueue(name));
  await until("ready", () => queue.isReady());
}, 20_000);

test("stop() takes no more messages and waits for what is in hand", async () => {
  const { queue, name } = open();
  const gate = Promise.withResolvers<Outcome>();
  const { received, handle } = recorder(() => gate.promise);
  queue.consume({ prefetch: 10, before, handle });
  await until("consuming", () => queue.isReady());
  await queue.publish(messages("1", "2"));
  await until("two are in hand", () => received.length === 2);
  let stopped = false;
  const stopping = queue.stop(10_000).then(() => {
    stopped = true;
  });
  // On the same channel, hence after the cancellation: nobody is there to take it.
  expect(await queue.publish(messages("3"))).toBe(1);
  expect(await queue.depth()).toBe(1);
  expect(stopped).toBe(false);
  gate.resolve("ack");
  await stopping;
  await queue.close();
  expect(received).toEqual(["1", "2"]);
  await asOperator(async (channel) => {
    const left = await channel.get(name, { noAck: true });
    expect(left ? left.content.toString() : "nothing").toBe("3");
    expect((await channel.checkQueue(name)).messageCount).toBe(0);
  });
}, 20_000);

test("stop() gives up in time, and what was in hand goes back to the queue", async () => {
  const { queue, name } = open();
  const { received, handle } = recorder(() => new Promise(() => {}));
  queue.consume({ prefetch: 2, before, handle });
  await until("consuming", () => queue.isReady());
  await queue.publish(messages("stuck"));
  await until("in hand", () => received.length === 1);
  const startedAt = performance.now();
  await queue.stop(300);
  expect(performance.now() - startedAt).toBeGreaterThanOrEqual(290);
  expect(performance.now() - startedAt).toBeLessThan(2_000);
  await queue.close();
  await until("it is back", () =>
    asOperator(async (channel) => (await channel.checkQueue(name)).messageCount === 1),
  );
}, 20_000);

test("close() settles on a connection that is dead, and nothing connects afterwards", async () => {
  const proxy = await openProxy();
  const { queue, events } = await openReady({ url: proxy.url });
  proxy.hold();
  const startedAt = performance.now();
  await queue.close();
  expect(performance.now() - startedAt).toBeLessThan(4_000);
  expect(queue.isReady()).toBe(false);
  expect(await queue.publish(messages("never"))).toBe(0);
  await expect(queue.depth()).rejects.toBeInstanceOf(QueueError);
  await proxy.serve();
  expect(events.connected).toBe(1);
  expect(proxy.connections()).toBe(0);
}, 20_000);

test("hint() reaches every listener of the queue's name, and is no message of the queue", async () => {
  const received: string[][] = [[], []];
  const [first, second] = received.map((texts) => (content: Buffer) => texts.push(content.toString()));
  const { queue, name } = await openReady({ onHint: first as never });
  const others = [await openReady({ name, onHint: second as never }), await openReady()];
  queue.hint(Buffer.from("one"));
  others[0]?.queue.hint(Buffer.from("two"));
  others[1]?.queue.hint(Buffer.from("of another queue"));
  await until("all hints are there", () => received.every((texts) => texts.length === 2));
  expect(received.map((texts) => texts.toSorted())).toEqual([
    ["one", "two"],
    ["one", "two"],
  ]);
  expect(await queue.depth()).toBe(0);
}, 20_000);

test("hint() is lost without a word where RabbitMQ is away, and heard again when it is back", async () => {
  const proxy = await openProxy();
  const received: string[] = [];
  const { queue } = await openReady({
    url: proxy.url,
    onHint: (content) => received.push(content.toString()),
  });
  await proxy.refuse();
  await until("it is gone", () => !queue.isReady());
  queue.hint(Buffer.from("lost"));
  await proxy.serve();
  await until("it is back", () => queue.isReady());
  await until("a hint arrives", () => {
    queue.hint(Buffer.from("heard"));
    return received.length > 0;
  });
  expect(received).not.toContain("lost");
}, 30_000);
