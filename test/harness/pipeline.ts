import { expect } from "bun:test";
import { compareSums, type Sums } from "../../lib/dev/compare_sums.ts";
import { type Outcome, openQueue, type Queue, type QueueOptions } from "../../lib/queue.ts";
import { decodeMessage, encodeMessage } from "../../lib/reservations/message.ts";
import type { Reservation } from "../../lib/reservations/reservation.ts";
import type { ReservationStatus } from "../../lib/schema.ts";
import { type GrantOptions, processMessages } from "../../worker.ts";
import { createTestDatabase, type TestDatabase } from "./database.ts";
import { AMQP_URL, DATABASE_URL, silent, uniqueName, until } from "./harness.ts";
import { type Entry, type RunningService, type StartOptions, startService } from "./processes.ts";
import { deleteQueue, openChannel } from "./queue.ts";

export type Pipeline = Awaited<ReturnType<typeof openPipeline>>;

/** Opens a database and a queue of one's own, for real processes. `await using` ends all of it. */
export async function openPipeline({ databaseUrl = DATABASE_URL, amqpUrl = AMQP_URL } = {}) {
  const test = await createTestDatabase({ server: databaseUrl });
  const queueName = uniqueName("pipeline_test");
  const services: { entry: Entry; service: RunningService }[] = [];
  const queues: Queue[] = [];
  return {
    test,
    queueName,
    /** The processes that were started, in their order. */
    services,
    /** Starts a process of an entry file; it is killed with the pipeline. */
    async start(entry: Entry, env: Record<string, string> = {}, options?: StartOptions) {
      const all = { DATABASE_URL: test.url, AMQP_URL: amqpUrl, QUEUE: queueName, ...env };
      const service = await startService(entry, all, options);
      services.push({ entry, service });
      return service;
    },
    /** The test's own connection to the queue. */
    async openQueue(options: Pick<QueueOptions, "onlyHints"> = {}) {
      const queue = openQueue(amqpUrl, {
        name: queueName,
        onConnected() {},
        onDisconnected() {},
        ...options,
      });
      queues.push(queue);
      await until("the test's queue is ready", () => queue.isReady());
      return queue;
    },
    async countDead() {
      await using operator = await openChannel(amqpUrl);
      return (await operator.channel.checkQueue(`${queueName}.dead`)).messageCount;
    },
    async [Symbol.asyncDispose]() {
      await Promise.all(services.map(({ service }) => service.kill("SIGKILL")));
      await Promise.all(queues.map((queue) => queue.close()));
      await deleteQueue(queueName, amqpUrl);
      await test.drop();
    },
  };
}

/** Grants reservations as a worker does when their messages come; resolves to what becomes of each message. */
export function processReservations(
  messages: readonly (readonly Reservation[])[],
  { logger = silent, maxAttempts = 10, ...options }: Partial<GrantOptions> & Pick<GrantOptions, "database">,
): Promise<Outcome[]> {
  const received = messages.map((reservations) => decodeMessage(encodeMessage(reservations)));
  return processMessages(received, { logger, maxAttempts, ...options });
}

/** Publishes messages as they are, `chunk` reservations in each. */
export async function publishReservations(
  queue: Queue,
  { reservations, chunk = 1 }: { reservations: readonly Reservation[]; chunk?: number },
): Promise<void> {
  const contents: Buffer[] = [];
  for (let at = 0; at < reservations.length; at += chunk) {
    contents.push(encodeMessage(reservations.slice(at, at + chunk)));
  }
  expect(await queue.publish(contents)).toBe(contents.length);
}

export interface Request {
  user_id: string;
  point_amount: number;
  execute_at: string;
  idempotency_key: string;
}

/** Requests whose times are spread evenly over the next milliseconds; each with its own key. */
export function requestsOf(count: number, { spreadMs }: { spreadMs: number }): Request[] {
  const startsAt = Date.now();
  return Array.from({ length: count }, (_, index) => ({
    user_id: `User${index % 17}`,
    point_amount: 1 + (index % 5),
    execute_at: new Date(startsAt + (index / count) * spreadMs).toISOString(),
    idempotency_key: crypto.randomUUID(),
  }));
}

/** Reserves over HTTP as a client does: the same key again if the answer is 503 or lost. Resolves to the ids. */
export async function reserveAll(
  url: string,
  { requests, concurrency = 50 }: { requests: readonly Request[]; concurrency?: number },
): Promise<string[]> {
  const ids: string[] = [];
  const waiting = requests.entries();
  async function client() {
    for (const [index, request] of waiting) {
      ids[index] = await until("it is reserved", () => reserve(url, request), 60_000);
    }
  }
  await Promise.all(Array.from({ length: concurrency }, client));
  return ids;
}

async function reserve(url: string, request: Request): Promise<string | undefined> {
  const init = { headers: { "content-type": "application/json" }, body: JSON.stringify(request) };
  const response = await fetch(`${url}/point/reserve`, { method: "POST", ...init }).catch(() => undefined);
  if (!response || response.status === 503) return undefined;
  const body = await response.text();
  if (response.status === 201) return JSON.parse(body).reservation_id;
  throw new Error(`Reserving was answered with ${response.status}: ${body}`);
}

/** The number of reservations in each status. */
export async function countStatuses(test: TestDatabase): Promise<Partial<Record<ReservationStatus, number>>> {
  const rows = await test.query<{ status: ReservationStatus; count: number }>(
    "select status, count(*) count from point_reservations group by status",
  );
  return Object.fromEntries(rows.map(({ status, count }) => [status, count]));
}

/** Waits until that many reservations are DONE. */
export async function untilDone(
  test: TestDatabase,
  { count, withinMs = 30_000 }: { count: number; withinMs?: number },
): Promise<void> {
  let seen = {};
  async function areDone() {
    // A restart of MySQL is no failure of the test's.
    const counts = await countStatuses(test).catch(() => undefined);
    if (counts) seen = counts;
    return counts?.DONE === count;
  }
  await until(() => `${count} are DONE, but ${JSON.stringify(seen)}`, areDone, withinMs);
}

/** Ledger, balances and reservations agree, and nothing was granted early. */
export async function expectAgreement({ database }: TestDatabase): Promise<Sums> {
  const sums = await compareSums(database);
  expect(sums).toMatchObject({ balanceMismatches: 0, reservationMismatches: 0, early: 0, agree: true });
  return sums;
}

/** Every reservation is DONE, with its one ledger entry, never early; ledger, balances and reservations agree. */
export async function expectAllDoneOnce(test: TestDatabase, count: number): Promise<Sums> {
  expect(await countStatuses(test)).toEqual({ DONE: count });
  const ledger =
    "select count(*) entries, count(distinct reservation_id) reservations from point_transactions";
  expect(await test.query(ledger)).toEqual([{ entries: count, reservations: count }]);
  return expectAgreement(test);
}
