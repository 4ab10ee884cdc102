import { DatabaseError, databaseErrorOf } from "../lib/database_errors.ts";
import { DomainError } from "../lib/errors.ts";
import { sleep } from "../lib/loop.ts";

/** A connection that waits for locks. */
export interface LockWaiter {
  query: <Row extends object>(sql: string, values?: unknown[]) => Promise<Row[]>;
  /** How long to wait for one lock, in milliseconds. */
  waitMs: number;
  /** Called with each line of output. */
  say: (line: string) => void;
}

/**
 * The `lock_wait_timeout` of the connection. While a statement waits for a table's metadata lock, all later statements on that
 * table queue behind it, so one wait must be short.
 *
 * MySQL and MariaDB take this lock again at the end of a long ALTER TABLE. If a transaction that has read the table meanwhile
 * is open then, the ALTER fails and its work is lost (seen: a key on 1,000,000 rows, after 10 s); the next try starts from the
 * beginning. There is no setting for the end alone: a long ALTER TABLE needs a time without backups and long reads.
 */
export const TRY_SECONDS = 1;
/** The shortest pause between two tries, so that the queue can empty; the longest is twice as long. */
const PAUSE_MS = 1_000;
const SAY_EVERY_MS = 10_000;
/** A try that takes longer has not only waited. */
const WORK_MS = 3 * TRY_SECONDS * 1_000;
const MAX_SHOWN = 120;

/** The connections that hold a lock, in words, and how an operator can find them. */
export interface Sight {
  holders: readonly string[];
  hint: string;
}

export interface LockWait {
  /** What waits for the lock. */
  what: string;
  /** What an operator must know if the wait ends without the lock. */
  advice: string;
  /** Looks for the connections that hold the lock. */
  look: () => Promise<Sight>;
}

/**
 * Tries until it gets a lock.
 *
 * @param attempt waits for the lock for `TRY_SECONDS`, and resolves to whether it got it
 * @throws {DomainError} SCHEMA, if the lock is not free within `waitMs`
 */
export async function waitForLock(
  { waitMs, say }: Omit<LockWaiter, "query">,
  attempt: () => Promise<boolean>,
  { what, advice, look }: LockWait,
): Promise<void> {
  let refusedAt: number | undefined;
  let saidAt: number | undefined;
  for (;;) {
    const beganAt = performance.now();
    if (await attempt()) return;
    const now = performance.now();
    refusedAt ??= now;
    const leftMs = refusedAt + waitMs - now;
    if (leftMs <= 0 || saidAt === undefined || now - saidAt >= SAY_EVERY_MS) {
      const { holders, hint } = await look();
      const waiting = [what, ...holders].join(". ");
      if (leftMs <= 0) {
        throw new DomainError(
          "SCHEMA",
          `Cannot migrate as a lock was not free within ${seconds(waitMs)}: ${waiting}. ${hint}. ${advice}`,
        );
      }
      const lost = now - beganAt > WORK_MS ? `, the last try has lost ${seconds(now - beganAt)} of work` : "";
      say(`Waiting for a lock (${seconds(now - refusedAt)} of ${seconds(waitMs)}${lost}): ${waiting}`);
      if (saidAt === undefined) say(hint);
      saidAt = now;
    }
    await sleep(Math.min(PAUSE_MS * (1 + Math.random()), leftMs));
  }
}

function seconds(ms: number): string {
  return `${Math.round(ms / 1_000)} s`;
}

/**
 * Runs a statement, again and again until it gets its locks. It must be safe to repeat.
 *
 * @param options.file the file of the statement
 * @throws {DomainError} SCHEMA, if a lock is not free within `waitMs`
 * @throws any other error of the statement, as the driver throws it
 */
export async function runWhenFree(
  waiter: LockWaiter,
  sql: string,
  { file, values }: { file: string; values?: unknown[] },
): Promise<void> {
  async function isDone(): Promise<boolean> {
    try {
      await waiter.query(sql, values);
      return true;
    } catch (error) {
      const known = databaseErrorOf(error);
      if (known instanceof DatabaseError && known.isContended) return false;
      throw error;
    }
  }
  const line = sql.replaceAll(/\s+/g, " ");
  await waitForLock(waiter, isDone, {
    what: `${file}: ${line.length > MAX_SHOWN ? `${line.slice(0, MAX_SHOWN)}…` : line}`,
    advice: "The statements before it are done: the next run of `bun run migrate` skips them",
    look: () => findHolders(waiter, sql),
  });
}

interface Holder {
  id: number;
  user: string;
  host: string;
  age: number;
}

// InnoDB shows the start of a transaction in the time zone of the server's host.
const AGE = "timestampdiff(second, trx_started, convert_tz(utc_timestamp(), '+00:00', 'SYSTEM'))";

const MYSQL = {
  relation: "Held by",
  // The words of a statement include the names of its tables. The locks without a table are those of backups.
  find: `/* find_lock_holders */
    select distinct processlist_id id, processlist_user user, processlist_host host,
      coalesce(${AGE}, processlist_time) age
    from performance_schema.metadata_locks join performance_schema.threads on thread_id = owner_thread_id
      left join information_schema.innodb_trx on trx_mysql_thread_id = processlist_id
    where lock_status = 'GRANTED' and processlist_id <> connection_id() and (
      (object_type = 'TABLE' and object_schema = database() and object_name in (?))
      or (object_type in ('GLOBAL', 'COMMIT', 'BACKUP LOCK') and lock_duration = 'EXPLICIT'))
    having age > 0 order by age desc limit 5`,
  hint: "To see who holds which lock: select * from performance_schema.metadata_locks join performance_schema.threads on thread_id = owner_thread_id",
};

/** MariaDB shows the holders of metadata locks only with a plugin. */
const MARIADB = {
  relation: "Open transaction:",
  find: `/* find_open_transactions */
    select id, user, host, ${AGE} age
    from information_schema.innodb_trx join information_schema.processlist on id = trx_mysql_thread_id
    where id <> connection_id() and (db is null or db = database())
    having age > 0 order by age desc limit 5`,
  hint: "To see all open transactions: select * from information_schema.innodb_trx join information_schema.processlist on id = trx_mysql_thread_id. To see who holds which lock: install soname 'metadata_lock_info'; select * from information_schema.metadata_lock_info",
};

/** Finds the connections that may hold the locks of a statement, the oldest first. */
async function findHolders({ query }: LockWaiter, sql: string): Promise<Sight> {
  const [server] = await query<{ is_mariadb: number }>(
    "/* find_product */ select version() like '%MariaDB%' is_mariadb",
  );
  const { relation, find, hint } = server?.is_mariadb === 1 ? MARIADB : MYSQL;
  // Not every user may see that. An operator who may has the hint.
  const found = await query<Holder>(find, [sql.split(/\W+/)]).catch(() => []);
  const holders = found.map(
    ({ id, user, host, age }) => `${relation} connection ${id} (${user}@${host}, for ${age} s)`,
  );
  return { holders, hint };
}
