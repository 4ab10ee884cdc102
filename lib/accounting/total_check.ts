import type { Database } from "../database.ts";
import type { EntryKind } from "../schema.ts";
import { runPage } from "./check.ts";
import { boundsOf } from "./day.ts";
import type { ShownTotal, TotalMismatch } from "./difference.ts";
import type { Aggregation } from "./total_repository.ts";

/** The earliest day that has totals, and the time of the earliest entry that they count; null if there is none. */
export interface FoundDay {
  day: string | null;
  createdAt: Date | null;
}

/**
 * Finds the next day of the totals, and the next entry, of a generation.
 *
 * @param options.day the first day of the totals
 * @param options.from the first time of the entries
 * @param options.since finds only totals that have changed since this time
 */
export async function findDay(
  database: Database,
  { generation, from, day, since }: { generation: number; from: Date; day: string; since: Date | undefined },
): Promise<FoundDay> {
  const [found] = await runPage(database, ({ select }) =>
    select<FoundDay>(
      `/* find_day */ select
         (select date_format(min(t.day), '%Y-%m-%d') from point_daily_totals t
           where t.generation = ? and t.day >= ? and t.updated_at >= ?) day,
         (select min(t.created_at) from point_transactions t
           where t.aggregated_in = ? and t.created_at >= ?) createdAt`,
      [generation, day, since ?? new Date(0), generation, from],
    ),
  );
  return found ?? { day: null, createdAt: null };
}

type Row = { side: "total" | "ledger"; of: EntryKind; campaign: string } & Record<
  keyof ShownTotal,
  string | number
>;

/** Compares the totals of a day with the entries that they count; finds nothing if the generation is no longer valid. */
export async function checkDay(
  database: Database,
  day: string,
  { generation, timeZone }: Aggregation,
): Promise<TotalMismatch[]> {
  const { from, until } = boundsOf(day, timeZone);
  const rows = await runPage(database, ({ select }) =>
    select<Row>(
      `/* check_day */
       select 'total' side, t.kind \`of\`, t.campaign, t.entries, t.points, t.users, t.late_ms_sum, t.late_ms_max
       from point_aggregation a join point_daily_totals t on t.generation = a.generation
       where a.id = 1 and a.generation = ? and t.day = ?
       union all
       select 'ledger', kind, campaign, count(*), sum(point_amount), count(distinct user_id), sum(late_ms),
         greatest(0, max(late_ms))
       from (
         select t.user_id, t.point_amount, t.kind, coalesce(r.campaign, '') campaign,
           coalesce(timestampdiff(microsecond, r.execute_at, t.created_at) div 1000, 0) late_ms
         from point_aggregation a
         join point_transactions t force index (point_transactions_aggregated) on t.aggregated_in = a.generation
         left join point_reservations r on r.id = t.reservation_id
         where a.id = 1 and a.generation = ? and t.created_at >= ? and t.created_at < ?
       ) entries group by kind, campaign`,
      [generation, day, generation, from, until],
    ),
  );
  const pairs = Map.groupBy(rows, ({ of, campaign }) => `${of} ${campaign}`);
  return [...pairs.values()].flatMap((pair): TotalMismatch[] => {
    const [total, ledger] = [shownTotal(pair, "total"), shownTotal(pair, "ledger")];
    const [first] = pair;
    if (!first || (total && ledger && COLUMNS.every((column) => total[column] === ledger[column]))) return [];
    return [{ kind: "total", day, of: first.of, campaign: first.campaign || null, total, ledger }];
  });
}

const COLUMNS = ["entries", "points", "users", "late_ms_sum", "late_ms_max"] as const;

function shownTotal(pair: readonly Row[], side: Row["side"]): ShownTotal | null {
  const row = pair.find((one) => one.side === side);
  if (!row) return null;
  const { entries, points, users, late_ms_sum, late_ms_max } = row;
  return {
    entries: BigInt(entries),
    points: BigInt(points),
    users: BigInt(users),
    late_ms_sum: BigInt(late_ms_sum),
    late_ms_max: BigInt(late_ms_max),
  };
}
