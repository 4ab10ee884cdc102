/** `bun run demo [--count N] [--seconds S]`: reserves some grants a little ahead, and shows them come true. */
import { parseArgs } from "node:util";
import { type Database, openDatabase } from "../database.ts";
import { sleep } from "../loop.ts";
import { compareSums } from "../point_repository.ts";
import { fieldOf, runWithStack, type Stack } from "./stack.ts";

const say = (line: string) => console.error(`demo: ${line}`);
const USAGE = "Usage: bun run demo [--count N] [--seconds S]: N reservations (5) within S seconds (3)";
/** Up to this many reservations get a line of their own; more are shown as sums. */
const MAX_ROWS = 20;
const MAX_USERS = 10;
/** Reservations under way at once to the API. */
const CONCURRENCY = 100;
const DRAW_MS = 100;
/** How long after the last `execute_at` to wait for the last grant. */
const GRACE_MS = 60_000;
/** The part of the time before the first `execute_at`, so that reserving is done when it comes. */
const LEAD = 0.2;
const LOG_LINES = 30;

interface Row {
  user_id: string;
  point_amount: number;
  execute_at: Date;
  status: string;
  /** Milliseconds from `execute_at` to the ledger entry; null before the grant. */
  late_ms: number | null;
}

function readOptions(): { count: number; seconds: number } {
  try {
    const { values } = parseArgs({
      args: Bun.argv.slice(2),
      options: {
        count: { type: "string", default: "5" },
        seconds: { type: "string", default: "3" },
        help: { type: "boolean", short: "h" },
      },
    });
    if (values.help) {
      console.log(USAGE);
      process.exit(0);
    }
    return { count: whole("count", values.count, 100_000), seconds: whole("seconds", values.seconds, 3_600) };
  } catch (error) {
    say(`${(error as Error).message}\n${USAGE}`);
    process.exit(2);
  }
}

function whole(name: string, text: string, max: number): number {
  if (/^\d+$/.test(text) && Number(text) >= 1 && Number(text) <= max) return Number(text);
  throw new Error(`--${name} must be a whole number from 1 to ${max}: received ${JSON.stringify(text)}`);
}

const { count, seconds } = readOptions();
const run = crypto.randomUUID().replaceAll("-", "").slice(0, 8);
const users = Array.from({ length: Math.min(MAX_USERS, Math.ceil(count / 2)) }, (_, n) => `Demo${run}u${n}`);
const log: string[] = [];

await runWithStack(
  {
    // The lease is short: what another demo on the same queue took and did not finish comes again soon.
    env: { SCAN_INTERVAL_MS: "200", LEASE_MS: "10000" },
    usualPorts: false,
    say,
    onLog(name, line) {
      log.push(`${name}: ${fieldOf(line, "msg") ?? ""} ${line}`);
      if (log.length > LOG_LINES) log.shift();
    },
    onExit: (name, how) => say(`${name} ended by ${how}`),
  },
  async (stack) => {
    const database = openDatabase(stack.databaseUrl);
    try {
      const isFine = await demonstrate(stack, database);
      if (!isFine && !stack.signal.aborted) say(`the last lines of the logs:\n${log.join("\n")}`);
      return isFine ? 0 : 1;
    } finally {
      await database.close();
    }
  },
);

/** Reserves, watches, checks. Returns whether all of it is as it was promised. */
async function demonstrate(stack: Stack, database: Database): Promise<boolean> {
  say(`reserving ${count} grants for ${users.length} users, within ${seconds} s`);
  const startsAt = Date.now();
  const promised = await reserve(stack, startsAt);
  const draw = process.stdout.isTTY ? tableDrawer() : linePrinter();
  const end = startsAt + seconds * 1_000 + GRACE_MS;
  let rows = await readRows(database);
  while (!stack.signal.aborted) {
    draw(rows);
    if (rows.every(({ status }) => !["PENDING", "PROCESSING"].includes(status)) || Date.now() > end) break;
    await sleep(DRAW_MS, stack.signal);
    rows = await readRows(database);
  }
  if (stack.signal.aborted) return false;
  return summarize({
    rows,
    balancesAreRight: await checkBalances(stack, promised),
    sums: await compareSums(database),
  });
}

/** Returns how many points each user was promised. */
async function reserve({ apiUrl, signal }: Stack, startsAt: number): Promise<Map<string, number>> {
  const promised = new Map<string, number>();
  let next = 0;
  async function reserveNext() {
    while (next < count && !signal.aborted) {
      const n = next++;
      const userId = users[n % users.length] ?? "";
      const amount = 10 * (1 + (n % 10));
      const response = await fetch(`${apiUrl}/point/reserve`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({
          user_id: userId,
          point_amount: amount,
          execute_at: executeAt(startsAt, n).toISOString(),
          idempotency_key: `demo-${run}-${n}`,
        }),
        signal: AbortSignal.timeout(30_000),
      });
      if (response.status !== 201)
        throw new Error(`Reserving failed with ${response.status}: ${await response.text()}`);
      promised.set(userId, (promised.get(userId) ?? 0) + amount);
    }
  }
  await Promise.all(Array.from({ length: Math.min(CONCURRENCY, count) }, reserveNext));
  return promised;
}

/** Spread evenly over the time, the last one at its end. */
function executeAt(startsAt: number, n: number): Date {
  return new Date(startsAt + seconds * 1_000 * (LEAD + ((1 - LEAD) * (n + 1)) / count));
}

function readRows(database: Database): Promise<Row[]> {
  return database.run((connection) =>
    connection.select<Row>(
      `select r.user_id, r.point_amount, r.execute_at, r.status,
         timestampdiff(microsecond, r.execute_at, t.created_at) div 1000 late_ms
       from point_reservations r left join point_transactions t on t.idempotency_key = r.idempotency_key
       where r.idempotency_key like ? order by r.execute_at, r.id`,
      [`demo-${run}-%`],
    ),
  );
}

/** Whether the API tells each user's balance as promised. */
async function checkBalances({ apiUrl }: Stack, promised: Map<string, number>): Promise<boolean> {
  const balances = await Promise.all(
    [...promised].map(async ([userId, points]) => {
      const response = await fetch(`${apiUrl}/users/${userId}/points`, {
        signal: AbortSignal.timeout(30_000),
      });
      const { point_num } = (await response.json()) as { point_num?: number };
      return { userId, promised: points, balance: point_num ?? 0 };
    }),
  );
  console.log("\nuser             promised   balance");
  for (const { userId, promised, balance } of balances) {
    console.log(`${userId.padEnd(14)} ${String(promised).padStart(10)} ${String(balance).padStart(9)}`);
  }
  return balances.every(({ promised, balance }) => promised === balance);
}

function summarize(result: {
  rows: Row[];
  balancesAreRight: boolean;
  sums: Awaited<ReturnType<typeof compareSums>>;
}): boolean {
  const { rows, balancesAreRight, sums } = result;
  const late = rows.map(({ late_ms }) => late_ms).filter((ms) => ms !== null);
  const granted = rows.filter(({ status }) => status === "DONE").length;
  const early = late.filter((ms) => ms < 0).length;
  const agree = sums.agree && balancesAreRight;
  console.log(
    `\n${granted} of ${count} granted, the latest ${Math.max(0, ...late)} ms after its time, ${early} early; ` +
      `ledger (${sums.ledger}), balances (${sums.balances}) and reservations (${sums.reservations}) ${agree ? "agree" : "DO NOT AGREE"}`,
  );
  return granted === count && early === 0 && agree;
}

function describeRow({ user_id, point_amount, execute_at, status, late_ms }: Row): string {
  const late = late_ms === null ? "" : `${late_ms} ms late`;
  return `${user_id.padEnd(14)} ${String(point_amount).padStart(6)} points at ${execute_at.toISOString().slice(11, 23)}  ${status.padEnd(10)} ${late}`;
}

function describeSums(rows: readonly Row[]): string {
  const counted = ["PENDING", "PROCESSING", "DONE", "FAILED", "CANCELLED"].map((status) => {
    const number = rows.filter((row) => row.status === status).length;
    return number > 0 || ["PENDING", "PROCESSING", "DONE"].includes(status) ? `${status} ${number}` : "";
  });
  const worst = rows.reduce((max, { late_ms }) => Math.max(max, late_ms ?? 0), 0);
  return `${counted.filter(Boolean).join("  ")}  worst lateness ${worst} ms`;
}

/** For a terminal: one table that is drawn over itself. */
function tableDrawer(): (rows: readonly Row[]) => void {
  let height = 0;
  return (rows) => {
    const lines = [...(rows.length <= MAX_ROWS ? rows.map(describeRow) : []), describeSums(rows)];
    process.stdout.write(`${height > 0 ? `\x1b[${height}A\x1b[0J` : ""}${lines.join("\n")}\n`);
    height = lines.length;
  };
}

/** For a file or a pipe: a line for each change, or the sums once a second. */
function linePrinter(): (rows: readonly Row[]) => void {
  const shown = new Map<number, string>();
  let sumsAt = 0;
  return (rows) => {
    if (rows.length > MAX_ROWS) {
      const isOver = rows.every(({ status }) => status === "DONE");
      if (Date.now() - sumsAt < 1_000 && !isOver) return;
      sumsAt = Date.now();
      console.log(describeSums(rows));
      return;
    }
    for (const [n, row] of rows.entries()) {
      if (shown.get(n) === row.status) continue;
      shown.set(n, row.status);
      console.log(describeRow(row));
    }
  };
}
