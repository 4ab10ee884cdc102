import type { Connection, Database } from "../database.ts";
import { type CheckedPage, findShownEntries, PAGE, runPage, WALK_PAGE } from "./check.ts";
import type { BalanceMismatch } from "./difference.ts";

/** Sorts after every user id. */
const AFTER_ALL = "~";

/**
 * Compares each balance of a page with the sum of its user's ledger entries, including users without a balance.
 *
 * @param options.since checks only balances that have changed since this time
 */
export function checkBalances(
  database: Database,
  { after, since }: { after: string; since: Date | undefined },
): Promise<CheckedPage<string>> {
  return runPage(database, async (connection) => {
    const limit = since ? WALK_PAGE : PAGE;
    const [page] = await connection.select<{ last: string | null; count: number }>(
      `/* page_of_balances */ select max(user_id) last, count(*) count
       from (select user_id from point_root where user_id > ? order by user_id limit ?) page`,
      [after, limit],
    );
    const isLast = !page?.last || page.count < limit;
    const last = isLast ? AFTER_ALL : page.last;
    const next = isLast ? undefined : (last ?? undefined);
    if (!since) {
      const differences = await findMismatches(connection, "user_id > ? and user_id <= ?", [after, last]);
      return { next, count: Number(page?.count ?? 0), differences };
    }
    const changed = await connection.select<{ userId: string }>(
      `/* find_changed_balances */ select user_id userId from point_root
       where user_id > ? and user_id <= ? and updated_at >= ?`,
      [after, last, since],
    );
    const userIds = changed.map(({ userId }) => userId);
    return { next, count: changed.length, differences: await findBalanceMismatches(connection, userIds) };
  });
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
