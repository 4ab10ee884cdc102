import type { Socket } from "node:net";
import { type ChannelModel, type ConfirmChannel, type ConsumeMessage, connect } from "amqplib";
import { v7 as uuidv7 } from "uuid";
import { ForeseenError } from "./errors.ts";
import { backoffMs, sleep, withDeadline } from "./loop.ts";

/** RabbitMQ is away, blocked, or did not confirm in time. Nobody knows whether what was published arrived. */
export class QueueError extends ForeseenError {
  override readonly name = "QueueError";
}

/** What becomes of a message: done with, or moved to the dead-letter queue. */
export type Outcome = "ack" | "dead";

export interface ConsumeOptions {
  /** The most messages handed over and not yet acknowledged. */
  prefetch: number;
  /** Awaited before each connection: what the handler needs must be there. */
  before: () => Promise<unknown>;
  /**
   * Handles one message; several run at once, up to `prefetch`. What it throws ends the subscription: all that is open goes
   * back to the queue, and after a backoff and `before` the queue is consumed again.
   */
  handle: (content: Buffer) => Promise<Outcome>;
}

export interface Queue {
  /**
   * Publishes persistent messages and waits for the broker's confirms. Resolves to how many were confirmed; the others
   * may have arrived or not. Never rejects.
   */
  publish(contents: readonly Buffer[]): Promise<number>;
  /**
   * Tells whoever listens with `onHint`. Nobody waits for it, and it may get lost: where RabbitMQ is away it is.
   */
  hint(content: Buffer): void;
  /**
   * How many messages wait in the queue.
   *
   * @throws {QueueError} where RabbitMQ is away or takes no messages now
   */
  depth(): Promise<number>;
  /** Consumes, across any number of reconnects, until `stop()`. */
  consume(options: ConsumeOptions): void;
  /** Takes no more messages, and waits until those in hand are handled, `withinMs` at most. */
  stop(withinMs: number): Promise<void>;
  /** Whether messages can be published, and where there is a consumer, are delivered. */
  isReady(): boolean;
  close(): Promise<void>;
}

/** What the queue reports, for the log. */
export interface QueueEvents {
  onConnected: () => void;
  onDisconnected: (reason: string, retryInMs: number) => void;
}

export interface QueueOptions extends QueueEvents {
  /** Name of the queue; its dead letters go to the queue `<name>.dead`. */
  name: string;
  /** How long to wait for the broker's confirms, in milliseconds. */
  publishTimeoutMs?: number;
  /** Gets the hints of all who have opened the queue of this name. */
  onHint?: (content: Buffer) => void;
}

const CONNECT_MS = 10_000;
const CALL_MS = 5_000;
const CLOSE_MS = 2_000;
const BACKOFF = { baseMs: 250, maxMs: 5_000 };
/** A connection that lasted this long was a good one: the next backoff starts small again. */
const GOOD_MS = 10_000;
/** Far more than back-pressure lets in; a publisher that runs wild is refused, not the broker's disk filled. */
const MAX_MESSAGES = 1_000_000;
const MAX_DEAD_MESSAGES = 100_000;
/** Hints that wait for one listener; the oldest make room, since the listener looks at the tables anyhow. */
const MAX_HINTS = 100;
const HINT_TTL_MS = 10_000;
/** A message that was given back so often kills its workers; RabbitMQ moves it to the dead letters. */
const MAX_DELIVERIES = 20;

interface Session {
  connection: ChannelModel;
  channel: ConfirmChannel;
  returned: Set<string>;
  blocked: boolean;
  consumerTag?: string;
  /** Ends the session; the supervisor makes the next one. */
  end: (reason: string) => void;
  ended: Promise<string>;
}

/**
 * Keeps a connection to RabbitMQ with its queues: connects, and after a loss of any kind connects again with backoff, until
 * `close()`. Returns at once.
 */
export function openQueue(
  url: string,
  { name, publishTimeoutMs = 5_000, onConnected, onDisconnected, onHint }: QueueOptions,
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
      // On another session this message was given back already, and comes again.
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
    if (session.blocked) throw new QueueError("RabbitMQ takes no messages: memory or disk alarm");
    return session;
  }

  const closed = new Promise<string>((resolve) => {
    closing.signal.addEventListener("abort", () => resolve("closed"), { once: true });
  });
  // Not before the caller could say `consume()`.
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
        // RabbitMQ tells of an alarm only after a publish. A new session would not know of it, and publish again.
        if (!current.blocked) current.end((error as Error).message);
      }
      // The queue is gone: a new session makes it again.
      if (current.returned.size > 0) current.end("RabbitMQ returned messages: the queue is missing");
      return confirmed;
    },
    hint(content) {
      if (!session || session.blocked) return;
      try {
        session.channel.publish(hintsOf(name), "", content, { persistent: false });
      } catch {
        // The channel closed since.
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
      // A session that is there already has no consumer: the next one has.
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
      // A connection that is just being made may hang; it dies with the process.
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
  // Without these listeners an error of the connection or the channel would end the process.
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
      // Dead letters that are safe across a crash of the broker need both of these.
      "x-overflow": "reject-publish",
      "x-dead-letter-strategy": "at-least-once",
      "x-dead-letter-exchange": "",
      "x-dead-letter-routing-key": dead,
    },
  });
}

/** The exchange that hands a hint to every listener. */
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

/** Resolves to whether the broker has the message in the queue; never rejects. */
function publishOne({ channel, returned }: Session, name: string, content: Buffer): Promise<boolean> {
  const messageId = uuidv7();
  return new Promise((resolve) => {
    const options = { persistent: true, mandatory: true, contentType: "application/json", messageId };
    try {
      channel.publish("", name, content, options, (error) => {
        // A message that no queue took is returned first and confirmed all the same.
        resolve(!error && !returned.has(messageId));
      });
    } catch {
      // The channel closed since; the row's lease brings it again.
      resolve(false);
    }
  });
}

/** Dead peers are noticed after two heartbeats of 20 s, unless the URL says otherwise. */
function withHeartbeat(url: string): string {
  const parsed = new URL(url);
  if (!parsed.searchParams.has("heartbeat")) parsed.searchParams.set("heartbeat", "20");
  return parsed.href;
}

/** Closes, or gives up after 2 s: a dead connection's close may never settle. */
async function closeQuietly(connection: ChannelModel): Promise<void> {
  try {
    await withDeadline(connection.close(), CLOSE_MS, () => new QueueError("late"));
  } catch {
    // A blocked or vanished broker does not answer; its socket must not stay.
    (connection.connection as unknown as { stream: Socket }).stream.destroy();
  }
}
