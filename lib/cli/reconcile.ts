import { hostname, userInfo } from "node:os";
import { type Difference, describeDifference } from "../accounting/difference.ts";
import { OVERDUE_MS } from "../accounting/overdue_check.ts";
import { reconcile } from "../accounting/reconcile.ts";
import { repairBalance } from "../accounting/repair.ts";
import { estimateRows, type Reconciliation } from "../accounting/run_repository.ts";
import { readSettings } from "../config.ts";
import { type Database, openDatabase } from "../database.ts";
import { DatabaseError } from "../database_errors.ts";
import { plural } from "../errors.ts";
import { digitsOf } from "../points/point.ts";
import { ANSWER_IS_NO, newCommand, print, runCommand, write } from "./command.ts";
import { openProgress } from "./progress.ts";

interface Options {
  full?: boolean;
  repair?: boolean;
  json?: boolean;
}

/** The outcome of repairing one difference. */
interface RepairOutcome {
  isRepaired: boolean;
  note: string;
}

/** Prints each difference when it is found, then the summary. */
interface Output {
  show(difference: Difference, repair: RepairOutcome | undefined): void;
  end(found: Reconciliation, summary: { repaired: number; seconds: number }): void;
}

async function main({ full = false, repair = false, json = false }: Options): Promise<number> {
  const { DATABASE_URL, LEASE_MS: leaseMs } = readSettings(["DATABASE_URL", "LEASE_MS"]);
  const database = openDatabase(DATABASE_URL, { program: "pointservice-reconcile" });
  const output = json ? openJson() : openLines();
  const startedAt = performance.now();
  let repaired = 0;
  let found: Reconciliation;
  {
    using progress = await openProgress("rows", await estimateRows(database));
    found = await reconcile(database, {
      isFull: full,
      leaseMs,
      onPage: progress.add,
      async onDifference(difference) {
        const isRepairable = repair && difference.kind === "balance";
        const outcome = isRepairable ? await tryRepair(database, difference.user_id) : undefined;
        if (outcome?.isRepaired) repaired++;
        progress.clear();
        output.show(difference, outcome);
      },
    });
  }
  output.end(found, { repaired, seconds: (performance.now() - startedAt) / 1_000 });
  await database.close();
  return found.differences > repaired ? ANSWER_IS_NO : 0;
}

async function tryRepair(database: Database, userId: string): Promise<RepairOutcome> {
  try {
    const repair = await repairBalance(database, userId, { repairedBy: `${operator()}@${hostname()}` });
    const note = repair ? `repaired: ${repair.before ?? "none"} -> ${repair.after}` : "already correct";
    return { isRepaired: true, note };
  } catch (error) {
    if (!(error instanceof DatabaseError) || error.isOutage) throw error;
    const note = error.isContended
      ? "not repaired: another transaction has locked the balance; run the command again"
      : "not repaired: the sum of the ledger is out of range for a balance";
    return { isRepaired: false, note };
  }
}

/** The user who runs this command. */
function operator(): string {
  const { username, uid } = userInfo();
  return username === "unknown" ? `uid ${uid}` : username;
}

/** What to do about a difference of each kind. */
const ADVICE: Record<Difference["kind"], string> = {
  balance:
    "look at the other differences of the user first; if the ledger is right, `bun run reconcile --repair` sets the balance to its sum",
  reservation:
    "decide by hand, as the ledger is never changed automatically: did the user get the points? Search the worker's log for the reservation's id",
  entry: "decide by hand, as the ledger is never changed automatically: find out who added the entry",
  total: "`bun run aggregate --from DAY --to DAY` recalculates the totals of these days",
  overdue:
    "check that scheduler.ts and worker.ts run, and read their logs; GET /point/reservations/{id} shows the details of the reservation",
};

/** One line for each difference, then a summary and advice. */
function openLines(): Output {
  const kinds = new Set<Difference["kind"]>();
  return {
    show(difference, repair) {
      print(`${describeDifference(difference)}${repair ? ` - ${repair.note}` : ""}`);
      if (!repair?.isRepaired) kinds.add(difference.kind);
    },
    end({ isFull, users, reservations, entries, days, differences }, { repaired, seconds }) {
      const rows = [
        plural(users, "user"),
        plural(reservations, "reservation"),
        plural(entries, "ledger entry", "ledger entries"),
      ];
      const scope = isFull ? "everything" : "what differs from the counted entries";
      const late = `overdue means ${OVERDUE_MS / 60_000} minutes late`;
      const outcome =
        differences === 0 ? "all agree" : `${plural(differences, "difference")}, ${repaired} repaired`;
      print(
        `${rows.join(", ")} and ${plural(days, "day")} checked in ${seconds.toFixed(1)} s (${scope}; ${late}): ${outcome}`,
      );
      for (const kind of kinds) print(`  ${kind}: ${ADVICE[kind]}`);
    },
  };
}

/** One JSON document, written as it grows: there may be millions of differences. */
function openJson(): Output {
  let separator = '{"differences":[';
  return {
    show(difference, repair) {
      const shown = repair ? { ...difference, repaired: repair.isRepaired } : difference;
      write(`${separator}\n${toJson(shown)}`);
      separator = ",";
    },
    end({ isFull, users, reservations, entries, days, differences }, { repaired, seconds }) {
      const checked = { users, reservations, entries, days };
      const summary = { is_full: isFull, checked, difference_count: differences, repaired, seconds };
      write(`${separator === "," ? "" : separator}\n],${toJson(summary).slice(1)}\n`);
    },
  };
}

function toJson(value: unknown): string {
  return JSON.stringify(value, (_, one) => (typeof one === "bigint" ? digitsOf(one) : one));
}

if (import.meta.main) {
  const command = newCommand("reconcile", "Compares balances, ledger, reservations and daily totals.", {
    no: "if differences are left",
  })
    .option("--full", "check everything, not only what differs from the counted entries")
    .option(
      "--repair",
      "set wrong balances to the sum of the ledger, and record each repair in point_repairs",
    )
    .option("--json", "print one JSON document instead of lines");
  await runCommand(command, { what: "reconcile", run: main });
}
