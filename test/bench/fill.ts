import type { TestDatabase } from "../harness/database.ts";

/** Reservations to fill in. SQL may use `n`, the number of the row; `status` is known in `executeAt`. */
export interface Rows {
  /** From 0 (inclusive) to `count` (exclusive). */
  count: number;
  /** Makes ids and keys that no other fill of the database has. */
  prefix: keyof typeof ID_PREFIXES;
  userId: string;
  /** SQL of what is added to the time of this process. */
  offset: string;
  status: string;
  campaign?: string;
}

const ID_PREFIXES = { finished: "01a1", warm: "01a2", due: "01a3", future: "01a4" };
/** Rows of one INSERT … SELECT: what MySQL does within a second or two. */
const ROWS = 10_000;
/** How long adding up or analyzing the tables may take, in milliseconds. */
const WORK_MS = 600_000;

/** Fills in reservations, and the ledger and the balances of those that are DONE. Ids are UUIDs v7, one for each millisecond. */
export async function fillRows({ query, database }: TestDatabase, rows: Rows): Promise<void> {
  const { count, prefix, userId, offset, status, campaign = "null" } = rows;
  const idPrefix = ID_PREFIXES[prefix];
  const idOf = (n: number) =>
    `${idPrefix}${n.toString(16).padStart(8, "0").replace(/^..../, "$&-")}-7000-8000-000000000000`;
  const isDone = status.includes("DONE");
  const now = new Date();
  for (let from = 0; from < count; from += ROWS) {
    await query(
      `insert into point_reservations
         (id, user_id, point_amount, execute_at, status, idempotency_key, scan_at, updated_at, campaign)
       with recursive digits (digit) as (select 0 union all select digit + 1 from digits where digit < 9),
       numbers (n) as (
         select ? + 1000 * a.digit + 100 * b.digit + 10 * c.digit + d.digit n
         from digits a, digits b, digits c, digits d order by n
       ),
       known as (select n, ${status} status from numbers where n < ?),
       timed as (select n, status, cast(? as datetime(3)) + interval ${offset} microsecond execute_at from known)
       select concat('${idPrefix}', insert(lpad(lower(hex(n)), 8, '0'), 5, 0, '-'), '-7000-8000-000000000000'), ${userId}, 1 + mod(n, 100), execute_at, status,
         concat('${prefix}-', n), if(status in ('PENDING', 'PROCESSING'), execute_at, null),
         if(status = 'DONE', execute_at, now(3)), ${campaign}
       from timed`,
      [from, count, now],
    );
    if (!isDone) continue;
    await query(
      `insert into point_transactions
         (id, idempotency_key, user_id, point_amount, kind, reservation_id, created_at)
       select concat('0', substring(id, 2)), idempotency_key, user_id, point_amount, 'grant', id, execute_at
       from point_reservations where id >= ? and id < ? and status = 'DONE'`,
      [idOf(from), idOf(from + ROWS)],
    );
  }
  if (!isDone) return;
  await database.run(
    (connection) =>
      connection.execute(
        `insert into point_root (user_id, point_num, updated_at)
         select user_id, sum(point_amount), max(created_at) from point_transactions group by user_id
         on duplicate key update point_num = values(point_num), updated_at = values(updated_at)`,
      ),
    { workMs: WORK_MS },
  );
}

/** Reservations as clients make them. */
export interface Fill extends Pick<Rows, "count" | "prefix"> {
  /** Users are `User0` to `User<users - 1>`, mixed. */
  users: number;
  /** When they are due; `past`: spread over the last month. */
  at: { inMs: number } | "past";
  /** DONE, with ledger and balances; else PENDING. */
  isDone?: boolean;
  /** One user gets every tenth. */
  isHot?: boolean;
}

/** Fills in reservations that all have the same status. */
export async function fill(test: TestDatabase, options: Fill): Promise<void> {
  const { count, prefix, users, at, isDone = false, isHot = false } = options;
  const userId = `concat('User', mod(crc32(n), ${users}))`;
  await fillRows(test, {
    count,
    prefix,
    userId: isHot ? `if(mod(n, 10) = 0, 'Hot', ${userId})` : userId,
    offset: at === "past" ? "1000000 * -mod(crc32(concat('at', n)), 2592000)" : String(at.inMs * 1_000),
    status: isDone ? "'DONE'" : "'PENDING'",
  });
}

/** Brings the statistics of the tables up to date. */
export async function analyze({ database }: TestDatabase): Promise<void> {
  for (const table of ["point_reservations", "point_transactions", "point_root"]) {
    await database.run((connection) => connection.select(`analyze table ${table}`), { workMs: WORK_MS });
  }
}
