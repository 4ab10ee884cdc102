import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { openAdmin } from "../harness/admin.ts";
import { insertReservations, reservationOf } from "../harness/fixtures.ts";
import { until } from "../harness/harness.ts";
import { listenerOf } from "../harness/listener.ts";
import {
  expectAllDoneOnce,
  openPipeline,
  type Pipeline,
  publishReservations,
  untilDone,
} from "../harness/pipeline.ts";
import { ENTRIES, type RunningService, untilReady } from "../harness/processes.ts";
import { canRestart, openRestartable } from "../harness/restartable.ts";
import { bodyOf, post } from "../http/client.ts";

// What /ready and the log say while a server misbehaves as a whole.

setDefaultTimeout(180_000);

if (!canRestart) console.warn("NOT TESTED: readiness while a server misbehaves");

const REQUESTS = 10_000;
const MESSAGES = 5_000;

describe.skipIf(!canRestart)("readiness", async () => {
  const servers = canRestart ? await openRestartable() : undefined;
  if (!servers) return;
  const { databaseUrl, amqpUrl } = servers;
  const admin = await openAdmin(databaseUrl);
  afterAll(async () => {
    await admin[Symbol.asyncDispose]();
    await servers[Symbol.asyncDispose]();
  });

  /** Starts all three processes with an ordinary account. */
  async function startAll(pipeline: Pipeline): Promise<RunningService[]> {
    const { url } = await admin.createAccount(pipeline.test);
    const services = [];
    for (const entry of ENTRIES) services.push(await pipeline.start(entry, { DATABASE_URL: url }));
    await untilReady(...services);
    return services;
  }

  /** Waits until /ready is 503 with this reason. */
  function untilUnready({ url }: RunningService, reason: RegExp): Promise<unknown> {
    return until(`/ready says ${reason}`, async () => {
      const response = await fetch(`${url}/ready`);
      return response.status === 503 && reason.test(await response.text());
    });
  }

  const STATES: [what: string, begin: string, end: string, reason: RegExp][] = [
    ["MySQL is read-only", "set global read_only = 1", "set global read_only = 0", /MySQL is read-only/],
    [
      "all tables are locked (FLUSH TABLES WITH READ LOCK)",
      "flush tables with read lock",
      "unlock tables",
      /MySQL did not answer .*, at a write to (reservations|balances|the ledger)/,
    ],
  ];

  test.each(STATES)(
    "if %s, no process is ready, and the log says it once (fault 46)",
    async (_, begin, end, reason) => {
      await using pipeline = await openPipeline(servers);
      const services = await startAll(pipeline);
      await admin.query(begin);
      try {
        for (const service of services) await untilUnready(service, reason);
      } finally {
        await admin.query(end);
      }
      await untilReady(...services);
      for (const { log } of services) {
        const changes = log().filter(({ msg }) => /^(ready|not ready|ready again)$/.test(String(msg)));
        expect(changes.map(({ msg }) => msg)).toEqual(["ready", "not ready", "ready again"]);
        expect(changes[1]).toMatchObject({ level: "warn", reason: expect.stringMatching(reason) });
      }
    },
  );

  test("if RabbitMQ is frozen, scheduler and worker are not ready; the API is: it uses it only for hints (fault 46)", async () => {
    await using pipeline = await openPipeline(servers);
    const [api, ...others] = await startAll(pipeline);
    const pid = listenerOf(amqpUrl) as number;
    process.kill(pid, "SIGSTOP");
    try {
      for (const service of others) await untilUnready(service, /RabbitMQ/);
      expect((await fetch(`${api?.url}/ready`)).status).toBe(200);
      expect(api?.log().filter(({ msg }) => msg === "not ready")).toEqual([]);
    } finally {
      process.kill(pid, "SIGCONT");
    }
    await untilReady(...others);
  });

  test(`${REQUESTS} requests and ${MESSAGES} messages in an outage give few lines of the log, which count them`, async () => {
    await using pipeline = await openPipeline(servers);
    const services = await startAll(pipeline);
    const [api] = services;
    const reservations = Array.from({ length: MESSAGES }, () => reservationOf());
    await insertReservations(pipeline.test, { reservations, status: "PROCESSING" });
    const queue = await pipeline.openQueue();
    const startedAt = performance.now();
    let unavailable = 0;
    await admin.query("set global read_only = 1");
    try {
      await untilUnready(services[2] as RunningService, /read-only/);
      await publishReservations(queue, { reservations });
      const waiting = Array.from({ length: REQUESTS }).keys();
      async function client() {
        for (const _ of waiting) {
          const response = await fetch(`${api?.url}/point/reserve`, post(bodyOf()));
          await response.text();
          if (response.status === 503) unavailable++;
        }
      }
      await Promise.all(Array.from({ length: 100 }, client));
    } finally {
      await admin.query("set global read_only = 0");
    }
    expect(unavailable).toBe(REQUESTS);
    await untilReady(...services);
    const seconds = Math.ceil((performance.now() - startedAt) / 1_000);
    const failed = () => api?.log().filter(({ msg }) => msg === "request failed") ?? [];
    await until("all are counted", () => {
      const counted = failed().reduce((sum, { count }) => sum + Number(count ?? 1), 0);
      return counted === REQUESTS;
    });
    expect(failed().length).toBeLessThanOrEqual(2 * (seconds + 2));
    // A few kinds in each of the three processes.
    const complaints = services.flatMap(({ log }) => log()).filter(({ level }) => level !== "info");
    expect(complaints.length).toBeLessThanOrEqual(5 * (seconds + 2));
    await untilDone(pipeline.test, { count: MESSAGES, withinMs: 60_000 });
    await expectAllDoneOnce(pipeline.test, MESSAGES);
  });
});
