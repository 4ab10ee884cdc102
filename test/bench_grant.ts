import { expect } from "bun:test";
import { openDatabase } from "../lib/database.ts";
import { decodeMessage, encodeMessage } from "../lib/message.ts";
import { compareSums } from "../lib/point_repository.ts";
import { claimDue } from "../lib/reservation_repository.ts";
import { processMessages } from "../worker.ts";
import { type Fill, fill } from "./bench_fill.ts";
import { startUsage, type Usages } from "./bench_usage.ts";
import { createTestDatabase, silent, type TestDatabase, until } from "./harness.ts";
import { openPipeline, type Pipeline } from "./pipeline.ts";

export interface GrantOptions {
  count: number;
  users: number;
  settings: Record<string, string>;
  hot?: boolean;
  workers?: number;
  /** What else is in the tables. */
  finished?: number;
  future?: number;
}

export interface GrantFigures {
  perS: number;
  usages: Usages;
  deadlocks: number;
}

const WARM_COUNT = 5_000;
const DRAIN_MS = 1_200_000;
const RECONCILE_MS = 600_000;

/** Grants per second from due to DONE, through the real scheduler, broker and workers. */
export async function benchGrant(options: GrantOptions): Promise<GrantFigures> {
  await using pipeline = await openPipeline();
  const { test } = pipeline;
  await fillAround(test, options);
  await warmUp(pipeline, options);
  await fill(test, dueFill(options));
  await settle(test);
  const end = startUsage();
  const scheduler = await pipeline.start("scheduler", options.settings);
  await untilDrained(test);
  const usages = end(pipeline.services);
  const first = scheduler.log().find(({ msg }) => msg === "published");
  const startedAt = Date.parse(String(first?.time)) - Number(first?.tookMs);
  const perS = (options.count / ((await lastGrant(test)) - startedAt)) * 1_000;
  await expectGranted(test, options.count + WARM_COUNT, options);
  return { perS, usages, deadlocks: deadlocksOf(pipeline) };
}

/** The same statements in this process, one after the other on one connection, without a broker. */
export async function benchDatabaseOnly(options: GrantOptions): Promise<number> {
  const test = await createTestDatabase();
  const database = openDatabase(test.url, { connections: 1 });
  try {
    await fill(test, { ...dueFill(options), prefix: "warm", count: WARM_COUNT });
    await drainHere(database, WARM_COUNT);
    await fill(test, dueFill(options));
    await settle(test);
    const startedAt = performance.now();
    await drainHere(database, options.count);
    const seconds = (performance.now() - startedAt) / 1_000;
    await expectGranted(test, options.count + WARM_COUNT, {});
    return options.count / seconds;
  } finally {
    await database.close();
    await test.drop();
  }
}

async function drainHere(database: TestDatabase["database"], count: number): Promise<void> {
  // As the processes do by default.
  const [scanBatch, workerBatch] = [2_000, 1_000];
  for (let granted = 0; granted < count; ) {
    const claimed = await claimDue(database, { limit: scanBatch, leaseMs: 60_000 });
    if (claimed.length === 0) throw new Error(`Nothing is due after ${granted} of ${count}`);
    for (let at = 0; at < claimed.length; at += workerBatch) {
      const message = decodeMessage(encodeMessage(claimed.slice(at, at + workerBatch)));
      await processMessages([message], { database, logger: silent, maxAttempts: 1 });
    }
    granted += claimed.length;
  }
}

function dueFill({ count, users, hot = false }: GrantOptions): Fill {
  return { count, users, hot, prefix: "due", at: { inMs: -1_000 } };
}

async function fillAround(
  test: TestDatabase,
  { finished = 0, future = 0, users }: GrantOptions,
): Promise<void> {
  await fill(test, { count: finished, users, prefix: "finished", at: "past", isDone: true });
  await fill(test, { count: future, users, prefix: "future", at: { inMs: 86_400_000 } });
  if (finished + future === 0) return;
  for (const table of ["point_reservations", "point_transactions", "point_root"]) {
    await test.query(`analyze table ${table}`);
  }
}

/** Lets the workers grant a little, so that what is measured is not the start of a process. */
export async function warmUp(
  pipeline: Pipeline,
  { users, workers = 1, settings }: Pick<GrantOptions, "users" | "workers" | "settings">,
): Promise<void> {
  await Promise.all(Array.from({ length: workers }, () => pipeline.start("worker", settings)));
  await fill(pipeline.test, { count: WARM_COUNT, users, prefix: "warm", at: { inMs: -1_000 } });
  const scheduler = await pipeline.start("scheduler", settings);
  await untilDrained(pipeline.test);
  await scheduler.kill("SIGKILL");
}

/** Waits until MySQL has written out, and cleared away, most of what the filling has left. */
async function settle(test: TestDatabase): Promise<void> {
  await test.query("select count(*) from point_reservations force index (point_reservations_scan_at)");
  await Bun.sleep(1_000);
}

/** Until nothing is due, nor under way. */
export async function untilDrained(test: TestDatabase): Promise<void> {
  await until(
    "all that was due is granted",
    async () => {
      await Bun.sleep(50);
      const rows = await test.query(
        "select 1 from point_reservations where scan_at < now(3) + interval 1 hour order by scan_at limit 1",
      );
      return rows.length === 0;
    },
    DRAIN_MS,
  );
}

async function lastGrant(test: TestDatabase): Promise<number> {
  const [row] = await test.query<{ last: Date }>("select max(created_at) last from point_transactions");
  return Number(row?.last);
}

/** The invariants, after each part: all that was due is DONE, once, not early, and the sums agree. */
export async function expectGranted(
  test: TestDatabase,
  count: number,
  { finished = 0, future = 0 }: Pick<GrantOptions, "finished" | "future">,
): Promise<void> {
  const [row] = await test.query<Record<string, unknown>>(
    `select (select count(*) from point_reservations where status = 'DONE') done,
       (select count(*) from point_reservations where status = 'PENDING') pending,
       (select count(*) from point_reservations) reservations, (select count(*) from point_transactions) entries`,
  );
  const counts = Object.fromEntries(Object.entries(row ?? {}).map(([name, value]) => [name, Number(value)]));
  const done = count + finished;
  expect(counts).toEqual({ done, pending: future, reservations: done + future, entries: done });
  expect(await compareSums(test.database, { workMs: RECONCILE_MS })).toMatchObject({
    ...{ usersApart: 0, reservationsApart: 0, early: 0, agree: true },
  });
}

/** How often MySQL has broken up a deadlock of these processes. */
export function deadlocksOf({ services }: Pipeline): number {
  const lines = services.flatMap(({ service }) => service.log());
  return lines.filter(({ error }) => /DEADLOCK|1213/.test(String((error as Error | undefined)?.message)))
    .length;
}
