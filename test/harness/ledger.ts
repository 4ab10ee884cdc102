import type { TestDatabase } from "./database.ts";

export interface EntryFields {
  userId: string;
  /** Negative if points are subtracted. */
  pointAmount: number;
  /** The reservation that was granted; without it the entry is a direct change. */
  reservation?: { id: string; idempotencyKey: string };
  createdAt?: Date;
}

/** Inserts ledger entries as they are, past all of our code and without their balances. */
export async function insertEntries({ query }: Pick<TestDatabase, "query">, entries: readonly EntryFields[]) {
  await query(
    `insert into point_transactions
       (id, idempotency_key, user_id, point_amount, kind, reservation_id, created_at) values ?`,
    [
      entries.map(({ userId, pointAmount, reservation, createdAt = new Date() }) => [
        crypto.randomUUID(),
        reservation?.idempotencyKey ?? crypto.randomUUID(),
        userId,
        pointAmount,
        reservation ? "grant" : pointAmount < 0 ? "sub" : "add",
        reservation?.id ?? null,
        createdAt,
      ]),
    ],
  );
}
