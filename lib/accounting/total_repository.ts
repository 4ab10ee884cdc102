import { and, asc, between, eq, lt, sql } from "drizzle-orm";
import type { Database, Transaction } from "../database.ts";
import { DatabaseError } from "../database_errors.ts";
import { DomainError } from "../errors.ts";
import { pointAggregation, type TotalRow, pointDailyTotals as totals } from "../schema.ts";
import { boundsOf, type Days, daysBetween } from "./day.ts";
import { addToSums } from "./sum_repository.ts";

/** The maximum number of rows that one statement deletes. */
const DELETE_PAGE = 10_000;
/** The longest time to reset a day, in milliseconds: one transaction marks millions of entries. */
const RESET_MS = 600_000;
/** The maximum number of lock waits of 1 s: resetting a day holds its lock for minutes. */
const MAX_WAITS = 600;

/** Runs work again while another transaction holds a lock that it needs. */
export async function retryLocked<T>(work: () => Promise<T>, signal?: AbortSignal): Promise<T> {
  for (let waits = 1; ; waits++) {
    try {
      return await work();
    } catch (error) {
      const mayPass = error instanceof DatabaseError && error.isContended;
      if (!mayPass || waits > MAX_WAITS || signal?.aborted) throw error;
    }
  }
}

/**
 * Locks the valid generation until the transaction ends. In share mode no other transaction can void totals meanwhile; with
 * `for update`, no other can count entries either.
 */
export async function lockGeneration(
  transaction: Transaction,
  // MariaDB does not support `for share`.
  { timeZone, mode }: { timeZone: string; mode: "lock in share mode" | "for update" },
): Promise<number> {
  const [state] = await transaction.select<Aggregation>(
    `/* lock_generation */ select generation, time_zone timeZone from point_aggregation where id = 1 ${mode}`,
  );
  if (!state) throw new Error("point_aggregation has lost its row");
  if (state.timeZone !== timeZone) {
    throw new DomainError(
      "TIME_ZONE",
      `Cannot aggregate by days of ${timeZone} as the totals are by days of ${state.timeZone || "no time zone yet"}. Set AGGREGATE_TIME_ZONE to the time zone of the totals; or, to change it for all totals, run \`bun run aggregate --rebuild\` once with the new one`,
    );
  }
  return state.generation;
}

/** Sets the time zone of the totals if none is set yet. */
export async function chooseTimeZone(database: Database, timeZone: string): Promise<void> {
  await database.run(({ execute }) =>
    execute(
      `/* choose_time_zone */ update point_aggregation set time_zone = ? where id = 1 and time_zone = ''`,
      [timeZone],
    ),
  );
}

/** Voids all totals in one step: every entry will be counted again, by days of this time zone. */
export async function startGeneration(database: Database, timeZone: string): Promise<void> {
  await retryLocked(() =>
    database.transaction(async (transaction) => {
      await transaction.execute(
        `/* start_generation */ update point_aggregation set generation = generation + 1, time_zone = ? where id = 1`,
        [timeZone],
      );
      await markUnfinished(transaction);
    }),
  );
}

/** If the process that voided totals dies, a scheduler continues at once, not after the interval. */
async function markUnfinished({ execute }: Transaction): Promise<void> {
  await execute(
    `/* mark_unfinished */ update point_aggregation_turns set is_wanted = 1, aggregated_at = null where id = 1`,
  );
}

/**
 * Voids the totals of a day: its entries will be counted again. While this transaction runs, no other one counts entries, so that
 * no entry is counted twice.
 *
 * @throws {DomainError} TIME_ZONE if the totals are by days of another time zone
 */
export async function resetDay(database: Database, day: string, timeZone: string): Promise<void> {
  const { from, until } = boundsOf(day, timeZone);
  async function reset(transaction: Transaction) {
    const generation = await lockGeneration(transaction, { timeZone, mode: "for update" });
    for (const table of ["point_daily_totals", "point_daily_users"]) {
      await transaction.execute(
        `/* reset_${table} */ delete from ${table} where generation = ? and day = ?`,
        [generation, day],
      );
    }
    // Without this index, MySQL would scan a small table, and wait for each entry that is not committed.
    const index = "point_transactions_aggregated";
    const where = "aggregated_in = ? and created_at >= ? and created_at < ?";
    const values = [generation, from, until];
    await addToSums(transaction, generation, { index, where, values, isSubtracted: true });
    await transaction.execute(
      `/* mark_uncounted */ update point_transactions force index (${index}) set aggregated_in = 0 where ${where}`,
      values,
    );
    await markUnfinished(transaction);
  }
  await retryLocked(() => database.transaction(reset, { workMs: RESET_MS }));
}

/** The tables whose rows are of one generation. */
const TABLES = [
  "point_daily_users",
  "point_daily_totals",
  "point_user_totals",
  "point_reservation_totals",
  "point_checked_days",
];

/** Deletes the totals of older generations, one page at a time. */
export async function deleteOldGenerations(database: Database): Promise<void> {
  const { generation } = await findAggregation(database);
  for (const table of TABLES) {
    let deleted: number;
    do {
      ({ affectedRows: deleted } = await database.run(({ execute }) =>
        execute(`/* delete_old_${table} */ delete from ${table} where generation < ? limit ?`, [
          generation,
          DELETE_PAGE,
        ]),
      ));
    } while (deleted === DELETE_PAGE);
  }
}

/** Records that all entries are counted. */
export async function noteAggregated(database: Database): Promise<void> {
  await database.run(({ execute }) =>
    execute(`/* note_aggregated */ update point_aggregation_turns set aggregated_at = now(3) where id = 1`),
  );
}

/** The generation of the valid totals. */
export interface Aggregation {
  generation: number;
  /** Empty before the first aggregation. */
  timeZone: string;
}

/** Finds the generation of the valid totals. */
export async function findAggregation(database: Database): Promise<Aggregation> {
  const [state] = await database.run((connection) =>
    connection.drizzle("find_aggregation").select().from(pointAggregation),
  );
  if (!state) throw new Error("point_aggregation has lost its row");
  return state;
}

/** When an aggregation last counted all entries; null before the first one, and while totals are recalculated. */
export async function findAggregatedAt(database: Database): Promise<Date | null> {
  const [turn] = await database.run(({ select }) =>
    select<{ aggregatedAt: Date | null }>(
      `/* find_aggregated_at */ select aggregated_at aggregatedAt from point_aggregation_turns where id = 1`,
    ),
  );
  return turn?.aggregatedAt ?? null;
}

/** The maximum number of totals in one answer. */
const MAX_TOTALS = 10_000;

export interface TotalsOptions extends Days {
  generation: number;
  campaign?: string | undefined;
}

/**
 * Totals by day, kind and campaign.
 *
 * @throws {DomainError} INVALID_INPUT if there are more than 10,000
 */
export async function findTotals(
  database: Database,
  { generation, from, to, campaign }: TotalsOptions,
): Promise<TotalRow[]> {
  const found = await database.run((connection) =>
    connection
      .drizzle("find_totals")
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

/**
 * The sum of all balances at the end of each day.
 *
 * @param rows all totals of these days
 */
export async function findBalances(
  database: Database,
  rows: readonly TotalRow[],
  { generation, from, to }: Omit<TotalsOptions, "campaign">,
): Promise<{ day: string; pointNum: bigint }[]> {
  const [before] = await database.run((connection) =>
    connection
      .drizzle("find_points_before")
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
