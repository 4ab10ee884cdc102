import { expect } from "bun:test";
import type { TestDatabase } from "../harness/database.ts";

/** What a day is in MySQL's own arithmetic, which knows no zone by its name here. */
export const ZONES: Record<string, string> = {
  UTC: "t.created_at",
  "Asia/Tokyo": "t.created_at + interval 9 hour",
  // The hours in which clocks changed in 2026.
  "America/New_York": `t.created_at - interval
    if(t.created_at >= '2026-03-08 07:00:00' and t.created_at < '2026-11-01 06:00:00', 4, 5) hour`,
};

/** SQL: how late a grant was: since the reservation `r` was due, made or last changed. */
const LATE_MS = `coalesce(greatest(0, timestampdiff(microsecond,
  greatest(r.execute_at, r.created_at, coalesce(r.changed_at, r.created_at)), t.created_at) div 1000), 0)`;

/** Checks all totals and sums against the whole ledger, added up as anybody would write it down. */
export async function expectExactTotals(db: TestDatabase, timeZone: string): Promise<void> {
  const { query } = db;
  const totals = await query(
    `select date_format(day, '%Y-%m-%d') day, kind, campaign, entries, points, users,
       cast(late_ms_sum as char) late_ms_sum, late_ms_max
     from point_daily_totals where generation = (select generation from point_aggregation)
     order by day, kind, campaign`,
  );
  const sums = await query(
    `select date_format(${ZONES[timeZone]}, '%Y-%m-%d') day, t.kind, coalesce(r.campaign, '') campaign,
       count(*) entries, cast(sum(t.point_amount) as signed) points, count(distinct t.user_id) users,
       cast(sum(${LATE_MS}) as char) late_ms_sum, max(${LATE_MS}) late_ms_max
     from point_transactions t left join point_reservations r on r.id = t.reservation_id
     group by 1, 2, 3 order by 1, 2, 3`,
  );
  expect(totals).toEqual(sums);
  expect(totals.length).toBeGreaterThan(0);
  await expectExactSums(db);
}

interface Entry {
  id: string;
  userId: string;
  pointAmount: number;
  idempotencyKey: string;
  reservationId: string | null;
  isUnfit: 0 | 1;
}

/** Checks the sums that reconciliations compare with, and that each unfit entry is a suspect. */
async function expectExactSums({ query }: TestDatabase): Promise<void> {
  const entries = await query<Entry>(
    `select t.id, t.user_id userId, t.point_amount pointAmount, t.idempotency_key idempotencyKey,
       t.reservation_id reservationId, t.kind = 'grant' and (r.status = 'DONE' and r.user_id = t.user_id
         and r.point_amount = t.point_amount and r.idempotency_key = t.idempotency_key) is not true isUnfit
     from point_transactions t left join point_reservations r on r.id = t.reservation_id order by t.id`,
  );
  const users: Record<string, string> = {};
  for (const [userId, some] of Map.groupBy(entries, (entry) => entry.userId)) {
    users[userId] = String(some.reduce((sum, { pointAmount }) => sum + pointAmount, 0));
  }
  const prefixes: Record<string, string> = {};
  const grants = entries.filter(({ reservationId }) => reservationId !== null);
  for (const [prefix, some] of Map.groupBy(
    grants,
    ({ reservationId }) => reservationId?.slice(0, 10) ?? "",
  )) {
    prefixes[prefix] = `${some.length} ${some.map(hashOf).reduce((xor, hash) => xor ^ hash)}`;
  }
  const valid = "generation = (select generation from point_aggregation)";
  const sumsOf = async (sql: string) => {
    const rows = await query<{ name: string; sum: string }>(sql);
    return Object.fromEntries(rows.map(({ name, sum }) => [name, sum]));
  };
  // A day that is counted again may leave a sum of nothing.
  expect(
    await sumsOf(
      `select user_id name, cast(points as char) sum from point_user_totals s where ${valid}
         and (points <> 0 or exists (select 1 from point_transactions t where t.user_id = s.user_id))`,
    ),
  ).toEqual(users);
  expect(
    await sumsOf(
      `select id_prefix name, concat(entries, ' ', fingerprint) sum from point_reservation_totals
       where ${valid} and (entries <> 0 or fingerprint <> 0)`,
    ),
  ).toEqual(prefixes);
  const suspects = await query<{ id: string }>(
    `select s.transaction_id id from point_suspects s join point_transactions t on t.id = s.transaction_id`,
  );
  const unfit = entries.filter(({ isUnfit }) => isUnfit).map(({ id }) => id);
  expect(suspects.map(({ id }) => id).toSorted()).toEqual(unfit.toSorted());
}

/** The first 64 bits of a hash. */
function hashOf({ reservationId, userId, pointAmount, idempotencyKey }: Entry): bigint {
  const text = [reservationId, userId, pointAmount, idempotencyKey].join(" ");
  return BigInt(`0x${new Bun.CryptoHasher("sha256").update(text).digest("hex").slice(0, 16)}`);
}
