import { drizzle, type MySql2Database } from "drizzle-orm/mysql2";
import {
  createPool,
  type PoolConnection,
  type QueryOptions,
  type ResultSetHeader,
  type RowDataPacket,
} from "mysql2";
import { DatabaseError, databaseErrorOf } from "./database_errors.ts";
import { backoffMs, sleep, withDeadline } from "./loop.ts";

/** A connection that is reserved for one piece of work. Every statement begins with its name: a comment in snake_case. */
export interface Connection {
  /** For ordinary statements. `name` is the statement's name. */
  drizzle(name: string): MySql2Database;
  /** For the bulk statements of the hot path: mysql2 builds them ten times faster than Drizzle. */
  execute(sql: string, values?: unknown[]): Promise<ResultSetHeader>;
  select<Row extends object>(sql: string, values?: unknown[]): Promise<Row[]>;
}

/** A connection between BEGIN and COMMIT. Only `Database.transaction()` creates one. */
export interface Transaction extends Connection {
  readonly isTransaction: true;
}

/** A bounded pool of connections to MySQL. It converts every error of MySQL to a `DatabaseError`. */
export interface Database {
  /**
   * Runs `work` on one connection; each statement commits by itself. After a deadlock or a lost connection it runs again.
   */
  run<T>(work: (connection: Connection) => Promise<T>, options?: WorkOptions): Promise<T>;
  /**
   * Runs `work` between BEGIN and COMMIT at READ COMMITTED. Any error rolls it back. After a deadlock or a lost connection
   * the whole transaction runs again, so `work` must be safe to run twice.
   */
  transaction<T>(work: (transaction: Transaction) => Promise<T>, options?: WorkOptions): Promise<T>;
  close(): Promise<void>;
}

export interface WorkOptions {
  /** How long this work may take, in milliseconds; by default the `workMs` of the database. */
  workMs?: number | undefined;
}

export interface DatabaseOptions {
  /** The maximum number of connections. */
  connections?: number;
  /** How long to wait for a connection, and then for the work on it, in milliseconds. */
  acquireMs?: number;
  workMs?: number;
  /** Called after each deadlock or lost connection, before the work runs again. */
  onRetry?: (error: DatabaseError, attempt: number) => void;
}

/** How often work is tried before the caller gets the deadlock or the lost connection. */
const MAX_TRIES = 5;
/** The maximum number of callers that wait for a connection; more are refused, since their clients would time out. */
const MAX_WAITING = 1_000;
const CLOSE_MS = 2_000;

/** Opens the pool. It connects when the first work needs a connection. */
export function openDatabase(
  url: string,
  { connections = 10, acquireMs = 5_000, workMs: usualWorkMs = 20_000, onRetry }: DatabaseOptions = {},
): Database {
  const pool = createPool({
    uri: url.replace(/^mariadb:/, "mysql:"),
    connectionLimit: connections,
    queueLimit: MAX_WAITING,
    connectTimeout: acquireMs,
    // So that a dead peer is noticed before a caller waits for it.
    enableKeepAlive: true,
    keepAliveInitialDelay: 10_000,
    // Idle connections are closed before the server ends them (`wait_timeout`).
    maxIdle: 1,
    idleTimeout: 10_000,
    timezone: "Z",
    supportBigNumbers: true,
    // affectedRows counts the rows that changed, not those that matched: markDone() relies on it.
    flags: ["-FOUND_ROWS"],
  });

  function acquire(): Promise<PoolConnection> {
    return new Promise((resolve, reject) => {
      let isLate = false;
      const timer = setTimeout(() => {
        isLate = true;
        reject(new DatabaseError("unavailable", `No connection to MySQL within ${acquireMs} ms`));
      }, acquireMs);
      pool.getConnection((error, connection) => {
        clearTimeout(timer);
        if (isLate) connection?.release();
        else if (error) reject(error);
        else resolve(connection);
      });
    });
  }

  async function runOnce<T>(work: (connection: Connection) => Promise<T>, workMs: number): Promise<T> {
    const connection = await acquire();
    try {
      const late = () => new DatabaseError("unavailable", `MySQL did not answer within ${workMs} ms`);
      const result = await withDeadline(sessionOf(connection).then(work), workMs, late);
      connection.release();
      return result;
    } catch (error) {
      // The next user must not inherit the state of this session.
      connection.destroy();
      throw error;
    }
  }

  async function run<T>(
    work: (connection: Connection) => Promise<T>,
    { workMs = usualWorkMs }: WorkOptions = {},
  ): Promise<T> {
    for (let attempt = 1; ; attempt++) {
      try {
        return await runOnce(work, workMs);
      } catch (thrown) {
        const error = databaseErrorOf(thrown);
        const mayPass =
          error instanceof DatabaseError && (error.kind === "deadlock" || error.kind === "lost");
        if (!mayPass || attempt === MAX_TRIES) throw error;
        onRetry?.(error, attempt);
        await sleep(backoffMs(attempt, { baseMs: 20, maxMs: 500 }));
      }
    }
  }

  return {
    run,
    transaction: (work, options) =>
      run(async (connection) => {
        await connection.execute("begin");
        // No ROLLBACK: the connection is destroyed on any error, and MySQL rolls the transaction back.
        const result = await work({ ...connection, isTransaction: true });
        await connection.execute("commit");
        return result;
      }, options),
    async close() {
      const closed = pool.promise().end();
      await withDeadline(closed, CLOSE_MS, () => new Error("late")).catch(() => undefined);
    },
  };
}

// The statements rely on these settings. Every connection sets them, whatever the server's defaults are.
const SESSION = [
  // wait_timeout: if a process hangs in the middle of a transaction, or its machine dies, its locks are held for this long and
  // not for the server's 8 hours. The default lease is as long: the rows that it has claimed are not claimed again earlier.
  `set time_zone = '+00:00', autocommit = 1, innodb_lock_wait_timeout = 5, wait_timeout = 15,
    sql_mode = 'STRICT_ALL_TABLES,NO_ZERO_IN_DATE,NO_ZERO_DATE,ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION'
    /*M! , in_predicate_conversion_threshold = 0 */`,
  "set session transaction isolation level read committed",
];

/** The connections whose session settings are done. */
const sessions = new WeakMap<PoolConnection, Connection>();

async function sessionOf(pooled: PoolConnection): Promise<Connection> {
  const known = sessions.get(pooled);
  if (known) return known;
  const promised = pooled.promise();
  const connection: Connection = {
    drizzle: namedDrizzle(promised),
    execute: async (sql, values) => (await promised.query<ResultSetHeader>(sql, values))[0],
    select: async <Row extends object>(sql: string, values?: unknown[]) =>
      (await promised.query<(Row & RowDataPacket)[]>(sql, values))[0],
  };
  for (const sql of SESSION) await connection.execute(sql);
  sessions.set(pooled, connection);
  return connection;
}

/** Drizzle cannot name a statement: one instance per name puts the name in front of the SQL. */
function namedDrizzle(client: ReturnType<PoolConnection["promise"]>): Connection["drizzle"] {
  const instances = new Map<string, MySql2Database>();
  return (name) => {
    const known = instances.get(name);
    if (known) return known;
    const query = (options: QueryOptions, values: unknown[]) =>
      client.query({ ...options, sql: `/* ${name} */ ${options.sql}` }, values);
    const instance = drizzle({ client: { query } as never });
    instances.set(name, instance);
    return instance;
  };
}

/**
 * Refuses a server whose settings lose commits in a crash: the service could not keep the promise of a 201.
 *
 * @throws {DatabaseError} kind `other`, with the setting, the rule and the value
 */
export async function checkDurability(database: Database): Promise<void> {
  type Settings = { flush: number; log_bin: number; sync: number };
  const [settings] = await database.run((connection) =>
    connection.select<Settings>(
      `/* check_durability */ select @@global.innodb_flush_log_at_trx_commit flush, @@global.log_bin log_bin,
         @@global.sync_binlog sync`,
    ),
  );
  const broken = [
    settings?.flush !== 1 && `innodb_flush_log_at_trx_commit must be 1: it is ${settings?.flush}`,
    settings?.log_bin === 1 && settings.sync !== 1 && `sync_binlog must be 1: it is ${settings.sync}`,
  ].filter((rule) => typeof rule === "string");
  if (broken.length > 0) {
    throw new DatabaseError(
      "other",
      `Cannot promise points on a MySQL that may lose commits: ${broken.join("; ")}. Change that in MySQL, or set ALLOW_LOSSY_DATABASE=true to run anyway`,
    );
  }
}
