import { connect } from "amqplib";
import { openQueue, type QueueOptions } from "../../lib/queue.ts";
import { AMQP_URL, uniqueName, until } from "./harness.ts";

/** Opens a channel as an operator has one, without our code. */
export async function openChannel(url: string = AMQP_URL) {
  const connection = await connect(url);
  const channel = await connection.createChannel();
  // What is refused rejects its call, and must not end the test as well.
  channel.on("error", () => undefined);
  return { channel, [Symbol.asyncDispose]: () => connection.close() };
}

/** Opens a queue of its own name, and waits until it is ready. `await using` closes and deletes it. */
export async function openTestQueue({
  url = AMQP_URL,
  name = uniqueName("queue_test"),
  ...options
}: Partial<QueueOptions> & { url?: string } = {}) {
  const queue = openQueue(url, { name, onConnected() {}, onDisconnected() {}, ...options });
  await until("the queue is ready", () => queue.isReady());
  return Object.assign(queue, {
    name,
    async [Symbol.asyncDispose]() {
      await queue.close();
      await deleteQueue(name);
    },
  });
}

/** Takes all messages that wait in a queue, each parsed. */
export async function takeMessages(name: string): Promise<unknown[]> {
  await using operator = await openChannel();
  const taken: unknown[] = [];
  for (;;) {
    const message = await operator.channel.get(name, { noAck: true });
    if (!message) return taken;
    taken.push(JSON.parse(message.content.toString()));
  }
}

/** Deletes a queue, its dead-letter queue and its exchange of hints. */
export async function deleteQueue(name: string, url: string = AMQP_URL): Promise<void> {
  await using operator = await openChannel(url);
  await operator.channel.deleteQueue(name);
  await operator.channel.deleteQueue(`${name}.dead`);
  await operator.channel.deleteExchange(`${name}.hints`);
}
