import type { TestDatabase } from "./harness.ts";

export interface Fill {
  count: number;
  /** Users are `User0` to `User<users - 1>`. */
  users: number;
  /** Makes ids and keys that no other fill of the database has. */
  prefix: "due" | "finished" | "future" | "warm";
  /** Of which time; `past`: spread over the last month. */
  at: { inMs: number } | "past";
  /** DONE, with ledger and balances; else PENDING. */
  isDone?: boolean;
  /** One user gets every tenth. */
  hot?: boolean;
}

/** How long adding up the ledger may take, in milliseconds. */
const SUM_MS = 600_000;
/** Rows of one INSERT … SELECT. */
const ROWS = 10_000;
const PREFIXES = { finished: "01a10990", warm: "01a20990", due: "01a30990", future: "01a40990" };

/** Fills in reservations as clients make them: ids in the order of time, a key each; the users mixed. */
export async function fill({ query, database }: TestDatabase, options: Fill): Promise<void> {
  const { count, users, prefix, at, isDone = false, hot = false } = options;
  const now = new Date();
  const userId = `concat('User', mod(crc32(n), ${users}))`;
  const executeAt =
    at === "past"
      ? "cast(? as datetime(3)) - interval mod(crc32(concat('at', n)), 2592000) second"
      : `cast(? as datetime(3)) + interval ${at.inMs * 1_000} microsecond`;
  for (let from = 0; from < count; from += ROWS) {
    await query(
      `insert into point_reservations
         (id, user_id, point_amount, execute_at, status, idempotency_key, scan_at, updated_at)
       with recursive digits (digit) as (select 0 union all select digit + 1 from digits where digit < 9),
       numbers (n) as (
         select ? + 1000 * a.digit + 100 * b.digit + 10 * c.digit + d.digit n
         from digits a, digits b, digits c, digits d order by n
       ),
       timed as (select n, ${executeAt} execute_at from numbers where n < ?)
       select concat('${PREFIXES[prefix]}-0000-7000-8000-', lpad(lower(hex(n)), 12, '0')),
         ${hot ? `if(mod(n, 10) = 0, 'Hot', ${userId})` : userId}, 1 + mod(n, 100), execute_at,
         '${isDone ? "DONE" : "PENDING"}', concat('${prefix}-', n), ${isDone ? "null, execute_at" : "execute_at, now(3)"}
       from timed`,
      [from, now, count],
    );
    if (!isDone) continue;
    await query(
      `insert into point_transactions (id, idempotency_key, user_id, point_amount, created_at)
       select concat('0', substring(id, 2)), idempotency_key, user_id, point_amount, execute_at
       from point_reservations where id >= ? and id < ?`,
      [from, from + ROWS].map(
        (n) => `${PREFIXES[prefix]}-0000-7000-8000-${n.toString(16).padStart(12, "0")}`,
      ),
    );
  }
  if (!isDone) return;
  await database.run(
    ({ execute }) =>
      execute(
        `insert into point_root (user_id, point_num, updated_at)
         select user_id, sum(point_amount), max(created_at) from point_transactions group by user_id
         on duplicate key update point_num = values(point_num), updated_at = values(updated_at)`,
      ),
    { workMs: SUM_MS },
  );
}
