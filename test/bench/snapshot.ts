import { checkOverdue, findOpenFrom } from "../../lib/accounting/overdue_check.ts";
import { BEGINNING, claimDue, findNextScan } from "../../lib/reservations/scan_repository.ts";
import { fromAfter } from "../../lib/reservations/sweep.ts";
import { scanAndPublish } from "../../scheduler.ts";
import type { TestDatabase } from "../harness/database.ts";
import { insertReservation } from "../harness/fixtures.ts";
import { silent, until } from "../harness/harness.ts";
import { openPipeline, requestsOf, reserveAll } from "../harness/pipeline.ts";
import { untilReady } from "../harness/processes.ts";
import { openSnapshot } from "../harness/snapshot.ts";
import type { Figure } from "./accounting.ts";
import { analyze, fill } from "./fill.ts";
import { untilDrained } from "./grant.ts";

/** How often each step is measured. */
const REPEATS = 30;
/** What one statement of the fill changes, and how long it may take, in milliseconds: the indexes may not fit into memory. */
const ROWS = 10_000;
const FILL_MS = 600_000;
/** How long the wait for the schedulers may last, in milliseconds. */
const PATIENCE_MS = 120_000;
const LEASE_MS = 15_000;

/** The medians, in milliseconds, by what was measured. */
type Medians = Record<string, number>;

function median(figures: readonly number[]): number {
  return figures.toSorted((a, b) => a - b)[Math.floor(figures.length / 2)] ?? Number.NaN;
}

async function medianOf(work: () => Promise<unknown>): Promise<number> {
  const took: number[] = [];
  for (let count = 0; count < REPEATS; count++) {
    const startedAt = performance.now();
    await work();
    took.push(performance.now() - startedAt);
  }
  return median(took);
}

/**
 * Reserves, claims and grants so many, in bulk, with the changes of rows and indexes that the processes make. They were due,
 * and their leases ended, more than a minute ago: what was granted just now costs a scan a little.
 */
async function grantInBulk(test: TestDatabase, count: number): Promise<void> {
  await fill(test, { count, users: Math.ceil(count / 5), prefix: "finished", at: { inMs: -120_000 } });
  const fillIn = { workMs: FILL_MS };
  for (let after = ""; ; ) {
    const last = await test.database.transaction(async ({ select, execute }) => {
      const page = await select<{ id: string }>(
        "select id from point_reservations where id > ? order by id limit ?",
        [after, ROWS],
      );
      const ofPage = [after, page.at(-1)?.id ?? after];
      await execute(
        `update point_reservations set status = 'PROCESSING', scan_at = now(3) - interval 90 second
         where id > ? and id <= ?`,
        ofPage,
      );
      await execute(
        `insert into point_transactions (id, idempotency_key, user_id, point_amount, kind, reservation_id)
         select concat('0', substring(id, 2)), idempotency_key, user_id, point_amount, 'grant', id
         from point_reservations where id > ? and id <= ?`,
        ofPage,
      );
      await execute(
        "update point_reservations set status = 'DONE', scan_at = null where id > ? and id <= ?",
        ofPage,
      );
      return page.at(-1)?.id;
    }, fillIn);
    if (!last) return;
    after = last;
  }
}

/** Grants `count`, and measures what the scheduler does after that. */
async function measure({
  count,
  settings,
  hasSnapshot,
}: {
  count: number;
  settings: Record<string, string>;
  hasSnapshot: boolean;
}): Promise<Medians> {
  await using pipeline = await openPipeline();
  const { test } = pipeline;
  await using _ = hasSnapshot ? await openSnapshot(test) : undefined;
  await grantInBulk(test, count);
  await analyze(test);
  if (!hasSnapshot) await Bun.sleep(2_000);

  const api = await pipeline.start("api", settings);
  await pipeline.start("worker", settings);
  // Starts without a position, as the first one ever: its first scan looks at everything.
  const startedAt = performance.now();
  const scheduler = await pipeline.start("scheduler", settings);
  await untilReady(api, scheduler);
  const grantOne = async () => {
    await reserveAll(api.url, { requests: requestsOf(1, { spreadMs: 0 }) });
    await untilDrained(test);
  };
  await grantOne();
  const firstMs = performance.now() - startedAt;
  for (let granted = 1; granted < REPEATS; granted++) await grantOne();
  const grants = await test.query<{ ms: string }>(
    `select timestampdiff(microsecond, r.created_at, t.created_at) / 1000 ms
     from point_transactions t join point_reservations r on r.id = t.reservation_id
     order by r.id desc limit ?`,
    [REPEATS],
  );
  const openFrom = await until("the position is stored", () => findOpenFrom(test.database), PATIENCE_MS);
  await scheduler.kill("SIGTERM");

  const { database } = test;
  const queue = { depth: async () => 0, publish: async (contents: readonly Buffer[]) => contents.length };
  const config = {
    SCAN_BATCH: 2_000,
    SCAN_INTERVAL_MS: 10_000,
    LEASE_MS,
    PUBLISH_CHUNK: 1_000,
    QUEUED_RESERVATIONS: 20_000,
  };
  let from = fromAfter(Date.now());
  return {
    "from the start of a scheduler to its first grant": firstMs,
    "one grant from reserve to DONE": median(grants.map(({ ms }) => Number(ms))),
    "a scan that finds nothing": await medianOf(async () => {
      ({ from } = await scanAndPublish({ database, queue, logger: silent, config, from }));
    }),
    "a claim of one": await medianOf(async () => {
      await insertReservation(test, { executeAt: new Date() });
      const { first = BEGINNING, due } = await findNextScan(database, { from, withinMs: 0, limit: 2_000 });
      const claimed = await claimDue(database, { from: first, limit: due, leaseMs: LEASE_MS });
      if (claimed.length !== 1) throw new Error(`Claimed ${claimed.length} of 1`);
      await test.query("delete from point_reservations where id = ?", [claimed[0]?.id]);
    }),
    "a sweep": await medianOf(() =>
      findNextScan(database, { from: { scanAt: openFrom, id: "" }, withinMs: 0, limit: 1 }),
    ),
    "a sweep from the beginning": await medianOf(() => findNextScan(database, { withinMs: 0, limit: 1 })),
    "an overdue check": await medianOf(() =>
      checkOverdue(database, { after: { scanAt: openFrom, id: "" }, leaseMs: LEASE_MS }),
    ),
  };
}

/** Measures scans and grants after `count` grants, with and without a snapshot that is older than those. */
export async function benchSnapshot(options: {
  count: number;
  settings: Record<string, string>;
  progress: (what: string) => void;
}): Promise<Figure[]> {
  const { count, settings, progress } = options;
  progress(`granting ${count}`);
  const without = await measure({ count, settings, hasSnapshot: false });
  progress(`granting ${count} with a snapshot`);
  const beside = await measure({ count, settings, hasSnapshot: true });
  return Object.entries(beside).map(([what, ms]) => {
    const usual = without[what] ?? Number.NaN;
    return {
      what: `${what}, snapshot of before ${count.toLocaleString("en")} grants`,
      figure: `${ms.toFixed(1)} ms`,
      limit: { what: `without ${usual.toFixed(1)} ms`, ratio: ms / usual },
    };
  });
}
