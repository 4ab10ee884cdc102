import { eq } from "drizzle-orm";
import { v7 as uuidv7 } from "uuid";
import type { Connection, Database } from "./database.ts";
import type { PointTransaction } from "./point.ts";
import { type BalanceRow, type LedgerRow, pointRoot, pointTransactions } from "./schema.ts";

/**
 * Adds entries to the ledger and to the balances, for the caller's transaction: both or neither. At least one entry.
 *
 * @throws {DatabaseError} `duplicate` where a key has its entry already, `out_of_range` where a balance would overflow
 */
export async function addPointsIdempotent(
  connection: Connection,
  entries: readonly PointTransaction[],
): Promise<void> {
  await connection.execute(
    "insert into point_transactions (id, idempotency_key, user_id, point_amount) values ?",
    [
      entries.map(({ idempotencyKey, userId, pointAmount }) => [
        uuidv7(),
        idempotencyKey,
        userId,
        pointAmount,
      ]),
    ],
  );
  // Sorted by user: two workers that lock balances in different orders deadlock.
  const sums = [...sumByUser(entries)].sort(([a], [b]) => (a < b ? -1 : 1));
  await connection.execute(
    `insert into point_root (user_id, point_num) values ?
     on duplicate key update point_num = point_num + values(point_num)`,
    [sums],
  );
}

function sumByUser(entries: readonly PointTransaction[]): Map<string, number> {
  const sums = new Map<string, number>();
  for (const { userId, pointAmount } of entries) sums.set(userId, (sums.get(userId) ?? 0) + pointAmount);
  return sums;
}

/** The ledger's entry of a key, or undefined. */
export async function findLedgerEntry(
  { drizzle }: Connection,
  idempotencyKey: string,
): Promise<LedgerRow | undefined> {
  const [entry] = await drizzle
    .select()
    .from(pointTransactions)
    .where(eq(pointTransactions.idempotencyKey, idempotencyKey));
  return entry;
}

/** What a user has, or undefined where the user never got points. */
export async function findBalance(database: Database, userId: string): Promise<BalanceRow | undefined> {
  const [balance] = await database.run(({ drizzle }) =>
    drizzle.select().from(pointRoot).where(eq(pointRoot.userId, userId)),
  );
  return balance;
}

/** Sums that must agree, and counts that must be 0. */
export interface Reconciliation {
  reservations: bigint;
  ledger: bigint;
  balances: bigint;
  /** Users whose balance is not the sum of their ledger entries. */
  usersApart: number;
  /** Reservations that are DONE without their ledger entry, or have one without being DONE. */
  reservationsApart: number;
  /** Ledger entries older than their reservation's `execute_at`. */
  early: number;
  agree: boolean;
}

/** Compares DONE reservations, ledger and balances, all as of one moment. Reads the whole of the three tables. */
export async function reconcile(database: Database): Promise<Reconciliation> {
  type Row = Record<Exclude<keyof Reconciliation, "agree">, string | number>;
  // One statement, hence one snapshot: a grant between two statements would look like a difference.
  const [row] = await database.run((connection) =>
    connection.select<Row>(`
      select
        (select coalesce(sum(point_amount), 0) from point_reservations where status = 'DONE') reservations,
        (select coalesce(sum(point_amount), 0) from point_transactions) ledger,
        (select coalesce(sum(point_num), 0) from point_root) balances,
        (select count(*) from (
          select user_id from (
            select user_id, point_num from point_root
            union all
            select user_id, -point_amount from point_transactions
          ) signed group by user_id having sum(point_num) <> 0
        ) users) usersApart,
        (select count(*) from point_reservations r
          left join point_transactions t on t.idempotency_key = r.idempotency_key
            and t.user_id = r.user_id and t.point_amount = r.point_amount
          where (r.status = 'DONE') <> (t.id is not null)) reservationsApart,
        (select count(*) from point_transactions t
          join point_reservations r on r.idempotency_key = t.idempotency_key
          where t.created_at < r.execute_at) early`),
  );
  if (!row) throw new Error("A SELECT without a table gave no row");
  const [reservations, ledger, balances] = [
    BigInt(row.reservations),
    BigInt(row.ledger),
    BigInt(row.balances),
  ];
  const [usersApart, reservationsApart, early] = [row.usersApart, row.reservationsApart, row.early].map(
    Number,
  ) as [number, number, number];
  const agree =
    reservations === ledger && ledger === balances && usersApart + reservationsApart + early === 0;
  return { reservations, ledger, balances, usersApart, reservationsApart, early, agree };
}
