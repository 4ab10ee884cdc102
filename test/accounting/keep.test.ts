import { beforeEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { pino } from "pino";
import { type AccountingOptions, keepAccounts } from "../../lib/accounting/keep.ts";
import { findAccountingState } from "../../lib/accounting/run_repository.ts";
import { resetDay, startGeneration } from "../../lib/accounting/total_repository.ts";
import { openTurns, type Turn, type Turns } from "../../lib/accounting/turn_repository.ts";
import { emptyTables, openTestDatabase } from "../harness/database.ts";
import { insertReservation } from "../harness/fixtures.ts";
import { until } from "../harness/harness.ts";
import { openPipeline, untilDone } from "../harness/pipeline.ts";
import type { RunningService } from "../harness/processes.ts";
import { change, fill } from "./filled.ts";

// The accounting of a scheduler, beside its scans.

setDefaultTimeout(60_000);

const db = await openTestDatabase();
/** The schedulers' own clock. */
let nowMs = 0;
let turns: Turns;
beforeEach(async () => {
  await emptyTables(db);
  turns = openScheduler();
});

/** The turns as a scheduler sees them that has just started. */
function openScheduler(): Turns {
  return openTurns(db.database, { intervalMs: CONFIG.AGGREGATE_INTERVAL_MS, now: () => nowMs });
}

const CONFIG = { AGGREGATE_INTERVAL_MS: 3_600_000, AGGREGATE_TIME_ZONE: "UTC", LEASE_MS: 15_000 };

async function keep(options: Partial<AccountingOptions> = {}) {
  const log: Record<string, unknown>[] = [];
  const logger = pino({}, { write: (line: string) => log.push(JSON.parse(line)) });
  const { signal } = new AbortController();
  const { database } = db;
  expect(await keepAccounts({ database, turns, logger, config: CONFIG, signal, ...options })).toBe(10_000);
  return log;
}

describe("keepAccounts()", () => {
  test("counts and compares if it is time, in one of many, and then not before the interval is over", async () => {
    await change(db, "Ann", 5);
    const schedulers = Array.from({ length: 5 }, openScheduler);
    // All of them have looked when the turn is given back.
    const turn = await turns.take();
    for (const one of schedulers) expect(await one.take()).toBeUndefined();
    await turn?.end({ isFinished: false });
    const logs = await Promise.all(schedulers.map((one) => keep({ turns: one })));
    expect(logs.flat()).toMatchObject([
      { level: 30, counted: 1, users: 1, entries: 1, days: 1, differences: 0 },
    ]);
    await change(db, "Ann", 5);
    const [first = turns] = schedulers;
    // It sees that a run has finished, and measures from here.
    expect(await keep({ turns: first })).toEqual([]);
    nowMs += CONFIG.AGGREGATE_INTERVAL_MS - 1;
    expect(await keep({ turns: first })).toEqual([]);
    nowMs += 1;
    expect(await keep({ turns: first })).toMatchObject([{ counted: 1, differences: 0 }]);
  });

  test("logs each difference as an error, a hundred at most, and how many there are", async () => {
    const users = Array.from({ length: 150 }, (_, index) => [`U${index}`, 1]);
    await db.query("insert into point_root (user_id, point_num) values ?", [users]);
    const log = await keep();
    expect(log.filter(({ difference }) => difference)).toHaveLength(100);
    const difference = "balance mismatch: U0 has 1, but the ledger has 0 in 0 entries";
    expect(log[0]).toMatchObject({ level: 50, difference });
    const msg = expect.stringContaining("bun run reconcile");
    expect(log.at(-1)).toMatchObject({ level: 50, differences: 150, msg });
  });

  test("leaves a run that a signal has ended to the next one", async () => {
    await change(db, "Ann", 5);
    expect(await keep({ signal: AbortSignal.abort() })).toEqual([]);
    expect(await db.query("select 1 from point_reconciliations")).toEqual([]);
    expect(await keep()).toMatchObject([{ counted: 1 }]);
  });
});

/** What is wrong, whenever it was changed, and the kinds of differences. */
const WRONG = `update point_root set point_num = point_num + 1000, updated_at = '2026-01-01' where user_id = 'Ann';
  insert into point_reservations (id, user_id, point_amount, execute_at, idempotency_key, status, created_at, updated_at)
    values (uuid(), 'Bob', 5, '2026-01-01', uuid(), 'DONE', '2026-01-01', '2026-01-01');
  insert into point_transactions (id, idempotency_key, user_id, point_amount, kind, reservation_id, created_at)
    values (uuid(), uuid(), 'Cat', 100, 'grant', uuid(), '2026-01-01');
  update point_daily_totals set points = points - 1 where kind = 'sub'`;
const TIMES: Record<string, string[]> = {
  point_root: ["created_at", "updated_at"],
  point_reservations: ["updated_at"],
  point_reconciliations: ["started_at", "finished_at"],
  point_aggregation_turns: ["finished_at", "aggregated_at"],
};

test.each(["ahead", "behind"])(
  "keepAccounts() is due in time, and finds what is wrong, after MySQL's clock was a day %s for a while (fault 40)",
  async (where) => {
    await fill(db);
    expect(await keep()).toMatchObject([{ differences: 0 }]);
    expect(await keep()).toEqual([]);
    const sign = where === "ahead" ? "+" : "-";
    for (const [table, columns] of Object.entries(TIMES)) {
      const moved = columns.map((column) => `${column} = ${column} ${sign} interval 1 day`);
      await db.query(`update ${table} set ${moved.join(", ")}`);
    }
    for (const sql of WRONG.split(";")) await db.query(sql);
    nowMs += CONFIG.AGGREGATE_INTERVAL_MS - 1;
    expect(await keep()).toEqual([]);
    nowMs += 1;
    const log = await keep();
    expect(log.flatMap(({ difference }) => difference ?? [])).toEqual(
      [
        "balance mismatch: Ann has 1230, but the ledger has 230",
        "balance mismatch: Cat has 100, but the ledger has 200",
        "reservation mismatch: ",
        "orphan entry: there is no reservation ",
        "total mismatch: 2026-01-01, sub, no campaign: the total has 1 entry, -21 points",
      ].map((start) => expect.stringMatching(new RegExp(`^${start}`))),
    );
    const [run] = await db.query("select is_full from point_reconciliations order by number desc limit 1");
    expect(run).toEqual({ is_full: 0 });
    expect(await findAccountingState(db.database)).toMatchObject({ differences: 5 });
  },
);

describe("openTurns()", () => {
  const end = (turn: Turn | undefined, isFinished = true) => turn?.end({ isFinished });

  test("gives the turn to one of many, until it is finished and the interval is over", async () => {
    const schedulers = Array.from({ length: 8 }, openScheduler);
    const taken = await Promise.all(schedulers.map((one) => one.take()));
    const [turn, ...others] = taken.filter((one) => one !== undefined);
    expect([turn !== undefined, others]).toEqual([true, []]);
    nowMs += 2 * CONFIG.AGGREGATE_INTERVAL_MS;
    await turn?.keep();
    for (const one of schedulers) expect(await one.take()).toBeUndefined();
    await end(turn);
    for (const one of schedulers) expect(await one.take()).toBeUndefined();
    nowMs += CONFIG.AGGREGATE_INTERVAL_MS - 1;
    for (const one of schedulers) expect(await one.take()).toBeUndefined();
    nowMs += 1;
    const next = await Promise.all(schedulers.map((one) => one.take()));
    expect(next.filter((one) => one !== undefined)).toHaveLength(1);
  });

  test("gives it at once to a scheduler that starts, if it was given back unfinished, or if totals were voided since", async () => {
    await end(await turns.take(), false);
    await end(await turns.take());
    expect(await turns.take()).toBeUndefined();
    await end(await openScheduler().take());
    expect(await turns.take()).toBeUndefined();
    await startGeneration(db.database, "UTC");
    const turn = await turns.take();
    // Also if it is voided while the turn is held: what was counted before must be counted again.
    await resetDay(db.database, "2026-01-01", "UTC");
    await end(turn);
    expect(await turns.take()).toBeDefined();
  });

  test("gives it to another one if nothing was heard of the holder for a minute, who then has no say", async () => {
    const lapsed = await turns.take();
    const other = openScheduler();
    expect(await other.take()).toBeUndefined();
    nowMs += 59_999;
    expect(await other.take()).toBeUndefined();
    await lapsed?.keep();
    nowMs += 1;
    expect(await other.take()).toBeUndefined();
    nowMs += 60_000;
    const turn = await other.take();
    expect(turn).toBeDefined();
    await lapsed?.keep();
    await end(lapsed, false);
    expect(await openScheduler().take()).toBeUndefined();
    await end(turn);
    expect(await turns.take()).toBeUndefined();
  });
});

async function metricsOf({ url }: RunningService): Promise<Record<string, number>> {
  const response = await fetch(`${url}/metrics`);
  expect(response.status).toBe(200);
  expect(response.headers.get("content-type")).toBe("text/plain; version=0.0.4");
  const lines = (await response.text()).split("\n").filter((line) => line && !line.startsWith("#"));
  return Object.fromEntries(
    lines.map((line) => line.split(" ")).map(([name, value]) => [name, Number(value)]),
  );
}

describe("scheduler.ts", () => {
  const FAST = { SCAN_INTERVAL_MS: "50", AGGREGATE_INTERVAL_MS: "50" };

  test("counts each entry once between two; a difference is a metric and an error, and the service goes on", async () => {
    await using pipeline = await openPipeline();
    const env = { ...FAST, AGGREGATE_TIME_ZONE: "Asia/Tokyo" };
    const schedulers = [await pipeline.start("scheduler", env), await pipeline.start("scheduler", env)];
    await pipeline.start("worker");
    for (const userId of ["User1", "User2", "User1"]) await insertReservation(pipeline.test, { userId });
    await untilDone(pipeline.test, { count: 3 });
    const log = () => schedulers.flatMap((scheduler) => scheduler.log());
    await until(
      "all are counted",
      () => log().reduce((sum, { counted }) => sum + Number(counted ?? 0), 0) === 3,
    );
    expect(
      await pipeline.test.query("select cast(sum(entries) as signed) entries from point_daily_totals"),
    ).toEqual([{ entries: 3 }]);
    expect(await pipeline.test.query("select time_zone from point_aggregation")).toEqual([
      { time_zone: "Asia/Tokyo" },
    ]);
    await pipeline.test.query("update point_root set point_num = point_num + 1 where user_id = 'User1'");
    for (const scheduler of schedulers) {
      const metrics = await until("it tells of the difference", async () => {
        const metrics = await metricsOf(scheduler);
        return metrics.pointservice_reconcile_differences === 1 && metrics;
      });
      for (const name of ["reconcile", "aggregate"]) {
        const seconds = metrics[`pointservice_${name}_finished_timestamp_seconds`] ?? 0;
        // Seconds since 1970, and not milliseconds.
        expect(seconds).toBeWithin(Date.UTC(2020) / 1_000, Date.UTC(2200) / 1_000);
      }
      await until("it is ready", async () => (await fetch(`${scheduler.url}/ready`)).status === 200);
    }
    expect(String(log().find(({ difference }) => difference)?.difference)).toStartWith(
      "balance mismatch: User1 has 201, but the ledger has 200 in 2 entries",
    );
    await insertReservation(pipeline.test);
    await untilDone(pipeline.test, { count: 4 });
    for (const scheduler of schedulers) expect(await scheduler.kill("SIGTERM")).toBe(0);
  });

  test("scans on while its accounting waits for a lock, and after it was refused", async () => {
    await using pipeline = await openPipeline();
    const gate = Promise.withResolvers<void>();
    const locked = Promise.withResolvers<void>();
    const holding = pipeline.test.database.transaction(
      async ({ execute, select }) => {
        await execute("update point_aggregation set time_zone = 'Asia/Tokyo'");
        locked.resolve();
        // MySQL ends a session that stands still in a transaction.
        for (let isOver = false; !isOver; ) {
          isOver = await Promise.race([gate.promise.then(() => true), Bun.sleep(1_000).then(() => false)]);
          await select("select 1");
        }
      },
      { workMs: 60_000 },
    );
    await locked.promise;
    const scheduler = await pipeline.start("scheduler", FAST);
    await pipeline.start("worker");
    for (let count = 1; count <= 3; count++) {
      await insertReservation(pipeline.test);
      await untilDone(pipeline.test, { count });
    }
    const compared = () => scheduler.log().some(({ differences }) => differences === 0);
    expect(compared()).toBe(false);
    gate.resolve();
    await holding;
    await until("it says what is wrong", () =>
      scheduler
        .log()
        .find(
          (line) =>
            line.level === "error" && JSON.stringify(line).includes("totals are by days of Asia/Tokyo"),
        ),
    );
    // It compares what can be compared.
    await until("it compares", compared);
    await insertReservation(pipeline.test);
    await untilDone(pipeline.test, { count: 4 });
  });

  test("leaves the accounting to others with AGGREGATE_INTERVAL_MS=0; /metrics is then empty", async () => {
    await using pipeline = await openPipeline();
    const scheduler = await pipeline.start("scheduler", { ...FAST, AGGREGATE_INTERVAL_MS: "0" });
    await pipeline.start("worker");
    await insertReservation(pipeline.test);
    await untilDone(pipeline.test, { count: 1 });
    expect(await metricsOf(scheduler)).toEqual({});
    expect(await scheduler.kill("SIGTERM")).toBe(0);
    expect(await pipeline.test.query("select 1 from point_daily_totals")).toEqual([]);
    expect(
      await pipeline.test.query("select 1 from point_aggregation_turns where finished_at is not null"),
    ).toEqual([]);
  });
});
