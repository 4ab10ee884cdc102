import { and, asc, desc, eq, getTableColumns, gt, lt, lte, or, type SQL, sql } from "drizzle-orm";
import { unionAll } from "drizzle-orm/mysql-core";
import type { Database } from "./database.ts";
import type { Page, Position } from "./page.ts";
import type { ReservationStatus } from "./reservation.ts";
import {
  LISTED_AS,
  pointRoot,
  pointReservations as reservations,
  pointTransactions as transactions,
} from "./schema.ts";

/**
 * What answers "where are my points?": the story of one reservation, and the lists and sums of one user. It only reads.
 */

/** A ledger entry is a reservation's where key, user and amount are the same: a FAILED one may have met another's entry. */
const IS_ITS_ENTRY = and(
  eq(transactions.idempotencyKey, reservations.idempotencyKey),
  eq(transactions.userId, reservations.userId),
  eq(transactions.pointAmount, reservations.pointAmount),
);

/** All that the program itself has written. */
const { listedAs: _, campaignListedAs: __, ...COLUMNS } = getTableColumns(reservations);

export type ReservationStory = NonNullable<Awaited<ReturnType<typeof findReservation>>>;

/** One reservation with its ledger entry, or undefined where there is none of that id. */
export function findReservation(database: Database, id: string) {
  return findStory(database, eq(reservations.id, id));
}

/** One reservation with its ledger entry, or undefined where there is none of that key. */
export function findReservationByKey(database: Database, idempotencyKey: string) {
  return findStory(database, eq(reservations.idempotencyKey, idempotencyKey));
}

async function findStory(database: Database, isIt: SQL) {
  const [found] = await database.run(({ drizzle }) =>
    drizzle
      .select({
        reservation: COLUMNS,
        transactionId: transactions.id,
        grantedAt: transactions.createdAt,
      })
      .from(reservations)
      .leftJoin(transactions, IS_ITS_ENTRY)
      .where(isIt),
  );
  return found && { ...found.reservation, transactionId: found.transactionId, grantedAt: found.grantedAt };
}

export interface ListOptions extends Page {
  status?: ReservationStatus | undefined;
  campaign?: string | undefined;
}

export interface ListedReservation {
  id: string;
  pointAmount: number;
  status: ReservationStatus;
  executeAt: Date;
  campaign: string | null;
}

/**
 * The reservations of a user in the order of `execute_at`, one more than `limit` where more follow. Any page costs the
 * same: each list of the index is read from the page's place on, and no further than the page. But PENDING and PROCESSING
 * are one list there: a page of the one passes over what is the other.
 */
export async function listReservations(
  database: Database,
  userId: string,
  { status, campaign, limit, after }: ListOptions,
): Promise<ListedReservation[]> {
  return database.run(async ({ drizzle }) => {
    const listedAs = campaign === undefined ? reservations.listedAs : reservations.campaignListedAs;
    const select = (...conditions: (SQL | undefined)[]) =>
      drizzle
        .select({
          id: reservations.id,
          pointAmount: reservations.pointAmount,
          status: reservations.status,
          executeAt: reservations.executeAt,
          campaign: reservations.campaign,
        })
        // Another index, or a part of this one, would read all that the user ever had.
        .from(reservations, {
          forceIndex: campaign === undefined ? "point_reservations_user" : "point_reservations_campaign",
        })
        .where(
          and(
            eq(reservations.userId, userId),
            campaign === undefined ? undefined : eq(reservations.campaign, campaign),
            isAfter(after),
            ...conditions,
          ),
        )
        .orderBy(asc(reservations.executeAt), asc(reservations.id))
        .limit(limit + 1);
    if (status === "PENDING" || status === "PROCESSING") {
      // Only what is due is ever claimed: a million that are not need not be looked at.
      const mayBe = status === "PROCESSING" ? sql`${reservations.executeAt} <= now(3)` : undefined;
      return select(eq(listedAs, "OPEN"), eq(reservations.status, status), mayBe);
    }
    if (status !== undefined) return select(eq(listedAs, status));
    const [first, second, ...rest] = LISTED_AS.map((one) => select(eq(listedAs, one)));
    if (!first || !second) throw new Error("There are fewer than two lists");
    // One statement, hence one snapshot: a reservation that ends meanwhile is neither missed nor there twice.
    return unionAll(first, second, ...rest)
      .orderBy(asc(sql`execute_at`), asc(sql`id`))
      .limit(limit + 1);
  });
}

export interface ListedTransaction {
  id: string;
  idempotencyKey: string;
  pointAmount: number;
  createdAt: Date;
  /** The reservation it came from, or null where it was added or subtracted directly. */
  reservationId: string | null;
  campaign: string | null;
}

/** The ledger of a user, newest first, one more than `limit` where more follow. */
export async function listTransactions(
  database: Database,
  userId: string,
  { limit, after }: Page,
): Promise<ListedTransaction[]> {
  return database.run(({ drizzle }) =>
    drizzle
      .select({
        id: transactions.id,
        idempotencyKey: transactions.idempotencyKey,
        pointAmount: transactions.pointAmount,
        createdAt: transactions.createdAt,
        reservationId: reservations.id,
        campaign: reservations.campaign,
      })
      // MariaDB would read all of the user's entries that are newer, and all of the user's reservations.
      .from(transactions, { forceIndex: "point_transactions_user" })
      .leftJoin(reservations, IS_ITS_ENTRY, { forceIndex: "point_reservations_idempotency_key" })
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

/** What a user has, and what is still to come. */
export interface Holdings {
  pointNum: bigint;
  /** When the balance changed last; null where it never did. */
  updatedAt: Date | null;
  /** The sum of what is neither granted, nor failed, nor cancelled. */
  reservedPointNum: bigint;
  /** When the next of it is due, or null where nothing is to come. */
  nextExecuteAt: Date | null;
}

/** What a user has and will have, or undefined where the user has no balance and no reservation to come. */
export async function findHoldings(database: Database, userId: string): Promise<Holdings | undefined> {
  const [found] = await database.run(({ drizzle }) => {
    const toCome = drizzle
      .select({
        // MySQL gives a SUM of integers as text.
        points: sql<bigint>`coalesce(sum(${reservations.pointAmount}), 0)`.mapWith(BigInt).as("points"),
        nextAt: sql<Date | null>`min(${reservations.executeAt})`
          .mapWith(reservations.executeAt)
          .as("next_at"),
      })
      .from(reservations)
      .where(isToCome(userId))
      .as("to_come");
    // One statement, hence one snapshot: what is granted meanwhile is in one of the two sums, never in both or none.
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
 * What a user had at a time, by the ledger, and when the last change before it was; undefined where the user is not known
 * today either. A time to come gives what is there now.
 */
export async function findBalanceAt(
  database: Database,
  userId: string,
  at: Date,
): Promise<Pick<Holdings, "pointNum" | "updatedAt"> | undefined> {
  const [[sum], isThere] = await Promise.all([
    database.run(({ drizzle }) =>
      drizzle
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

/** Whether a user has a balance or a reservation to come; it adds nothing up. */
async function isKnown(database: Database, userId: string): Promise<boolean> {
  const rows = await database.run(({ drizzle }) =>
    unionAll(
      drizzle.select({ userId: pointRoot.userId }).from(pointRoot).where(eq(pointRoot.userId, userId)),
      drizzle.select({ userId: reservations.userId }).from(reservations).where(isToCome(userId)).limit(1),
    ),
  );
  return rows.length > 0;
}

function isToCome(userId: string): SQL | undefined {
  return and(eq(reservations.userId, userId), eq(reservations.listedAs, "OPEN"));
}

/** What comes after a position in ascending order; spelled out, since MySQL finds no range in `(a, b) > (?, ?)`. */
function isAfter(after: Position | undefined): SQL | undefined {
  return (
    after &&
    or(
      gt(reservations.executeAt, after.time),
      and(eq(reservations.executeAt, after.time), gt(reservations.id, after.id)),
    )
  );
}
