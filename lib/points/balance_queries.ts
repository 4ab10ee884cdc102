import { and, desc, eq, lt, lte, or, type SQL, sql } from "drizzle-orm";
import { unionAll } from "drizzle-orm/mysql-core";
import type { Database } from "../database.ts";
import type { Page } from "../page.ts";
import {
  type BalanceRow,
  type EntryKind,
  pointRoot,
  pointReservations as reservations,
  pointTransactions as transactions,
} from "../schema.ts";

/** The balance of a user, or undefined if the user has never received points. */
export async function findBalance(database: Database, userId: string): Promise<BalanceRow | undefined> {
  const [balance] = await database.run(({ drizzle }) =>
    drizzle("find_balance").select().from(pointRoot).where(eq(pointRoot.userId, userId)),
  );
  return balance;
}

/** The balance of a user, and the points still to be granted. */
export interface Holdings {
  pointNum: bigint;
  /** When the balance last changed; null if it has never changed. */
  updatedAt: Date | null;
  /** The sum of the open reservations: those that are PENDING or PROCESSING. */
  reservedPointNum: bigint;
  /** When the next open reservation is due; null if there is none. */
  nextExecuteAt: Date | null;
}

/** The holdings of a user, or undefined if the user has no balance and no open reservation. */
export async function findHoldings(database: Database, userId: string): Promise<Holdings | undefined> {
  const [found] = await database.run((connection) => {
    const drizzle = connection.drizzle("find_holdings");
    const toCome = drizzle
      .select({
        // MySQL returns a SUM of integers as text.
        points: sql<bigint>`coalesce(sum(${reservations.pointAmount}), 0)`.mapWith(BigInt).as("points"),
        nextAt: sql<Date | null>`min(${reservations.executeAt})`
          .mapWith(reservations.executeAt)
          .as("next_at"),
      })
      .from(reservations)
      .where(isToCome(userId))
      .as("to_come");
    // One statement, hence one snapshot: a concurrent grant is in one of the two sums, never in both or in none.
    return drizzle
      .select({
        pointNum: pointRoot.pointNum,
        updatedAt: pointRoot.updatedAt,
        reservedPointNum: toCome.points,
        nextExecuteAt: toCome.nextAt,
      })
      .from(toCome)
      .leftJoin(pointRoot, eq(pointRoot.userId, userId));
  });
  if (!found || (found.pointNum === null && found.nextExecuteAt === null)) return undefined;
  return { ...found, pointNum: found.pointNum ?? 0n };
}

/**
 * The balance of a user at a time, by the ledger, and when it had last changed; undefined if the user has no balance and no open
 * reservation today. A time in the future gives the current balance.
 */
export async function findBalanceAt(
  database: Database,
  userId: string,
  at: Date,
): Promise<Pick<Holdings, "pointNum" | "updatedAt"> | undefined> {
  const [[sum], isThere] = await Promise.all([
    database.run(({ drizzle }) =>
      drizzle("find_balance_at")
        .select({
          pointNum: sql<bigint>`coalesce(sum(${transactions.pointAmount}), 0)`.mapWith(BigInt),
          updatedAt: sql<Date | null>`max(${transactions.createdAt})`.mapWith(transactions.createdAt),
        })
        .from(transactions)
        .where(and(eq(transactions.userId, userId), lte(transactions.createdAt, at))),
    ),
    isKnown(database, userId),
  ]);
  return isThere ? sum : undefined;
}

/** Whether a user has a balance or an open reservation. */
async function isKnown(database: Database, userId: string): Promise<boolean> {
  const rows = await database.run((connection) => {
    const drizzle = connection.drizzle("is_known");
    return unionAll(
      drizzle.select({ userId: pointRoot.userId }).from(pointRoot).where(eq(pointRoot.userId, userId)),
      drizzle.select({ userId: reservations.userId }).from(reservations).where(isToCome(userId)).limit(1),
    );
  });
  return rows.length > 0;
}

function isToCome(userId: string): SQL | undefined {
  return and(eq(reservations.userId, userId), eq(reservations.listedAs, "OPEN"));
}

export interface ListedTransaction {
  id: string;
  kind: EntryKind;
  idempotencyKey: string;
  pointAmount: number;
  createdAt: Date;
  /** The reservation that was granted; null for a direct change. */
  reservationId: string | null;
  campaign: string | null;
}

/** The ledger entries of a user, newest first, one more than `limit` if more follow. */
export async function listTransactions(
  database: Database,
  userId: string,
  { limit, after }: Page,
): Promise<ListedTransaction[]> {
  return database.run(({ drizzle }) =>
    drizzle("list_transactions")
      .select({
        id: transactions.id,
        kind: transactions.kind,
        idempotencyKey: transactions.idempotencyKey,
        pointAmount: transactions.pointAmount,
        createdAt: transactions.createdAt,
        reservationId: transactions.reservationId,
        campaign: reservations.campaign,
      })
      // Without the index hints, MariaDB would read all newer entries of the user, and all of the user's reservations.
      .from(transactions, { forceIndex: "point_transactions_user" })
      .leftJoin(reservations, eq(reservations.id, transactions.reservationId), { forceIndex: "PRIMARY" })
      .where(
        and(
          eq(transactions.userId, userId),
          after &&
            or(
              lt(transactions.createdAt, after.time),
              and(eq(transactions.createdAt, after.time), lt(transactions.id, after.id)),
            ),
        ),
      )
      .orderBy(desc(transactions.createdAt), desc(transactions.id))
      .limit(limit + 1),
  );
}
