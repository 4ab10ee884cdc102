import type { Database, Transaction } from "../database.ts";
import { grantableAt } from "../schema.ts";
import {
  type DailySum,
  type GrantedReservation,
  sumByDay,
  type TotalName,
  type UncountedEntry,
} from "./daily_sum.ts";
import { addSuspects, addToSums } from "./sum_repository.ts";
import { findAggregation, lockGeneration } from "./total_repository.ts";

/** The number of totals whose users one statement looks up: with thousands MySQL would scan the table. */
const SUMS = 500;

/**
 * Adds a page of uncounted ledger entries to the totals of their days, and marks them as counted, in one transaction: each
 * entry counts once, however late it commits and whatever process dies. Also checks that each grant fits its reservation, and
 * records those that do not: no entry is counted unseen. Skips entries that another transaction is counting.
 *
 * @returns the number of entries that it counted; fewer than `limit` if none are left
 * @throws {DomainError} TIME_ZONE if the totals are by days of another time zone
 */
export function countEntries(
  database: Database,
  { timeZone, limit }: { timeZone: string; limit: number },
): Promise<number> {
  return database.transaction(async (transaction) => {
    const generation = await lockGeneration(transaction, { timeZone, mode: "lock in share mode" });
    const entries = await transaction.select<UncountedEntry>(
      `/* lock_uncounted_entries */
       select id, user_id userId, point_amount pointAmount, kind, reservation_id reservationId,
         idempotency_key idempotencyKey, created_at createdAt
       from point_transactions force index (point_transactions_aggregated)
       where aggregated_in < ? order by aggregated_in, created_at, id limit ? for update skip locked`,
      [generation, limit],
    );
    if (entries.length === 0) return 0;
    const reservations = await findGranted(transaction, entries);
    await addToTotals(transaction, generation, sumByDay(entries, { reservations, timeZone }));
    const ids = entries.map(({ id }) => id);
    await addToSums(transaction, generation, { index: "primary", where: "id in (?)", values: [ids] });
    await addSuspects(transaction, findUnfit(entries, reservations));
    await transaction.execute(
      `/* mark_counted */ update point_transactions force index (primary) set aggregated_in = ? where id in (?)`,
      [generation, ids],
    );
    return entries.length;
  });
}

async function findGranted(
  transaction: Transaction,
  entries: readonly UncountedEntry[],
): Promise<Map<string, GrantedReservation>> {
  const ids = entries.map(({ reservationId }) => reservationId).filter((id) => id !== null);
  if (ids.length === 0) return new Map();
  const rows = await transaction.select<GrantedReservation>(
    `/* find_granted_reservations */ select id, user_id userId, point_amount pointAmount, status,
       idempotency_key idempotencyKey, campaign,
       ${grantableAt()} grantableAt
     from point_reservations where id in (?)`,
    [ids],
  );
  return new Map(rows.map((row) => [row.id, row]));
}

/** The ids of the grants that are not the one entry of a DONE reservation. */
function findUnfit(
  entries: readonly UncountedEntry[],
  reservations: ReadonlyMap<string, GrantedReservation>,
): string[] {
  const unfit = entries.filter((entry) => {
    if (entry.kind !== "grant") return false;
    const reservation = reservations.get(entry.reservationId ?? "");
    return !(
      reservation?.status === "DONE" &&
      reservation.idempotencyKey === entry.idempotencyKey &&
      reservation.userId === entry.userId &&
      reservation.pointAmount === entry.pointAmount
    );
  });
  return unfit.map(({ id }) => id);
}

async function addToTotals(
  transaction: Transaction,
  generation: number,
  sums: readonly DailySum[],
): Promise<void> {
  // First lock the totals: the transaction that has locked a total decides which of its users are new.
  await transaction.execute(
    `/* insert_totals */ insert into point_daily_totals (generation, day, kind, campaign) values ?
     on duplicate key update generation = values(generation)`,
    [sums.map(({ day, kind, campaign }) => [generation, day, kind, campaign])],
  );
  const counted = await findCountedUsers(transaction, generation, sums);
  const fresh = sums.map((sum) => ({
    ...sum,
    userIds: [...sum.userIds].filter((userId) => !counted.has(nameOf(sum, userId))).toSorted(),
  }));
  const users = fresh.flatMap(({ day, kind, campaign, userIds }) =>
    userIds.map((userId) => [generation, day, kind, campaign, userId]),
  );
  if (users.length > 0) {
    await transaction.execute(
      `/* insert_counted_users */ insert into point_daily_users (generation, day, kind, campaign, user_id) values ?`,
      [users],
    );
  }
  await transaction.execute(
    `/* add_to_totals */ insert into point_daily_totals
       (generation, day, kind, campaign, entries, points, users, late_ms_sum, late_ms_max) values ?
     on duplicate key update entries = entries + values(entries), points = points + values(points),
       users = users + values(users), late_ms_sum = late_ms_sum + values(late_ms_sum),
       late_ms_max = greatest(late_ms_max, values(late_ms_max))`,
    [
      fresh.map(({ day, kind, campaign, entries, points, userIds, lateMsSum, lateMsMax }) => {
        return [
          generation,
          day,
          kind,
          campaign,
          entries,
          points,
          userIds.length,
          String(lateMsSum),
          lateMsMax,
        ];
      }),
    ],
  );
}

function nameOf({ day, kind, campaign }: TotalName, userId: string): string {
  return `${day} ${kind} ${campaign} ${userId}`;
}

/** The users that the totals have already counted, by `nameOf()`. */
async function findCountedUsers(
  { select }: Transaction,
  generation: number,
  sums: readonly DailySum[],
): Promise<Set<string>> {
  // Written out: MariaDB finds no range in `(a, b) in ((?, ?), …)`.
  const ofOneTotal = "(generation = ? and day = ? and kind = ? and campaign = ? and user_id in (?))";
  const names = new Set<string>();
  for (let at = 0; at < sums.length; at += SUMS) {
    const some = sums.slice(at, at + SUMS);
    const rows = await select<{ name: string }>(
      `/* find_counted_users */ select concat_ws(' ', day, kind, campaign, user_id) name from point_daily_users
       where ${some.map(() => ofOneTotal).join(" or ")}`,
      some.flatMap(({ day, kind, campaign, userIds }) => [generation, day, kind, campaign, [...userIds]]),
    );
    for (const { name } of rows) names.add(name);
  }
  return names;
}

/** The number of ledger entries that no total counts yet. */
export async function countWaiting(database: Database): Promise<number> {
  const { generation } = await findAggregation(database);
  const [row] = await database.run(({ select }) =>
    select<{ entries: number }>(
      `/* count_waiting */ select count(*) entries from point_transactions where aggregated_in < ?`,
      [generation],
    ),
  );
  return Number(row?.entries ?? 0);
}
