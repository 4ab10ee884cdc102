import { afterAll, expect, setDefaultTimeout, test } from "bun:test";
import type { Channel } from "amqplib";
import { pino } from "pino";
import {
  type ConsumeOptions,
  type Outcome,
  openQueue,
  QueueError,
  type QueueOptions,
} from "../../lib/queue.ts";
import { AMQP_URL, uniqueName, until } from "../harness/harness.ts";
import { blockedFrame, startProxy, type TcpProxy } from "../harness/proxy.ts";
import { deleteQueue, openChannel } from "../harness/queue.ts";

setDefaultTimeout(30_000);

const cleanups: (() => Promise<unknown>)[] = [];
afterAll(() => Promise.all(cleanups.map((cleanup) => cleanup())));

/**
 * An open queue of its own name, closed and deleted in the end; how often it connected, why it was disconnected each time, and
 * what it logged.
 */
function open({ url = AMQP_URL, ...options }: Partial<QueueOptions> & { url?: string } = {}) {
  const name = options.name ?? uniqueName("queue_test");
  const events = { connected: 0, reasons: [] as string[] };
  const log: Record<string, unknown>[] = [];
  const logger = pino({}, { write: (line: string) => log.push(JSON.parse(line)) });
  const onConnected = () => events.connected++;
  const onDisconnected = (reason: string) => events.reasons.push(reason);
  const queue = openQueue(url, { ...options, name, onConnected, onDisconnected, logger });
  cleanups.push(() => queue.close().then(() => deleteQueue(name)));
  return { queue, name, events, log };
}

async function openReady(options: Parameters<typeof open>[0] = {}) {
  const opened = open(options);
  await until("the queue is ready", () => opened.queue.isReady() && opened.events.connected > 0);
  return opened;
}

async function openProxy(options?: { serving: boolean }): Promise<TcpProxy> {
  const proxy = await startProxy(AMQP_URL, options);
  cleanups.push(() => proxy.close());
  return proxy;
}

/** Does something without our code, on a connection of its own. */
async function asOperator<T>(work: (channel: Channel) => Promise<T>): Promise<T> {
  await using operator = await openChannel();
  return await work(operator.channel);
}

/** The next message of a queue, taken from it. */
async function take(channel: Channel, name: string) {
  return (await channel.get(name, { noAck: true })) || undefined;
}

function messages(...texts: string[]): Buffer[] {
  return texts.map((text) => Buffer.from(text));
}

/** Consumes, and notes what comes; ready when it returns. */
async function consume(
  { queue }: ReturnType<typeof open>,
  options: Partial<ConsumeOptions> & { outcome?: (text: string) => Outcome | Promise<Outcome> } = {},
): Promise<string[]> {
  const { outcome = () => "ack", prefetch = 10, before = async () => {} } = options;
  const received: string[] = [];
  async function handle(content: Buffer) {
    received.push(content.toString());
    return outcome(content.toString());
  }
  queue.consume({ prefetch, before, handle });
  await until("consuming", () => queue.isReady());
  return received;
}

test.concurrent("publish() confirms what is persistent, routed and labelled (fault 14)", async () => {
  const { queue, name } = await openReady();
  const texts = ["one", "two", "three"];
  expect(await queue.publish(messages(...texts))).toBe(3);
  expect(await queue.depth()).toBe(3);
  await asOperator(async (channel) => {
    for (const text of texts) {
      const message = await take(channel, name);
      expect(message?.content.toString()).toBe(text);
      expect(message?.properties).toMatchObject({
        deliveryMode: 2,
        contentType: "application/json",
        messageId: expect.stringMatching(/^[0-9a-f-]{36}$/),
      });
    }
  });
});

test.concurrent("openQueue() makes a durable quorum queue whose dead letters cannot get lost", async () => {
  const { name } = await openReady();
  // A queue with other arguments would be refused here.
  await asOperator((channel) =>
    channel.assertQueue(name, {
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
    }),
  );
});

test.concurrent("consume() acknowledges what was handled and moves what is dead to the dead-letter queue", async () => {
  const opened = await openReady();
  const { queue, name } = opened;
  await queue.publish(messages("good", "bad", "fine"));
  const received = await consume(opened, { outcome: (text) => (text === "bad" ? "dead" : "ack") });
  await until("all came", () => received.length === 3);
  expect(received).toEqual(["good", "bad", "fine"]);
  const dead = await until("the dead letter", () => asOperator((channel) => take(channel, `${name}.dead`)));
  expect(dead.content.toString()).toBe("bad");
  await queue.close();
  await asOperator(async (channel) => {
    expect((await channel.checkQueue(name)).messageCount).toBe(0);
    expect((await channel.checkQueue(`${name}.dead`)).messageCount).toBe(0);
  });
});

test.concurrent("consume() hands over at most prefetch messages at once", async () => {
  const opened = await openReady();
  const gate = Promise.withResolvers<Outcome>();
  const received = await consume(opened, { prefetch: 3, outcome: () => gate.promise });
  await opened.queue.publish(messages("1", "2", "3", "4", "5"));
  await until("two wait", async () => received.length === 3 && (await opened.queue.depth()) === 2);
  gate.resolve("ack");
  await until("the rest", () => received.length === 5);
});

test.concurrent("a handler that throws gives all open messages back; consumption resumes after `before` (fault 34)", async () => {
  const opened = await openReady();
  const { queue, events } = opened;
  const gate = Promise.withResolvers<Outcome>();
  let befores = 0;
  const received = await consume(opened, {
    before: async () => befores++,
    outcome(text) {
      if (befores > 1) return "ack";
      if (text !== "5") return gate.promise;
      throw new Error("MySQL is away");
    },
  });
  const texts = ["1", "2", "3", "4", "5"];
  await queue.publish(messages(...texts));
  await until("all came again", () => received.length === 10);
  expect(received.slice(0, 5)).toEqual(texts);
  expect(received.slice(5).sort()).toEqual(texts);
  expect(befores).toBe(2);
  expect(events.reasons).toContain("MySQL is away");
  // The handlers of the lost subscription end late: their acknowledgements are dropped, not sent on the new channel.
  const { connected } = events;
  gate.resolve("ack");
  expect(await queue.publish(messages("6"))).toBe(1);
  await until("the next one", () => received.includes("6"));
  expect(await queue.depth()).toBe(0);
  // RabbitMQ would have closed a channel that acknowledges what it was not given.
  expect([events.connected, queue.isReady()]).toEqual([connected, true]);
});

test.concurrent("publish() does not count what no queue took, depth() rejects then, and the queue is made again (fault 13)", async () => {
  const { queue, name } = await openReady();
  await deleteQueue(name);
  expect(await queue.publish(messages("lost", "lost too"))).toBe(0);
  await until("the queue is there", async () => (await queue.publish(messages("kept"))) === 1);
  expect(await queue.depth()).toBe(1);
  await deleteQueue(name);
  await expect(queue.depth()).rejects.toBeInstanceOf(QueueError);
  await until("the queue is there", () => queue.depth().catch(() => undefined));
});

test.concurrent("openQueue() waits for a broker that is not there at the start, and connects again after each loss", async () => {
  const proxy = await openProxy({ serving: false });
  const { queue, events, ...opened } = open({ url: proxy.url });
  await until("a try has failed", () => events.reasons.length > 0);
  expect([queue.isReady(), events.connected]).toEqual([false, 0]);
  await proxy.serve();
  const received = await consume({ queue, events, ...opened });
  await proxy.refuse();
  await until("not ready", () => !queue.isReady());
  expect(await queue.publish(messages("never"))).toBe(0);
  await expect(queue.depth()).rejects.toBeInstanceOf(QueueError);
  const tries = events.reasons.length;
  await until("several tries", () => events.reasons.length >= tries + 2);
  await proxy.serve();
  await until("ready again", () => queue.isReady());
  expect(await queue.publish(messages("after"))).toBe(1);
  await until("it comes", () => received.length > 0);
  expect(received).toEqual(["after"]);
});

test.concurrent("a consumer that the broker cancels subscribes again (fault 35)", async () => {
  const opened = open();
  const { queue, name, events } = opened;
  const gate = Promise.withResolvers<void>();
  let befores = 0;
  const before = async () => (++befores > 1 ? gate.promise : undefined);
  const received = await consume(opened, { before });
  await deleteQueue(name);
  await until("it would subscribe again", () => befores === 2);
  expect(events.reasons).toContain(`RabbitMQ cancelled the consumer: the queue ${name} is missing`);
  expect(queue.isReady()).toBe(false);
  gate.resolve();
  await until("consuming again", () => queue.isReady());
  expect(await queue.publish(messages("after"))).toBe(1);
  await until("it comes", () => received.length === 1);
});

test.concurrent("publish() resolves after its deadline if no confirm comes (fault 11)", async () => {
  const proxy = await openProxy();
  const { queue, events } = await openReady({ url: proxy.url, publishTimeoutMs: 300 });
  proxy.hold();
  expect(await queue.publish(messages("one", "two"))).toBe(0);
  await until("the session ends", () => events.reasons.length > 0);
  expect(events.reasons).toEqual(["RabbitMQ did not confirm within 300 ms"]);
  await proxy.serve();
  await until("connected again", () => events.connected === 2);
  expect(await queue.publish(messages("three"))).toBe(1);
});

test.concurrent("an alarm of the broker refuses publishing at once, until it is over (fault 15)", async () => {
  const proxy = await openProxy();
  const { queue } = await openReady({ url: proxy.url });
  proxy.inject(blockedFrame(true));
  await until("not ready", () => !queue.isReady());
  expect(await queue.publish(messages("never"))).toBe(0);
  const refused = await queue.depth().catch((error) => error);
  expect(refused).toBeInstanceOf(QueueError);
  expect(refused.message).toContain("alarm");
  proxy.inject(blockedFrame(false));
  await until("ready", () => queue.isReady());
  expect(await queue.publish(messages("after"))).toBe(1);
  expect(await queue.depth()).toBe(1);
});

test.concurrent("an alarm that RabbitMQ reports only after a publish does not end the session (fault 15)", async () => {
  const proxy = await openProxy();
  const { queue, events } = await openReady({ url: proxy.url, publishTimeoutMs: 300 });
  proxy.hold();
  const publishing = queue.publish(messages("unconfirmed"));
  proxy.inject(blockedFrame(true));
  expect(await publishing).toBe(0);
  proxy.inject(blockedFrame(false));
  await until("ready", () => queue.isReady());
  expect(events).toEqual({ connected: 1, reasons: [] });
});

test.concurrent("a queue of that name with other properties is reported, not a crash", async () => {
  const name = uniqueName("queue_test");
  await asOperator((channel) => channel.assertQueue(name, { durable: true }));
  const { queue, events } = open({ name });
  const [reason] = await until("the report", () => events.reasons.length > 0 && events.reasons);
  expect(reason).toContain("PRECONDITION");
  expect(reason).toContain(name);
  expect([queue.isReady(), events.connected]).toEqual([false, 0]);
  await asOperator((channel) => channel.deleteQueue(name));
  await until("ready", () => queue.isReady());
});

test.concurrent("stop() takes no more messages and waits for what is in hand", async () => {
  const opened = open();
  const { queue, name } = opened;
  const gate = Promise.withResolvers<Outcome>();
  const received = await consume(opened, { outcome: () => gate.promise });
  await queue.publish(messages("1", "2"));
  await until("two are in hand", () => received.length === 2);
  let isStopped = false;
  const stopping = queue.stop(10_000).then(() => {
    isStopped = true;
  });
  // On the same channel, hence after the cancellation: nobody is there to take it.
  expect(await queue.publish(messages("3"))).toBe(1);
  expect([await queue.depth(), isStopped]).toEqual([1, false]);
  gate.resolve("ack");
  await stopping;
  await queue.close();
  expect(received).toEqual(["1", "2"]);
  await asOperator(async (channel) => {
    const left = await take(channel, name);
    expect(left?.content.toString()).toBe("3");
    expect((await channel.checkQueue(name)).messageCount).toBe(0);
  });
});

test.concurrent("stop() gives up in time, and what was in hand goes back to the queue", async () => {
  const opened = open();
  const { queue, name } = opened;
  const received = await consume(opened, { outcome: () => new Promise(() => {}) });
  await queue.publish(messages("stuck"));
  await until("in hand", () => received.length === 1);
  await queue.stop(300);
  await queue.close();
  await until("it is back", () =>
    asOperator(async (channel) => (await channel.checkQueue(name)).messageCount === 1),
  );
});

test.concurrent("close() settles on a connection that is dead, and nothing connects afterwards", async () => {
  const proxy = await openProxy();
  const { queue, events } = await openReady({ url: proxy.url });
  proxy.hold();
  await queue.close();
  expect(queue.isReady()).toBe(false);
  expect(await queue.publish(messages("never"))).toBe(0);
  await expect(queue.depth()).rejects.toBeInstanceOf(QueueError);
  await proxy.serve();
  expect([events.connected, proxy.connections()]).toEqual([1, 0]);
});

test.concurrent("hint() reaches every listener of the queue's name, and is no message of the queue", async () => {
  const received: string[][] = [[], []];
  const [first, second] = received.map((texts) => (content: Buffer) => void texts.push(content.toString()));
  if (!first || !second) return expect.unreachable();
  const { queue, name } = await openReady({ onHint: first });
  const [other, stranger] = [await openReady({ name, onHint: second }), await openReady()];
  queue.hint(Buffer.from("one"));
  other.queue.hint(Buffer.from("two"));
  stranger.queue.hint(Buffer.from("of another queue"));
  await until("all hints are there", () => received.every((texts) => texts.length === 2));
  expect(received.map((texts) => texts.toSorted())).toEqual(Array(2).fill(["one", "two"]));
  expect(await queue.depth()).toBe(0);
});

test.concurrent("hint() is lost silently while RabbitMQ is away, and heard again when it is back", async () => {
  const proxy = await openProxy();
  const received: string[] = [];
  const onHint = (content: Buffer) => void received.push(content.toString());
  const { queue } = await openReady({ url: proxy.url, onHint });
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
});

/** The lines about hints and queues that were logged: each message, with the reason of a warning. */
function linesOf({ log }: ReturnType<typeof open>): string[] {
  return log.map(({ msg, reason }) => (reason === undefined ? String(msg) : `${msg}: ${reason}`));
}

const HINTS_FAIL = "hints do not work; the next scan finds what they would announce";
const HINTS_WORK = "hints work again";

/** Waits until a hint of a sender reaches a listener. */
async function untilHeard(sender: ReturnType<typeof open>, received: string[], text: string) {
  await until(`"${text}" is heard`, () => {
    sender.queue.hint(Buffer.from(text));
    return received.includes(text);
  });
}

/** Two listeners of one name, and what they hear. */
async function openListeners() {
  const first = { received: [] as string[] };
  const second = { received: [] as string[] };
  const hearing =
    ({ received }: { received: string[] }) =>
    (content: Buffer) =>
      void received.push(content.toString());
  const one = await openReady({ onHint: hearing(first) });
  const two = await openReady({ onHint: hearing(second), name: one.name });
  return [Object.assign(one, first), Object.assign(two, second)] as const;
}

test.concurrent("the exchange of the hints, deleted, is noticed, logged and declared again; messages go on (fault 47)", async () => {
  const [one, two] = await openListeners();
  await asOperator((channel) => channel.deleteExchange(`${one.name}.hints`));
  // Whoever sends a hint meanwhile loses the hint, and nothing else.
  one.queue.hint(Buffer.from("lost"));
  expect(await one.queue.publish(messages("kept"))).toBe(1);
  await untilHeard(one, two.received, "from one");
  await untilHeard(two, one.received, "from two");
  await until("both say so", () => [one, two].every((opened) => linesOf(opened).at(-1) === HINTS_WORK));
  expect(linesOf(one)[0]).toStartWith(HINTS_FAIL);
  expect(linesOf(one)[0]).toContain(`no exchange '${one.name}.hints'`);
  for (const { events } of [one, two]) expect(events).toEqual({ connected: 1, reasons: [] });
});

test.concurrent("a binding, deleted, is noticed, logged and made again by each listener (fault 47)", async () => {
  const [one, two] = await openListeners();
  await asOperator(async (channel) => {
    // The bindings of a deleted exchange are gone; only their owners may delete them alone.
    await channel.deleteExchange(`${one.name}.hints`);
    await channel.assertExchange(`${one.name}.hints`, "fanout", { durable: true });
  });
  await until("both say so", () => [one, two].every((opened) => linesOf(opened).at(-1) === HINTS_WORK));
  for (const opened of [one, two]) {
    expect(linesOf(opened)).toEqual([
      expect.stringMatching(/: the binding of \S+ to \S+ is missing$|no exchange/),
      HINTS_WORK,
    ]);
    expect(opened.events).toEqual({ connected: 1, reasons: [] });
  }
  await untilHeard(one, two.received, "from one");
  await untilHeard(two, one.received, "from two");
});

test.concurrent("without hints, messages are published and consumed; this is logged once, and hints are tried again (fault 48)", async () => {
  const name = uniqueName("queue_test");
  await asOperator((channel) => channel.assertExchange(`${name}.hints`, "direct"));
  const heard: string[] = [];
  const opened = await openReady({ name, onHint: (content) => void heard.push(content.toString()) });
  const received = await consume(opened);
  expect(await opened.queue.publish(messages("one"))).toBe(1);
  await until("it comes", () => received.length === 1);
  opened.queue.hint(Buffer.from("lost"));
  await opened.queue.check();
  expect(linesOf(opened)).toEqual([expect.stringMatching(/^hints do not work.*PRECONDITION.*hints/)]);
  await asOperator((channel) => channel.deleteExchange(`${name}.hints`));
  await untilHeard(opened, heard, "found");
  expect(linesOf(opened).slice(1)).toEqual([HINTS_WORK]);
  expect(heard).not.toContain("lost");
});

test.concurrent("onlyHints: hints arrive, and no queue is declared", async () => {
  const sender = await openReady({ onlyHints: true });
  await sender.queue.check();
  const refused = asOperator((channel) => channel.checkQueue(sender.name));
  await expect(refused).rejects.toThrow("NOT_FOUND");
  const heard: string[] = [];
  await openReady({ name: sender.name, onHint: (content) => void heard.push(content.toString()) });
  await untilHeard(sender, heard, "one");
  expect(heard).toContain("one");
});

test.concurrent("the dead-letter queue, deleted, is noticed, logged and declared again on the same connection", async () => {
  const opened = await openReady();
  const received = await consume(opened, { outcome: (text) => (text === "bad" ? "dead" : "ack") });
  const { connected } = opened.events;
  const dead = `${opened.name}.dead`;
  await asOperator((channel) => channel.deleteQueue(dead));
  expect(await opened.queue.publish(messages("good", "bad"))).toBe(2);
  await until("both come", () => received.length === 2);
  await until("it is there again", () => opened.log.length === 2);
  expect(linesOf(opened)).toEqual([
    "the dead-letter queue is missing",
    "declared the dead-letter queue again",
  ]);
  expect(opened.log).toMatchObject([{ queue: dead }, { queue: dead }]);
  expect(opened.events.connected).toBe(connected);
  await opened.queue.publish(messages("bad"));
  await until("a dead letter", () => asOperator((channel) => take(channel, dead)));
});

test.concurrent("the queue, deleted, is noticed without any message, and declared again (fault 13)", async () => {
  const { queue, name, events } = await openReady();
  await deleteQueue(name);
  await until("it is noticed", () => events.reasons.length > 0);
  expect(events.reasons).toEqual([`the queue ${name} is missing`]);
  await until("it is there again", () =>
    queue.check().then(
      () => true,
      () => false,
    ),
  );
  expect(await queue.publish(messages("kept"))).toBe(1);
});

/** Why `check()` rejects. */
async function whyNot({ queue }: ReturnType<typeof open>): Promise<string> {
  const error = await queue.check().then(
    () => new Error("it resolves"),
    (thrown) => thrown,
  );
  expect(error).toBeInstanceOf(QueueError);
  return error.message;
}

test.concurrent("check() says why messages cannot be published or delivered, and ends no connection that is slow", async () => {
  const proxy = await openProxy();
  const opened = await openReady({ url: proxy.url });
  await opened.queue.check();
  proxy.inject(blockedFrame(true));
  await until("an alarm", async () => /alarm/.test(await whyNot(opened).catch(() => "")));
  proxy.inject(blockedFrame(false));
  await until("it is over", () => opened.queue.isReady());

  proxy.hold();
  for (const _ of [1, 2]) expect(await whyNot(opened)).toBe("RabbitMQ did not answer within 2000 ms");
  expect(opened.events).toEqual({ connected: 1, reasons: [] });
  await proxy.refuse();
  await until("it is noticed", () => opened.events.reasons.length > 1);
  expect(await whyNot(opened)).toStartWith("RabbitMQ is not connected: ");
  expect(await whyNot(opened)).toContain(opened.events.reasons.at(-1) ?? "no reason");

  await proxy.serve();
  const gate = Promise.withResolvers<void>();
  opened.queue.consume({ prefetch: 1, before: () => gate.promise, handle: async () => "ack" });
  await until("it waits", async () => (await whyNot(opened)).startsWith("RabbitMQ is not connected"));
  gate.resolve();
  await until("it consumes", () =>
    opened.queue.check().then(
      () => true,
      () => false,
    ),
  );
});

test.concurrent("a virtual host that does not exist is named in the reason", async () => {
  const { events } = open({ url: new URL("/no%2Fwhere", AMQP_URL).href });
  const [reason] = await until("a reason", () => events.reasons.length > 0 && events.reasons);
  expect(reason).toStartWith("RabbitMQ refuses the virtual host no/where: it does not exist");
});
