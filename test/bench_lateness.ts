import { fill } from "./bench_fill.ts";
import { deadlocksOf, expectGranted, untilDrained } from "./bench_grant.ts";
import { startUsage, type Usages } from "./bench_usage.ts";
import type { TestDatabase } from "./harness.ts";
import { openPipeline, type Pipeline, type Request, requestsOf, reserveAll } from "./pipeline.ts";

/** Of granted − execute_at, in milliseconds. */
export interface Lateness {
  p50Ms: number;
  p99Ms: number;
  maxMs: number;
}

export interface LatenessFigures extends Lateness {
  usages: Usages;
  deadlocks: number;
}

export interface BurstFigures extends LatenessFigures {
  perS: number;
  /** The lateness of the last one of each tenth of the grants: how it grows. */
  growthMs: number[];
}

const PER_S = 500;
const TICK_MS = 20;

/** A steady load over HTTP: due times spread over the next seconds, every tenth due at once. */
export async function benchSteady(options: {
  seconds: number;
  spreadMs: number;
  settings: Record<string, string>;
}): Promise<LatenessFigures> {
  await using pipeline = await openPipeline();
  const { url } = await startAll(pipeline, options.settings);
  // The first ones find processes that have never done it.
  await reserveFor(url, { seconds: 2, spreadMs: 1_000 });
  await untilDrained(pipeline.test);
  const warm = await countEntries(pipeline.test);
  const end = startUsage();
  const count = await reserveFor(url, options);
  await untilDrained(pipeline.test);
  const usages = end(pipeline.services);
  await expectGranted(pipeline.test, warm + count, {});
  const { late } = await readLateness(pipeline.test, warm);
  return { ...percentiles(late), usages, deadlocks: deadlocksOf(pipeline) };
}

async function reserveFor(
  url: string,
  { seconds, spreadMs }: { seconds: number; spreadMs: number },
): Promise<number> {
  const sent: Promise<unknown>[] = [];
  const startedAt = Date.now();
  for (let count = 0; count < seconds * PER_S; ) {
    const target = Math.min(seconds * PER_S, ((Date.now() - startedAt) / 1_000) * PER_S);
    const requests: Request[] = [];
    for (; count < target; count++) {
      const inMs = count % 10 === 0 ? 0 : Math.random() * spreadMs;
      requests.push({
        user_id: `User${count % 10_000}`,
        point_amount: 1 + (count % 100),
        execute_at: new Date(Date.now() + inMs).toISOString(),
        idempotency_key: crypto.randomUUID(),
      });
    }
    if (requests.length > 0) sent.push(reserveAll(url, { requests }));
    await Bun.sleep(TICK_MS);
  }
  await Promise.all(sent);
  return seconds * PER_S;
}

/** How long before the burst it is filled in. */
const FILL_MS_PER_ROW = 0.15;

/** Many due at one moment, while the processes stand idle. */
export async function benchBurst(options: {
  count: number;
  settings: Record<string, string>;
}): Promise<BurstFigures> {
  await using pipeline = await openPipeline();
  const { url } = await startAll(pipeline, options.settings);
  await reserveFor(url, { seconds: 2, spreadMs: 1_000 });
  await untilDrained(pipeline.test);
  const warm = await countEntries(pipeline.test);
  const inMs = 3_000 + options.count * FILL_MS_PER_ROW;
  const filledBy = Date.now() + inMs;
  await fill(pipeline.test, { count: options.count, users: 100_000, prefix: "due", at: { inMs } });
  // One comes as they do in life, over HTTP: it tells the scheduler when to look.
  const [request] = requestsOf(1, { spreadMs: 0 });
  await reserveAll(url, {
    requests: [{ ...request, execute_at: new Date(filledBy).toISOString() } as Request],
  });
  if (Date.now() > filledBy) throw new Error("The burst was not filled in before its time");
  await Bun.sleep(filledBy - Date.now());
  const end = startUsage();
  await untilDrained(pipeline.test);
  const usages = end(pipeline.services);
  await expectGranted(pipeline.test, warm + options.count + 1, {});
  const { late } = await readLateness(pipeline.test, warm);
  const lates = percentiles(late);
  const growthMs = Array.from(
    { length: 10 },
    (_, tenth) => late[Math.ceil((late.length * (tenth + 1)) / 10) - 1] ?? 0,
  );
  const perS = (options.count / lates.maxMs) * 1_000;
  return { ...lates, perS, growthMs, usages, deadlocks: deadlocksOf(pipeline) };
}

async function startAll(pipeline: Pipeline, settings: Record<string, string>) {
  const api = await pipeline.start("api", settings);
  // The interval of production: what comes sooner is found by itself.
  for (const entry of ["scheduler", "worker"] as const) {
    await pipeline.start(entry, { SCAN_INTERVAL_MS: "10000", ...settings });
  }
  return api;
}

async function countEntries(test: TestDatabase): Promise<number> {
  const [row] = await test.query<{ entries: number }>("select count(*) entries from point_transactions");
  return Number(row?.entries);
}

/** The lateness of all but the first `skip` grants, ascending. */
async function readLateness(test: TestDatabase, skip: number): Promise<{ late: number[] }> {
  const rows = await test.query<{ late: number | string }>(
    `select timestampdiff(microsecond, r.execute_at, t.created_at) / 1000 late
     from point_transactions t join point_reservations r on r.idempotency_key = t.idempotency_key
     order by t.created_at, t.id`,
  );
  return {
    late: rows
      .slice(skip)
      .map(({ late }) => Number(late))
      .sort((a, b) => a - b),
  };
}

function percentiles(sorted: readonly number[]): Lateness {
  const at = (share: number) => sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? 0;
  return { p50Ms: at(0.5), p99Ms: at(0.99), maxMs: at(1) };
}
