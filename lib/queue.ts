import type { ChannelModel, ConfirmChannel, ConsumeMessage } from "amqplib";
import type { Logger } from "pino";
import { v7 as uuidv7 } from "uuid";
import {
  CALL_MS,
  closeConnection,
  noAnswer,
  openChannel,
  openConnection,
  QueueError,
  reasonOf,
} from "./amqp.ts";
import { type Hints, logHints, openHints } from "./hints.ts";
import { aborted, backoffMs, runLoop, sleep, withDeadline } from "./loop.ts";
import { deadLettersOf, declareDeadLetters, declareQueues, openLook } from "./queue_declaration.ts";

export { QueueError };

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
  /**
   * Sends a hint to all listeners (`onHint`), from a queue with `onHint` or `onlyHints`. It may be lost, and is lost while
   * RabbitMQ is unavailable.
   */
  hint(content: Buffer): void;
  /**
   * The number of messages that wait in the queue.
   *
   * @throws {QueueError} if RabbitMQ is unavailable or accepts no messages
   */
  depth(): Promise<number>;
  /**
   * Checks that messages can be published and, if there is a consumer, delivered. Asks the broker whether the queue exists;
   * waits at most 2 s, and does not end a connection that is merely slow.
   *
   * @throws {QueueError} with the reason
   */
  check(): Promise<void>;
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
  /** The name of the program: RabbitMQ shows its connection as `<program> <host> <pid>`. */
  program?: string;
  /** Only `hint()` is used: the queues are neither declared nor watched, and need no rights. */
  onlyHints?: boolean;
  /** The longest wait for the broker's confirms, in milliseconds. */
  publishTimeoutMs?: number;
  onConnected: () => void;
  onDisconnected: (reason: string, retryInMs: number) => void;
  /** Receives the hints of all processes that use the queue of this name. */
  onHint?: (content: Buffer) => void;
  /** Gets a line whenever something is missing that the work can go on without, and when it is there again. */
  logger?: Pick<Logger, "info" | "warn">;
}

const PUBLISH_TIMEOUT_MS = 5_000;
const CLOSE_MS = 2_000;
const CHECK_MS = 2_000;
/** How often a process looks for missing queues, in milliseconds. */
const WATCH_MS = 2_000;
const WATCH_RETRY = { baseMs: 2_000, maxMs: 30_000 };
/** The longest wait for hints before a new connection is used, in milliseconds: the first hints then arrive, too. */
const HINTS_MS = 2_000;
const BACKOFF = { baseMs: 250, maxMs: 5_000 };
/** A connection that lasts this long is successful: the next backoff starts with the shortest wait. */
const GOOD_MS = 10_000;

interface Session {
  connection: ChannelModel;
  channel: ConfirmChannel;
  returned: Set<string>;
  blocked: boolean;
  consumerTag?: string;
  /** Finds out which of the queues are missing. */
  findMissing: () => Promise<string[]>;
  hints?: Hints;
  /** Ends the session; the supervisor opens the next one. */
  end: (reason: string) => void;
  ended: Promise<string>;
  /** Aborted at the end. */
  signal: AbortSignal;
}

/**
 * Connects to RabbitMQ and declares the queues; reconnects with backoff after any loss, until `close()`. Returns at once.
 */
export function openQueue(url: string, options: QueueOptions): Queue {
  const { name, publishTimeoutMs = PUBLISH_TIMEOUT_MS, onlyHints = false, onHint, logger } = options;
  const closing = new AbortController();
  const onHints = logHints(logger);
  let session: Session | undefined;
  /** Why there is no session. */
  let absence = "connecting";
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
        session = await openSession(url, options);
        reason = await Promise.race([live(session), session.ended, closed]);
      } catch (error) {
        reason = reasonOf(error);
        if (/ACCESS[_-]REFUSED|NOT_ALLOWED/.test(reason)) reason += ". Is AMQP_URL right?";
      }
      const over = session;
      session = undefined;
      absence = reason;
      over?.end(reason);
      if (over) await closeConnection(over.connection, over.channel);
      if (closing.signal.aborted) return;
      if (Date.now() - startedAt > GOOD_MS) attempt = 1;
      const retryInMs = backoffMs(attempt, BACKOFF);
      options.onDisconnected(reason, retryInMs);
      await sleep(retryInMs, closing.signal);
    }
  }

  async function live(current: Session): Promise<string> {
    if (consumer && !stopped) await subscribe(current, consumer);
    const { connection, signal } = current;
    if (onHint || onlyHints) {
      current.hints = openHints({ connection, exchange: `${name}.hints`, onHint, onState: onHints, signal });
      await Promise.race([current.hints.tried, sleep(HINTS_MS, signal)]);
    }
    if (!onlyHints) watch(current);
    if (!signal.aborted) options.onConnected();
    return current.ended;
  }

  /** Without the queue, a new session is needed; without the dead-letter queue, messages go on meanwhile. */
  function watch(current: Session) {
    const { connection, findMissing, signal } = current;
    async function look() {
      for (const missing of await findMissing()) {
        if (missing === name) {
          current.end(`the queue ${name} is missing`);
        } else {
          logger?.warn({ queue: missing }, "the dead-letter queue is missing");
          await declareDeadLetters(connection, name);
          logger?.info({ queue: missing }, "declared the dead-letter queue again");
        }
      }
      return WATCH_MS;
    }
    function onFailure(error: unknown, retryInMs: number) {
      // A broker that is blocked by an alarm does not answer.
      if (signal.aborted || current.blocked) return;
      logger?.warn({ reason: reasonOf(error), retryInMs }, "cannot watch the queues");
    }
    runLoop(look, { signal, onFailure, ...WATCH_RETRY });
  }

  async function subscribe(current: Session, { prefetch, handle }: ConsumeOptions) {
    const { channel } = current;
    await channel.prefetch(prefetch);
    const { consumerTag } = await channel.consume(name, (message) => {
      if (message === null)
        return current.end(`RabbitMQ cancelled the consumer: the queue ${name} is missing`);
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
      current.end(reasonOf(error));
    } finally {
      inHand--;
    }
  }

  function connected(): Session {
    if (!session) throw new QueueError(`RabbitMQ is not connected: ${absence}`);
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
        if (!current.blocked) current.end(reasonOf(error));
      }
      // A new session declares the queue again.
      if (current.returned.size > 0) current.end(`RabbitMQ returned messages: the queue ${name} is missing`);
      return confirmed;
    },
    hint(content) {
      if (session && !session.blocked) session.hints?.send(content);
    },
    async depth() {
      const current = connected();
      try {
        const answer = withDeadline(current.channel.checkQueue(name), CALL_MS, () => noAnswer(CALL_MS));
        return (await answer).messageCount;
      } catch (error) {
        current.end(reasonOf(error));
        throw new QueueError(reasonOf(error));
      }
    },
    async check() {
      const { findMissing, consumerTag } = connected();
      if (consumer && !consumerTag) throw new QueueError("RabbitMQ has not accepted the consumer yet");
      const missing = await withDeadline(findMissing(), CHECK_MS, () => noAnswer(CHECK_MS)).catch((error) =>
        failWith(reasonOf(error)),
      );
      if (missing.includes(name)) throw new QueueError(`The queue ${name} is missing`);
    },
    consume(next) {
      consumer = next;
      // The current session has no consumer; the next one gets it.
      session?.end("consuming begins");
    },
    async stop(withinMs) {
      stopped = true;
      const { channel, consumerTag } = session ?? {};
      if (channel && consumerTag) {
        const cancelled = channel.cancel(consumerTag).catch(() => undefined);
        await Promise.race([cancelled, sleep(CLOSE_MS)]);
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

async function openSession(
  url: string,
  { name, program = "pointservice", onlyHints }: QueueOptions,
): Promise<Session> {
  const connection = await openConnection(url, program);
  const over = new AbortController();
  const ended = aborted(over.signal).then((): string => over.signal.reason);
  const end = (reason: string) => over.abort(reason);
  // Without these listeners, an error of the connection or the channel would end the process.
  connection.on("error", (error) => end(error.message));
  connection.on("close", () => end("RabbitMQ closed the connection"));
  try {
    const channel = await openChannel(connection.createConfirmChannel());
    channel.on("error", (error) => end(error.message));
    channel.on("close", () => end("RabbitMQ closed the channel"));
    const names = onlyHints ? [] : [name, deadLettersOf(name)];
    const session: Session = {
      connection,
      channel,
      returned: new Set(),
      blocked: false,
      findMissing: openLook(connection, names),
      end,
      ended,
      signal: over.signal,
    };
    channel.on("return", ({ properties }) => session.returned.add(String(properties.messageId)));
    connection.on("blocked", () => {
      session.blocked = true;
    });
    connection.on("unblocked", () => {
      session.blocked = false;
    });
    if (!onlyHints) await Promise.race([declareQueues(connection, name), ended.then(failWith)]);
    return session;
  } catch (error) {
    await closeConnection(connection);
    throw error;
  }
}

function failWith(reason: string): never {
  throw new QueueError(reason);
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
