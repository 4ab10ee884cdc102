import { and, asc, eq, getTableColumns, gt, or, type SQL, sql } from "drizzle-orm";
import { unionAll } from "drizzle-orm/mysql-core";
import type { Connection, Database } from "../database.ts";
import type { Page, Position } from "../page.ts";
import {
  LISTED_AS,
  type ReservationStatus,
  pointReservations as reservations,
  pointTransactions as transactions,
} from "../schema.ts";

/** The columns that the program writes: all except the generated ones. */
const { listedAs: _, campaignListedAs: __, ...COLUMNS } = getTableColumns(reservations);

/** A reservation, with the ledger entry of its grant. */
export type ReservationDetails = NonNullable<Awaited<ReturnType<typeof findDetails>>>;

/** The details of the reservation with this id, or undefined. */
export function findReservation(database: Database, id: string): Promise<ReservationDetails | undefined> {
  return database.run((connection) => findDetails(connection, eq(reservations.id, id)));
}

/** The details of the reservation with this idempotency key, or undefined. */
export function findReservationByKey(
  database: Database,
  idempotencyKey: string,
): Promise<ReservationDetails | undefined> {
  return database.run((connection) =>
    findDetails(connection, eq(reservations.idempotencyKey, idempotencyKey)),
  );
}

/** The details of the reservation that a condition on a unique column selects, or undefined. */
export async function findDetails({ drizzle }: Connection, isIt: SQL) {
  const [found] = await drizzle("find_details")
    .select({
      reservation: COLUMNS,
      transactionId: transactions.id,
      grantedAt: transactions.createdAt,
    })
    .from(reservations)
    .leftJoin(
      transactions,
      and(
        // By the key, which is indexed.
        eq(transactions.idempotencyKey, reservations.idempotencyKey),
        eq(transactions.isGrant, 1),
        eq(transactions.reservationId, reservations.id),
      ),
    )
    .where(isIt);
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
 * The reservations of a user in the order of `execute_at`, one more than `limit` if there is a next page. Every page costs the
 * same: each list of the index is read from the position of the page to its end. But PENDING and PROCESSING share one list of
 * the index: a page of one status reads past the rows of the other.
 */
export async function listReservations(
  database: Database,
  userId: string,
  { status, campaign, limit, after }: ListOptions,
): Promise<ListedReservation[]> {
  return database.run(async (connection) => {
    const drizzle = connection.drizzle("list_reservations");
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
        // With another index, or only a part of this one, all reservations of the user would be read.
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
      // Only due reservations are claimed: no need to read a million that are not due.
      const mayBe = status === "PROCESSING" ? sql`${reservations.executeAt} <= now(3)` : undefined;
      return select(eq(listedAs, "OPEN"), eq(reservations.status, status), mayBe);
    }
    if (status !== undefined) return select(eq(listedAs, status));
    const [first, second, ...rest] = LISTED_AS.map((one) => select(eq(listedAs, one)));
    if (!first || !second) throw new Error("There are fewer than two lists");
    // One statement, hence one snapshot: a reservation that changes its list meanwhile is neither missed nor listed twice.
    return unionAll(first, second, ...rest)
      .orderBy(asc(sql`execute_at`), asc(sql`id`))
      .limit(limit + 1);
  });
}

/** The rows after a position, in ascending order. Written out, since MySQL finds no range in `(a, b) > (?, ?)`. */
function isAfter(after: Position | undefined): SQL | undefined {
  return (
    after &&
    or(
      gt(reservations.executeAt, after.time),
      and(eq(reservations.executeAt, after.time), gt(reservations.id, after.id)),
    )
  );
}
