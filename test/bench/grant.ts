import { expect } from "bun:test";
import { openDatabase } from "../../lib/database.ts";
import { compareSums } from "../../lib/dev/compare_sums.ts";
import { decodeMessage, encodeMessage } from "../../lib/reservations/message.ts";
import { claimDue } from "../../lib/reservations/scan_repository.ts";
import { processMessages } from "../../worker.ts";
import { createTestDatabase, type TestDatabase } from "../harness/database.ts";
import { silent, until } from "../harness/harness.ts";
import { openPipeline, type Pipeline } from "../harness/pipeline.ts";
import { analyze, type Fill, fill } from "./fill.ts";
import { startUsage } from "./usage.ts";

/** What is granted. */
export interface GrantOptions {
  count: number;
  users: number;
  settings: Record<string, string>;
  isHot?: boolean;
  workers?: number;
  /** How many others are in the tables. */
  finished?: number;
  future?: number;
}

const WARM_COUNT = 5_000;
const DRAIN_MS = 1_200_000;
const COMPARE_MS = 600_000;
/** Batches of the processes by default. */
const [SCAN_BATCH, WORKER_BATCH] = [2_000, 1_000];

/** Measures grants per second from due to DONE, through the real scheduler, broker and workers. */
export async function benchGrant(options: GrantOptions) {
  const { count, users, finished = 0, future = 0 } = options;
  await using pipeline = await openPipeline();
  const { test } = pipeline;
  await fill(test, { count: finished, users, prefix: "finished", at: "past", isDone: true });
  await fill(test, { count: future, users, prefix: "future", at: { inMs: 86_400_000 } });
  if (finished + future > 0) await analyze(test);
  await warmUp(pipeline, options);
  await fillDue(test, options);
  const end = startUsage();
  const scheduler = await pipeline.start("scheduler", options.settings);
  await untilDrained(test);
  const usages = end(pipeline.services);
  const first = scheduler.log().find(({ confirmed }) => confirmed !== undefined);
  const startedAt = Date.parse(String(first?.time)) - Number(first?.tookMs);
  const [row] = await test.query<{ last: Date }>("select max(created_at) last from point_transactions");
  const perS = (count / (Number(row?.last) - startedAt)) * 1_000;
  await expectGranted(test, { count: count + WARM_COUNT, finished, future });
  return { perS, usages, deadlocks: deadlocksOf(pipeline) };
}

/** Measures the same statements in this process, one after the other on one connection, without a broker. */
export async function benchDatabaseOnly(options: GrantOptions): Promise<number> {
  const test = await createTestDatabase();
  const database = openDatabase(test.url, { connections: 1 });
  async function drain(count: number) {
    for (let granted = 0; granted < count; ) {
      const claimed = await claimDue(database, { limit: SCAN_BATCH, leaseMs: 60_000 });
      if (claimed.length === 0) throw new Error(`Nothing is due after ${granted} of ${count}`);
      for (let at = 0; at < claimed.length; at += WORKER_BATCH) {
        const message = decodeMessage(encodeMessage(claimed.slice(at, at + WORKER_BATCH)));
        await processMessages([message], { database, logger: silent, maxAttempts: 1 });
      }
      granted += claimed.length;
    }
  }
  try {
    await fill(test, { ...dueOf(options), prefix: "warm", count: WARM_COUNT });
    await drain(WARM_COUNT);
    await fillDue(test, options);
    const startedAt = performance.now();
    await drain(options.count);
    const seconds = (performance.now() - startedAt) / 1_000;
    await expectGranted(test, { count: options.count + WARM_COUNT });
    return options.count / seconds;
  } finally {
    await database.close();
    await test.drop();
  }
}

function dueOf({ count, users, isHot = false }: Pick<GrantOptions, "count" | "users" | "isHot">): Fill {
  return { count, users, isHot, prefix: "due", at: { inMs: -1_000 } };
}

/** Lets the workers grant a little, so that the start of a process is not measured. */
async function warmUp(
  pipeline: Pipeline,
  { users, workers = 1, settings }: Pick<GrantOptions, "users" | "workers" | "settings">,
): Promise<void> {
  await Promise.all(Array.from({ length: workers }, () => pipeline.start("worker", settings)));
  await fill(pipeline.test, { ...dueOf({ count: WARM_COUNT, users }), prefix: "warm" });
  const scheduler = await pipeline.start("scheduler", settings);
  await untilDrained(pipeline.test);
  await scheduler.kill("SIGKILL");
}

/** Fills in what is due, and waits until MySQL has written out, and cleared away, most of what that has left. */
async function fillDue(test: TestDatabase, options: GrantOptions): Promise<void> {
  await fill(test, dueOf(options));
  await test.query("select count(*) from point_reservations force index (point_reservations_scan_at)");
  await Bun.sleep(1_000);
}

/** Waits until nothing is due, nor being granted. */
export async function untilDrained(test: TestDatabase): Promise<void> {
  const isDrained = async () => {
    await Bun.sleep(50);
    const rows = await test.query(
      "select 1 from point_reservations where scan_at < now(3) + interval 1 hour order by scan_at limit 1",
    );
    return rows.length === 0;
  };
  await until("all that was due is granted", isDrained, DRAIN_MS);
}

/** Checks the invariants after each part: all that was due is DONE, once, not early, and the sums agree. */
export async function expectGranted(
  test: TestDatabase,
  { count, finished = 0, future = 0 }: Pick<GrantOptions, "count" | "finished" | "future">,
): Promise<void> {
  const [row] = await test.query<Record<string, unknown>>(
    `select (select count(*) from point_reservations where status = 'DONE') done,
       (select count(*) from point_reservations where status = 'PENDING') pending,
       (select count(*) from point_reservations) reservations, (select count(*) from point_transactions) entries`,
  );
  const counts = Object.fromEntries(Object.entries(row ?? {}).map(([name, value]) => [name, Number(value)]));
  const done = count + finished;
  expect(counts).toEqual({ done, pending: future, reservations: done + future, entries: done });
  const none = { balanceMismatches: 0, reservationMismatches: 0, early: 0 };
  expect(await compareSums(test.database, { workMs: COMPARE_MS })).toMatchObject({ ...none, agree: true });
}

/** How often MySQL has broken up a deadlock of these processes. */
export function deadlocksOf({ services }: Pipeline): number {
  const lines = services.flatMap(({ service }) => service.log());
  return lines.filter(({ error }) => /DEADLOCK|1213/.test(JSON.stringify(error ?? ""))).length;
}
