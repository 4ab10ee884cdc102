import { drizzle, type MySql2Database } from "drizzle-orm/mysql2";
import {
  createPool,
  type PoolConnection,
  type QueryOptions,
  type ResultSetHeader,
  type RowDataPacket,
} from "mysql2";
import { DatabaseError, databaseErrorOf } from "./database_errors.ts";
import {
  checkServer,
  connectionOptions,
  openSessionEnder,
  prepareSession,
  type ServerSession,
  type SessionOptions,
} from "./database_session.ts";
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

export interface DatabaseOptions extends SessionOptions {
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
/** After so many milliseconds, the server is checked again: its settings may have changed, or it may be another one. */
const CHECK_AGAIN_MS = 5_000;
const ROLLBACK_MS = 1_000;
const CLOSE_MS = 2_000;

/** A connection of the pool that is ready for work. */
interface OpenSession {
  connection: Connection;
  /** As the server knows it. */
  session: ServerSession;
  /** When the server was checked, by `performance.now()`. */
  checkedAtMs: number;
}

/**
 * Opens the pool. It connects when the first work needs a connection. A server whose settings are unfit is refused with
 * `unsafe`, a read-only one with `unavailable`: on each new connection, and again on one that was last checked 5 s ago.
 */
export function openDatabase(
  url: string,
  {
    connections = 10,
    acquireMs = 5_000,
    workMs: usualWorkMs = 20_000,
    onRetry,
    program,
    allowLossy,
  }: DatabaseOptions = {},
): Database {
  const pool = createPool({
    ...connectionOptions(url, { program, connectMs: acquireMs }),
    connectionLimit: connections,
    queueLimit: MAX_WAITING,
    // Idle connections are closed before the server ends them (`wait_timeout`).
    maxIdle: 1,
    idleTimeout: 10_000,
    // affectedRows counts the rows that changed, not those that matched: markDone() relies on it.
    flags: ["-FOUND_ROWS"],
  });
  const sessions = new WeakMap<PoolConnection, OpenSession>();
  const ender = openSessionEnder(url, { program });

  function acquire(): Promise<PoolConnection> {
    return new Promise((resolve, reject) => {
      let isLate = false;
      const timer = setTimeout(() => {
        isLate = true;
        reject(
          new DatabaseError(
            "unavailable",
            `No connection to MySQL within ${acquireMs} ms`,
            "no connection to MySQL is free",
          ),
        );
      }, acquireMs);
      pool.getConnection((error, connection) => {
        clearTimeout(timer);
        if (isLate) connection?.release();
        else if (error) reject(connectError(error));
        else resolve(connection);
      });
    });
  }

  async function sessionOf(pooled: PoolConnection): Promise<Connection> {
    const known = sessions.get(pooled);
    if (!known) {
      const session = await prepareSession(pooled.promise(), { allowLossy });
      const connection = connectionOf(pooled);
      sessions.set(pooled, { connection, session, checkedAtMs: performance.now() });
      return connection;
    }
    if (performance.now() - known.checkedAtMs > CHECK_AGAIN_MS) {
      await checkServer(pooled.promise(), { allowLossy });
      known.checkedAtMs = performance.now();
    }
    return known.connection;
  }

  async function runOnce<T>(work: (connection: Connection) => Promise<T>, workMs: number): Promise<T> {
    const pooled = await acquire();
    try {
      const late = () => new DatabaseError("timeout", `MySQL did not answer within ${workMs} ms`);
      const result = await withDeadline(sessionOf(pooled).then(work), workMs, late);
      pooled.release();
      return result;
    } catch (error) {
      // The next user must not inherit the state of this session.
      pooled.destroy();
      const session = sessions.get(pooled)?.session;
      if (session && error instanceof DatabaseError && error.kind === "timeout") ender.end(session);
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
        try {
          const result = await work({ ...connection, isTransaction: true });
          await connection.execute("commit");
          return result;
        } catch (error) {
          // The connection is destroyed, and MySQL rolls back: but later than the next attempt needs the locks.
          await withDeadline(connection.execute("rollback"), ROLLBACK_MS, () => new Error("late")).catch(
            () => undefined,
          );
          throw error;
        }
      }, options),
    async close() {
      const closed = Promise.all([pool.promise().end(), ender.settled()]);
      await withDeadline(closed, CLOSE_MS, () => new Error("late")).catch(() => undefined);
    },
  };
}

/** Whatever fails before a connection is there is not the fault of a statement. */
function connectError(thrown: Error): unknown {
  const error = databaseErrorOf(thrown);
  if (error instanceof DatabaseError && error.isOutage) return error;
  return new DatabaseError("unavailable", `Cannot connect to MySQL: ${thrown.message}`);
}

function connectionOf(pooled: PoolConnection): Connection {
  const promised = pooled.promise();
  return {
    drizzle: namedDrizzle(promised),
    execute: async (sql, values) => (await promised.query<ResultSetHeader>(sql, values))[0],
    select: async <Row extends object>(sql: string, values?: unknown[]) =>
      (await promised.query<(Row & RowDataPacket)[]>(sql, values))[0],
  };
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
