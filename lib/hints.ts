import type { Channel, ChannelModel } from "amqplib";
import type { Logger } from "pino";
import { v7 as uuidv7 } from "uuid";
import {
  ACCESS_REFUSED,
  closeChannel,
  codeOf,
  openChannel,
  QueueError,
  reasonOf,
  withChannel,
} from "./amqp.ts";
import { runLoop, sleep } from "./loop.ts";

/** Hints over one connection. */
export interface Hints {
  /** Sends a hint to all listeners, or loses it. */
  send(content: Buffer): void;
  /** Resolves when the first attempt to set them up has succeeded or failed. */
  tried: Promise<void>;
}

export interface HintsOptions {
  connection: ChannelModel;
  /** The name of the exchange that sends each hint to every listener. */
  exchange: string;
  /** Receives the hints of all processes; without it, this process only sends. */
  onHint: ((content: Buffer) => void) | undefined;
  /** Called with the reason whenever hints do not work, and without one whenever they do. */
  onState: (problem?: string) => void;
  /** Aborted at the end of the connection. */
  signal: AbortSignal;
}

/** The maximum number of hints that wait for one listener. The oldest are dropped: after one hint a listener checks all rows. */
const MAX_HINTS = 100;
const HINT_TTL_MS = 10_000;
/** The period of the probes, and the longest wait for one, in milliseconds: together they must be shorter than 5 s. */
const PROBE_EVERY_MS = 2_000;
const PROBE_MS = 1_500;
/** A probe is no hint: processes of older versions, too, ignore its content. */
const PROBE = { type: "probe", content: Buffer.from("{}") };
/** The wait before what had worked is set up again, in milliseconds. */
const REPAIR_MS = 200;
/** Waits between attempts, in milliseconds: if only an operator can fix the cause, frequent ones are useless. */
const RETRY = { baseMs: 2_000, maxMs: 30_000 };

/** Makes the function that logs when hints stop working, and why, and when they work again: once each. */
export function logHints(logger?: Pick<Logger, "info" | "warn">): HintsOptions["onState"] {
  let logged: string | undefined;
  return (problem) => {
    if (problem === logged) return;
    logged = problem;
    if (problem === undefined) logger?.info("hints work again");
    else logger?.warn({ reason: problem }, "hints do not work; the next scan finds what they would announce");
  };
}

/**
 * Sends and receives hints until the end of the connection. They are optional, and live on a channel of their own: whatever
 * is missing or refused here does not touch the messages of the queue. What is missing is declared again.
 *
 * The protocol cannot show a binding. So a probe that goes the way of a hint every 2 s proves all of it: the exchange, the
 * right to send to it, the binding, the queue and its consumer.
 */
export function openHints({ connection, exchange, onHint, onState, signal }: HintsOptions): Hints {
  const queue = `${exchange}.${uuidv7()}`;
  const tried = Promise.withResolvers<void>();
  let working: Channel | undefined;

  /** Sets the hints up, and watches them until something is missing. */
  async function setUpAndWatch(): Promise<number> {
    await declareExchange(connection, exchange);
    const channel = await openChannel(connection.createChannel());
    const lost = Promise.withResolvers<never>();
    lost.promise.catch(() => undefined);
    channel.on("error", lost.reject);
    channel.on("close", () => lost.reject(new QueueError("RabbitMQ closed the channel of the hints")));
    let heard = () => {};

    async function listen(onHint: (content: Buffer) => void) {
      // The queue is deleted with the connection.
      const options = { "x-max-length": MAX_HINTS, "x-message-ttl": HINT_TTL_MS };
      await channel.assertQueue(queue, { exclusive: true, durable: false, arguments: options });
      await channel.bindQueue(queue, exchange, "");
      await channel.consume(
        queue,
        (message) => {
          if (message === null) return lost.reject(new QueueError(`the queue ${queue} was deleted`));
          heard();
          if (message.properties.type !== PROBE.type) onHint(message.content);
        },
        { noAck: true },
      );
    }

    async function probe() {
      let isHeard = false;
      const { promise, resolve } = Promise.withResolvers<void>();
      heard = () => {
        isHeard = true;
        resolve();
      };
      channel.publish(exchange, "", PROBE.content, { type: PROBE.type, persistent: false });
      // Needs no rights, and is answered after the probe was routed, or not at all if the exchange is missing or refused. Without
      // a deadline: if the broker is frozen or blocked, there is nothing to repair.
      await channel.prefetch(0);
      if (!onHint) return;
      await Promise.race([promise, sleep(PROBE_MS, signal)]);
      // If this process was frozen meanwhile, the probe is read before this answer.
      if (!isHeard) await channel.prefetch(0);
      if (!isHeard) throw new QueueError(`the binding of ${exchange} to ${queue} is missing`);
    }

    try {
      if (onHint) await Promise.race([listen(onHint), lost.promise]);
      for (;;) {
        await Promise.race([probe(), lost.promise]);
        working = channel;
        onState();
        tried.resolve();
        await Promise.race([sleep(PROBE_EVERY_MS, signal), lost.promise]);
        if (signal.aborted) return 0;
      }
    } catch (error) {
      if (!working) throw error;
      report(error);
      return REPAIR_MS;
    } finally {
      working = undefined;
      // Its consumer must not take the probe of the next one.
      await closeChannel(channel);
    }
  }

  function report(error: unknown) {
    tried.resolve();
    if (!signal.aborted) onState(reasonOf(error));
  }
  runLoop(setUpAndWatch, { ...RETRY, signal, onFailure: report });

  return {
    send(content) {
      try {
        working?.publish(exchange, "", content, { persistent: false });
      } catch {
        // The channel has just closed.
      }
    },
    tried: tried.promise,
  };
}

/** Declares the exchange. Without the right to do so, uses the one that exists: the first probe proves it. */
async function declareExchange(connection: ChannelModel, exchange: string): Promise<void> {
  try {
    await withChannel(connection, (channel) => channel.assertExchange(exchange, "fanout", { durable: true }));
  } catch (error) {
    if (codeOf(error) !== ACCESS_REFUSED) throw error;
  }
}
