import { Option } from "commander";
import { newCommand } from "../../lib/cli/command.ts";
import { progress, settingsGiven, wholeNumber } from "../harness/tool.ts";
import { benchAccounting, type Figure } from "./accounting.ts";
import { benchDatabaseOnly, benchGrant, type GrantOptions } from "./grant.ts";
import { benchBurst, benchSteady } from "./lateness.ts";
import { benchLists } from "./lists.ts";
import { benchLocked } from "./locked.ts";
import { benchReserve } from "./reserve.ts";
import { benchSnapshot } from "./snapshot.ts";
import type { Usages } from "./usage.ts";

const DESCRIPTION = `Measures the program on real services, each figure beside a limit that is
measured in the same run, and prints tables. Every part ends by checking that
nothing was lost, doubled or early, and fails if something was. Settings of the
processes, e.g. WORKER_BATCH=500, are passed on to them.`;

const USERS = 100_000;
const FEW_USERS = 2_000;
const settings = settingsGiven();

const rows: Record<string, unknown>[] = [];
const usageRows: Record<string, unknown>[] = [];
const json = {
  reserve: {} as Record<string, number>,
  grant: {} as Record<string, number>,
  flat: {} as Record<string, number>,
  lateness: {} as Record<string, number>,
  locked: {} as Record<string, number>,
  rss_mb: {} as Record<string, number>,
  scale: {} as Record<string, number>,
  deadlocks: 0,
};

function show({ what, figure, limit }: Figure): void {
  rows.push({ what, figure, ...(limit && { beside: limit.what, ratio: limit.ratio.toFixed(2) }) });
  progress(`${what}: ${figure}${limit ? `, ${limit.ratio.toFixed(2)} × ${limit.what}` : ""}`);
}

function showUsages(part: string, usages: Usages): void {
  for (const [process, { rssMb, cpuS }] of usages) {
    usageRows.push({ part, process, "peak RSS, MB": Math.round(rssMb), "CPU, s": cpuS.toFixed(1) });
    if (["api", "scheduler", "worker"].includes(process)) {
      json.rss_mb[process] = Math.round(Math.max(json.rss_mb[process] ?? 0, rssMb));
    }
  }
}

const perSecond = (figure: number) => `${Math.round(figure).toLocaleString("en")}/s`;
const ms = (figure: number) =>
  `${figure < 10 ? figure.toFixed(1) : Math.round(figure).toLocaleString("en")} ms`;
const latency = ({ p50Ms, p99Ms }: { p50Ms: number; p99Ms: number }) => `p50 ${ms(p50Ms)}, p99 ${ms(p99Ms)}`;

async function grant(part: string, given: Partial<GrantOptions> = {}) {
  const figures = await benchGrant({ count, users: USERS, settings, ...given });
  showUsages(part, figures.usages);
  json.deadlocks += figures.deadlocks;
  return figures;
}

/** Grants of 100,000 users, which others are compared with; measured once. */
let usual: ReturnType<typeof grant> | undefined;
function usualGrant() {
  usual ??= grant("grant");
  return usual;
}

const RUN = {
  async reserve() {
    const { loads, usages } = await benchReserve({ seconds: isQuick ? 2 : 10, settings });
    for (const { connections, reserve, noop } of loads) {
      const limit = { what: `noop ${perSecond(noop.perS)}`, ratio: reserve.perS / noop.perS };
      const figure = `${perSecond(reserve.perS)}, ${latency(reserve)}`;
      show({ what: `reserve, ${connections} connections`, figure, limit });
      json.reserve[`rps_${connections}`] = reserve.perS;
      json.reserve[`p99_ms_${connections}`] = reserve.p99Ms;
      json.reserve[`noop_rps_${connections}`] = noop.perS;
    }
    showUsages("reserve", usages);
  },
  async grant() {
    for (const users of isQuick ? [USERS] : [USERS, FEW_USERS]) {
      const isUsual = users === USERS;
      const limit = await benchDatabaseOnly({ count, users, settings });
      const { perS } = isUsual ? await usualGrant() : await grant("grant, few users", { users });
      show({
        what: `grant, ${users.toLocaleString("en")} users`,
        figure: perSecond(perS),
        limit: { what: `db_only ${perSecond(limit)}`, ratio: perS / limit },
      });
      if (isUsual) json.grant = { per_s: perS, db_only_per_s: limit };
    }
  },
  async flat() {
    const { perS: limit } = await usualGrant();
    const [finished, future] = isQuick ? [20_000, 10_000] : [2_000_000, 1_000_000];
    const flat = await grant("flat", { finished, future });
    const hot = await grant("hot user", { isHot: true });
    for (const { what, perS } of [
      { what: `flat: ${finished.toLocaleString("en")} finished`, perS: flat.perS },
      { what: "one user in every tenth grant", perS: hot.perS },
    ]) {
      show({
        what,
        figure: perSecond(perS),
        limit: { what: `grant ${perSecond(limit)}`, ratio: perS / limit },
      });
    }
    json.flat = { per_s: flat.perS, hot_user_per_s: hot.perS };
  },
  async lateness() {
    const [seconds, burstCount] = isQuick ? [3, 10_000] : [30, 100_000];
    const steady = await benchSteady({ seconds, spreadMs: seconds * 1_000 }, settings);
    show({ what: "lateness, 500/s", figure: `${latency(steady)}, max ${ms(steady.maxMs)}` });
    showUsages("lateness, 500/s", steady.usages);
    const burst = await benchBurst(burstCount, settings);
    const burstPerS = (burstCount / burst.maxMs) * 1_000;
    const figure = `${perSecond(burstPerS)}, ${latency(burst)}, max ${ms(burst.maxMs)}`;
    show({ what: "lateness, burst in one second", figure });
    show({ what: "lateness after each tenth of the burst", figure: burst.growthMs.map(ms).join(", ") });
    showUsages("lateness, burst", burst.usages);
    json.deadlocks += steady.deadlocks + burst.deadlocks;
    const { p50Ms: p50_ms, p99Ms: p99_ms, maxMs: max_ms } = steady;
    json.lateness = { p50_ms, p99_ms, max_ms, burst_per_s: burstPerS };
  },
  async locked() {
    const seconds = isQuick ? 3 : 15;
    const locked = await benchLocked({ seconds }, settings);
    const { p50Ms: p50_ms, p99Ms: p99_ms, maxMs: max_ms, releaseMs: release_ms } = locked;
    const figure = `${latency(locked)}, max ${ms(max_ms)}`;
    show({ what: "lateness of others beside 10 locked balances, 500/s", figure });
    const what = `from the release to the last of ${locked.lockedCount} grants of the locked ones`;
    show({ what, figure: ms(release_ms) });
    json.locked = { p50_ms, p99_ms, max_ms, release_ms };
  },
  async scale() {
    for (const workers of isQuick ? [1, 2] : [1, 2, 4]) {
      const isUsual = isQuick && workers === 1;
      const { perS } = await (isUsual ? usualGrant() : grant(`scale, ${workers}`, { workers }));
      json.scale[workers] = perS;
      const limit = { what: "1 worker", ratio: perS / Number(json.scale[1]) };
      show({ what: `grant, ${workers} workers`, figure: perSecond(perS), limit });
    }
  },
  async memory() {
    const due = isQuick ? count : 1_000_000;
    const part = `${due.toLocaleString("en")} due`;
    const { perS } = await grant(part, { count: due });
    show({ what: `grant, ${part} at once`, figure: perSecond(perS) });
  },
  async lists() {
    console.table(await benchLists({ rows: options.rows }));
  },
  async accounting() {
    for (const figure of await benchAccounting({ entries: options.entries, progress })) show(figure);
  },
  async snapshot() {
    const granted = options.count ?? (isQuick ? 20_000 : 500_000);
    for (const figure of await benchSnapshot({ count: granted, settings, progress })) show(figure);
  },
};

type Part = keyof typeof RUN;
const PARTS = Object.keys(RUN) as Part[];
/** Those of `--quick`, which ends within a minute. */
const QUICK_PARTS: Part[] = ["reserve", "grant", "flat", "lateness", "scale"];

interface Options {
  quick: boolean;
  json?: string;
  part?: Part[];
  count?: number;
  rows: number;
  entries: number;
}

const options = newCommand("bench", DESCRIPTION)
  .option("--quick", "ends within a minute", false)
  .option("--json <file>", "where to write the figures")
  .addOption(new Option("--part <part...>", "what to measure").choices(PARTS))
  .option("--count <n>", "how many reservations each part grants", wholeNumber(1_000))
  .option("--rows <n>", "reservations in the table whose lists are read", wholeNumber(1_000), 1_000_000)
  .option("--entries <n>", "ledger entries that are counted and reconciled", wholeNumber(10_000), 10_000_000)
  .parse()
  .opts<Options>();
const { quick: isQuick, part: parts = isQuick ? QUICK_PARTS : PARTS } = options;
const count = options.count ?? (isQuick ? 10_000 : 200_000);

for (const part of parts) {
  progress(part);
  await RUN[part]();
}
for (const table of [rows, usageRows]) if (table.length > 0) console.table(table);
console.log(`Deadlocks: ${json.deadlocks}`);
if (options.json) {
  const round = (_: string, value: unknown) =>
    typeof value === "number" ? Math.round(value * 10) / 10 : value;
  await Bun.write(options.json, `${JSON.stringify(json, round)}\n`);
}
process.exit(0);
