import { and, eq } from "drizzle-orm";
import { v7 as uuidv7 } from "uuid";
import type { Database, Transaction } from "../database.ts";
import { type LedgerRow, pointTransactions } from "../schema.ts";
import type { PointTransaction } from "./point.ts";

/**
 * Adds entries to the ledger and to the balances. Needs at least one entry.
 *
 * @throws {DatabaseError} `duplicate` if a key already has an entry, `out_of_range` if a balance would overflow
 */
export async function addPointsIdempotent(
  transaction: Transaction,
  entries: readonly PointTransaction[],
): Promise<void> {
  await insertLedgerEntries(transaction, entries);
  await upsertBalances(transaction, [...sumByUser(entries)]);
}

/** Adds entries only to the ledger. Needs at least one entry. */
export async function insertLedgerEntries(
  transaction: Transaction,
  entries: readonly PointTransaction[],
): Promise<void> {
  await transaction.execute(
    `/* insert_ledger_entries */ insert into point_transactions
       (id, idempotency_key, user_id, point_amount, kind, reservation_id) values ?`,
    [
      entries.map(({ idempotencyKey, userId, pointAmount, kind, reservationId }) => [
        uuidv7(),
        idempotencyKey,
        userId,
        pointAmount,
        kind,
        reservationId,
      ]),
    ],
  );
}

/** Adds to balances, and creates missing ones. */
export async function upsertBalances(transaction: Transaction, sums: [string, number][]): Promise<void> {
  if (sums.length === 0) return;
  await transaction.execute(
    `/* upsert_balances */ insert into point_root (user_id, point_num) values ?
     on duplicate key update point_num = point_num + values(point_num)`,
    // Sorted by user: two workers that lock balances in different orders would deadlock.
    [sums.toSorted(([a], [b]) => (a < b ? -1 : 1))],
  );
}

/**
 * The users who have a balance, committed or not: an INSERT would have to wait for another transaction's uncommitted one.
 */
export async function findTakenBalances(
  database: Database,
  userIds: readonly string[],
): Promise<Set<string>> {
  if (userIds.length === 0) return new Set();
  const rows = await database.run(async (connection) => {
    // For the next statement alone.
    await connection.execute("/* read_uncommitted */ set transaction isolation level read uncommitted");
    return connection.select<{ userId: string }>(
      "/* find_taken_balances */ select user_id userId from point_root where user_id in (?)",
      [userIds],
    );
  });
  return new Set(rows.map(({ userId }) => userId));
}

/** The sum of the entries of each user. */
export function sumByUser(entries: readonly PointTransaction[]): Map<string, number> {
  const sums = new Map<string, number>();
  for (const { userId, pointAmount } of entries) sums.set(userId, (sums.get(userId) ?? 0) + pointAmount);
  return sums;
}

/** The ledger entry of the grant with this key, or undefined. */
export async function findGrantEntry(
  transaction: Transaction,
  idempotencyKey: string,
): Promise<LedgerRow | undefined> {
  const [entry] = await transaction
    .drizzle("find_grant_entry")
    .select()
    .from(pointTransactions)
    .where(and(eq(pointTransactions.idempotencyKey, idempotencyKey), eq(pointTransactions.isGrant, 1)));
  return entry;
}
