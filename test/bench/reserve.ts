import { expect } from "bun:test";
import { join } from "node:path";
import autocannon from "autocannon";
import { compareSums } from "../../lib/dev/compare_sums.ts";
import type { TestDatabase } from "../harness/database.ts";
import { until } from "../harness/harness.ts";
import { openPipeline } from "../harness/pipeline.ts";
import { startUsage } from "./usage.ts";

/** What one load made of the server. */
export interface Load {
  perS: number;
  p50Ms: number;
  p99Ms: number;
}

const WARM_S = 1;
const ROUNDS = 2;
const COMPARE_MS = 600_000;

/** Measures reservations per second over HTTP, with key and durable commit; and the same server without a database. */
export async function benchReserve(options: { seconds: number; settings: Record<string, string> }) {
  await using pipeline = await openPipeline();
  const api = await pipeline.start("api", options.settings);
  const child = Bun.spawn([process.execPath, join(import.meta.dir, "noop.ts")], { stdout: "pipe" });
  try {
    const noopUrl = await until("noop listens", async () => {
      for await (const bytes of child.stdout) return new TextDecoder().decode(bytes).trim();
      return false;
    });
    const urls = { reserve: api.url, noop: noopUrl.replace(/\/$/, "") };
    for (const url of Object.values(urls)) await generate({ url, connections: 64, seconds: WARM_S });
    const end = startUsage();
    const loads: { connections: number; reserve: Load; noop: Load }[] = [];
    for (const connections of [64, 256]) {
      const turn = { connections, seconds: options.seconds / ROUNDS };
      const [reserve, noop]: [Load[], Load[]] = [[], []];
      // In turns, so that both see the same machine.
      for (let round = 0; round < ROUNDS; round++) {
        reserve.push(await generate({ url: urls.reserve, ...turn }));
        noop.push(await generate({ url: urls.noop, ...turn }));
      }
      loads.push({ connections, reserve: sumOf(reserve), noop: sumOf(noop) });
    }
    const usages = end(pipeline.services);
    await expectReserved(pipeline.test, answered.get(urls.reserve) ?? 0);
    return { loads, usages };
  } finally {
    child.kill();
    await child.exited;
  }
}

/** What several equally long loads come to: means, but the slowest of the slow answers. */
function sumOf(loads: readonly Load[]): Load {
  const mean = (field: keyof Load) => loads.reduce((sum, load) => sum + load[field], 0) / loads.length;
  return { perS: mean("perS"), p50Ms: mean("p50Ms"), p99Ms: Math.max(...loads.map(({ p99Ms }) => p99Ms)) };
}

/** Every 201 is a row; what was not answered at the end may be one as well. */
async function expectReserved({ query, database }: TestDatabase, count: number) {
  const [row] = await query<{ pending: number; others: number }>(
    "select coalesce(sum(status = 'PENDING'), 0) pending, coalesce(sum(status <> 'PENDING'), 0) others from point_reservations",
  );
  expect(count).toBeGreaterThan(0);
  expect(Number(row?.pending)).toBeGreaterThanOrEqual(count);
  expect(Number(row?.others)).toBe(0);
  expect(await compareSums(database, { workMs: COMPARE_MS })).toMatchObject({ agree: true, ledger: 0n });
}

interface Turn {
  url: string;
  connections: number;
  seconds: number;
}

/** How many requests each server has answered with 201. */
const answered = new Map<string, number>();
let turns = 0;

/** Sends reservations as fast as they are answered. Each answer must be a 201. */
async function generate({ url, connections, seconds }: Turn): Promise<Load> {
  const prefix = `load${turns++}-`;
  // So far ahead that none is due meanwhile.
  const dueAt = new Date(Date.now() + 86_400_000);
  let count = 0;
  function newBody(): string {
    count++;
    return JSON.stringify({
      user_id: `User${(count * 7919) % 100_000}`,
      point_amount: 100,
      execute_at: dueAt,
      idempotency_key: `${prefix}${count}`,
    });
  }
  const { requests, duration, non2xx, errors, latency } = await autocannon({
    url: `${url}/point/reserve`,
    connections,
    duration: seconds,
    requests: [
      {
        method: "POST",
        headers: { "content-type": "application/json" },
        setupRequest: (request) => ({ ...request, body: newBody() }),
      },
    ],
  });
  if (non2xx || errors) throw new Error(`${non2xx} requests were refused, ${errors} broke: ${url}`);
  answered.set(url, (answered.get(url) ?? 0) + requests.total);
  return { perS: requests.total / duration, p50Ms: latency.p50, p99Ms: latency.p99 };
}
