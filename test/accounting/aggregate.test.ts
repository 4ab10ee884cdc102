import { afterEach, beforeEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { createConnection, type Connection as DriverConnection } from "mysql2/promise";
import { aggregate } from "../../lib/accounting/aggregate.ts";
import { countEntries, countWaiting } from "../../lib/accounting/count_repository.ts";
import { reconcile } from "../../lib/accounting/reconcile.ts";
import { resetDay, startGeneration } from "../../lib/accounting/total_repository.ts";
import { openDatabase } from "../../lib/database.ts";
import { type Random, randomOf } from "../faults/random.ts";
import { countReads, emptyTables, openAnother, openTestDatabase } from "../harness/database.ts";
import { until } from "../harness/harness.ts";
import { type EntryFields, insertEntries } from "../harness/ledger.ts";
import { type Moment, startProxy } from "../harness/proxy.ts";
import { beforeStatements } from "../harness/statements.ts";
import { expectExactTotals, ZONES } from "./totals_by_sql.ts";

setDefaultTimeout(60_000);

const db = await openTestDatabase();
beforeEach(() => emptyTables(db));

/** A time near to where days begin or clocks change in some zone, or anywhere in the year. */
function timeOf(random: Random): Date {
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

/** Adds ledger entries of any kind, with the reservations of the grants, past all of our code. */
async function addEntries(connection: DriverConnection, random: Random, count: number): Promise<void> {
  const query = async (sql: string, values?: unknown[]) => (await connection.query(sql, values))[0] as never;
  const reservations: unknown[] = [];
  const entries = Array.from({ length: count }, (): EntryFields => {
    const createdAt = timeOf(random);
    const userId = `User${random.below(7)}`;
    if (random.below(3) === 0) return { userId, createdAt, pointAmount: random.pick([-3, -1, 2, 5]) };
    const pointAmount = 1 + random.below(9);
    const [id, idempotencyKey] = [crypto.randomUUID(), crypto.randomUUID()];
    // Due, made and changed in any order; a clock may even have gone back.
    const [executeAt, madeAt] = [before(), before()];
    const changedAt = random.below(3) === 0 ? before() : null;
    const campaign = random.pick([null, "spring", "summer", "Summer"]);
    const fields = [executeAt, madeAt, changedAt, campaign];
    // Some do not fit their entry, or do not exist.
    switch (random.below(30)) {
      case 0:
        break;
      case 1:
        reservations.push([id, userId, pointAmount, idempotencyKey, "CANCELLED", ...fields]);
        break;
      case 2:
        reservations.push([id, userId, pointAmount + 1, idempotencyKey, "DONE", ...fields]);
        break;
      case 3:
        reservations.push([id, "Another", pointAmount, idempotencyKey, "DONE", ...fields]);
        break;
      case 4:
        reservations.push([id, userId, pointAmount, crypto.randomUUID(), "DONE", ...fields]);
        break;
      default:
        reservations.push([id, userId, pointAmount, idempotencyKey, "DONE", ...fields]);
    }
    return { userId, createdAt, pointAmount, reservation: { id, idempotencyKey } };

    function before() {
      return new Date(createdAt.getTime() + 1_000 - random.below(90_000));
    }
  });
  if (reservations.length > 0) {
    await query(
      `insert into point_reservations (id, user_id, point_amount, idempotency_key, status, execute_at, created_at,
         changed_at, campaign) values ?`,
      [reservations],
    );
  }
  await insertEntries({ query }, entries);
}

/** A connection past our own code, at its isolation level: no other one leaves the gaps between entries free. */
async function openWriter() {
  const connection = await createConnection({ uri: db.url, timezone: "Z" });
  await connection.query("set session transaction isolation level read committed");
  return Object.assign(connection, { [Symbol.asyncDispose]: () => connection.end() });
}

/** Aggregates until every entry is counted: a connection that was cut holds its rows until the server notices. */
function aggregateAll(timeZone: string): Promise<unknown> {
  return until("all are counted", async () => {
    await aggregate(db.database, { timeZone });
    return (await countWaiting(db.database)) === 0;
  });
}

/** Aggregates over a connection that dies at its n-th statement, and does not come back. Resolves to whether there are so many. */
async function aggregateCut(timeZone: string, { statement, moment }: { statement: number; moment: Moment }) {
  const proxy = await startProxy(db.url);
  let left = statement;
  let isCut = false;
  const command = Object.assign(/^/, { test: () => left-- === 0 });
  const spring = () => {
    isCut = true;
    proxy.refuse();
  };
  proxy.trap({ command, moment, spring });
  const database = openDatabase(proxy.url, { connections: 1 });
  const aggregated = await aggregate(database, { timeZone }).then(
    () => true,
    () => false,
  );
  await Promise.all([database.close(), proxy.close()]);
  expect(aggregated).toBe(!isCut);
  return isCut;
}

describe("aggregate() gives what a plain GROUP BY over the whole ledger gives", () => {
  const late: DriverConnection[] = [];
  afterEach(async () => {
    for (const connection of late.splice(0)) await connection.end();
  });
  const seed = Number(Bun.env.AGGREGATE_SEED ?? Math.floor(Math.random() * 2 ** 31));

  test.each(Object.keys(ZONES))(
    `after random entries, crashes and runs, by days of %s (AGGREGATE_SEED=${seed} repeats it)`,
    async (timeZone) => {
      const random = randomOf(seed);
      await using writer = await openWriter();
      const dayOf = () => timeOf(random).toISOString().slice(0, 10);
      async function runAndCheck() {
        await aggregateAll(timeZone);
        await expectExactTotals(db, timeZone);
      }
      const steps: Record<string, () => Promise<unknown>> = {
        "some entries": () => addEntries(writer, random, 1 + random.below(60)),
        async "entries that commit late"() {
          const connection = await openWriter();
          late.push(connection);
          await connection.query("begin");
          await addEntries(connection, random, 1 + random.below(20));
        },
        async "a late one commits, or does not"() {
          const connection = late.splice(random.below(late.length + 1), 1)[0];
          await connection?.query(random.below(3) === 0 ? "rollback" : "commit");
          await connection?.end();
        },
        "a run": runAndCheck,
        async "two runs at once"() {
          await using another = openAnother(db);
          await Promise.all([aggregateAll(timeZone), aggregate(another, { timeZone })]);
          await runAndCheck();
        },
        async "pages, and no end"() {
          for (let page = 0; page < 3; page++) await countEntries(db.database, { timeZone, limit: 7 });
        },
        async "a run that dies"() {
          const moment = random.pick<Moment>(["unsent", "sent", "answered"]);
          await aggregateCut(timeZone, { statement: random.below(12), moment });
          await runAndCheck();
        },
        "a day again": () => resetDay(db.database, dayOf(), timeZone),
        async "a day again, twice and while others count"() {
          await using another = openAnother(db);
          const day = dayOf();
          const resets = [db.database, another].map((one) => resetDay(one, day, timeZone));
          await Promise.all([...resets, aggregateAll(timeZone), aggregate(another, { timeZone })]);
          await runAndCheck();
        },
        async "all again"() {
          if (random.below(3) === 0) await startGeneration(db.database, timeZone);
        },
      };
      await addEntries(writer, random, 50);
      await aggregateAll(timeZone);
      for (let step = 0; step < 60; step++) await random.pick(Object.values(steps))();
      for (const connection of late) await connection.query("commit");
      await runAndCheck();
      for (const table of ["point_daily_users", "point_user_totals", "point_reservation_totals"]) {
        const old = `select 1 from ${table} where generation < (select generation from point_aggregation)`;
        expect(await db.query(`${old} limit 1`)).toEqual([]);
      }
    },
  );

  test.each<Moment>(["sent", "answered"])(
    "whichever statement was the last of a run that died, %s: the next one counts what is left, once",
    async (moment) => {
      await using writer = await openWriter();
      let statement = 0;
      do await addEntries(writer, randomOf(statement), 20);
      while (
        await aggregateCut("UTC", { statement: statement++, moment }).finally(() => aggregateAll("UTC"))
      );
      await expectExactTotals(db, "UTC");
      // What sets the session, BEGIN, reads, writes, COMMIT.
      expect(statement).toBeGreaterThan(12);
    },
  );

  test("of a page in which every entry has a campaign of its own", async () => {
    const grants = Array.from({ length: 3_000 }, (_, index) => ({
      id: crypto.randomUUID(),
      idempotencyKey: `key-${index}`,
      userId: `User${index}`,
    }));
    await db.query(
      `insert into point_reservations
       (id, user_id, point_amount, execute_at, idempotency_key, campaign, status) values ?`,
      [
        grants.map(({ id, idempotencyKey: key, userId }) => [
          id,
          userId,
          1,
          new Date(),
          key,
          `of-${key}`,
          "DONE",
        ]),
      ],
    );
    await insertEntries(
      db,
      grants.map((reservation) => ({ userId: reservation.userId, pointAmount: 1, reservation })),
    );
    expect(await aggregate(db.database, { timeZone: "UTC" })).toBe(3_000);
    await expectExactTotals(db, "UTC");
  });
});

/** Reservations and their grants: when each was due, made, changed and granted. */
async function insertGrants(rows: readonly (readonly [string, string, string | null, string])[]) {
  const grants = rows.map(([executeAt, madeAt, changedAt, createdAt]) => {
    const [id, idempotencyKey] = [crypto.randomUUID(), crypto.randomUUID()];
    const entry = {
      userId: "Late",
      pointAmount: 1,
      reservation: { id, idempotencyKey },
      createdAt: new Date(createdAt),
    };
    const reservation = [id, "Late", 1, idempotencyKey, "DONE", new Date(executeAt), new Date(madeAt)];
    return { entry, reservation: [...reservation, changedAt && new Date(changedAt)] };
  });
  await db.query(
    `insert into point_reservations
       (id, user_id, point_amount, idempotency_key, status, execute_at, created_at, changed_at) values ?`,
    [grants.map(({ reservation }) => reservation)],
  );
  await insertEntries(
    db,
    grants.map(({ entry }) => entry),
  );
}

describe("aggregate() adds up lateness exactly", () => {
  const FIRST = "1000-01-01T00:00:00.000Z";
  const LAST = "9999-12-31T23:59:59.998Z";
  const LONGEST = BigInt(Date.parse(LAST) - Date.parse(FIRST));

  async function lateness() {
    await aggregate(db.database, { timeZone: "UTC" });
    return db.query(
      "select cast(late_ms_sum as char) sum, cast(late_ms_max as char) max from point_daily_totals order by day",
    );
  }

  test("from when a reservation was due, made or last changed, whichever is the latest; never below 0 (fault 55)", async () => {
    await insertGrants([
      ["1970-01-01T00:00:00Z", "2026-01-01T00:00:00Z", null, "2026-01-01T00:00:00.032Z"],
      ["2026-01-02T00:00:01Z", "2026-01-01T00:00:00Z", null, "2026-01-02T00:00:01.500Z"],
      ["1970-01-01T00:00:00Z", "2026-01-01T00:00:00Z", "2026-01-03T00:00:00Z", "2026-01-03T00:00:00.007Z"],
      // The clock went back.
      ["1970-01-01T00:00:00Z", "2026-01-05T00:00:00Z", null, "2026-01-04T00:00:00Z"],
    ]);
    expect(await lateness()).toEqual(["32", "500", "7", "0"].map((ms) => ({ sum: ms, max: ms })));
    await expectExactTotals(db, "UTC");
  });

  test("beyond the digits of a number and the range of a BIGINT, whatever the clocks say (fault 55)", async () => {
    const count = 100;
    await insertGrants(Array.from({ length: count }, () => [FIRST, FIRST, null, LAST] as const));
    expect(await lateness()).toEqual([{ sum: String(LONGEST * BigInt(count)), max: String(LONGEST) }]);
    expect(LONGEST * BigInt(count)).toBeGreaterThan(BigInt(Number.MAX_SAFE_INTEGER));
    await expectExactTotals(db, "UTC");
    await db.query("insert into point_root (user_id, point_num) values ('Late', ?)", [count]);
    expect(await reconcile(db.database, { leaseMs: 15_000 })).toMatchObject({ days: 1, differences: 0 });
    // As much as 32,476 of them and more.
    const before = 2n ** 63n + 1n;
    await db.query("update point_daily_totals set late_ms_sum = ?", [String(before)]);
    await insertGrants([[FIRST, FIRST, null, LAST]]);
    expect(await lateness()).toEqual([{ sum: String(before + LONGEST), max: String(LONGEST) }]);
  });
});

test("aggregate() does not mix the days of two zones; startGeneration() changes the zone for all", async () => {
  await using writer = await openWriter();
  await addEntries(writer, randomOf(3), 30);
  await aggregate(db.database, { timeZone: "UTC" });
  await addEntries(writer, randomOf(4), 30);
  const tokyo = { timeZone: "Asia/Tokyo" };
  await expect(aggregate(db.database, tokyo)).rejects.toMatchObject({ code: "TIME_ZONE" });
  await expect(resetDay(db.database, "2026-06-01", "Asia/Tokyo")).rejects.toMatchObject({
    code: "TIME_ZONE",
  });
  await startGeneration(db.database, "Asia/Tokyo");
  expect(await aggregate(db.database, tokyo)).toBe(60);
  await expectExactTotals(db, "Asia/Tokyo");
  expect(await db.query("select distinct generation from point_daily_users")).toEqual([{ generation: 2 }]);
});

test("resetDay() holds up those who count: what they count meanwhile would be counted twice", async () => {
  await using writer = await openWriter();
  await addEntries(writer, randomOf(5), 30);
  await aggregateAll("UTC");
  await addEntries(writer, randomOf(5), 30);
  const reached = Promise.withResolvers<void>();
  const gate = Promise.withResolvers<void>();
  // Its totals are gone, its entries are still marked.
  const held = beforeStatements(db.database, async (sql) => {
    if (!sql.includes("mark_uncounted")) return;
    reached.resolve();
    await gate.promise;
  });
  const resetting = resetDay(held, "2026-03-08", "UTC");
  await reached.promise;
  const counting = countEntries(db.database, { timeZone: "UTC", limit: 1_000 });
  const isWaiting = until("it waits", async () => {
    const [waiting] = await db.query(
      "select id from information_schema.processlist where db = ? and info like '/* lock_generation */%'",
      [db.name],
    );
    return waiting;
  });
  await Promise.race([counting, isWaiting]);
  gate.resolve();
  await Promise.all([resetting, counting]);
  await aggregateAll("UTC");
  await expectExactTotals(db, "UTC");
});

test("aggregate() reads as much as is new, however large the ledger is", async () => {
  const single = openDatabase(db.url, { connections: 1 });
  await using writer = await openWriter();
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
  await single.close();
  const [few = 0, many = 0] = reads;
  expect(few).toBeGreaterThan(20);
  // Which totals and users the new ones meet differs a little.
  expect(many).toBeLessThan(few + 100);
});
