import { asc, eq, inArray } from "drizzle-orm";
import { v7 as uuidv7 } from "uuid";
import { type Connection, type Database, DatabaseError } from "./database.ts";
import { DIRECT, MAX_POINT_NUM, type PointTransaction } from "./point.ts";
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
  await insertLedgerEntries(connection, entries);
  await upsertBalances(connection, [...sumByUser(entries)]);
}

async function insertLedgerEntries(
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
}

async function upsertBalances(connection: Connection, sums: [string, number][]): Promise<void> {
  if (sums.length === 0) return;
  await connection.execute(
    `insert into point_root (user_id, point_num) values ?
     on duplicate key update point_num = point_num + values(point_num)`,
    // Sorted by user: two workers that lock balances in different orders deadlock.
    [sums.toSorted(([a], [b]) => (a < b ? -1 : 1))],
  );
}

function sumByUser(entries: readonly PointTransaction[]): Map<string, number> {
  const sums = new Map<string, number>();
  for (const { userId, pointAmount } of entries) sums.set(userId, (sums.get(userId) ?? 0) + pointAmount);
  return sums;
}

/** The ledger's entry of a key, or undefined. */
export async function findLedgerEntry(
  connection: Connection,
  idempotencyKey: string,
): Promise<LedgerRow | undefined> {
  return (await findLedgerEntries(connection, [idempotencyKey])).get(idempotencyKey);
}

async function findLedgerEntries(
  { drizzle }: Connection,
  idempotencyKeys: string[],
): Promise<Map<string, LedgerRow>> {
  const rows = await drizzle
    .select()
    .from(pointTransactions)
    .where(inArray(pointTransactions.idempotencyKey, idempotencyKeys));
  return new Map(rows.map((row) => [row.idempotencyKey, row]));
}

/** What became of a change of points that no reservation made. */
export type ChangeOutcome =
  | "changed"
  /** The same key came with the same content before; nothing was changed again. */
  | "replayed"
  /** The same key came with other content before. */
  | "conflict"
  /** There is less than what shall be subtracted. */
  | "too_few"
  /** There would be more than a balance can hold. */
  | "too_many"
  /** Points shall be taken from somebody who never got any. */
  | "unknown_user"
  /** Somebody else, a grant for instance, holds the balance. */
  | "busy";

/** How often a batch starts whose keys another one was just using. */
const MAX_TRIES = 3;

/**
 * Adds to and subtracts from balances, with a ledger entry each, in one transaction. What is refused affects only itself;
 * each sees what those before it in the batch have left.
 *
 * @param options.wait whether to wait for a balance that somebody else holds; else its changes are `busy` and not done
 */
export async function changePoints(
  database: Database,
  batch: readonly PointTransaction[],
  { wait = true }: { wait?: boolean } = {},
): Promise<ChangeOutcome[]> {
  for (let attempt = 1; ; attempt++) {
    try {
      return await database.transaction((connection) => changeTogether(connection, batch, wait));
    } catch (error) {
      // Somebody else has used a key since it was looked up: now its entry is there to be found.
      const mayPass = error instanceof DatabaseError && error.kind === "duplicate";
      if (!mayPass || attempt === MAX_TRIES) throw error;
    }
  }
}

async function changeTogether(
  connection: Connection,
  batch: readonly PointTransaction[],
  wait: boolean,
): Promise<ChangeOutcome[]> {
  const userIds = [...new Set(batch.map(({ userId }) => userId))];
  const balances = await lockBalances(connection, userIds, wait);
  const busy = wait ? new Set() : await findHeld(connection, userIds, balances);
  const known: Map<string, PointTransaction> = await findLedgerEntries(
    connection,
    batch.map(({ idempotencyKey }) => idempotencyKey),
  );
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
    await insertLedgerEntries(connection, accepted);
    const sums = [...sumByUser(accepted)];
    await addToKnown(
      connection,
      sums.filter(([userId]) => balances.has(userId)),
    );
    await upsertBalances(
      connection,
      sums.filter(([userId]) => !balances.has(userId)),
    );
  }
  return outcomes;
}

/** Locks balances in the order of their users, as the grant does; users without one are left out. */
async function lockBalances(
  { drizzle }: Connection,
  userIds: string[],
  wait: boolean,
): Promise<Map<string, bigint>> {
  const rows = await drizzle
    .select({ userId: pointRoot.userId, pointNum: pointRoot.pointNum })
    // MariaDB would read a small table from end to end, and wait for rows that nobody asked for.
    .from(pointRoot, { forceIndex: "PRIMARY" })
    .where(inArray(pointRoot.userId, userIds))
    .orderBy(asc(pointRoot.userId))
    .for("update", wait ? {} : { skipLocked: true });
  return new Map(rows.map(({ userId, pointNum }) => [userId, pointNum]));
}

/** Users who have a balance that we could not lock. */
async function findHeld(
  { drizzle }: Connection,
  userIds: string[],
  locked: ReadonlyMap<string, bigint>,
): Promise<Set<string>> {
  const others = userIds.filter((userId) => !locked.has(userId));
  if (others.length === 0) return new Set();
  const rows = await drizzle
    .select({ userId: pointRoot.userId })
    .from(pointRoot)
    .where(inArray(pointRoot.userId, others));
  return new Set(rows.map(({ userId }) => userId));
}

/** Not by the upsert: MySQL would check the row that it does not insert, whose points may be negative. */
async function addToKnown(
  connection: Connection,
  sums: readonly (readonly [string, number])[],
): Promise<void> {
  if (sums.length === 0) return;
  await connection.execute(
    `update point_root force index (primary) set point_num = point_num + case user_id ${"when ? then ? ".repeat(sums.length)} end
     where user_id in (?)`,
    [...sums.flat(), sums.map(([userId]) => userId)],
  );
}

/** What a user has, or undefined where the user never got points. */
export async function findBalance(database: Database, userId: string): Promise<BalanceRow | undefined> {
  const [balance] = await database.run(({ drizzle }) =>
    drizzle.select().from(pointRoot).where(eq(pointRoot.userId, userId)),
  );
  return balance;
}

/** Sums that must agree, and counts that must be 0: reservations and direct changes make the ledger, the ledger the balances. */
export interface Sums {
  /** What reservations that are DONE have granted. */
  reservations: bigint;
  /** What was added and subtracted without a reservation. */
  direct: bigint;
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

/**
 * Compares DONE reservations, ledger and balances, all as of one moment. Reads the whole of the three tables.
 *
 * @param options.workMs how long that may take, in milliseconds
 */
export async function compareSums(database: Database, options?: { workMs: number }): Promise<Sums> {
  type Row = Record<Exclude<keyof Sums, "agree">, string | number>;
  // One statement, hence one snapshot: a grant between two statements would look like a difference.
  const [row] = await database.run(
    (connection) =>
      connection.select<Row>(
        `
      select
        (select coalesce(sum(point_amount), 0) from point_reservations where status = 'DONE') reservations,
        (select coalesce(sum(point_amount), 0) from point_transactions
          where idempotency_key like ?) direct,
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
          where t.created_at < r.execute_at) early`,
        [`${DIRECT}%`],
      ),
    options,
  );
  if (!row) throw new Error("A SELECT without a table gave no row");
  const [reservations, direct, ledger, balances] = [
    row.reservations,
    row.direct,
    row.ledger,
    row.balances,
  ].map(BigInt) as [bigint, bigint, bigint, bigint];
  const [usersApart, reservationsApart, early] = [row.usersApart, row.reservationsApart, row.early].map(
    Number,
  ) as [number, number, number];
  const agree =
    reservations + direct === ledger && ledger === balances && usersApart + reservationsApart + early === 0;
  return { reservations, direct, ledger, balances, usersApart, reservationsApart, early, agree };
}
