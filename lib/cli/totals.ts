import { dailyTotalOf, TOTAL_COLUMNS } from "../accounting/daily_total.ts";
import { type Days, dayField, daysBetween, newDays } from "../accounting/day.ts";
import { findAggregation, findBalances, findTotals } from "../accounting/total_repository.ts";
import { readSettings } from "../config.ts";
import { openDatabase } from "../database.ts";
import { campaignField } from "../reservations/reservation.ts";
import type { TotalRow } from "../schema.ts";
import { type Bar, drawBars } from "./bars.ts";
import { newCommand, parserOf, print, runCommand } from "./command.ts";

interface Options extends Partial<Days> {
  campaign?: string;
}

async function main({ from, to, campaign }: Options): Promise<number> {
  const database = openDatabase(readSettings(["DATABASE_URL"]).DATABASE_URL, {
    program: "pointservice-totals",
  });
  const { generation, timeZone } = await findAggregation(database);
  const places = { from: "--from", to: "--to" };
  const days = newDays({ from, to }, { timeZone: timeZone || "UTC", places });
  const rows = await findTotals(database, { generation, ...days, campaign });
  print(`${drawTable(rows)}\nPoints granted and added per day\n${drawBars(barsOf(rows, days))}`);
  if (campaign === undefined) {
    const last = (await findBalances(database, rows, { generation, ...days })).at(-1);
    print(`\nAll points of all users at the end of ${days.to}: ${last?.pointNum}`);
  }
  await database.close();
  print(timeZone ? `Days of ${timeZone}` : "No entries are counted yet; run `bun run aggregate`");
  return 0;
}

function drawTable(rows: readonly TotalRow[]): string {
  const shown = rows.map((row) => {
    const total = dailyTotalOf(row);
    return Object.fromEntries(TOTAL_COLUMNS.map((column) => [column, String(total[column] ?? "")]));
  });
  return Bun.inspect.table(shown, [...TOTAL_COLUMNS]);
}

/** One bar per day, from the first day that has totals. */
function barsOf(rows: readonly TotalRow[], { to }: Days): Bar[] {
  const sums = new Map<string, { added: bigint; subtracted: bigint }>();
  for (const { day, points } of rows) {
    const { added, subtracted } = sums.get(day) ?? { added: 0n, subtracted: 0n };
    if (points > 0n) sums.set(day, { added: added + points, subtracted });
    else sums.set(day, { added, subtracted: subtracted - points });
  }
  return daysBetween(rows[0]?.day ?? to, to).map((label) => {
    const { added, subtracted } = sums.get(label) ?? { added: 0n, subtracted: 0n };
    return { label, value: added, note: subtracted > 0n ? `, ${subtracted} subtracted` : "" };
  });
}

if (import.meta.main) {
  const command = newCommand(
    "totals",
    "Shows the daily totals as a table, and the points of each day as bars.",
  )
    .option(
      "--from <day>",
      "the first day; by default, the first of the 31 days that end with --to",
      parserOf(dayField, "--from"),
    )
    .option("--to <day>", "the last day; by default, today", parserOf(dayField, "--to"))
    .option("--campaign <name>", "only this campaign", parserOf(campaignField, "--campaign"));
  await runCommand(command, { what: "read the totals", run: main });
}
