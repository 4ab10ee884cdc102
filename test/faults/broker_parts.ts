import type { Channel } from "amqplib";
import type { World } from "./world.ts";

/** What the processes make on RabbitMQ besides their queue. */
export type BrokerPart = "hints" | "dead letters";

type Broker = Pick<World, "queueName" | "openChannel">;

export function hintsOf({ queueName }: Broker): string {
  return `${queueName}.hints`;
}

export function deadLettersOf({ queueName }: Broker): string {
  return `${queueName}.dead`;
}

/** Whether it is there now: for hints, whether they get anywhere. */
export async function isThere(broker: Broker, part: BrokerPart): Promise<boolean> {
  await using operator = await broker.openChannel();
  const { channel } = operator;
  try {
    if (part === "hints") return await isRouted(channel, broker);
    await channel.checkQueue(deadLettersOf(broker));
    return true;
  } catch {
    // RabbitMQ closes the channel that asks for what is missing.
    return false;
  }
}

/** Whether a hint gets into any queue. */
async function isRouted(channel: Channel, broker: Broker): Promise<boolean> {
  let isReturned = false;
  channel.on("return", () => {
    isReturned = true;
  });
  // No scheduler can read it.
  channel.publish(hintsOf(broker), "", Buffer.from("{}"), { mandatory: true });
  await channel.checkQueue(broker.queueName);
  return !isReturned;
}
