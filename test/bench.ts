/** Measures the whole way on real services and prints a table: `bun run bench [--count N]`. */
import { parseArgs } from "node:util";
import { reservationOf, until } from "./harness.ts";
import {
  countStatuses,
  expectAllDoneOnce,
  insertReservations,
  openPipeline,
  requestsOf,
} from "./pipeline.ts";

const { values } = parseArgs({ options: { count: { type: "string", default: "20000" } } });
const count = Number(values.count);
if (!Number.isSafeInteger(count) || count < 1) {
  console.error(`Cannot measure as --count must be a whole number from 1: received ${values.count}`);
  process.exit(1);
}
const CONCURRENCY = 200;
/** Rows of one INSERT of the preparation. */
const ROWS = 2_000;

interface Measure {
  what: string;
  settings: Record<string, string>;
}

/** Reservations per second that one real api process answers with 201. */
async function measureReserve({ settings }: Measure): Promise<number> {
  await using pipeline = await openPipeline();
  const { url } = await pipeline.start("api", settings);
  const bodies = requestsOf(count, { spreadMs: 86_400_000 }).map((request) => JSON.stringify(request));
  const waiting = bodies.values();
  async function client() {
    for (const body of waiting) {
      const response = await fetch(`${url}/point/reserve`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body,
      });
      if (response.status !== 201) throw new Error(`Reserving was answered with ${response.status}`);
      await response.arrayBuffer();
    }
  }
  const startedAt = performance.now();
  await Promise.all(Array.from({ length: CONCURRENCY }, client));
  const perSecond = perSecondSince(startedAt);
  const { PENDING } = await countStatuses(pipeline.test);
  if (PENDING !== count) throw new Error(`${count} were answered with 201, ${PENDING} are there`);
  return perSecond;
}

/** Reservations per second that one scheduler and one worker bring from due to DONE. */
async function measureDrain({ settings }: Measure): Promise<number> {
  await using pipeline = await openPipeline();
  for (let inserted = 0; inserted < count; inserted += ROWS) {
    const reservations = Array.from({ length: Math.min(ROWS, count - inserted) }, (_, index) =>
      reservationOf({
        userId: `User${(inserted + index) % 1_000}`,
        executeAt: new Date(Date.now() + 3_600_000),
      }),
    );
    await insertReservations(pipeline.test, { reservations });
  }
  for (const entry of ["worker", "scheduler"] as const) {
    const { url } = await pipeline.start(entry, settings);
    await until(`${entry} is ready`, async () => (await fetch(`${url}/ready`)).status === 200);
  }
  // All at one moment, with both processes warm.
  await pipeline.test.query(
    "update point_reservations set execute_at = utc_timestamp(3), scan_at = utc_timestamp(3)",
  );
  const startedAt = performance.now();
  await until(
    "all are DONE",
    async () => {
      // Rarely: counting reads the whole table.
      await Bun.sleep(250);
      return (await countStatuses(pipeline.test)).DONE === count;
    },
    600_000,
  );
  const perSecond = perSecondSince(startedAt);
  await expectAllDoneOnce(pipeline.test, count);
  return perSecond;
}

function perSecondSince(startedAt: number): number {
  return count / ((performance.now() - startedAt) / 1_000);
}

const rows: Record<string, string>[] = [];
async function compare(measure: (one: Measure) => Promise<number>, [usual, bare]: [Measure, Measure]) {
  const base = await measure(bare);
  for (const [{ what }, perSecond] of [
    [bare, base],
    [usual, await measure(usual)],
  ] as const) {
    rows.push({
      what,
      "reservations/s": Math.round(perSecond).toLocaleString("en"),
      ratio: `${(perSecond / base).toFixed(1)} ×`,
    });
  }
}

console.log(`${count} reservations each, ${CONCURRENCY} requests at once; this takes a while`);
await compare(measureReserve, [
  { what: "reserve over HTTP, coalesced", settings: {} },
  { what: "reserve over HTTP, RESERVE_BATCH=1", settings: { RESERVE_BATCH: "1" } },
]);
await compare(measureDrain, [
  { what: "due → DONE, usual chunks", settings: {} },
  { what: "due → DONE, PUBLISH_CHUNK=1", settings: { PUBLISH_CHUNK: "1" } },
]);
console.table(rows);
process.exit(0);
