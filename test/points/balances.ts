import { findBalance } from "../../lib/points/balance_queries.ts";
import type { PointTransaction } from "../../lib/points/point.ts";
import type { TestDatabase } from "../harness/database.ts";

/** Gives a user a balance that is in no ledger. */
export function setBalance({ query }: TestDatabase, userId: string, points: bigint) {
  return query("insert into point_root (user_id, point_num) values (?, ?)", [userId, String(points)]);
}

/** The points of some users; undefined for those who have no balance. */
export function pointsOf({ database }: TestDatabase, ...userIds: string[]): Promise<(bigint | undefined)[]> {
  return Promise.all(userIds.map(async (userId) => (await findBalance(database, userId))?.pointNum));
}

/** All entries of the ledger, in the order in which they were inserted. */
export function ledgerOf({ query }: TestDatabase): Promise<PointTransaction[]> {
  return query(
    `select idempotency_key idempotencyKey, user_id userId, point_amount pointAmount, kind, reservation_id reservationId
     from point_transactions order by id`,
  );
}
