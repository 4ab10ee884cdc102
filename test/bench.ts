/**
 * Measures the program on real services, each figure beside a limit that is measured in the same run, and prints tables:
 * `bun run bench [--quick] [--json FILE] [--part reserve|grant|flat|lateness|scale|memory|lists|books] [--count N]`. Every part
 * ends by checking that nothing was lost, doubled or early, and fails if something was.
 *
 * Settings of the processes, e.g. `WORKER_BATCH=500`, are handed on to them.
 */
import { parseArgs } from "node:util";
import { Settings } from "../lib/config.ts";
import { benchBooks } from "./bench_books.ts";
import { benchDatabaseOnly, benchGrant, type GrantFigures } from "./bench_grant.ts";
import { benchBurst, benchSteady } from "./bench_lateness.ts";
import { benchLists } from "./bench_lists.ts";
import { benchReserve } from "./bench_reserve.ts";
import type { Usages } from "./bench_usage.ts";

const PARTS = ["reserve", "grant", "flat", "lateness", "scale", "memory", "lists", "books"] as const;
type Part = (typeof PARTS)[number];
/** Those of `--quick`, which ends within a minute. */
const QUICK_PARTS: Part[] = ["reserve", "grant", "flat", "lateness", "scale"];

const { values } = parseArgs({
  options: {
    quick: { type: "boolean", default: false },
    json: { type: "string" },
    part: { type: "string", multiple: true },
    /** How many reservations are granted in each part. */
    count: { type: "string" },
    /** How many reservations stand in the table whose lists are read. */
    rows: { type: "string", default: "1000000" },
    /** How many ledger entries are counted and compared; there are a tenth as many users. */
    entries: { type: "string", default: "10000000" },
  },
});
const { quick } = values;
const unknown = values.part?.filter((part) => !PARTS.includes(part as Part)) ?? [];
const parts = (values.part as Part[] | undefined) ?? (quick ? QUICK_PARTS : PARTS);
const [count, listRows] = [Number(values.count ?? (quick ? 10_000 : 200_000)), Number(values.rows)];
const entries = Number(values.entries);
const faults = [
  unknown.length > 0 && `--part must be ${PARTS.join(", ")}: received ${unknown.join(", ")}`,
  !(Number.isSafeInteger(count) && count >= 1_000) &&
    `--count must be a whole number from 1000: received ${values.count}`,
  !(Number.isSafeInteger(entries) && entries >= 10_000) &&
    `--entries must be a whole number from 10000: received ${values.entries}`,
  !(Number.isSafeInteger(listRows) && listRows >= 1_000) &&
    `--rows must be a whole number from 1000: received ${values.rows}`,
].filter((fault) => fault !== false);
if (faults.length > 0) {
  console.error(`Cannot measure as ${faults.join("; and as ")}`);
  process.exit(1);
}

const USERS = 100_000;
const FEW_USERS = 2_000;
const settings = Object.fromEntries(
  Object.keys(Settings.properties)
    .filter((name) => !/URL$|PORT$|^HOST$|^QUEUE$/.test(name))
    .flatMap((name) => (Bun.env[name] ? [[name, Bun.env[name]]] : [])),
);
const startedAt = performance.now();
const seconds = quick ? 2 : 10;

const rows: Record<string, unknown>[] = [];
const usageRows: Record<string, unknown>[] = [];
const json = {
  reserve: {} as Record<string, number>,
  grant: {} as Record<string, number>,
  flat: {} as Record<string, number>,
  lateness: {} as Record<string, number>,
  rss_mb: {} as Record<string, number>,
  scale: {} as Record<string, number>,
  deadlocks: 0,
};

function progress(what: string): void {
  const s = Math.round((performance.now() - startedAt) / 1_000);
  console.error(`${String(s).padStart(5)} s  ${what}`);
}

function show(what: string, figure: string, limit?: { what: string; ratio: number }): void {
  rows.push({ what, figure, ...(limit && { beside: limit.what, ratio: limit.ratio.toFixed(2) }) });
  progress(`${what}: ${figure}${limit ? `, ${limit.ratio.toFixed(2)} × ${limit.what}` : ""}`);
}

function showUsages(part: string, usages: Usages): void {
  for (const [process, { rssMb, cpuS }] of usages) {
    usageRows.push({ part, process, "peak RSS, MB": Math.round(rssMb), "CPU, s": cpuS.toFixed(1) });
    if (process in { api: 1, scheduler: 1, worker: 1 }) {
      json.rss_mb[process] = Math.round(Math.max(json.rss_mb[process] ?? 0, rssMb));
    }
  }
}

const perSecond = (figure: number) => `${Math.round(figure).toLocaleString("en")}/s`;
const ms = (figure: number) =>
  `${figure < 10 ? figure.toFixed(1) : Math.round(figure).toLocaleString("en")} ms`;
const latency = ({ p50Ms, p99Ms }: { p50Ms: number; p99Ms: number }) => `p50 ${ms(p50Ms)}, p99 ${ms(p99Ms)}`;

/** Grants of 100,000 users, the figure that others stand beside; measured once. */
let usual: Promise<GrantFigures> | undefined;
function usualGrant(): Promise<GrantFigures> {
  usual ??= grant("grant", { users: USERS });
  return usual;
}

async function grant(part: string, options: Omit<Parameters<typeof benchGrant>[0], "count" | "settings">) {
  const figures = await benchGrant({ count, settings, ...options });
  showUsages(part, figures.usages);
  json.deadlocks += figures.deadlocks;
  return figures;
}

const RUN: Record<Part, () => Promise<void>> = {
  async reserve() {
    const { reserve, noop, usages } = await benchReserve({ seconds, settings });
    for (const connections of [64, 256] as const) {
      const [load, limit] = [reserve[connections], noop[connections]];
      show(`reserve, ${connections} connections`, `${perSecond(load.perS)}, ${latency(load)}`, {
        what: `noop ${perSecond(limit.perS)}`,
        ratio: load.perS / limit.perS,
      });
    }
    showUsages("reserve", usages);
    json.reserve = {
      rps_64: reserve[64].perS,
      rps_256: reserve[256].perS,
      p99_ms_256: reserve[256].p99Ms,
      noop_rps_256: noop[256].perS,
    };
  },
  async grant() {
    for (const users of quick ? [USERS] : [USERS, FEW_USERS]) {
      const isUsual = users === USERS;
      const limit = await benchDatabaseOnly({ count, users, settings });
      const { perS } = isUsual ? await usualGrant() : await grant("grant, few users", { users });
      show(`grant, ${users.toLocaleString("en")} users`, perSecond(perS), {
        what: `db_only ${perSecond(limit)}`,
        ratio: perS / limit,
      });
      if (isUsual) json.grant = { per_s: perS, db_only_per_s: limit };
    }
  },
  async flat() {
    const { perS: limit } = await usualGrant();
    const beside = (perS: number) => ({ what: `grant ${perSecond(limit)}`, ratio: perS / limit });
    const [finished, future] = quick ? [20_000, 10_000] : [2_000_000, 1_000_000];
    const flat = await grant("flat", { users: USERS, finished, future });
    show(`flat: ${finished.toLocaleString("en")} finished`, perSecond(flat.perS), beside(flat.perS));
    const hot = await grant("hot user", { users: USERS, hot: true });
    show("one user in every tenth grant", perSecond(hot.perS), beside(hot.perS));
    json.flat = { per_s: flat.perS, hot_user_per_s: hot.perS };
  },
  async lateness() {
    const steady = await benchSteady({ seconds: quick ? 3 : 30, spreadMs: quick ? 3_000 : 30_000, settings });
    show("lateness, 500/s", `${latency(steady)}, max ${ms(steady.maxMs)}`);
    showUsages("lateness, 500/s", steady.usages);
    const burst = await benchBurst({ count: quick ? 10_000 : 100_000, settings });
    show(
      "lateness, burst in one second",
      `${perSecond(burst.perS)}, ${latency(burst)}, max ${ms(burst.maxMs)}`,
    );
    show("lateness after each tenth of the burst", burst.growthMs.map(ms).join(", "));
    showUsages("lateness, burst", burst.usages);
    json.deadlocks += steady.deadlocks + burst.deadlocks;
    json.lateness = {
      ...{ p50_ms: steady.p50Ms, p99_ms: steady.p99Ms, max_ms: steady.maxMs, burst_per_s: burst.perS },
    };
  },
  async scale() {
    for (const workers of quick ? [1, 2] : [1, 2, 4]) {
      const isMeasured = quick && workers === 1;
      const { perS } = await (isMeasured
        ? usualGrant()
        : grant(`scale, ${workers}`, { users: USERS, workers }));
      json.scale[workers] = perS;
      show(`grant, ${workers} workers`, perSecond(perS), {
        what: "1 worker",
        ratio: perS / Number(json.scale[1]),
      });
    }
  },
  async memory() {
    const { perS } = await grant("1,000,000 due", { users: USERS, count: 1_000_000 } as never);
    show("grant, 1,000,000 due at once", perSecond(perS));
  },
  async lists() {
    console.table(await benchLists({ rows: listRows }));
  },
  async books() {
    const figures = await benchBooks({ entries, progress });
    for (const { what, figure, beside, ratio } of figures) {
      show(what, figure, beside === undefined ? undefined : { what: beside, ratio });
    }
  },
};

for (const part of parts) {
  progress(part);
  await RUN[part]();
}
for (const table of [rows, usageRows]) if (table.length > 0) console.table(table);
console.log(`Deadlocks: ${json.deadlocks}`);
if (values.json) {
  const rounded = JSON.stringify(json, (_, value) =>
    typeof value === "number" ? Math.round(value * 10) / 10 : value,
  );
  await Bun.write(values.json, `${rounded}\n`);
}
process.exit(0);
