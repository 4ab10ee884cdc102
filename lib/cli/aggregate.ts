import { Option } from "commander";
import { aggregate } from "../accounting/aggregate.ts";
import { countWaiting } from "../accounting/count_repository.ts";
import { type Days, dayField, daysBetween, newDays } from "../accounting/day.ts";
import { chooseTimeZone, resetDay, startGeneration } from "../accounting/total_repository.ts";
import { readSettings } from "../config.ts";
import { openDatabase } from "../database.ts";
import { plural } from "../errors.ts";
import { newCommand, parserOf, print, runCommand } from "./command.ts";
import { openProgress } from "./progress.ts";

interface Options extends Partial<Days> {
  rebuild?: boolean;
}

async function main({ days, isRebuild }: { days: Days | undefined; isRebuild: boolean }): Promise<number> {
  const { DATABASE_URL, AGGREGATE_TIME_ZONE: timeZone } = readSettings([
    "DATABASE_URL",
    "AGGREGATE_TIME_ZONE",
  ]);
  const database = openDatabase(DATABASE_URL, { program: "pointservice-aggregate" });
  const startedAt = performance.now();
  if (isRebuild) await startGeneration(database, timeZone);
  if (days) {
    await chooseTimeZone(database, timeZone);
    for (const day of daysBetween(days.from, days.to)) await resetDay(database, day, timeZone);
  }
  let counted: number;
  {
    using progress = await openProgress("entries", await countWaiting(database));
    counted = await aggregate(database, { timeZone, onPage: progress.add });
  }
  const seconds = ((performance.now() - startedAt) / 1_000).toFixed(1);
  const scope = isRebuild
    ? "all totals recalculated: "
    : days
      ? `${days.from} to ${days.to} recalculated: `
      : "";
  const entries = plural(counted, "ledger entry", "ledger entries");
  print(`${scope}${entries} counted in ${seconds} s, by days of ${timeZone}`);
  if (isRebuild) print(`Set AGGREGATE_TIME_ZONE=${timeZone} for every scheduler, and restart them`);
  await database.close();
  return 0;
}

if (import.meta.main) {
  const command = newCommand(
    "aggregate",
    "Counts the new ledger entries in the daily totals, by days of AGGREGATE_TIME_ZONE.",
  )
    .option(
      "--from <day>",
      "recalculate the totals of the days from this one to --to, for instance if `bun run reconcile` found a wrong one",
      parserOf(dayField, "--from"),
    )
    .option("--to <day>", "the last day to recalculate; at most 366 days", parserOf(dayField, "--to"))
    .addOption(
      new Option("--rebuild", "recalculate all totals, for instance in a new time zone").conflicts([
        "from",
        "to",
      ]),
    );
  await runCommand<Options>(command, {
    what: "aggregate",
    run: ({ from, to, rebuild: isRebuild = false }) => {
      // Neither has a default here: the user must name all days to recalculate.
      if ((from === undefined) !== (to === undefined)) {
        command.error("error: --from and --to must be given together");
      }
      const places = { from: "--from", to: "--to" };
      const days = from === undefined ? undefined : newDays({ from, to }, { timeZone: "UTC", places });
      return main({ days, isRebuild });
    },
  });
}
