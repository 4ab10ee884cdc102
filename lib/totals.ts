import { parseArgs } from "node:util";
import { totalOf } from "./answers.ts";
import { readConfig, type Settings } from "./config.ts";
import { openDatabase } from "./database.ts";
import { daysBetween, newDays, parseDay } from "./day.ts";
import { parseCampaign } from "./reservation.ts";
import type { TotalRow } from "./schema.ts";
import { drawBars, runCommand } from "./terminal.ts";
import { findAggregation, findBalances, findTotals } from "./total_repository.ts";

const USAGE = `Usage: bun run totals [--from DAY] [--to DAY] [--campaign NAME]
  the daily totals as a table, and the points of each day as bars; the last 31 days unless told otherwise`;

function readWanted(args: string[]) {
  const text = { type: "string" } as const;
  const { values } = parseArgs({ args, options: { from: text, to: text, campaign: text } });
  const { from, to, campaign } = values;
  if (from !== undefined) parseDay(from, "--from");
  if (to !== undefined) parseDay(to, "--to");
  if (campaign !== undefined) parseCampaign(campaign);
  return values;
}

/** What came in on each day, and what went out. */
function pointsByDay(rows: readonly TotalRow[], days: readonly string[]) {
  const sums = new Map(days.map((day) => [day, { came: 0n, went: 0n }]));
  for (const { day, points } of rows) {
    const sum = sums.get(day);
    if (sum) sum[points > 0n ? "came" : "went"] += points;
  }
  return [...sums].map(([day, sum]) => ({ day, ...sum }));
}

/** The table and the bars. */
function showTotals(rows: readonly TotalRow[], days: readonly string[]): string {
  const table = rows.map((row) => {
    const { late_ms_mean, late_ms_max, ...total } = totalOf(row);
    const late = { late_ms_mean: late_ms_mean ?? "", late_ms_max: late_ms_max ?? "" };
    return { ...total, points: String(row.points), campaign: row.campaign, ...late };
  });
  const first = rows[0]?.day ?? days.at(-1) ?? "";
  const bars = pointsByDay(rows, days)
    .filter(({ day }) => day >= first)
    .map(({ day, came, went }) => ({
      label: day,
      value: came,
      note: went < 0n ? `, ${-went} subtracted` : "",
    }));
  return [Bun.inspect.table(table), "Points granted and added by day", drawBars(bars)].join("\n");
}

async function main(
  { from, to, campaign }: ReturnType<typeof readWanted>,
  { DATABASE_URL }: Pick<Settings, "DATABASE_URL">,
): Promise<number> {
  const database = openDatabase(DATABASE_URL);
  const { generation, timeZone } = await findAggregation(database);
  const places = { from: "--from", to: "--to" };
  const days = newDays({ from, to }, { timeZone: timeZone || "UTC", places });
  const rows = await findTotals(database, { generation, ...days, campaign });
  console.log(showTotals(rows, daysBetween(days.from, days.to)));
  if (campaign === undefined) {
    const last = (await findBalances(database, rows, { generation, ...days })).at(-1);
    console.log(`\nAll points of all users at the end of ${days.to}: ${last?.pointNum}`);
  }
  await database.close();
  console.log(timeZone ? `Days of ${timeZone}` : "Nothing was counted yet: `bun run aggregate` does");
  return 0;
}

if (import.meta.main) {
  await runCommand({
    ...{ what: "read the totals", usage: USAGE, failed: 1 },
    read: readWanted,
    run: (wanted) => main(wanted, readConfig(Bun.env, ["DATABASE_URL"])),
  });
}
