import { drizzle, type MySql2Database } from "drizzle-orm/mysql2";
import { createPool, type PoolConnection, type ResultSetHeader, type RowDataPacket } from "mysql2";
import { ForeseenError } from "./errors.ts";
import { backoffMs, sleep, withDeadline } from "./loop.ts";

/**
 * What a failed statement means to the caller:
 * - `lost`: the connection broke; the same again may succeed
 * - `deadlock`, `lock_timeout`: somebody else held a lock
 * - `unavailable`: MySQL is away, full, read-only or shut to us; no fault of any row
 * - `duplicate`, `out_of_range`: the fault of some row
 * - `other`: none of these
 */
export type DatabaseErrorKind =
  | "lost"
  | "deadlock"
  | "lock_timeout"
  | "unavailable"
  | "duplicate"
  | "out_of_range"
  | "other";

/** MySQL, or the way to it, failed. Holds no SQL and no parameter: safe to log, not meant for clients. */
export class DatabaseError extends ForeseenError {
  override readonly name = "DatabaseError";

  constructor(
    readonly kind: DatabaseErrorKind,
    message: string,
  ) {
    super(message);
  }

  /** True where nothing but time, or an operator, can mend it. */
  get isOutage(): boolean {
    return this.kind === "lost" || this.kind === "unavailable";
  }

  /** True where somebody else's lock was in the way. */
  get isContended(): boolean {
    return this.kind === "deadlock" || this.kind === "lock_timeout";
  }
}

// Numbers of the MySQL and MariaDB reference manuals, "Server Error Message Reference".
const DEADLOCK = new Set([
  1213, // deadlock
  1020, // MariaDB: record has changed since last read
  3101, // group replication rolled the transaction back
]);
const LOCK_WAIT_TIMEOUT = 1205;
/** Host, user, password or database are not known to the server. */
const NOT_LET_IN = new Set([1044, 1045, 1049, 1698, 3118]);
const UNAVAILABLE = new Set([
  ...[1021, 1114, 1030, 1026], // disk or table full, error in a file
  ...[1037, 1038, 1041, 1135, 1206], // out of memory, no thread, lock table full
  ...[1040, 1203, 1226, 1129, 1130], // too many connections, host blocked or unknown
  ...NOT_LET_IN,
  ...[1142, 1143, 1146, 1227], // a privilege or a table is gone
  ...[1047, 1053, 1077, 1079, 1152, 1158, 1159, 1160, 1161, 1184, 3168, 3169], // cluster not ready, shutdown, connection lost
  ...[1180, 1317, 1969, 3024], // commit failed, interrupted, statement too long
  ...[1290, 1792, 1836, 3100], // read-only, or a group replication that refuses
]);
/** The session was killed, or was idle for too long. */
const SESSION_ENDED = new Set([1927, 4031]);
const OUT_OF_RANGE = new Set([1264, 1690]);
const CONNECTION_LOST = /^(PROTOCOL_CONNECTION_LOST|ECONNRESET|EPIPE|ERR_STREAM_.*)$/;

const DRIVER_CODE = /^(ER_|WARN_|UNKNOWN_CODE|PROTOCOL_|HANDSHAKE_|AUTH_|ERR_STREAM_|E[A-Z0-9]+$)/;

/** Turns what Drizzle or mysql2 threw into a `DatabaseError`; anything else comes back as it is. */
export function databaseErrorOf(thrown: unknown): unknown {
  // Drizzle's own message holds every parameter: only the driver's error beneath it counts.
  let driver = thrown;
  while (driver instanceof Error && driver.cause instanceof Error) driver = driver.cause;
  if (!(driver instanceof Error) || driver instanceof DatabaseError) return driver;
  const { code, errno, message } = driver as Error & { code?: unknown; errno?: unknown };
  if (/in closed state/.test(message)) return new DatabaseError("lost", "The connection to MySQL was closed");
  if (/^(Pool is closed|Queue limit reached)/.test(message)) return new DatabaseError("unavailable", message);
  if (typeof code !== "string" || !DRIVER_CODE.test(code)) {
    return driver === thrown
      ? thrown
      : new DatabaseError("other", "A statement failed before it reached MySQL");
  }
  const kind = kindOf(code, Number(errno));
  // A server's sentence may quote a value, but not where the server, or the way to it, is at fault.
  const text = kind === "unavailable" ? `: ${message}` : "";
  const hint = NOT_LET_IN.has(Number(errno)) ? ". Is DATABASE_URL right?" : "";
  return new DatabaseError(kind, `MySQL failed with ${code}${text}${hint}`);
}

function kindOf(code: string, errno: number): DatabaseErrorKind {
  if (CONNECTION_LOST.test(code) || SESSION_ENDED.has(errno)) return "lost";
  if (DEADLOCK.has(errno)) return "deadlock";
  if (errno === LOCK_WAIT_TIMEOUT) return "lock_timeout";
  if (errno === 1062) return "duplicate";
  if (OUT_OF_RANGE.has(errno)) return "out_of_range";
  // Errors of the socket and of the handshake carry no number of the server's.
  return UNAVAILABLE.has(errno) || !(errno >= 1_000) ? "unavailable" : "other";
}

/** One connection, checked out for one piece of work. */
export interface Connection {
  /** For ordinary statements. */
  drizzle: MySql2Database;
  /** For the bulk statements of the hot path, which mysql2 builds ten times faster than Drizzle. */
  execute(sql: string, values?: unknown[]): Promise<ResultSetHeader>;
  select<Row extends object>(sql: string, values?: unknown[]): Promise<Row[]>;
}

/** MySQL behind a bounded pool. Everything that leaves it as an error is a `DatabaseError`. */
export interface Database {
  /** Runs `work` on one connection, each statement committing by itself; again after a deadlock or a lost connection. */
  run<T>(work: (connection: Connection) => Promise<T>, options?: WorkOptions): Promise<T>;
  /**
   * Runs `work` between BEGIN and COMMIT at READ COMMITTED. Any error rolls all of it back; after a deadlock or a lost
   * connection it starts again from BEGIN, so it must be one that may run twice.
   */
  transaction<T>(work: (connection: Connection) => Promise<T>, options?: WorkOptions): Promise<T>;
  close(): Promise<void>;
}

export interface WorkOptions {
  /** How long this work may take, in milliseconds, where it is larger than others. */
  workMs?: number;
}

export interface DatabaseOptions {
  /** The most connections at once. */
  connections?: number;
  /** How long to wait for a connection, and then for the work on it, in milliseconds. */
  acquireMs?: number;
  workMs?: number;
  /** Told of each deadlock and lost connection after which a piece of work starts again. */
  onRetry?: (error: DatabaseError, attempt: number) => void;
}

/** How often a piece of work starts before its deadlock or lost connection is told to the caller. */
const MAX_TRIES = 5;
/** Those who wait for a connection; more are refused, since the wait would be longer than a client's patience. */
const MAX_WAITING = 1_000;
const CLOSE_MS = 2_000;

/** Opens the pool; connects only when the first work comes. */
export function openDatabase(
  url: string,
  { connections = 10, acquireMs = 5_000, workMs = 20_000, onRetry }: DatabaseOptions = {},
): Database {
  const pool = createPool({
    uri: url.replace(/^mariadb:/, "mysql:"),
    connectionLimit: connections,
    queueLimit: MAX_WAITING,
    connectTimeout: acquireMs,
    // A peer that is gone without a word is noticed before somebody waits for it.
    enableKeepAlive: true,
    keepAliveInitialDelay: 10_000,
    // Before the server ends them.
    maxIdle: 1,
    idleTimeout: 10_000,
    timezone: "Z",
    supportBigNumbers: true,
    // affectedRows counts the rows that changed, not those that matched: markDone() relies on it.
    flags: ["-FOUND_ROWS"],
  });

  function acquire(): Promise<PoolConnection> {
    return new Promise((resolve, reject) => {
      let late = false;
      const timer = setTimeout(() => {
        late = true;
        reject(new DatabaseError("unavailable", `No connection to MySQL within ${acquireMs} ms`));
      }, acquireMs);
      pool.getConnection((error, connection) => {
        clearTimeout(timer);
        if (late) connection?.release();
        else if (error) reject(error);
        else resolve(connection);
      });
    });
  }

  async function once<T>(
    work: (connection: Connection) => Promise<T>,
    { workMs }: Required<WorkOptions>,
  ): Promise<T> {
    const connection = await acquire();
    try {
      const late = () => new DatabaseError("unavailable", `MySQL did not answer within ${workMs} ms`);
      const done = sessionOf(connection).then(work);
      const result = await withDeadline(done, workMs, late);
      connection.release();
      return result;
    } catch (error) {
      // Whatever state the session is in, the next user must not inherit it.
      connection.destroy();
      throw error;
    }
  }

  async function again<T>(
    work: (connection: Connection) => Promise<T>,
    options: WorkOptions = {},
  ): Promise<T> {
    for (let attempt = 1; ; attempt++) {
      try {
        return await once(work, { workMs, ...options });
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
    run: again,
    transaction: (work, options) =>
      again(async (connection) => {
        await connection.execute("begin");
        // No ROLLBACK: the connection is destroyed on any error, and MySQL rolls back what it had begun.
        const result = await work(connection);
        await connection.execute("commit");
        return result;
      }, options),
    close: async () => {
      const closed = pool.promise().end();
      await withDeadline(closed, CLOSE_MS, () => new Error("late")).catch(() => undefined);
    },
  };
}

// The server's defaults are somebody else's choice: what the statements rely on is set on every connection.
const SESSION = [
  // wait_timeout: a process that hangs, or whose machine is gone, in the middle of a transaction keeps its locks for that long
  // and not for the server's 8 hours; what it had claimed comes again no sooner.
  `set time_zone = '+00:00', autocommit = 1, innodb_lock_wait_timeout = 5, wait_timeout = 15,
    sql_mode = 'STRICT_ALL_TABLES,NO_ZERO_IN_DATE,NO_ZERO_DATE,ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION'
    /*M! , in_predicate_conversion_threshold = 0 */`,
  "set session transaction isolation level read committed",
];

/** The connections whose session is set. */
const sessions = new WeakMap<PoolConnection, Connection>();

async function sessionOf(pooled: PoolConnection): Promise<Connection> {
  const known = sessions.get(pooled);
  if (known) return known;
  const promised = pooled.promise();
  const connection: Connection = {
    drizzle: drizzle({ client: promised as never }),
    execute: async (sql, values) => (await promised.query<ResultSetHeader>(sql, values))[0],
    select: async <Row extends object>(sql: string, values?: unknown[]) =>
      (await promised.query<(Row & RowDataPacket)[]>(sql, values))[0],
  };
  for (const sql of SESSION) await connection.execute(sql);
  sessions.set(pooled, connection);
  return connection;
}

/**
 * Refuses a server whose settings lose commits in a crash: a 201 would be a promise that nobody keeps.
 *
 * @throws {DatabaseError} kind `other`, with the setting, the rule and the value
 */
export async function checkDurability(database: Database): Promise<void> {
  type Settings = { flush: number; log_bin: number; sync: number };
  const [settings] = await database.run((connection) =>
    connection.select<Settings>(
      "select @@global.innodb_flush_log_at_trx_commit flush, @@global.log_bin log_bin, @@global.sync_binlog sync",
    ),
  );
  const broken = [
    settings?.flush !== 1 && `innodb_flush_log_at_trx_commit must be 1: it is ${settings?.flush}`,
    settings?.log_bin === 1 && settings.sync !== 1 && `sync_binlog must be 1: it is ${settings.sync}`,
  ].filter((rule) => typeof rule === "string");
  if (broken.length > 0) {
    throw new DatabaseError(
      "other",
      `Cannot promise points on a MySQL that may lose commits: ${broken.join("; ")}. Set it in MySQL, or ALLOW_LOSSY_DATABASE=true to run all the same`,
    );
  }
}
