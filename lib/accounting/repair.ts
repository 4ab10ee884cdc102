import { v7 as uuidv7 } from "uuid";
import type { Database } from "../database.ts";

/** The longest time to add up the entries of one user, in milliseconds. */
const WORK_MS = 600_000;

/** The change of a repair. */
export interface Repair {
  /** Null if there was no balance. */
  before: bigint | null;
  after: bigint;
}

/**
 * Sets a user's balance to the sum of the ledger entries, never the reverse, and records this in `point_repairs`, in one
 * transaction.
 *
 * @param options.repairedBy who ran the repair
 * @returns undefined if the balance is already correct
 * @throws {DatabaseError} if the sum is out of range for a balance
 */
export function repairBalance(
  database: Database,
  userId: string,
  { repairedBy }: { repairedBy: string },
): Promise<Repair | undefined> {
  return database.transaction(
    async ({ select, execute }) => {
      const { affectedRows } = await execute(
        `/* insert_missing_balance */ insert into point_root (user_id, point_num) values (?, 0)
         on duplicate key update user_id = values(user_id)`,
        [userId],
      );
      // A transaction that adds a ledger entry also changes the balance: while the balance is locked, the sum does not change.
      const [balance] = await select<{ points: string | number }>(
        `/* lock_balance */ select point_num points from point_root where user_id = ? for update`,
        [userId],
      );
      const [ledger] = await select<{ points: string }>(
        `/* sum_ledger */ select coalesce(sum(point_amount), 0) points from point_transactions where user_id = ?`,
        [userId],
      );
      const before = affectedRows === 1 ? null : BigInt(balance?.points ?? 0);
      const after = BigInt(ledger?.points ?? 0);
      if (before === after) return undefined;
      await execute(`/* repair_balance */ update point_root set point_num = ? where user_id = ?`, [
        String(after),
        userId,
      ]);
      await execute(
        `/* record_repair */ insert into point_repairs
           (id, user_id, point_num_before, point_num_after, repaired_by)
         values (?, ?, ?, ?, concat(?, ', MySQL user ', current_user()))`,
        [uuidv7(), userId, before === null ? null : String(before), String(after), repairedBy],
      );
      return { before, after };
    },
    { workMs: WORK_MS },
  );
}
