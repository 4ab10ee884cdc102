import { and, asc, eq, inArray } from "drizzle-orm";
import type { Database, Transaction } from "../database.ts";
import { DatabaseError } from "../database_errors.ts";
import { pointRoot, pointTransactions } from "../schema.ts";
import { findTakenBalances, insertLedgerEntries, sumByUser, upsertBalances } from "./ledger_repository.ts";
import { MAX_POINT_NUM, type PointTransaction } from "./point.ts";

/** The outcome of a direct change of points. */
export type ChangeOutcome =
  | "changed"
  /** The key was used before, with the same content; nothing was changed again. */
  | "replayed"
  /** The key was used before, with other content. */
  | "conflict"
  /** The balance is less than the points to subtract. */
  | "too_few"
  /** The balance would be too large to store. */
  | "too_many"
  /** Points cannot be subtracted, since the user has never received any. */
  | "unknown_user"
  /** Another transaction, for instance a grant, has locked the balance. */
  | "busy";

/** How often a batch is tried if other transactions use its keys, or create its balances, meanwhile. */
const MAX_TRIES = 3;

/**
 * Adds points to balances and subtracts points from them, with a ledger entry for each change, in one transaction. A refused
 * change does not affect the others; each change sees the balance after the changes before it in the batch. It does not wait
 * for balances that another transaction has locked: their changes are `busy`, and are not made.
 */
export async function changePoints(
  database: Database,
  batch: readonly PointTransaction[],
): Promise<ChangeOutcome[]> {
  /** Whether users whose balance could not be locked have one, committed or not. */
  const areTaken = new Map<string, boolean>();
  let wasHeldUp = false;
  for (let attempt = 1; ; ) {
    try {
      const changed = await database.transaction((transaction) =>
        changeTogether(transaction, batch, areTaken),
      );
      if (changed.outcomes) return changed.outcomes;
      // Looked up before their balances are created: an INSERT would wait for another transaction's uncommitted one.
      const taken = await findTakenBalances(database, changed.unlocked);
      for (const userId of changed.unlocked) areTaken.set(userId, wasHeldUp || taken.has(userId));
    } catch (error) {
      const kind = error instanceof DatabaseError ? error.kind : undefined;
      // Another transaction has used a key since it was looked up: the next try finds its entry. Or one creates a balance.
      const mayPass = kind === "duplicate" || kind === "lock_timeout";
      if (!mayPass || attempt++ === MAX_TRIES) throw error;
      wasHeldUp = kind === "lock_timeout";
      areTaken.clear();
    }
  }
}

type Changed =
  | { outcomes: ChangeOutcome[] }
  /** Nothing is changed: users without a balance that can be locked, of whom `areTaken` says nothing. */
  | { outcomes?: never; unlocked: string[] };

async function changeTogether(
  transaction: Transaction,
  batch: readonly PointTransaction[],
  areTaken: ReadonlyMap<string, boolean>,
): Promise<Changed> {
  const userIds = [...new Set(batch.map(({ userId }) => userId))];
  const balances = await lockBalances(transaction, userIds);
  const unlocked = userIds.filter((userId) => !balances.has(userId));
  if (unlocked.some((userId) => !areTaken.has(userId))) return { unlocked };
  const busy = new Set(unlocked.filter((userId) => areTaken.get(userId)));
  const known = await findChanges(transaction, batch);
  const left = new Map(balances);
  const accepted: PointTransaction[] = [];
  const outcomes = batch.map((change): ChangeOutcome => {
    const { idempotencyKey, userId, pointAmount } = change;
    if (busy.has(userId)) return "busy";
    const first = known.get(idempotencyKey);
    if (first) {
      return first.userId === userId && first.pointAmount === pointAmount ? "replayed" : "conflict";
    }
    const before = left.get(userId);
    if (before === undefined && pointAmount < 0) return "unknown_user";
    const after = (before ?? 0n) + BigInt(pointAmount);
    if (after < 0n) return "too_few";
    if (after > MAX_POINT_NUM) return "too_many";
    left.set(userId, after);
    known.set(idempotencyKey, change);
    accepted.push(change);
    return "changed";
  });
  if (accepted.length > 0) {
    await insertLedgerEntries(transaction, accepted);
    const sums = [...sumByUser(accepted)];
    await addToKnown(
      transaction,
      sums.filter(([userId]) => balances.has(userId)),
    );
    await upsertBalances(
      transaction,
      sums.filter(([userId]) => !balances.has(userId)),
    );
  }
  return { outcomes };
}

/** Locks balances that no other transaction has locked. The result has only those. */
async function lockBalances(
  transaction: Transaction,
  userIds: readonly string[],
): Promise<Map<string, bigint>> {
  const rows = await transaction
    .drizzle("lock_balances")
    .select({ userId: pointRoot.userId, pointNum: pointRoot.pointNum })
    // Without the index hint, MariaDB would scan a small table, and lock other rows.
    .from(pointRoot, { forceIndex: "PRIMARY" })
    .where(inArray(pointRoot.userId, userIds))
    .orderBy(asc(pointRoot.userId))
    .for("update", { skipLocked: true });
  return new Map(rows.map(({ userId, pointNum }) => [userId, pointNum]));
}

/** Earlier direct changes with these keys, by their keys. */
async function findChanges(
  transaction: Transaction,
  batch: readonly PointTransaction[],
): Promise<Map<string, Pick<PointTransaction, "userId" | "pointAmount">>> {
  const { idempotencyKey, userId, pointAmount, isGrant } = pointTransactions;
  const keys = batch.map((change) => change.idempotencyKey);
  const rows = await transaction
    .drizzle("find_changes")
    .select({ idempotencyKey, userId, pointAmount })
    .from(pointTransactions)
    .where(and(inArray(idempotencyKey, keys), eq(isGrant, 0)));
  return new Map(rows.map((row) => [row.idempotencyKey, row]));
}

/** Adds to existing balances. Not an upsert: MySQL would check the row that it does not insert, which may be negative. */
async function addToKnown(
  transaction: Transaction,
  sums: readonly (readonly [string, number])[],
): Promise<void> {
  if (sums.length === 0) return;
  await transaction.execute(
    `/* add_to_known */ update point_root force index (primary)
     set point_num = point_num + case user_id ${"when ? then ? ".repeat(sums.length)} end where user_id in (?)`,
    [...sums.flat(), sums.map(([userId]) => userId)],
  );
}
