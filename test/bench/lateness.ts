import type { TestDatabase } from "../harness/database.ts";
import { openPipeline, type Request, requestsOf, reserveAll } from "../harness/pipeline.ts";
import { fill } from "./fill.ts";
import { deadlocksOf, expectGranted, untilDrained } from "./grant.ts";
import { startUsage } from "./usage.ts";

export const PER_S = 500;
const TICK_MS = 20;
/** The first ones find processes that have never done it. */
export const WARM = { seconds: 2, spreadMs: 1_000 };
/** How long before the burst it is filled in. */
const FILL_MS_PER_ROW = 0.15;

/** Measures a steady load over HTTP: due times spread over the next seconds, every tenth due at once. */
export function benchSteady(load: typeof WARM, settings: Record<string, string>) {
  return measure(settings, { count: load.seconds * PER_S, load: (url) => reserveFor(url, load) });
}

/** Measures many that are due at one moment, while the processes stand idle. */
export function benchBurst(count: number, settings: Record<string, string>) {
  return measure(settings, {
    count: count + 1,
    async prepare(test, url) {
      const inMs = 3_000 + count * FILL_MS_PER_ROW;
      const filledBy = Date.now() + inMs;
      await fill(test, { count, users: 100_000, prefix: "due", at: { inMs } });
      // One comes over HTTP, as in production: it tells the scheduler when to look.
      const [request] = requestsOf(1, { spreadMs: 0 });
      const execute_at = new Date(filledBy).toISOString();
      await reserveAll(url, { requests: [{ ...request, execute_at } as Request] });
      if (Date.now() > filledBy) throw new Error("The burst was not filled in before its time");
      await Bun.sleep(filledBy - Date.now());
    },
  });
}

/** Starts one process of each kind, lets them grant a little, and measures what a load of `count` reservations comes to. */
async function measure(
  settings: Record<string, string>,
  options: {
    count: number;
    prepare?: (test: TestDatabase, url: string) => Promise<void>;
    load?: (url: string) => Promise<void>;
  },
) {
  const { count, prepare, load } = options;
  await using pipeline = await openPipeline();
  const { test, services } = pipeline;
  const { url } = await pipeline.start("api", settings);
  // The interval of production: the scheduler finds by itself what comes sooner.
  for (const entry of ["scheduler", "worker"] as const) {
    await pipeline.start(entry, { SCAN_INTERVAL_MS: "10000", ...settings });
  }
  await reserveFor(url, WARM);
  await untilDrained(test);
  await prepare?.(test, url);
  const end = startUsage();
  await load?.(url);
  await untilDrained(test);
  const usages = end(services);
  const warm = WARM.seconds * PER_S;
  await expectGranted(test, { count: warm + count });
  const late = await readLateness(test, warm);
  const at = (share: number) => late[Math.min(late.length - 1, Math.floor(late.length * share))] ?? 0;
  return {
    // Lateness: the time from `execute_at` to the grant.
    p50Ms: at(0.5),
    p99Ms: at(0.99),
    maxMs: at(1),
    /** Of the last one of each tenth of the grants: how it grows. */
    growthMs: Array.from({ length: 10 }, (_, tenth) => at((tenth + 1) / 10)),
    usages,
    deadlocks: deadlocksOf(pipeline),
  };
}

/** Reserves over HTTP: due times spread over the next milliseconds, every tenth due at once. */
export async function reserveFor(url: string, { seconds, spreadMs }: typeof WARM): Promise<void> {
  const sent: Promise<unknown>[] = [];
  const startedAt = Date.now();
  for (let count = 0; count < seconds * PER_S; await Bun.sleep(TICK_MS)) {
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
  }
  await Promise.all(sent);
}

/** The lateness of all but the first `skip` grants, ascending, in milliseconds. */
async function readLateness({ query }: TestDatabase, skip: number): Promise<number[]> {
  const rows = await query<{ late: number | string }>(
    `select timestampdiff(microsecond, r.execute_at, t.created_at) / 1000 late
     from point_transactions t join point_reservations r on r.id = t.reservation_id order by t.created_at, t.id`,
  );
  return rows
    .slice(skip)
    .map(({ late }) => Number(late))
    .sort((a, b) => a - b);
}
