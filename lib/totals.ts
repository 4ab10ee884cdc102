import { parseArgs } from "node:util";
import { totalOf } from "./answers.ts";
import { readConfig, type Settings } from "./config.ts";
import { openDatabase } from "./database.ts";
import { daysBetween, newDays, parseDay } from "./day.ts";
import { DomainError } from "./errors.ts";
import { parseCampaign } from "./reservation.ts";
import type { TotalRow } from "./schema.ts";
import { drawBars, runCommand } from "./terminal.ts";
import { balancesOf, findAggregation, findPointsBefore, findTotals } from "./total_repository.ts";

/** The most totals of one table. */
const MAX_TOTALS = 10_000;

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

/**
 * The table and the bars.
 *
 * @param options.before what all users had when the days began; undefined where the rows are not all of them
 */
export function showTotals(
  rows: readonly TotalRow[],
  { days, before }: { days: readonly string[]; before: bigint | undefined },
): string {
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
  const last = before === undefined ? undefined : balancesOf(rows, { days, before }).at(-1);
  return [
    Bun.inspect.table(table),
    "Points granted and added by day",
    drawBars(bars),
    ...(last ? ["", `All points of all users at the end of ${last.day}: ${last.pointNum}`] : []),
  ].join("\n");
}

async function main(
  { from, to, campaign }: ReturnType<typeof readWanted>,
  { DATABASE_URL }: Pick<Settings, "DATABASE_URL">,
): Promise<number> {
  const database = openDatabase(DATABASE_URL);
  const { generation, timeZone } = await findAggregation(database);
  const places = { from: "--from", to: "--to" };
  const days = newDays({ from, to }, { timeZone: timeZone || "UTC", places });
  const rows = await findTotals(database, { generation, ...days, campaign, limit: MAX_TOTALS });
  const before =
    campaign === undefined ? await findPointsBefore(database, { generation, day: days.from }) : undefined;
  await database.close();
  if (rows.length > MAX_TOTALS) {
    throw new DomainError(
      "INVALID_INPUT",
      `These are more than ${MAX_TOTALS} totals: ask for fewer days, or one campaign`,
    );
  }
  console.log(
    showTotals(rows, {
      days: daysBetween(days.from, days.to),
      before,
    }),
  );
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
