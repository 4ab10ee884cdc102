import type { Connection, Database } from "../database.ts";
import { AFTER_ALL, type CheckedPage, findShownEntries, PAGE, runPage, WALK_PAGE } from "./check.ts";
import type { BalanceMismatch } from "./difference.ts";

/**
 * Compares each balance of a page with the sum of its user's ledger entries, including users without a balance.
 *
 * @param options.isFull false: only those of users whose balance differs from the sum of the counted entries
 */
export function checkBalances(
  database: Database,
  { after, isFull }: { after: string; isFull: boolean },
): Promise<CheckedPage<string>> {
  return runPage(database, async (connection) => {
    const limit = isFull ? PAGE : WALK_PAGE;
    const [page] = await connection.select<{ last: string | null; count: number }>(
      `/* page_of_balances */ select max(user_id) last, count(*) count
       from (select user_id from point_root where user_id > ? order by user_id limit ?) page`,
      [after, limit],
    );
    const isLast = !page?.last || page.count < limit;
    const last = isLast ? AFTER_ALL : page.last;
    const next = isLast ? undefined : (last ?? undefined);
    if (isFull) {
      const differences = await findMismatches(connection, "user_id > ? and user_id <= ?", [after, last]);
      return { next, count: Number(page?.count ?? 0), differences };
    }
    const userIds = await findMovedBalances(connection, { after, last });
    return { next, count: userIds.length, differences: await findBalanceMismatches(connection, userIds) };
  });
}

/** The users whose balance differs from the sum of their counted entries: most have entries that are not counted yet. */
async function findMovedBalances(
  { select }: Connection,
  { after, last }: { after: string; last: string | null },
): Promise<string[]> {
  const rows = await select<{ userId: string }>(
    `/* find_moved_balances */ select b.user_id userId
     from point_aggregation a join point_root b
     left join point_user_totals s on s.generation = a.generation and s.user_id = b.user_id
     where a.id = 1 and b.user_id > ? and b.user_id <= ? and b.point_num <> coalesce(s.points, 0)
     union all
     select s.user_id
     from point_aggregation a join point_user_totals s on s.generation = a.generation
     left join point_root b on b.user_id = s.user_id
     where a.id = 1 and s.user_id > ? and s.user_id <= ? and b.user_id is null`,
    [after, last, after, last],
  );
  return rows.map(({ userId }) => userId);
}

/** The mismatches among the balances of these users. */
export async function findBalanceMismatches(
  connection: Connection,
  userIds: readonly string[],
): Promise<BalanceMismatch[]> {
  const found: BalanceMismatch[] = [];
  for (let at = 0; at < userIds.length; at += PAGE) {
    found.push(...(await findMismatches(connection, "user_id in (?)", [userIds.slice(at, at + PAGE)])));
  }
  return found;
}

async function findMismatches(
  connection: Connection,
  where: string,
  values: unknown[],
): Promise<BalanceMismatch[]> {
  type Row = { userId: string; hasBalance: number; balance: string; ledger: string; entryCount: number };
  const rows = await connection.select<Row>(
    `/* find_balance_mismatches */ select user_id userId, max(has_balance) hasBalance, sum(balance) balance,
       sum(ledger) ledger, sum(entries) entryCount
     from (
       select user_id, 1 has_balance, point_num balance, 0 ledger, 0 entries from point_root where ${where}
       union all
       select user_id, 0, 0, sum(point_amount), count(*)
       from point_transactions force index (point_transactions_user) where ${where} group by user_id
     ) both_sides group by user_id having sum(balance) <> sum(ledger) order by user_id`,
    [...values, ...values],
  );
  const found: BalanceMismatch[] = [];
  for (const { userId, hasBalance, balance, ledger, entryCount } of rows) {
    found.push({
      kind: "balance",
      user_id: userId,
      balance: Number(hasBalance) === 1 ? BigInt(balance) : null,
      ledger: BigInt(ledger),
      entry_count: Number(entryCount),
      entries: await findShownEntries(
        connection,
        "t.user_id = ? order by t.created_at desc, t.id desc",
        userId,
      ),
    });
  }
  return found;
}
