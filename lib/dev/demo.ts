/** The demonstration: makes reservations for the next seconds, and shows them until they are granted. */
import type { Database } from "../database.ts";
import { sleep } from "../loop.ts";
import { compareSums, type Sums } from "./compare_sums.ts";
import type { Stack } from "./stack.ts";

const MAX_USERS = 10;
/** Concurrent requests to the API. */
const CONCURRENCY = 100;
const REQUEST_MS = 30_000;
const DRAW_MS = 100;
/** How long after the last `execute_at` to wait for the last grant. */
const GRACE_MS = 60_000;
/** The fraction of the time before the first `execute_at`: all reservations must be made by then. */
const LEAD = 0.2;

/** A reservation in the demonstration. */
export interface DemoRow {
  user_id: string;
  point_amount: number;
  execute_at: Date;
  status: string;
  /** Milliseconds from `execute_at` to the ledger entry; null before the grant. */
  late_ms: number | null;
}

/** The balance of a user, and the expected balance. */
export interface DemoBalance {
  userId: string;
  promised: number;
  balance: number;
}

export interface DemoOptions extends Pick<Stack, "apiUrl" | "signal"> {
  database: Database;
  count: number;
  seconds: number;
  say: (line: string) => void;
  /** Called repeatedly with all reservations. */
  onRows: (rows: readonly DemoRow[]) => void;
}

/** The result of the demonstration. */
export interface DemoResult {
  rows: DemoRow[];
  balances: DemoBalance[];
  sums: Sums;
}

/** Runs the demonstration; undefined if `signal` was aborted. */
export async function demonstrate(options: DemoOptions): Promise<DemoResult | undefined> {
  const { database, count, seconds, signal, say, onRows } = options;
  const run = crypto.randomUUID().replaceAll("-", "").slice(0, 8);
  const users = Math.min(MAX_USERS, Math.ceil(count / 2));
  say(`reservations: ${count}, users: ${users}, all due within ${seconds} s`);
  const startsAt = Date.now();
  const promised = await reserve(options, { run, users, startsAt });
  const endsAt = startsAt + seconds * 1_000 + GRACE_MS;
  for (;;) {
    const rows = await readRows(database, run);
    if (signal.aborted) return undefined;
    onRows(rows);
    const isOver = rows.every(({ status }) => !["PENDING", "PROCESSING"].includes(status));
    if (isOver || Date.now() > endsAt) {
      return { rows, balances: await readBalances(options, promised), sums: await compareSums(database) };
    }
    await sleep(DRAW_MS, signal);
  }
}

/** Reserves over the API. @returns the points that each user was promised */
async function reserve(
  { apiUrl, signal, count, seconds }: DemoOptions,
  { run, users, startsAt }: { run: string; users: number; startsAt: number },
): Promise<Map<string, number>> {
  const promised = new Map<string, number>();
  let next = 0;
  async function reserveNext() {
    while (next < count && !signal.aborted) {
      const n = next++;
      const userId = `Demo${run}u${n % users}`;
      const amount = 10 * (1 + (n % 10));
      // Spread evenly over the time; the last one at its end.
      const executeAt = new Date(startsAt + seconds * 1_000 * (LEAD + ((1 - LEAD) * (n + 1)) / count));
      const response = await fetch(`${apiUrl}/point/reserve`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({
          user_id: userId,
          point_amount: amount,
          execute_at: executeAt.toISOString(),
          idempotency_key: `demo-${run}-${n}`,
        }),
        signal: AbortSignal.timeout(REQUEST_MS),
      });
      if (response.status !== 201) {
        throw new Error(`Reserving failed with ${response.status}: ${await response.text()}`);
      }
      promised.set(userId, (promised.get(userId) ?? 0) + amount);
    }
  }
  await Promise.all(Array.from({ length: Math.min(CONCURRENCY, count) }, reserveNext));
  return promised;
}

function readRows(database: Database, run: string): Promise<DemoRow[]> {
  return database.run(({ select }) =>
    select<DemoRow>(
      `/* read_demo_rows */ select r.user_id, r.point_amount, r.execute_at, r.status,
         timestampdiff(microsecond, r.execute_at, t.created_at) div 1000 late_ms
       from point_reservations r
       left join point_transactions t on t.idempotency_key = r.idempotency_key and t.is_grant = 1
       where r.idempotency_key like ? order by r.execute_at, r.id`,
      [`demo-${run}-%`],
    ),
  );
}

/** Reads the balances through the API. */
function readBalances({ apiUrl }: DemoOptions, promised: Map<string, number>): Promise<DemoBalance[]> {
  return Promise.all(
    [...promised].map(async ([userId, points]) => {
      const response = await fetch(`${apiUrl}/users/${userId}/points`, {
        signal: AbortSignal.timeout(REQUEST_MS),
      });
      const { point_num: balance = 0 } = (await response.json()) as { point_num?: number };
      return { userId, promised: points, balance };
    }),
  );
}
