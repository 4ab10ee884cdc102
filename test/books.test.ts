import { afterAll, beforeAll, beforeEach, describe, expect, test } from "bun:test";
import { pino } from "pino";
import { openDatabase } from "../lib/database.ts";
import { changePoints } from "../lib/point_repository.ts";
import { type BooksOptions, keepBooks } from "../scheduler.ts";
import {
  createTestDatabase,
  emptyBooks,
  insertReservation,
  type RunningService,
  type TestDatabase,
  until,
} from "./harness.ts";
import { openPipeline, untilDone } from "./pipeline.ts";

// What the scheduler does for the books beside its scans.

let db: TestDatabase;
beforeAll(async () => {
  db = await createTestDatabase();
});
afterAll(() => db.drop());
beforeEach(() => emptyBooks(db));

const CONFIG = { AGGREGATE_INTERVAL_MS: 3_600_000, AGGREGATE_TIME_ZONE: "UTC", LEASE_MS: 15_000 };

function keep(options: Partial<BooksOptions> = {}) {
  const log: Record<string, unknown>[] = [];
  const logger = pino({}, { write: (line: string) => log.push(JSON.parse(line)) });
  const { signal } = new AbortController();
  return { log, kept: keepBooks({ database: db.database, logger, config: CONFIG, signal, ...options }) };
}

function change(userId: string, pointAmount: number) {
  return changePoints(db.database, [
    { idempotencyKey: `direct:${crypto.randomUUID()}`, userId, pointAmount },
  ]);
}

function countedBy(log: readonly Record<string, unknown>[]): number {
  return log.reduce((sum, { counted }) => sum + Number(counted ?? 0), 0);
}

describe("keepBooks()", () => {
  test("counts and compares where it is time, for one of many, and then not before the interval is over", async () => {
    await change("Ann", 5);
    const runs = Array.from({ length: 5 }, () => keep());
    expect(await Promise.all(runs.map(({ kept }) => kept))).toEqual(Array(5).fill(10_000));
    const logs = runs.flatMap(({ log }) => log);
    expect(logs).toMatchObject([
      { msg: "the books agree", counted: 1, users: 1, entries: 1, days: 1, differences: 0 },
    ]);
    await change("Ann", 5);
    const early = keep();
    await early.kept;
    expect(early.log).toEqual([]);
    await db.query("update point_aggregation_turns set finished_at = now(3) - interval 1 hour");
    const next = keep();
    await next.kept;
    expect(next.log).toMatchObject([{ counted: 1, differences: 0 }]);
  });

  test("logs each difference as an error, a hundred at most, and how many there are", async () => {
    const users = Array.from({ length: 150 }, (_, index) => [`U${index}`, 1]);
    await db.query("insert into point_root (user_id, point_num) values ?", [users]);
    const { log, kept } = keep();
    await kept;
    expect(log.filter(({ msg }) => msg === "the books differ")).toHaveLength(100);
    expect(log[0]).toMatchObject({
      level: 50,
      difference: "balance of U0: 1, but the ledger has 0 in 0 entries",
    });
    expect(log.at(-1)).toMatchObject({ level: 50, differences: 150 });
    expect(String(log.at(-1)?.msg)).toContain("bun run reconcile");
  });

  test("leaves a run that a signal has ended to the next one", async () => {
    await change("Ann", 5);
    const { log, kept } = keep({ signal: AbortSignal.abort() });
    await kept;
    expect(log).toEqual([]);
    expect(await db.query("select 1 from point_reconciliations")).toEqual([]);
    const next = keep();
    await next.kept;
    expect(next.log).toMatchObject([{ counted: 1 }]);
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
  test("counts what is granted, every entry once between two of them; a difference is a metric, and the service goes on", async () => {
    await using pipeline = await openPipeline();
    const env = { AGGREGATE_INTERVAL_MS: "50", AGGREGATE_TIME_ZONE: "Asia/Tokyo", SCAN_INTERVAL_MS: "50" };
    const schedulers = [await pipeline.start("scheduler", env), await pipeline.start("scheduler", env)];
    await pipeline.start("worker");
    for (let index = 0; index < 30; index++)
      await insertReservation(pipeline.test, { userId: `User${index % 3}` });
    await untilDone(pipeline.test, { count: 30 });
    const logs = () => schedulers.map((scheduler) => scheduler.log());
    await until("all are counted", () => countedBy(logs().flat()) === 30);
    const rows = await pipeline.test.query(
      "select cast(sum(entries) as signed) entries from point_daily_totals",
    );
    expect(rows).toEqual([{ entries: 30 }]);
    const [one] = schedulers as [RunningService];
    await until("the figures are served", async () => {
      return (await metricsOf(one)).pointservice_reconcile_differences === 0;
    });
    const { pointservice_aggregate_finished_timestamp_seconds: finished = 0 } = await metricsOf(one);
    expect(Math.abs(finished - Date.now() / 1_000)).toBeLessThan(60);

    await pipeline.test.query("update point_root set point_num = point_num + 1 where user_id = 'User1'");
    for (const scheduler of schedulers) {
      await until(
        "both tell",
        async () => (await metricsOf(scheduler)).pointservice_reconcile_differences === 1,
      );
      expect((await fetch(`${scheduler.url}/ready`)).status).toBe(200);
    }
    const errors = logs()
      .flat()
      .filter(({ msg }) => msg === "the books differ");
    expect(String(errors[0]?.difference)).toStartWith(
      "balance of User1: 1001, but the ledger has 1000 in 10 entries",
    );
    await insertReservation(pipeline.test, { userId: "User1" });
    await untilDone(pipeline.test, { count: 31 });
    for (const scheduler of schedulers) expect(await scheduler.kill("SIGTERM")).toBe(0);
  }, 60_000);

  test("scans on while the books wait for a lock, and after they were refused", async () => {
    await using pipeline = await openPipeline();
    const other = openDatabase(pipeline.test.url);
    const gate = Promise.withResolvers<void>();
    const locked = Promise.withResolvers<void>();
    const holding = other.transaction(
      async (connection) => {
        await connection.execute("update point_aggregation set time_zone = 'Asia/Tokyo'");
        locked.resolve();
        // MySQL ends a session that stands still in a transaction.
        for (let isOver = false; !isOver; ) {
          isOver = await Promise.race([gate.promise.then(() => true), Bun.sleep(1_000).then(() => false)]);
          await connection.select("select 1");
        }
      },
      { workMs: 60_000 },
    );
    await locked.promise;
    const scheduler = await pipeline.start("scheduler", {
      SCAN_INTERVAL_MS: "50",
      AGGREGATE_INTERVAL_MS: "50",
    });
    await pipeline.start("worker");
    for (let count = 1; count <= 5; count++) {
      await insertReservation(pipeline.test);
      await untilDone(pipeline.test, { count });
    }
    expect(scheduler.log().filter(({ counted }) => counted !== undefined)).toEqual([]);
    gate.resolve();
    await holding;
    await other.close();
    const refused = await until("it says what is wrong", () =>
      scheduler.log().find(({ msg, error }) => {
        const { message = "" } = (error ?? {}) as { message?: string };
        return (
          msg === "the totals could not be made" && message.includes("the totals are by days of Asia/Tokyo")
        );
      }),
    );
    expect(refused.level).toBe("error");
    // What can be compared is.
    await until("it compares", () => scheduler.log().some(({ msg }) => msg === "the books agree"));
    await insertReservation(pipeline.test);
    await untilDone(pipeline.test, { count: 6 });
  }, 60_000);

  test("leaves the books alone with AGGREGATE_INTERVAL_MS=0; /metrics then has nothing to tell, /elsewhere is 404", async () => {
    await using pipeline = await openPipeline();
    const scheduler = await pipeline.start("scheduler", {
      SCAN_INTERVAL_MS: "50",
      AGGREGATE_INTERVAL_MS: "0",
    });
    await pipeline.start("worker");
    await insertReservation(pipeline.test);
    await untilDone(pipeline.test, { count: 1 });
    expect(await scheduler.kill("SIGTERM")).toBe(0);
    expect(await pipeline.test.query("select 1 from point_daily_totals")).toEqual([]);
    const again = await pipeline.start("scheduler", { AGGREGATE_INTERVAL_MS: "0" });
    await until("ready", async () => (await fetch(`${again.url}/ready`)).status === 200);
    expect(await metricsOf(again)).toEqual({});
  }, 30_000);
});
