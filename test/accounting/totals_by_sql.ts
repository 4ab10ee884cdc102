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

/** Checks the totals against the whole ledger, added up as anybody would write it down. */
export async function expectExactTotals({ query }: TestDatabase, timeZone: string): Promise<void> {
  const totals = await query(
    `select date_format(day, '%Y-%m-%d') day, kind, campaign, entries, points, users, late_ms_sum, late_ms_max
     from point_daily_totals where generation = (select generation from point_aggregation)
     order by day, kind, campaign`,
  );
  const sums = await query(
    `select date_format(${ZONES[timeZone]}, '%Y-%m-%d') day, t.kind, coalesce(r.campaign, '') campaign,
       count(*) entries, cast(sum(t.point_amount) as signed) points, count(distinct t.user_id) users,
       cast(coalesce(sum(timestampdiff(microsecond, r.execute_at, t.created_at) div 1000), 0) as signed) late_ms_sum,
       coalesce(max(timestampdiff(microsecond, r.execute_at, t.created_at) div 1000), 0) late_ms_max
     from point_transactions t left join point_reservations r on r.id = t.reservation_id
     group by 1, 2, 3 order by 1, 2, 3`,
  );
  expect(totals).toEqual(sums);
  expect(totals.length).toBeGreaterThan(0);
}
