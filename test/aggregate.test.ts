import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { createConnection, type Connection as DriverConnection } from "mysql2/promise";
import { aggregate } from "../lib/aggregate.ts";
import { openDatabase } from "../lib/database.ts";
import { changePoints } from "../lib/point_repository.ts";
import {
  countEntries,
  countWaiting,
  endTurn,
  keepTurn,
  resetDay,
  startGeneration,
  takeTurn,
} from "../lib/total_repository.ts";
import { type Random, randomOf } from "./faults_random.ts";
import {
  countReads,
  createTestDatabase,
  emptyBooks,
  insertReservation,
  type TestDatabase,
  until,
} from "./harness.ts";
import { openAnother, processReservations } from "./pipeline.ts";
import { type Moment, startProxy } from "./proxy.ts";

const ROOT = join(import.meta.dir, "..");

let db: TestDatabase;
beforeAll(async () => {
  db = await createTestDatabase();
});
afterAll(() => db.drop());
beforeEach(() => emptyBooks(db));

/** What a day is in MySQL's own arithmetic, which knows no zone by its name here. */
const ZONES: Record<string, string> = {
  UTC: "t.created_at",
  "Asia/Tokyo": "t.created_at + interval 9 hour",
  // The hours in which clocks changed in 2026.
  "America/New_York": `t.created_at - interval
    if(t.created_at >= '2026-03-08 07:00:00' and t.created_at < '2026-11-01 06:00:00', 4, 5) hour`,
};

/** The totals as they are kept. */
function totalsOf({ query }: TestDatabase) {
  return query(
    `select date_format(day, '%Y-%m-%d') day, kind, campaign, entries, points, users, late_ms_sum, late_ms_max
     from point_daily_totals where generation = (select generation from point_aggregation)
     order by day, kind, campaign`,
  );
}

/** The same from the whole ledger, as anybody would write it down. */
function sumsOf({ query }: TestDatabase, timeZone: string) {
  return query(
    `select date_format(${ZONES[timeZone]}, '%Y-%m-%d') day,
       if(t.idempotency_key like 'direct:%', if(t.point_amount < 0, 'sub', 'add'), 'grant') kind,
       coalesce(r.campaign, '') campaign, count(*) entries, cast(sum(t.point_amount) as signed) points,
       count(distinct t.user_id) users,
       cast(coalesce(sum(timestampdiff(microsecond, r.execute_at, t.created_at) div 1000), 0) as signed) late_ms_sum,
       coalesce(max(timestampdiff(microsecond, r.execute_at, t.created_at) div 1000), 0) late_ms_max
     from point_transactions t left join point_reservations r on r.idempotency_key = t.idempotency_key
     group by 1, 2, 3 order by 1, 2, 3`,
  );
}

async function expectExact(timeZone: string): Promise<void> {
  const kept = await totalsOf(db);
  expect(kept).toEqual(await sumsOf(db, timeZone));
  expect(kept.length).toBeGreaterThan(0);
}

type Row = [id: string, key: string, userId: string, points: number, createdAt: Date];

/** A moment near to where days begin or clocks change in some zone, or anywhere in the year. */
function momentOf(random: Random): Date {
  const edges = [
    "2026-03-08T05:00:00Z", // New York: the day of 23 hours begins
    "2026-03-08T07:00:00Z", // its clocks go forward
    "2026-03-09T04:00:00Z", // it ends
    "2026-11-01T04:00:00Z", // the day of 25 hours begins
    "2026-11-01T06:00:00Z", // its clocks go back
    "2026-11-02T05:00:00Z", // it ends
    "2026-06-01T15:00:00Z", // Tokyo's midnight
    "2026-06-02T00:00:00Z",
  ];
  const near = Date.parse(random.pick(edges)) + random.pick([-1, 0, 1, -3_600_000, 3_600_000, 7, -7]);
  const anywhere = Date.UTC(2026, 0, 1) + random.below(365 * 86_400_000);
  return new Date(random.below(4) === 0 ? anywhere : near);
}

function dayNear(random: Random): string {
  return momentOf(random).toISOString().slice(0, 10);
}

/** Ledger entries of any kind, with the reservations of the grants; none of the program's own code. */
async function addEntries(connection: DriverConnection, random: Random, count: number): Promise<void> {
  const reservations: unknown[] = [];
  const entries: Row[] = Array.from({ length: count }, () => {
    const key = crypto.randomUUID();
    const createdAt = momentOf(random);
    const userId = `User${random.below(7)}`;
    const isGrant = random.below(3) > 0;
    const points = isGrant ? 1 + random.below(9) : random.pick([-3, -1, 2, 5]);
    if (isGrant) {
      const executeAt = new Date(createdAt.getTime() - random.below(90_000));
      const campaign = random.pick([null, "spring", "summer", "Summer"]);
      reservations.push([crypto.randomUUID(), userId, points, executeAt, key, campaign, "DONE"]);
    }
    return [crypto.randomUUID(), isGrant ? key : `direct:${key}`, userId, points, createdAt];
  });
  if (reservations.length > 0) {
    await connection.query(
      `insert into point_reservations
       (id, user_id, point_amount, execute_at, idempotency_key, campaign, status) values ?`,
      [reservations],
    );
  }
  await connection.query(
    "insert into point_transactions (id, idempotency_key, user_id, point_amount, created_at) values ?",
    [entries],
  );
}

/** Past our own code, but at its isolation level: no other one leaves the gaps between entries free. */
async function connectTo(url: string): Promise<DriverConnection> {
  const connection = await createConnection({ uri: url, timezone: "Z" });
  await connection.query("set session transaction isolation level read committed");
  return connection;
}

/** The command, as an operator runs it. */
function runCommand(args: string[] = [], env: Record<string, string> = {}) {
  return Bun.spawn(["bun", "lib/aggregate.ts", ...args], {
    cwd: ROOT,
    env: { ...Bun.env, DATABASE_URL: db.url, ...env },
    stdout: "pipe",
    stderr: "pipe",
  });
}

describe("aggregate() gives what a plain GROUP BY over the whole ledger gives", () => {
  const late: DriverConnection[] = [];
  afterEach(async () => {
    for (const connection of late.splice(0)) await connection.end();
  });
  const seed = Number(Bun.env.AGGREGATE_SEED ?? Math.floor(Math.random() * 2 ** 31));

  test.each(Object.keys(ZONES))(
    `after random entries, crashes and runs, by days of %s (AGGREGATE_SEED=${seed} is the same again)`,
    async (timeZone) => {
      const random = randomOf(seed);
      const writer = await connectTo(db.url);
      // A connection that was cut holds its rows until the server notices: they are left to the next run.
      const run = () =>
        until("all are counted", async () => {
          await aggregate(db.database, { timeZone });
          return (await countWaiting(db.database)) === 0;
        });
      const steps: Record<string, () => Promise<unknown>> = {
        async "some entries"() {
          await addEntries(writer, random, 1 + random.below(60));
        },
        async "entries that commit late"() {
          const connection = await connectTo(db.url);
          await connection.query("begin");
          await addEntries(connection, random, 1 + random.below(20));
          late.push(connection);
        },
        async "a late one commits, or does not"() {
          const connection = late.splice(random.below(late.length + 1), 1)[0];
          await connection?.query(random.below(3) === 0 ? "rollback" : "commit");
          await connection?.end();
        },
        async "a run"() {
          await run();
          await expectExact(timeZone);
        },
        async "two runs at once"() {
          await using another = openAnother(db);
          await Promise.all([run(), aggregate(another, { timeZone })]);
          await run();
          await expectExact(timeZone);
        },
        async "pages, and no end"() {
          for (let page = 0; page < 3; page++) await countEntries(db.database, { timeZone, limit: 7 });
        },
        async "a run whose connection is cut at some statement"() {
          const proxy = await startProxy(db.url);
          let left = random.below(12);
          const command = Object.assign(/^/, { test: () => left-- === 0 });
          const moment = random.pick<Moment>(["unsent", "sent", "answered"]);
          proxy.trap({ command, moment, spring: () => proxy.cut() });
          const database = openDatabase(proxy.url);
          await aggregate(database, { timeZone });
          await Promise.all([database.close(), proxy.close()]);
          await run();
          await expectExact(timeZone);
        },
        async "a day anew"() {
          await resetDay(db.database, dayNear(random), timeZone);
        },
        async "a day anew, twice and while others count"() {
          await using another = openAnother(db);
          const day = dayNear(random);
          const anew = [db.database, another].map((one) => resetDay(one, day, timeZone));
          await Promise.all([...anew, run(), aggregate(another, { timeZone })]);
          await run();
          await expectExact(timeZone);
        },
        async "all anew"() {
          if (random.below(3) === 0) await startGeneration(db.database, timeZone);
        },
      };
      await addEntries(writer, random, 50);
      await run();
      for (let step = 0; step < 200; step++) {
        const work = random.pick(Object.values(steps));
        await work();
      }
      for (const connection of late) await connection.query("commit");
      await run();
      await expectExact(timeZone);
      const old =
        "select 1 from point_daily_users where generation < (select generation from point_aggregation)";
      expect(await db.query(`${old} limit 1`)).toEqual([]);
      await writer.end();
    },
    60_000,
  );

  test("of real grants, additions and subtractions, while it runs", async () => {
    const reservations = await Promise.all(
      Array.from({ length: 40 }, (_, index) =>
        insertReservation(db, { status: "PROCESSING", userId: `User${index % 5}`, campaign: "real" }),
      ),
    );
    const granting = processReservations(
      reservations.map((reservation) => [reservation]),
      { database: db.database },
    );
    const changing = Array.from({ length: 40 }, (_, index) => {
      const change = { idempotencyKey: `direct:${index}`, userId: `User${index % 3}`, pointAmount: 5 };
      return changePoints(db.database, [change]);
    });
    const aggregating = Array.from({ length: 5 }, () => aggregate(db.database, { timeZone: "UTC" }));
    await Promise.all([granting, ...changing, ...aggregating]);
    await aggregate(db.database, { timeZone: "UTC" });
    await expectExact("UTC");
    const [{ entries } = { entries: 0 }] = await db.query<{ entries: number }>(
      "select cast(sum(entries) as signed) entries from point_daily_totals",
    );
    expect(entries).toBe(80);
  }, 30_000);
});

test("aggregate() costs what is new, however large the ledger is", async () => {
  const single = openDatabase(db.url, { connections: 1 });
  const writer = await connectTo(db.url);
  const random = randomOf(6);
  const reads: number[] = [];
  for (const before of [100, 3_000]) {
    await addEntries(writer, random, before);
    await aggregate(db.database, { timeZone: "UTC" });
    await addEntries(writer, random, 20);
    reads.push(
      await countReads(single, async (database) => {
        expect(await aggregate(database, { timeZone: "UTC" })).toBe(20);
      }),
    );
  }
  await Promise.all([single.close(), writer.end()]);
  const [few = 0, many = 0] = reads;
  expect(few).toBeGreaterThan(20);
  // Which totals and users the new ones meet differs a little.
  expect(many).toBeLessThan(few + 100);
}, 20_000);

describe("bun run aggregate", () => {
  test.each<[string, RegExp, Moment]>([
    ["before BEGIN", /^begin/, "unsent"],
    ["BEGIN │ entries", /^begin/, "answered"],
    ["entries │ totals", /for update skip locked/, "answered"],
    ["totals │ users", /^insert into point_daily_totals/, "answered"],
    ["users │ their numbers", /^insert into point_daily_users/, "answered"],
    ["numbers │ marks", /entries = entries \+/, "answered"],
    ["marks │ COMMIT", /^update point_transactions/, "answered"],
    ["before COMMIT", /^commit/, "unsent"],
    ["within COMMIT", /^commit/, "sent"],
    ["after COMMIT", /^commit/, "answered"],
  ])(
    "killed at %s: the next run counts what is left, once",
    async (_, command, moment) => {
      const writer = await connectTo(db.url);
      await addEntries(writer, randomOf(1), 50);
      await writer.end();
      const proxy = await startProxy(db.url);
      const killed = Promise.withResolvers<void>();
      const run = runCommand([], { DATABASE_URL: proxy.url });
      proxy.trap({
        command,
        moment,
        spring() {
          run.kill("SIGKILL");
          killed.resolve();
        },
      });
      await killed.promise;
      await run.exited;
      await proxy.close();
      // What the server has not noticed to be gone yet holds its rows a moment longer.
      await until("all are counted", async () => {
        await aggregate(db.database, { timeZone: "UTC" });
        const [{ sum } = { sum: 0 }] = await db.query<{ sum: number }>(
          "select cast(sum(entries) as signed) sum from point_daily_totals",
        );
        return sum === 50;
      });
      await expectExact("UTC");
    },
    20_000,
  );

  test("says how many it has counted; a day's totals that are wrong are right after --from --to", async () => {
    const writer = await connectTo(db.url);
    await addEntries(writer, randomOf(2), 30);
    await writer.end();
    const first = runCommand();
    expect(await first.exited).toBe(0);
    expect(await new Response(first.stdout).text()).toMatch(
      /^30 ledger entries counted in .* by days of UTC\n$/,
    );
    await expectExact("UTC");
    await db.query("update point_daily_totals set points = points + 1, users = 0");
    const second = runCommand(["--from", "2026-01-01", "--to", "2026-12-31"]);
    expect(await second.exited).toBe(0);
    expect(await new Response(second.stdout).text()).toStartWith(
      "2026-01-01 to 2026-12-31 made anew: 30 ledger entries counted",
    );
    await expectExact("UTC");
  }, 60_000);

  test("makes a day anew where nothing was ever counted", async () => {
    const writer = await connectTo(db.url);
    await addEntries(writer, randomOf(5), 10);
    await writer.end();
    expect(await runCommand(["--from", "2026-03-08", "--to", "2026-03-08"]).exited).toBe(0);
    await expectExact("UTC");
  }, 20_000);

  test("counts a page in which every entry is of a campaign of its own", async () => {
    const campaigns = Array.from({ length: 3_000 }, (_, index) => [
      ...[crypto.randomUUID(), `User${index}`, 1, "2026-01-01", `key-${index}`, `campaign-${index}`, "DONE"],
    ]);
    await db.query(
      `insert into point_reservations
       (id, user_id, point_amount, execute_at, idempotency_key, campaign, status) values ?`,
      [campaigns],
    );
    await db.query(
      `insert into point_transactions (id, idempotency_key, user_id, point_amount)
       select uuid(), idempotency_key, user_id, point_amount from point_reservations`,
    );
    expect(await aggregate(db.database, { timeZone: "UTC" })).toBe(3_000);
    await expectExact("UTC");
  }, 30_000);

  test("does not mix the days of two zones: another one is refused until --rebuild", async () => {
    const writer = await connectTo(db.url);
    await addEntries(writer, randomOf(3), 30);
    expect(await runCommand().exited).toBe(0);
    await addEntries(writer, randomOf(4), 30);
    await writer.end();
    const tokyo = { AGGREGATE_TIME_ZONE: "Asia/Tokyo" };
    const refused = runCommand([], tokyo);
    expect(await refused.exited).toBe(1);
    expect(await new Response(refused.stderr).text()).toBe(
      "Cannot aggregate by days of Asia/Tokyo as the totals are by days of UTC: set AGGREGATE_TIME_ZONE to that. To change the zone for all, run `bun run aggregate --rebuild` once with the new one\n",
    );
    expect(await runCommand(["--rebuild"], tokyo).exited).toBe(0);
    await expectExact("Asia/Tokyo");
    expect(await db.query("select distinct generation from point_daily_users")).toEqual([{ generation: 2 }]);
  }, 30_000);

  test.each([
    [
      ["--from", "2026-02-31", "--to", "2026-03-01"],
      '--from must be a day like 2026-01-31, from 1970 to 9999: received "2026-02-31"',
    ],
    [["--from", "2026-03-01"], "--to must be a day like 2026-01-31, from 1970 to 9999: received nothing"],
    [
      ["--from", "2026-03-02", "--to", "2026-03-01"],
      "--from must not be after --to: received 2026-03-02 and 2026-03-01",
    ],
    [["--rebuild", "--from", "2026-03-02", "--to", "2026-03-02"], "--rebuild takes no days"],
    [["--form"], "Unknown option '--form'"],
  ])("refuses %p, says why and how it is used", async (args, reason) => {
    const run = runCommand(args);
    expect(await run.exited).toBe(2);
    const said = await new Response(run.stderr).text();
    expect(said).toContain(reason);
    expect(said).toContain("Usage: bun run aggregate");
  });
});

describe("takeTurn()", () => {
  const HOUR = { intervalMs: 3_600_000 };

  test("gives it to one of many, until it is finished and the interval is over", async () => {
    const turns = await Promise.all(Array.from({ length: 8 }, () => takeTurn(db.database, HOUR)));
    const [turn = "", ...others] = turns.filter((one) => one !== undefined);
    expect([turn.length, others]).toEqual([36, []]);
    await keepTurn(db.database, turn);
    expect(await takeTurn(db.database, HOUR)).toBeUndefined();
    // Nobody ends another one's.
    await endTurn(db.database, crypto.randomUUID(), { isFinished: true });
    expect(await takeTurn(db.database, { intervalMs: 0 })).toBeUndefined();
    await endTurn(db.database, turn, { isFinished: true });
    expect(await takeTurn(db.database, HOUR)).toBeUndefined();
    await until("the interval is over", () => takeTurn(db.database, { intervalMs: 1 }));
  });

  test("gives it again at once where it was given back unfinished", async () => {
    const turn = (await takeTurn(db.database, HOUR)) ?? "";
    await endTurn(db.database, turn, { isFinished: false });
    expect(await takeTurn(db.database, HOUR)).toBeDefined();
  });

  test("gives it again where the one who had it has not been heard of for a minute, and takes no word of that one", async () => {
    const lapsed = (await takeTurn(db.database, HOUR)) ?? "";
    const [left] = await db.query<{ seconds: number }>(
      "select timestampdiff(second, now(3), held_until) seconds from point_aggregation_turns",
    );
    expect(left?.seconds).toBeWithin(30, 61);
    await db.query("update point_aggregation_turns set held_until = now(3)");
    expect(await takeTurn(db.database, HOUR)).toBeDefined();
    await keepTurn(db.database, lapsed);
    await endTurn(db.database, lapsed, { isFinished: false });
    expect(await takeTurn(db.database, HOUR)).toBeUndefined();
  });
});
