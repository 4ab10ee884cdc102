import { expect } from "bun:test";
import { join } from "node:path";
import autocannon from "autocannon";
import { compareSums } from "../lib/point_repository.ts";
import { startUsage, type Usages } from "./bench_usage.ts";
import { until } from "./harness.ts";
import { openPipeline } from "./pipeline.ts";

/** What one load made of the server. */
export interface Load {
  perS: number;
  p50Ms: number;
  p99Ms: number;
}

export interface ReserveFigures {
  /** By the number of connections. */
  reserve: Record<64 | 256, Load>;
  noop: Record<64 | 256, Load>;
  usages: Usages;
}

const WARM_S = 1;
const ROUNDS = 2;

type Rounds = Record<"reserve" | "noop", Record<64 | 256, Load[]>>;

/** What several equally long loads come to; of the slow answers the slowest. */
function sumOf(loads: readonly Load[]): Load {
  const mean = (field: keyof Load) => loads.reduce((sum, load) => sum + load[field], 0) / loads.length;
  return { perS: mean("perS"), p50Ms: mean("p50Ms"), p99Ms: Math.max(...loads.map(({ p99Ms }) => p99Ms)) };
}

/** Reservations per second over HTTP, with key and durable commit; and the same server without a database. */
export async function benchReserve(options: {
  seconds: number;
  settings: Record<string, string>;
}): Promise<ReserveFigures> {
  await using pipeline = await openPipeline();
  const { url } = await pipeline.start("api", options.settings);
  const child = Bun.spawn([process.execPath, join(import.meta.dir, "bench_noop.ts")], { stdout: "pipe" });
  try {
    const noopUrl = await until("noop listens", async () => {
      for await (const bytes of child.stdout) return new TextDecoder().decode(bytes).trim();
      return false;
    });
    const load = wrkOrAutocannon();
    for (const target of [url, noopUrl]) await load(target, { connections: 64, seconds: WARM_S });
    const loads = { reserve: { 64: [], 256: [] }, noop: { 64: [], 256: [] } } as Rounds;
    const end = startUsage();
    // In turns, so that both see the same machine.
    for (const connections of [64, 256] as const) {
      for (let round = 0; round < ROUNDS; round++) {
        const turn = { connections, seconds: options.seconds / ROUNDS };
        loads.reserve[connections].push(await load(url, turn));
        loads.noop[connections].push(await load(noopUrl, turn));
      }
    }
    const usages = end(pipeline.services);
    const summed = ({ 64: few, 256: many }: Rounds["noop"]) => ({ 64: sumOf(few), 256: sumOf(many) });
    const [reserve, noop] = [summed(loads.reserve), summed(loads.noop)];
    await expectReserved(pipeline.test, answered.get(url) ?? 0);
    return { reserve, noop, usages };
  } finally {
    child.kill();
    await child.exited;
  }
}

/** Requests that each server has answered with 201. */
const answered = new Map<string, number>();

/** Every 201 is a row; what was under way at the end may be one as well. */
async function expectReserved(
  { query, database }: Awaited<ReturnType<typeof openPipeline>>["test"],
  count: number,
) {
  const [row] = await query<{ pending: number; others: number }>(
    "select coalesce(sum(status = 'PENDING'), 0) pending, coalesce(sum(status <> 'PENDING'), 0) others from point_reservations",
  );
  expect(count).toBeGreaterThan(0);
  expect(Number(row?.pending)).toBeGreaterThanOrEqual(count);
  expect(Number(row?.others)).toBe(0);
  expect(await compareSums(database, { workMs: 600_000 })).toMatchObject({ agree: true, ledger: 0n });
}

type Generator = (url: string, options: { connections: number; seconds: number }) => Promise<Load>;

function wrkOrAutocannon(): Generator {
  const wrk = Bun.which("wrk");
  return wrk ? (url, options) => loadByWrk(wrk, url, options) : loadByAutocannon;
}

let loads = 0;

const SCRIPT = `
local threads = 0
function setup(thread)
  thread:set("number", threads)
  threads = threads + 1
end
function init(args)
  prefix, due, count = args[1], args[2], 0
  headers = { ["content-type"] = "application/json" }
end
function request()
  count = count + 1
  return wrk.format("POST", "/point/reserve", headers, '{"user_id":"User' .. (count * 7919 % 100000) ..
    '","point_amount":100,"execute_at":"' .. due .. '","idempotency_key":"' .. prefix .. number .. "-" .. count .. '"}')
end
function done(summary, latency)
  local errors = summary.errors
  io.write(string.format('FIGURES {"requests":%d,"us":%d,"refused":%d,"broken":%d,"p50":%f,"p99":%f}\\n',
    summary.requests, summary.duration, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
`;

async function loadByWrk(
  wrk: string,
  url: string,
  { connections, seconds }: Parameters<Generator>[1],
): Promise<Load> {
  const script = join(import.meta.dir, "..", "node_modules", ".bench.lua");
  await Bun.write(script, SCRIPT);
  const args = [`-t1`, `-c${connections}`, `-d${seconds}s`, "--timeout", "10s", "-s", script, url];
  const child = Bun.spawn([wrk, ...args, "--", `load${loads++}-`, due()], {
    stdout: "pipe",
    stderr: "inherit",
  });
  const output = await new Response(child.stdout).text();
  const json = /FIGURES (.*)/.exec(output)?.[1];
  if (!json) throw new Error(`wrk said: ${output}`);
  const { requests, us, refused, broken, p50, p99 } = JSON.parse(json) as Record<
    "requests" | "us" | "refused" | "broken" | "p50" | "p99",
    number
  >;
  if (refused || broken)
    throw new Error(`${refused} of ${requests} were refused, ${broken} connections broke: ${url}`);
  return loadOf(url, { requests, seconds: us / 1e6, p50Ms: p50 / 1e3, p99Ms: p99 / 1e3 });
}

async function loadByAutocannon(
  url: string,
  { connections, seconds }: Parameters<Generator>[1],
): Promise<Load> {
  const prefix = `load${loads++}-`;
  const executeAt = due();
  let count = 0;
  const result = await autocannon({
    url: `${url.replace(/\/$/, "")}/point/reserve`,
    connections,
    duration: seconds,
    requests: [
      {
        method: "POST",
        headers: { "content-type": "application/json" },
        setupRequest: (request) => ({
          ...request,
          body: JSON.stringify({
            user_id: `User${(++count * 7919) % 100_000}`,
            point_amount: 100,
            execute_at: executeAt,
            idempotency_key: `${prefix}${count}`,
          }),
        }),
      },
    ],
  });
  if (result.non2xx || result.errors)
    throw new Error(`${result.non2xx} were refused, ${result.errors} broke: ${url}`);
  const { p50, p99 } = result.latency;
  return loadOf(url, { requests: result.requests.total, seconds: result.duration, p50Ms: p50, p99Ms: p99 });
}

function loadOf(
  url: string,
  { requests, seconds, p50Ms, p99Ms }: { requests: number; seconds: number; p50Ms: number; p99Ms: number },
): Load {
  answered.set(url, (answered.get(url) ?? 0) + requests);
  return { perS: requests / seconds, p50Ms, p99Ms };
}

/** Far enough that nothing of it is due meanwhile. */
function due(): string {
  return new Date(Date.now() + 86_400_000).toISOString();
}
