import type { Socket } from "node:net";
import { hostname } from "node:os";
import { type Channel, type ChannelModel, connect, credentials } from "amqplib";
import { ExpectedError } from "./errors.ts";
import { withDeadline } from "./loop.ts";

/** RabbitMQ is unavailable, blocked or too slow. A message that was just published may have arrived or not. */
export class QueueError extends ExpectedError {
  override readonly name = "QueueError";
}

const CONNECT_MS = 10_000;
/** The longest wait for an answer of the broker, in milliseconds. */
export const CALL_MS = 5_000;
const CLOSE_MS = 2_000;

/** The codes of the errors that close a channel: https://www.rabbitmq.com/amqp-0-9-1-reference#constants */
export const ACCESS_REFUSED = 403;
export const NOT_FOUND = 404;

/** The code of an error of a channel; undefined for other errors. */
export function codeOf(error: unknown): number | undefined {
  return (error as { code?: number } | undefined)?.code;
}

/** What an error says. */
export function reasonOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** The error for an answer that does not come in time. */
export function noAnswer(ms: number): QueueError {
  return new QueueError(`RabbitMQ did not answer within ${ms} ms`);
}

/**
 * Connects. The broker shows the connection under the name `<program> <host> <pid>`.
 *
 * @throws {Error} with the reason in its message
 */
export async function openConnection(url: string, program: string): Promise<ChannelModel> {
  const credentials = credentialsOf(url);
  try {
    return await connect(withHeartbeat(url), {
      noDelay: true,
      keepAlive: true,
      timeout: CONNECT_MS,
      clientProperties: { connection_name: `${program} ${hostname()} ${process.pid}` },
      ...(credentials && { credentials }),
    });
  } catch (error) {
    // The broker gives a reason, but amqplib does not pass it on.
    if (!(error instanceof Error && error.message.includes("got <ConnectionClose"))) throw error;
    const vhost = decodeURIComponent(new URL(url).pathname.slice(1)) || "/";
    throw new QueueError(
      `RabbitMQ refuses the virtual host ${vhost}: it does not exist, the user has no rights on it, or it has too many connections. Is AMQP_URL right?`,
    );
  }
}

/** Opens a channel. If that takes too long, the channel closes again as soon as it is open. */
export async function openChannel<T extends Channel>(opening: Promise<T>): Promise<T> {
  // Without this listener, an error of the channel would end the process.
  opening.then(
    (channel) => channel.on("error", () => undefined),
    () => undefined,
  );
  try {
    return await withDeadline(opening, CALL_MS, () => noAnswer(CALL_MS));
  } catch (error) {
    opening.then(closeChannel, () => undefined);
    throw error;
  }
}

/** Does something on a channel of its own: an error of the broker closes only this channel. */
export async function withChannel<T>(
  connection: ChannelModel,
  work: (channel: Channel) => Promise<T>,
): Promise<T> {
  const channel = await openChannel(connection.createChannel());
  try {
    return await withDeadline(work(channel), CALL_MS, () => noAnswer(CALL_MS));
  } finally {
    closeChannel(channel);
  }
}

/** Closes a channel after all that was sent on it; never rejects, and may never resolve on a dead connection. */
export async function closeChannel(channel: Channel): Promise<void> {
  await channel.close().catch(() => undefined);
}

/** Closes, or gives up after 2 s: closing a dead connection may never settle. */
export async function closeConnection(connection: ChannelModel, channel?: Channel): Promise<void> {
  try {
    // The closing of a connection overtakes acknowledgements that were just sent; that of their channel does not.
    const closing = (channel ? closeChannel(channel) : Promise.resolve()).then(() => connection.close());
    await withDeadline(closing, CLOSE_MS, () => noAnswer(CLOSE_MS));
  } catch {
    // A blocked or dead broker does not answer; the socket must not stay open.
    (connection.connection as unknown as { stream: Socket }).stream.destroy();
  }
}

/** User and password of a URL; undefined without them. amqplib itself decodes only those in Latin-1. */
function credentialsOf(url: string) {
  const { username, password } = new URL(url);
  return username || password ? credentials.plain(decode(username), decode(password)) : undefined;
}

function decode(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    // A `%` that encodes nothing stands for itself.
    return text;
  }
}

/** Sets a heartbeat of 20 s unless the URL has one: a dead peer is noticed after two heartbeats. */
function withHeartbeat(url: string): string {
  const parsed = new URL(url);
  if (!parsed.searchParams.has("heartbeat")) parsed.searchParams.set("heartbeat", "20");
  return parsed.href;
}
