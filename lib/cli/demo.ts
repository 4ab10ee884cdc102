import { openDatabase } from "../database.ts";
import { type DemoResult, type DemoRow, demonstrate } from "../dev/demo.ts";
import { fieldOf, runWithStack } from "../dev/stack.ts";
import { ANSWER_IS_NO, newCommand, print, runCommand, wholeUpTo } from "./command.ts";

/** Up to this number, each reservation has its own line; for more, only sums are shown. */
const MAX_ROWS = 20;
const SUMS_MS = 1_000;
const LOG_LINES = 30;

const say = (line: string) => console.error(`demo: ${line}`);

interface Options {
  count: number;
  seconds: number;
}

function main({ count, seconds }: Options): Promise<number> {
  const log: string[] = [];
  return runWithStack(
    {
      // A short lease: the reservations of an interrupted demo on the same queue are claimed again soon.
      env: { SCAN_INTERVAL_MS: "200", LEASE_MS: "10000" },
      usualPorts: false,
      say,
      onLog(name, line) {
        log.push(`${name}: ${fieldOf(line, "msg") ?? ""} ${line}`);
        if (log.length > LOG_LINES) log.shift();
      },
      onExit: (name, how) => say(`${name} ended with ${how}`),
    },
    async ({ databaseUrl, apiUrl, signal }) => {
      const database = openDatabase(databaseUrl);
      try {
        const onRows = process.stdout.isTTY ? openTable() : openLines();
        const result = await demonstrate({ database, apiUrl, signal, count, seconds, say, onRows });
        if (!result) return ANSWER_IS_NO;
        if (showResult(result, count)) return 0;
        say(`the last lines of the logs:\n${log.join("\n")}`);
        return ANSWER_IS_NO;
      } finally {
        await database.close();
      }
    },
  );
}

/** Prints balances and sums. @returns whether every promise was kept */
function showResult({ rows, balances, sums }: DemoResult, count: number): boolean {
  print("\nuser             promised   balance");
  for (const { userId, promised, balance } of balances) {
    print(`${userId.padEnd(14)} ${String(promised).padStart(10)} ${String(balance).padStart(9)}`);
  }
  const late = rows.map(({ late_ms }) => late_ms).filter((ms) => ms !== null);
  const granted = rows.filter(({ status }) => status === "DONE").length;
  const early = late.filter((ms) => ms < 0).length;
  const agree = sums.agree && balances.every(({ promised, balance }) => promised === balance);
  print(
    `\n${granted} of ${count} granted, the latest ${Math.max(0, ...late)} ms after its time, ${early} early; ` +
      `ledger (${sums.ledger}), balances (${sums.balances}) and reservations (${sums.reservations}) ${agree ? "agree" : "DO NOT AGREE"}`,
  );
  return granted === count && early === 0 && agree;
}

function describeRow({ user_id, point_amount, execute_at, status, late_ms }: DemoRow): string {
  const late = late_ms === null ? "" : `${late_ms} ms late`;
  return `${user_id.padEnd(14)} ${String(point_amount).padStart(6)} points at ${execute_at.toISOString().slice(11, 23)}  ${status.padEnd(10)} ${late}`;
}

function describeSums(rows: readonly DemoRow[]): string {
  const counted = ["PENDING", "PROCESSING", "DONE", "FAILED", "CANCELLED"].map((status) => {
    const count = rows.filter((row) => row.status === status).length;
    return count > 0 || ["PENDING", "PROCESSING", "DONE"].includes(status) ? `${status} ${count}` : "";
  });
  const worst = rows.reduce((max, { late_ms }) => Math.max(max, late_ms ?? 0), 0);
  return `${counted.filter(Boolean).join("  ")}  worst lateness ${worst} ms`;
}

/** For a terminal: one table that is redrawn in place. */
function openTable(): (rows: readonly DemoRow[]) => void {
  let height = 0;
  return (rows) => {
    const lines = [...(rows.length <= MAX_ROWS ? rows.map(describeRow) : []), describeSums(rows)];
    process.stdout.write(`${height > 0 ? `\x1b[${height}A\x1b[0J` : ""}${lines.join("\n")}\n`);
    height = lines.length;
  };
}

/** For a file or a pipe: a line for each change, or the sums once a second. */
function openLines(): (rows: readonly DemoRow[]) => void {
  const shown = new Map<number, string>();
  let sumsAt = 0;
  return (rows) => {
    if (rows.length > MAX_ROWS) {
      const isOver = rows.every(({ status }) => status === "DONE");
      if (Date.now() - sumsAt < SUMS_MS && !isOver) return;
      sumsAt = Date.now();
      print(describeSums(rows));
      return;
    }
    for (const [n, row] of rows.entries()) {
      if (shown.get(n) === row.status) continue;
      shown.set(n, row.status);
      print(describeRow(row));
    }
  };
}

if (import.meta.main) {
  const command = newCommand(
    "demo",
    "Makes reservations for the next seconds, shows how they are granted, and checks all sums.",
    { no: "if a promise is broken" },
  )
    .option("--count <n>", "the number of reservations, at most 100000", wholeUpTo(100_000), 5)
    .option("--seconds <n>", "the seconds until the last of them is due, at most 3600", wholeUpTo(3_600), 3);
  await runCommand(command, { what: "run the demo", run: main });
}
