import type { Socket } from "node:net";
import { type ChannelModel, type ConfirmChannel, type ConsumeMessage, connect } from "amqplib";
import { v7 as uuidv7 } from "uuid";
import { ExpectedError } from "./errors.ts";
import { backoffMs, sleep, withDeadline } from "./loop.ts";

/** RabbitMQ is unavailable, blocked or too slow. A message that was just published may have arrived or not. */
export class QueueError extends ExpectedError {
  override readonly name = "QueueError";
}

/** What to do with a handled message: acknowledge it, or move it to the dead-letter queue. */
export type Outcome = "ack" | "dead";

export interface ConsumeOptions {
  /** The maximum number of delivered messages that are not yet acknowledged. */
  prefetch: number;
  /** Awaited before each connection: waits until the handler can work. */
  before: () => Promise<unknown>;
  /**
   * Handles one message; up to `prefetch` calls run at once. An error ends the subscription: all unacknowledged messages go
   * back to the queue, and consuming starts again after a backoff and `before`.
   */
  handle: (content: Buffer) => Promise<Outcome>;
}

/** A queue of RabbitMQ that survives the loss of connections. */
export interface Queue {
  /**
   * Publishes persistent messages and waits for the broker's confirms. Resolves to the number of confirmed messages; the
   * others may have arrived or not. Never rejects.
   */
  publish(contents: readonly Buffer[]): Promise<number>;
  /** Sends a hint to all listeners (`onHint`). It may be lost, and is lost while RabbitMQ is unavailable. */
  hint(content: Buffer): void;
  /**
   * The number of messages that wait in the queue.
   *
   * @throws {QueueError} if RabbitMQ is unavailable or accepts no messages
   */
  depth(): Promise<number>;
  /** Consumes, across any number of reconnects, until `stop()`. */
  consume(options: ConsumeOptions): void;
  /** Stops consuming, and waits at most `withinMs` until the delivered messages are handled. */
  stop(withinMs: number): Promise<void>;
  /** Whether messages can be published and, if there is a consumer, delivered. */
  isReady(): boolean;
  close(): Promise<void>;
}

export interface QueueOptions {
  /** The name of the queue; its dead letters go to the queue `<name>.dead`. */
  name: string;
  /** The longest wait for the broker's confirms, in milliseconds. */
  publishTimeoutMs?: number;
  onConnected: () => void;
  onDisconnected: (reason: string, retryInMs: number) => void;
  /** Receives the hints of all processes that use the queue of this name. */
  onHint?: (content: Buffer) => void;
}

const CONNECT_MS = 10_000;
const CALL_MS = 5_000;
const PUBLISH_TIMEOUT_MS = 5_000;
const CLOSE_MS = 2_000;
const BACKOFF = { baseMs: 250, maxMs: 5_000 };
/** A connection that lasts this long is successful: the next backoff starts with the shortest wait. */
const GOOD_MS = 10_000;
/** Far more than back-pressure allows: a faulty publisher is refused before it fills the broker's disk. */
const MAX_MESSAGES = 1_000_000;
const MAX_DEAD_MESSAGES = 100_000;
/** The maximum number of hints that wait for one listener. The oldest are dropped: after one hint a listener checks all rows. */
const MAX_HINTS = 100;
const HINT_TTL_MS = 10_000;
/** A message that is redelivered more often probably kills its workers: RabbitMQ moves it to the dead-letter queue. */
const MAX_DELIVERIES = 20;

interface Session {
  connection: ChannelModel;
  channel: ConfirmChannel;
  returned: Set<string>;
  blocked: boolean;
  consumerTag?: string;
  /** Ends the session; the supervisor opens the next one. */
  end: (reason: string) => void;
  ended: Promise<string>;
}

/**
 * Connects to RabbitMQ and declares the queues; reconnects with backoff after any loss, until `close()`. Returns at once.
 */
export function openQueue(
  url: string,
  { name, publishTimeoutMs = PUBLISH_TIMEOUT_MS, onConnected, onDisconnected, onHint }: QueueOptions,
): Queue {
  const closing = new AbortController();
  let session: Session | undefined;
  let consumer: ConsumeOptions | undefined;
  let inHand = 0;
  let stopped = false;

  async function supervise() {
    for (let attempt = 1; !closing.signal.aborted; attempt++) {
      const startedAt = Date.now();
      let reason: string;
      try {
        if (!stopped) await consumer?.before();
        if (closing.signal.aborted) return;
        const opened = await openSession(url, name);
        session = opened;
        reason = await Promise.race([live(opened), opened.ended, closed]);
      } catch (error) {
        reason = error instanceof Error ? error.message : String(error);
        if (/ACCESS[_-]REFUSED|NOT_ALLOWED/.test(reason)) reason += ". Is AMQP_URL right?";
      }
      const connection = session?.connection;
      session = undefined;
      if (connection) await closeQuietly(connection);
      if (closing.signal.aborted) return;
      if (Date.now() - startedAt > GOOD_MS) attempt = 1;
      const retryInMs = backoffMs(attempt, BACKOFF);
      onDisconnected(reason, retryInMs);
      await sleep(retryInMs, closing.signal);
    }
  }

  async function live(current: Session): Promise<string> {
    if (onHint) await listenForHints(current.channel, name, onHint);
    if (consumer && !stopped) await subscribe(current, consumer);
    onConnected();
    return current.ended;
  }

  async function subscribe(current: Session, { prefetch, handle }: ConsumeOptions) {
    const { channel } = current;
    await channel.prefetch(prefetch);
    const { consumerTag } = await channel.consume(name, (message) => {
      if (message === null) return current.end("RabbitMQ cancelled the consumer");
      receive(current, message, handle);
    });
    current.consumerTag = consumerTag;
    if (stopped) await channel.cancel(consumerTag);
  }

  async function receive(current: Session, message: ConsumeMessage, handle: ConsumeOptions["handle"]) {
    inHand++;
    try {
      const outcome = await handle(message.content);
      // The session was lost: RabbitMQ delivers the message again.
      if (session !== current) return;
      if (outcome === "ack") current.channel.ack(message);
      else current.channel.reject(message, false);
    } catch (error) {
      current.end(error instanceof Error ? error.message : String(error));
    } finally {
      inHand--;
    }
  }

  function connected(): Session {
    if (!session) throw new QueueError("RabbitMQ is not connected");
    if (session.blocked) throw new QueueError("RabbitMQ accepts no messages: memory or disk alarm");
    return session;
  }

  const closed = new Promise<string>((resolve) => {
    closing.signal.addEventListener("abort", () => resolve("closed"), { once: true });
  });
  // In a later microtask, so that the caller can call `consume()` first.
  const supervised = Promise.resolve().then(supervise);

  return {
    async publish(contents) {
      const current = session;
      if (!current || current.blocked) return 0;
      const late = () => new QueueError(`RabbitMQ did not confirm within ${publishTimeoutMs} ms`);
      let confirmed = 0;
      const confirms = contents.map(async (content) => {
        if (await publishOne(current, name, content)) confirmed++;
      });
      try {
        await withDeadline(Promise.all(confirms), publishTimeoutMs, late);
      } catch (error) {
        // RabbitMQ reports an alarm only after a publish: a new session would not know it, and would publish again.
        if (!current.blocked) current.end((error as Error).message);
      }
      // The queue is missing: a new session declares it again.
      if (current.returned.size > 0) current.end("RabbitMQ returned messages: the queue is missing");
      return confirmed;
    },
    hint(content) {
      if (!session || session.blocked) return;
      try {
        session.channel.publish(hintsOf(name), "", content, { persistent: false });
      } catch {
        // The channel has closed.
      }
    },
    async depth() {
      const current = connected();
      const late = () => new QueueError(`RabbitMQ did not answer within ${CALL_MS} ms`);
      try {
        return (await withDeadline(current.channel.checkQueue(name), CALL_MS, late)).messageCount;
      } catch (error) {
        current.end((error as Error).message);
        throw new QueueError((error as Error).message);
      }
    },
    consume(options) {
      consumer = options;
      // The current session has no consumer; the next one gets it.
      session?.end("consuming begins");
    },
    async stop(withinMs) {
      stopped = true;
      const { channel, consumerTag } = session ?? {};
      if (channel && consumerTag) {
        await withDeadline(channel.cancel(consumerTag), CLOSE_MS, () => new Error("late")).catch(
          () => undefined,
        );
      }
      for (const end = Date.now() + withinMs; inHand > 0 && Date.now() < end; ) await sleep(20);
    },
    isReady() {
      return session !== undefined && !session.blocked && (!consumer || session.consumerTag !== undefined);
    },
    async close() {
      closing.abort();
      // A connection attempt may hang; it ends with the process.
      await Promise.race([supervised, sleep(CLOSE_MS + 500)]);
    },
  };
}

async function openSession(url: string, name: string): Promise<Session> {
  const connection = await connect(withHeartbeat(url), {
    noDelay: true,
    keepAlive: true,
    timeout: CONNECT_MS,
  });
  const { promise: ended, resolve: end } = Promise.withResolvers<string>();
  // Without these listeners, an error of the connection or the channel would end the process.
  connection.on("error", (error) => end(error.message));
  connection.on("close", () => end("RabbitMQ closed the connection"));
  try {
    const late = () => new QueueError(`RabbitMQ did not answer within ${CALL_MS} ms`);
    const channel = await withDeadline(connection.createConfirmChannel(), CALL_MS, late);
    channel.on("error", (error) => end(error.message));
    channel.on("close", () => end("RabbitMQ closed the channel"));
    const session: Session = { connection, channel, returned: new Set(), blocked: false, end, ended };
    channel.on("return", ({ properties }) => session.returned.add(String(properties.messageId)));
    connection.on("blocked", () => {
      session.blocked = true;
    });
    connection.on("unblocked", () => {
      session.blocked = false;
    });
    await Promise.race([withDeadline(assertQueues(channel, name), CALL_MS, late), ended.then(failWith)]);
    return session;
  } catch (error) {
    await closeQuietly(connection);
    throw error;
  }
}

function failWith(reason: string): never {
  throw new QueueError(reason);
}

async function assertQueues(channel: ConfirmChannel, name: string) {
  const dead = `${name}.dead`;
  await channel.assertExchange(hintsOf(name), "fanout", { durable: true });
  await channel.assertQueue(dead, {
    durable: true,
    arguments: { "x-queue-type": "quorum", "x-max-length": MAX_DEAD_MESSAGES },
  });
  await channel.assertQueue(name, {
    durable: true,
    arguments: {
      "x-queue-type": "quorum",
      "x-max-length": MAX_MESSAGES,
      "x-delivery-limit": MAX_DELIVERIES,
      // Both are needed to keep dead letters across a crash of the broker.
      "x-overflow": "reject-publish",
      "x-dead-letter-strategy": "at-least-once",
      "x-dead-letter-exchange": "",
      "x-dead-letter-routing-key": dead,
    },
  });
}

/** The exchange that sends each hint to every listener. */
function hintsOf(name: string): string {
  return `${name}.hints`;
}

async function listenForHints(channel: ConfirmChannel, name: string, onHint: (content: Buffer) => void) {
  const { queue } = await channel.assertQueue("", {
    exclusive: true,
    autoDelete: true,
    durable: false,
    arguments: { "x-max-length": MAX_HINTS, "x-message-ttl": HINT_TTL_MS },
  });
  await channel.bindQueue(queue, hintsOf(name), "");
  await channel.consume(queue, (message) => message && onHint(message.content), { noAck: true });
}

/** Resolves to true if the broker has put the message into the queue; never rejects. */
function publishOne({ channel, returned }: Session, name: string, content: Buffer): Promise<boolean> {
  const messageId = uuidv7();
  return new Promise((resolve) => {
    const options = { persistent: true, mandatory: true, contentType: "application/json", messageId };
    try {
      channel.publish("", name, content, options, (error) => {
        // A message that no queue takes is returned first, and then confirmed as well.
        resolve(!error && !returned.has(messageId));
      });
    } catch {
      // The channel has closed; the rows are claimed again when their lease ends.
      resolve(false);
    }
  });
}

/** Sets a heartbeat of 20 s unless the URL has one: a dead peer is noticed after two heartbeats. */
function withHeartbeat(url: string): string {
  const parsed = new URL(url);
  if (!parsed.searchParams.has("heartbeat")) parsed.searchParams.set("heartbeat", "20");
  return parsed.href;
}

/** Closes, or gives up after 2 s: closing a dead connection may never settle. */
async function closeQuietly(connection: ChannelModel): Promise<void> {
  try {
    await withDeadline(connection.close(), CLOSE_MS, () => new QueueError("late"));
  } catch {
    // A blocked or dead broker does not answer; the socket must not stay open.
    (connection.connection as unknown as { stream: Socket }).stream.destroy();
  }
}
