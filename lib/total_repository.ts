import { and, asc, between, eq, lt, sql } from "drizzle-orm";
import { v7 as uuidv7 } from "uuid";
import type { Connection, Database } from "./database.ts";
import { boundsOf, dayOf, daysBetween } from "./day.ts";
import { DomainError } from "./errors.ts";
import { type EntryKind, kindOf } from "./point.ts";
import { pointAggregation, type TotalRow, pointDailyTotals as totals } from "./schema.ts";

/** Totals of which one statement asks who is counted: beyond some thousands MySQL would read all of them. */
const SUMS = 500;
/** Rows that one statement deletes. */
const DELETE_PAGE = 10_000;
/** How long a day may take to be set back, in milliseconds: millions of entries are marked in one transaction. */
const RESET_MS = 600_000;

/** What entries of one day, kind and campaign add up to. */
interface Sum {
  day: string;
  kind: EntryKind;
  /** Empty where there is none. */
  campaign: string;
  entries: number;
  points: number;
  userIds: Set<string>;
  /** Milliseconds from `execute_at` to the entry; 0 where no reservation made it. */
  lateMsSum: number;
  lateMsMax: number;
}

interface Entry {
  id: string;
  idempotencyKey: string;
  userId: string;
  pointAmount: number;
  createdAt: Date;
}

type Promised = { idempotencyKey: string; campaign: string | null; executeAt: Date };

/**
 * Adds a page of ledger entries that no total holds yet to the totals of their days, and marks them: both in one
 * transaction, so that each counts once, however late it commits and whatever dies. Those that another one is just counting
 * are left to it.
 *
 * @returns how many were counted; fewer than `limit` where there is nothing left
 * @throws {DomainError} TIME_ZONE where the totals are by the days of another zone
 */
export function countEntries(
  database: Database,
  { timeZone, limit }: { timeZone: string; limit: number },
): Promise<number> {
  return database.transaction(async (connection) => {
    const generation = await holdGeneration(connection, timeZone);
    const entries = await connection.select<Entry>(
      `select id, idempotency_key idempotencyKey, user_id userId, point_amount pointAmount, created_at createdAt
       from point_transactions force index (point_transactions_aggregated)
       where aggregated_in < ? order by aggregated_in, created_at, id limit ? for update skip locked`,
      [generation, limit],
    );
    if (entries.length === 0) return 0;
    const promised = await connection.select<Promised>(
      `select idempotency_key idempotencyKey, campaign, execute_at executeAt
       from point_reservations where idempotency_key in (?)`,
      [entries.map(({ idempotencyKey }) => idempotencyKey)],
    );
    await addToTotals(connection, generation, addUp(entries, promised, timeZone));
    await connection.execute(
      "update point_transactions force index (primary) set aggregated_in = ? where id in (?)",
      [generation, entries.map(({ id }) => id)],
    );
    return entries.length;
  });
}

/**
 * The generation that counts, held until the transaction ends: nobody makes totals void meanwhile, or, where it is held alone,
 * nobody counts.
 */
async function holdGeneration(
  connection: Connection,
  timeZone: string,
  { alone = false } = {},
): Promise<number> {
  // Not `for share`, which MariaDB does not know.
  const [state] = await connection.select<{ generation: number; timeZone: string }>(
    `select generation, time_zone timeZone from point_aggregation where id = 1
     ${alone ? "for update" : "lock in share mode"}`,
  );
  if (!state) throw new Error("point_aggregation has lost its row");
  if (state.timeZone !== timeZone) {
    throw new DomainError(
      "TIME_ZONE",
      `Cannot aggregate by days of ${timeZone} as the totals are by days of ${state.timeZone || "no time zone yet"}: set AGGREGATE_TIME_ZONE to that. To change the zone for all, run \`bun run aggregate --rebuild\` once with the new one`,
    );
  }
  return state.generation;
}

/** Sorted as the totals are: two batches that lock rows in different orders deadlock. */
function addUp(entries: readonly Entry[], promised: readonly Promised[], timeZone: string): Sum[] {
  const promisedByKey = new Map(promised.map((one) => [one.idempotencyKey, one]));
  const sums = new Map<string, Sum>();
  let day = { name: "", from: new Date(0), until: new Date(0) };
  for (const { idempotencyKey, userId, pointAmount, createdAt } of entries) {
    // They come in the order of their times.
    if (createdAt < day.from || createdAt >= day.until) {
      const name = dayOf(createdAt, timeZone);
      day = { name, ...boundsOf(name, timeZone) };
    }
    const { campaign, executeAt = createdAt } = promisedByKey.get(idempotencyKey) ?? { campaign: null };
    const names = { day: day.name, kind: kindOf({ idempotencyKey, pointAmount }), campaign: campaign ?? "" };
    const key = `${names.day} ${names.kind} ${names.campaign}`;
    const sum = sums.get(key) ?? {
      ...names,
      ...{ entries: 0, points: 0, userIds: new Set<string>(), lateMsSum: 0, lateMsMax: 0 },
    };
    const lateMs = createdAt.getTime() - executeAt.getTime();
    sum.entries++;
    sum.points += pointAmount;
    sum.userIds.add(userId);
    sum.lateMsSum += lateMs;
    sum.lateMsMax = Math.max(sum.lateMsMax, lateMs);
    sums.set(key, sum);
  }
  return [...sums].toSorted(([a], [b]) => (a < b ? -1 : 1)).map(([, sum]) => sum);
}

async function addToTotals(connection: Connection, generation: number, sums: readonly Sum[]): Promise<void> {
  // The rows themselves first: whoever holds a total may say which of its users are new.
  await connection.execute(
    `insert into point_daily_totals (generation, day, kind, campaign) values ?
     on duplicate key update generation = values(generation)`,
    [sums.map(({ day, kind, campaign }) => [generation, day, kind, campaign])],
  );
  const known = await findCounted(connection, generation, sums);
  const fresh = sums.map((sum) => ({
    ...sum,
    userIds: [...sum.userIds].filter((userId) => !known.has(nameOf(sum, userId))).toSorted(),
  }));
  const users = fresh.flatMap(({ day, kind, campaign, userIds }) =>
    userIds.map((userId) => [generation, day, kind, campaign, userId]),
  );
  if (users.length > 0) {
    await connection.execute(
      "insert into point_daily_users (generation, day, kind, campaign, user_id) values ?",
      [users],
    );
  }
  await connection.execute(
    `insert into point_daily_totals
       (generation, day, kind, campaign, entries, points, users, late_ms_sum, late_ms_max) values ?
     on duplicate key update entries = entries + values(entries), points = points + values(points),
       users = users + values(users), late_ms_sum = late_ms_sum + values(late_ms_sum),
       late_ms_max = greatest(late_ms_max, values(late_ms_max))`,
    [
      fresh.map(({ day, kind, campaign, entries, points, userIds, lateMsSum, lateMsMax }) => [
        ...[generation, day, kind, campaign],
        ...[entries, points, userIds.length, lateMsSum, lateMsMax],
      ]),
    ],
  );
}

function nameOf({ day, kind, campaign }: Pick<Sum, "day" | "kind" | "campaign">, userId: string): string {
  return `${day} ${kind} ${campaign} ${userId}`;
}

/** Which of their users the totals hold already, each by the name of its total and its own. */
async function findCounted(
  connection: Connection,
  generation: number,
  sums: readonly Sum[],
): Promise<Set<string>> {
  // Written out, as MariaDB finds no range in `(a, b) in ((?, ?), …)`.
  const ofOne = "(generation = ? and day = ? and kind = ? and campaign = ? and user_id in (?))";
  const names = new Set<string>();
  for (let at = 0; at < sums.length; at += SUMS) {
    const some = sums.slice(at, at + SUMS);
    const rows = await connection.select<{ name: string }>(
      `select concat_ws(' ', day, kind, campaign, user_id) name from point_daily_users
       where ${some.map(() => ofOne).join(" or ")}`,
      some.flatMap(({ day, kind, campaign, userIds }) => [generation, day, kind, campaign, [...userIds]]),
    );
    for (const { name } of rows) names.add(name);
  }
  return names;
}

/** How many ledger entries no total holds yet. */
export async function countWaiting(database: Database): Promise<number> {
  const { generation } = await findAggregation(database);
  const [row] = await database.run((connection) =>
    connection.select<{ entries: number }>(
      "select count(*) entries from point_transactions where aggregated_in < ?",
      [generation],
    ),
  );
  return Number(row?.entries ?? 0);
}

/** Makes a zone the one by whose days totals are, where none was chosen yet. */
export async function chooseTimeZone(database: Database, timeZone: string): Promise<void> {
  await database.run(({ execute }) =>
    execute("update point_aggregation set time_zone = ? where id = 1 and time_zone = ''", [timeZone]),
  );
}

/** Makes all totals void, in one step: every entry is to be counted again, by the days of this zone. */
export async function startGeneration(database: Database, timeZone: string): Promise<void> {
  await database.transaction(async ({ execute }) => {
    await execute("update point_aggregation set generation = generation + 1, time_zone = ? where id = 1", [
      timeZone,
    ]);
    await execute(UNFINISHED);
  });
}

// Where whoever began it dies, a scheduler goes on with it, and not only in an hour.
const UNFINISHED = "update point_aggregation_turns set finished_at = null, aggregated_at = null where id = 1";

/**
 * Makes the totals of a day void: its entries are to be counted again. One transaction in which nobody counts, so that none of
 * them counts twice.
 *
 * @throws {DomainError} TIME_ZONE where the totals are by the days of another zone
 */
export async function resetDay(database: Database, day: string, timeZone: string): Promise<void> {
  const { from, until } = boundsOf(day, timeZone);
  await database.transaction(
    async (connection) => {
      const generation = await holdGeneration(connection, timeZone, { alone: true });
      for (const table of ["point_daily_totals", "point_daily_users"]) {
        await connection.execute(`delete from ${table} where generation = ? and day = ?`, [generation, day]);
      }
      await connection.execute(
        // A small table would be read from end to end, and each entry waited for that has not committed.
        `update point_transactions force index (point_transactions_aggregated) set aggregated_in = 0
         where aggregated_in = ? and created_at >= ? and created_at < ?`,
        [generation, from, until],
      );
      await connection.execute(UNFINISHED);
    },
    { workMs: RESET_MS },
  );
}

/** Deletes what is left of totals that do not count any more, a page at a time. */
export async function deleteOldGenerations(database: Database): Promise<void> {
  const { generation } = await findAggregation(database);
  for (const table of ["point_daily_users", "point_daily_totals"]) {
    let deleted: number;
    do {
      ({ affectedRows: deleted } = await database.run(({ execute }) =>
        execute(`delete from ${table} where generation < ? limit ?`, [generation, DELETE_PAGE]),
      ));
    } while (deleted === DELETE_PAGE);
  }
}

/** Notes that all that was there is counted. */
export async function noteAggregated(database: Database): Promise<void> {
  await database.run(({ execute }) =>
    execute("update point_aggregation_turns set aggregated_at = now(3) where id = 1"),
  );
}

/** How long nobody else takes the turn of one who has not been heard of, in milliseconds. */
const HOLD_MS = 60_000;

/**
 * Takes the turn to keep the books where it is due and nobody else has it: one conditional UPDATE, whoever comes.
 *
 * @returns by what the turn is known; undefined where it is not ours
 */
export async function takeTurn(
  database: Database,
  { intervalMs }: { intervalMs: number },
): Promise<string | undefined> {
  const turn = uuidv7();
  const { affectedRows } = await database.run(({ execute }) =>
    execute(
      `update point_aggregation_turns set held_by = ?, held_until = now(3) + interval ? microsecond
       where id = 1 and held_until <= now(3)
         and (finished_at is null or finished_at <= now(3) - interval ? microsecond)`,
      [turn, HOLD_MS * 1_000, intervalMs * 1_000],
    ),
  );
  return affectedRows === 1 ? turn : undefined;
}

/** Keeps the turn for another minute. */
export async function keepTurn(database: Database, turn: string): Promise<void> {
  await database.run(({ execute }) =>
    execute(
      "update point_aggregation_turns set held_until = now(3) + interval ? microsecond where id = 1 and held_by = ?",
      [HOLD_MS * 1_000, turn],
    ),
  );
}

/**
 * Gives the turn back.
 *
 * @param options.isFinished whether the next one is due an interval from now, and not at once
 */
export async function endTurn(
  database: Database,
  turn: string,
  { isFinished }: { isFinished: boolean },
): Promise<void> {
  const finished = isFinished ? ", finished_at = now(3)" : "";
  await database.run(({ execute }) =>
    execute(
      `update point_aggregation_turns set held_by = null, held_until = now(3)${finished} where id = 1 and held_by = ?`,
      [turn],
    ),
  );
}

/** Which totals count. */
export interface Aggregation {
  generation: number;
  /** Empty until something was counted. */
  timeZone: string;
}

export async function findAggregation(database: Database): Promise<Aggregation> {
  const [state] = await database.run(({ drizzle }) => drizzle.select().from(pointAggregation));
  if (!state) throw new Error("point_aggregation has lost its row");
  return state;
}

/** When a run had last counted all that was there; null before the first, and while totals are made anew. */
export async function findAggregatedAt(database: Database): Promise<Date | null> {
  const [turn] = await database.run(({ select }) =>
    select<{ aggregatedAt: Date | null }>(
      "select aggregated_at aggregatedAt from point_aggregation_turns where id = 1",
    ),
  );
  return turn?.aggregatedAt ?? null;
}

/** The most totals that are read at once. */
const MAX_TOTALS = 10_000;

export interface TotalsOptions {
  generation: number;
  /** The first and the last day. */
  from: string;
  to: string;
  campaign?: string | undefined;
}

/**
 * Totals by day, kind and campaign.
 *
 * @throws {DomainError} INVALID_INPUT where they are more than 10,000
 */
export async function findTotals(
  database: Database,
  { generation, from, to, campaign }: TotalsOptions,
): Promise<TotalRow[]> {
  const found = await database.run(({ drizzle }) =>
    drizzle
      .select()
      .from(totals)
      .where(
        and(
          eq(totals.generation, generation),
          between(totals.day, from, to),
          campaign === undefined ? undefined : eq(totals.campaign, campaign),
        ),
      )
      .orderBy(asc(totals.day), asc(totals.kind), asc(totals.campaign))
      .limit(MAX_TOTALS + 1),
  );
  if (found.length > MAX_TOTALS) {
    const sentence = `totals must be at most ${MAX_TOTALS}`;
    const explanation = `${sentence}: ask for fewer days, or one campaign`;
    throw new DomainError("INVALID_INPUT", "Cannot list the totals", [{ sentence, explanation }]);
  }
  return found;
}

/** All points of all users at the end of each day, by all totals of the days and what there was before them. */
export async function findBalances(
  database: Database,
  rows: readonly TotalRow[],
  { generation, from, to }: Omit<TotalsOptions, "campaign">,
): Promise<{ day: string; pointNum: bigint }[]> {
  const [before] = await database.run(({ drizzle }) =>
    drizzle
      .select({ points: sql<bigint>`coalesce(sum(${totals.points}), 0)`.mapWith(BigInt) })
      .from(totals)
      .where(and(eq(totals.generation, generation), lt(totals.day, from))),
  );
  const changes = new Map<string, bigint>();
  for (const { day, points } of rows) changes.set(day, (changes.get(day) ?? 0n) + points);
  let pointNum = before?.points ?? 0n;
  return daysBetween(from, to).map((day) => {
    pointNum += changes.get(day) ?? 0n;
    return { day, pointNum };
  });
}
