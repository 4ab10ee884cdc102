import { beforeEach, expect, setDefaultTimeout, test } from "bun:test";
import { BEGINNING, claimDue, type ScanPosition } from "../../lib/reservations/scan_repository.ts";
import { scanAndPublish } from "../../scheduler.ts";
import { emptyTables, openTestDatabase } from "../harness/database.ts";
import { insertReservation } from "../harness/fixtures.ts";
import { silent } from "../harness/harness.ts";
import { expectAllDoneOnce, openPipeline, untilDone } from "../harness/pipeline.ts";
import { untilReady } from "../harness/processes.ts";
import { leaveEntries, openSnapshot } from "../harness/snapshot.ts";

// How long it takes until what is due is claimed: beside a long snapshot, and if it lies before the scans' position.

const db = await openTestDatabase();
setDefaultTimeout(120_000);
beforeEach(() => emptyTables(db));

const REPEATS = 15;

async function msOf(work: () => Promise<unknown>): Promise<number> {
  const startedAt = performance.now();
  await work();
  return performance.now() - startedAt;
}

function median(took: readonly number[]): number {
  return took.toSorted((a, b) => a - b)[Math.floor(took.length / 2)] ?? Number.NaN;
}

test("a scan takes less than half as long as a claim that starts at the beginning of 120,000 entries in a snapshot (fault 42)", async () => {
  const queue = { depth: async () => 0, publish: async (contents: readonly Buffer[]) => contents.length };
  const config = {
    SCAN_BATCH: 100,
    SCAN_INTERVAL_MS: 10_000,
    LEASE_MS: 60_000,
    PUBLISH_CHUNK: 100,
    QUEUED_RESERVATIONS: 10_000,
  };
  let from: ScanPosition = BEGINNING;
  async function scanOne() {
    await insertReservation(db, { executeAt: new Date() });
    ({ from } = await scanAndPublish({ database: db.database, queue, logger: silent, config, from }));
  }
  await scanOne();
  await using _ = await openSnapshot(db);
  for (let count = 0; count < 5; count++) await leaveEntries(db, new Date(Date.now() - 600_000 + count));
  const [scans, claims]: [number[], number[]] = [[], []];
  // In turns: the machine may be busy with other things.
  for (let count = 0; count < REPEATS; count++) {
    scans.push(await msOf(scanOne));
    claims.push(await msOf(() => claimDue(db.database, { limit: 100, leaseMs: 60_000 })));
  }
  expect(2 * median(scans)).toBeLessThan(median(claims));
});

test("what somebody held, or inserted by hand, is granted within a second or ten, whatever was claimed since", async () => {
  await using pipeline = await openPipeline();
  const { test } = pipeline;
  await untilReady(await pipeline.start("scheduler"), await pipeline.start("worker"));
  const held = await insertReservation(test, { executeAt: new Date(Date.now() + 1_000) });
  await test.database.transaction(async ({ select }) => {
    await select("select id from point_reservations where id = ? for update", [held.id]);
    await Bun.sleep(8_000);
    await insertReservation(test, { executeAt: new Date() });
    await untilDone(test, { count: 1 });
  });
  await untilDone(test, { count: 2, withinMs: 2_500 });
  await insertReservation(test, { executeAt: new Date("1970-01-01T00:00:00.000Z") });
  await untilDone(test, { count: 3, withinMs: 15_000 });
  await expectAllDoneOnce(test, 3);
});
