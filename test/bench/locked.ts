import { openDatabase } from "../../lib/database.ts";
import type { TestDatabase } from "../harness/database.ts";
import { until } from "../harness/harness.ts";
import { openPipeline, type Request, reserveAll } from "../harness/pipeline.ts";
import { expectGranted, untilDrained } from "./grant.ts";
import { PER_S, reserveFor, WARM } from "./lateness.ts";

/** Their balances are locked from the first reservation to the last. */
const LOCKED = Array.from({ length: 10 }, (_, index) => `Locked${index}`);
/** How often each of them gets points, in milliseconds. */
const EVERY_MS = 250;
const DRAIN_MS = 60_000;
/** Sessions that are silent for 15 s are ended. */
const ALIVE_MS = 3_000;

/** Measures others beside locked balances: 500 reservations per second over HTTP, and a few for the locked ones. */
export async function benchLocked({ seconds }: { seconds: number }, settings: Record<string, string>) {
  await using pipeline = await openPipeline();
  const { test } = pipeline;
  const { url } = await pipeline.start("api", settings);
  for (const entry of ["scheduler", "worker"] as const) {
    await pipeline.start(entry, { SCAN_INTERVAL_MS: "10000", ...settings });
  }
  await reserveFor(url, WARM);
  // Everyone has a balance.
  await reserveAll(url, { requests: requestsOfLocked() });
  await untilDrained(test);
  const [start] = await test.query<{ now: Date }>("select now(3) now");
  let lockedCount = 0;
  const releasedAt = await whileLocked(test, async () => {
    const end = performance.now() + seconds * 1_000;
    async function reserveLocked() {
      for (; performance.now() < end; await Bun.sleep(EVERY_MS)) {
        await reserveAll(url, { requests: requestsOfLocked() });
        lockedCount += LOCKED.length;
      }
    }
    await Promise.all([reserveFor(url, { seconds, spreadMs: seconds * 1_000 }), reserveLocked()]);
    await until("all others are granted", () => areOthersDone(test), DRAIN_MS);
  });
  await untilDrained(test);
  const warm = WARM.seconds * PER_S + LOCKED.length;
  await expectGranted(test, { count: warm + seconds * PER_S + lockedCount });

  const late = await test.query<{ isLocked: 0 | 1; late: string; at: Date }>(
    `select t.user_id like 'Locked%' isLocked, t.created_at at,
       timestampdiff(microsecond, greatest(r.execute_at, r.created_at), t.created_at) / 1000 late
     from point_transactions t join point_reservations r on r.id = t.reservation_id where r.created_at > ?`,
    [start?.now],
  );
  const others = late.filter(({ isLocked }) => isLocked === 0).map((row) => Number(row.late));
  others.sort((a, b) => a - b);
  const at = (share: number) => others[Math.min(others.length - 1, Math.floor(others.length * share))] ?? 0;
  const lastAt = Math.max(...late.filter(({ isLocked }) => isLocked === 1).map((row) => Number(row.at)));
  return {
    /** Of the others: from the time when a reservation could have been granted to its grant. */
    p50Ms: at(0.5),
    p99Ms: at(0.99),
    maxMs: at(1),
    /** From the release of the locks to the last grant of the locked ones, and how many there were. */
    releaseMs: lastAt - releasedAt,
    lockedCount,
  };
}

function requestsOfLocked(): Request[] {
  const execute_at = new Date().toISOString();
  return LOCKED.map((user_id) => ({
    user_id,
    point_amount: 1,
    execute_at,
    idempotency_key: crypto.randomUUID(),
  }));
}

/** Holds the locks during some work; resolves to the time of the release, by the database's clock. */
async function whileLocked({ url }: TestDatabase, work: () => Promise<void>): Promise<number> {
  const holder = openDatabase(url, { connections: 1, workMs: 600_000 });
  const released = holder.transaction(async ({ select }) => {
    await select("select * from point_root where user_id in (?) for update", [LOCKED]);
    const alive = setInterval(() => select("select 1"), ALIVE_MS);
    await work().finally(() => clearInterval(alive));
    const [row] = await select<{ now: Date }>("select now(3) now");
    return Number(row?.now);
  });
  return released.finally(() => holder.close());
}

async function areOthersDone({ query }: TestDatabase): Promise<boolean> {
  const open = await query(
    `select 1 from point_reservations
     where scan_at < now(3) + interval 1 hour and user_id not like 'Locked%' limit 1`,
  );
  return open.length === 0;
}
