import type { Database } from "../database.ts";
import { LATEST_MS } from "../field.ts";
import { type EntryKind, grantableAt } from "../schema.ts";
import { EARLIEST, runPage } from "./check.ts";
import { boundsOf, dayOf } from "./day.ts";
import type { ShownTotal, TotalMismatch } from "./difference.ts";
import { hashOf } from "./sum_repository.ts";
import { type Aggregation, findAggregation } from "./total_repository.ts";

/** The number of days with totals in one page. */
const DAYS = 400;
/** Before every day of a total, and after every time of an entry. */
const FIRST_DAY = "0001-01-01";
const LATEST = new Date(LATEST_MS);

/** A day to check. */
export interface FoundDay {
  day: string;
  /** Of its totals, before the check; null if it has none. */
  fingerprint: string | null;
  aggregation: Aggregation;
}

/**
 * Finds the days that have totals, or entries that totals should count, in ascending order.
 *
 * @param options.isFull false: only days whose totals have changed since a check found them right, or that have no totals
 */
export async function* findDays(
  database: Database,
  { isFull }: { isFull: boolean },
): AsyncGenerator<FoundDay> {
  const aggregation = await findAggregation(database);
  const { generation, timeZone } = aggregation;
  if (timeZone === "") return;
  let from = EARLIEST;

  /** The days without totals from `from` on. */
  async function* findMissing(until: Date): AsyncGenerator<FoundDay> {
    while (from < until) {
      const createdAt = await findNextEntry(database, { generation, from, until });
      if (!createdAt) return;
      const day = dayOf(createdAt, timeZone);
      yield { day, fingerprint: null, aggregation };
      from = boundsOf(day, timeZone).until;
    }
  }

  for (let after = FIRST_DAY, isLast = false; !isLast; ) {
    const page = await listDays(database, { generation, after });
    for (const { day, fingerprint, isChecked } of page) {
      const bounds = boundsOf(day, timeZone);
      yield* findMissing(bounds.from);
      if (isFull || !isChecked) yield { day, fingerprint, aggregation };
      if (bounds.until > from) from = bounds.until;
      after = day;
    }
    isLast = page.length < DAYS;
  }
  yield* findMissing(LATEST);
}

/** A page of the days that have totals. */
async function listDays(
  database: Database,
  { generation, after }: { generation: number; after: string },
): Promise<{ day: string; fingerprint: string; isChecked: boolean }[]> {
  const rows = await runPage(database, ({ select }) =>
    select<{ day: string; fingerprint: string; isChecked: 0 | 1 }>(
      `/* list_days */ select date_format(t.day, '%Y-%m-%d') day, cast(t.fingerprint as char) fingerprint,
         t.fingerprint <=> c.fingerprint isChecked
       from (
         select day, bit_xor(${hashOf("kind", "campaign", "entries", "points", "users", "late_ms_sum", "late_ms_max")})
           fingerprint
         from point_daily_totals where generation = ? and day > ? group by day order by day limit ?
       ) t
       left join point_checked_days c on c.generation = ? and c.day = t.day order by t.day`,
      [generation, after, DAYS, generation],
    ),
  );
  return rows.map((row) => ({ ...row, isChecked: row.isChecked === 1 }));
}

/** The time of the first entry in a time range that the totals of a generation count. */
async function findNextEntry(
  database: Database,
  { generation, from, until }: { generation: number; from: Date; until: Date },
): Promise<Date | undefined> {
  const [found] = await runPage(database, ({ select }) =>
    select<{ createdAt: Date | null }>(
      `/* find_next_entry */ select min(created_at) createdAt from point_transactions
       where aggregated_in = ? and created_at >= ? and created_at < ?`,
      [generation, from, until],
    ),
  );
  return found?.createdAt ?? undefined;
}

/** Compares the totals of a day with the entries that they count, and remembers them if they agree. */
export async function checkDay(database: Database, found: FoundDay): Promise<TotalMismatch[]> {
  const { day, fingerprint, aggregation } = found;
  const differences = await compareDay(database, day, aggregation);
  const values = [aggregation.generation, day];
  await database.run(({ execute }) =>
    differences.length === 0 && fingerprint !== null
      ? execute(
          // The fingerprint from before the check: what has changed since will be checked again.
          `/* remember_day */ insert into point_checked_days (generation, day, fingerprint) values (?)
           on duplicate key update fingerprint = values(fingerprint)`,
          [[...values, fingerprint]],
        )
      : execute(`/* forget_day */ delete from point_checked_days where generation = ? and day = ?`, values),
  );
  return differences;
}

type Row = { side: "total" | "ledger"; of: EntryKind; campaign: string } & Record<
  keyof ShownTotal,
  string | number
>;

/** The totals of a day that are not what their entries add up to; none if the generation is no longer valid. */
async function compareDay(
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
       select 'ledger', kind, campaign, count(*), sum(point_amount), count(distinct user_id), sum(late_ms), max(late_ms)
       from (
         select t.user_id, t.point_amount, t.kind, coalesce(r.campaign, '') campaign,
           greatest(0, coalesce(timestampdiff(microsecond,
             ${grantableAt("r.")}, t.created_at) div 1000, 0)) late_ms
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
