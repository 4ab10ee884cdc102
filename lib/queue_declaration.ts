/** The queues that we declare, and how to see that they are there. */
import type { Channel, ChannelModel, Options } from "amqplib";
import { ACCESS_REFUSED, codeOf, NOT_FOUND, openChannel, withChannel } from "./amqp.ts";

/** Far more than back-pressure allows: a faulty publisher is refused before it fills the broker's disk. */
const MAX_MESSAGES = 1_000_000;
const MAX_DEAD_MESSAGES = 100_000;
/** A message that is redelivered more often probably kills its workers: RabbitMQ moves it to the dead-letter queue. */
const MAX_DELIVERIES = 20;

/** The name of the queue that gets the dead letters of a queue. */
export function deadLettersOf(name: string): string {
  return `${name}.dead`;
}

/** Declares a queue and its dead-letter queue. */
export async function declareQueues(connection: ChannelModel, name: string): Promise<void> {
  await declareDeadLetters(connection, name);
  await declareQueue(connection, name, {
    durable: true,
    arguments: {
      "x-queue-type": "quorum",
      "x-max-length": MAX_MESSAGES,
      "x-delivery-limit": MAX_DELIVERIES,
      // Both are needed to keep dead letters across a crash of the broker.
      "x-overflow": "reject-publish",
      "x-dead-letter-strategy": "at-least-once",
      "x-dead-letter-exchange": "",
      "x-dead-letter-routing-key": deadLettersOf(name),
    },
  });
}

/** Declares the dead-letter queue of a queue. */
export function declareDeadLetters(connection: ChannelModel, name: string): Promise<void> {
  return declareQueue(connection, deadLettersOf(name), {
    durable: true,
    arguments: { "x-queue-type": "quorum", "x-max-length": MAX_DEAD_MESSAGES },
  });
}

/** Declares a queue. Without the right to do so, uses the one that exists. */
async function declareQueue(
  connection: ChannelModel,
  name: string,
  options: Options.AssertQueue,
): Promise<void> {
  try {
    await withChannel(connection, (channel) => channel.assertQueue(name, options));
  } catch (refusal) {
    if (codeOf(refusal) !== ACCESS_REFUSED) throw refusal;
    try {
      await withChannel(connection, (channel) => channel.checkQueue(name));
    } catch (error) {
      // RabbitMQ 4 refuses this, too. Then its use shows whether the queue exists.
      if (codeOf(error) !== ACCESS_REFUSED) throw refusal;
    }
  }
}

/**
 * Makes the function that finds out which queues are missing, on a channel of its own, since an error closes the channel.
 * Never looks twice at once: a broker that is frozen does not get more and more questions.
 */
export function openLook(connection: ChannelModel, names: readonly string[]): () => Promise<string[]> {
  let channel: Channel | undefined;
  let looking: Promise<string[]> | undefined;
  /** RabbitMQ 4 does not let this user look at them. */
  const hidden = new Set<string>();

  async function look() {
    const missing: string[] = [];
    for (const name of names) {
      if (hidden.has(name)) continue;
      channel ??= await openChannel(connection.createChannel());
      try {
        await channel.checkQueue(name);
      } catch (error) {
        channel = undefined;
        if (codeOf(error) === NOT_FOUND) missing.push(name);
        else if (codeOf(error) === ACCESS_REFUSED) hidden.add(name);
        else throw error;
      }
    }
    channel ??= await openChannel(connection.createChannel());
    // Needs no rights: even without them, it proves that the broker works.
    await channel.prefetch(0);
    return missing;
  }

  return () => {
    looking ??= look().finally(() => {
      looking = undefined;
    });
    return looking;
  };
}
