import { ExpectedError } from "./errors.ts";

/**
 * The meaning of a failed statement for the caller:
 * - `lost`: the connection broke; the same work may succeed if it is tried again
 * - `deadlock`, `lock_timeout`: another transaction held a lock
 * - `unavailable`: MySQL is down, full, read-only or refuses the connection; no row is invalid
 * - `duplicate`, `out_of_range`: a row is invalid
 * - `other`: any other error
 */
export type DatabaseErrorKind =
  | "lost"
  | "deadlock"
  | "lock_timeout"
  | "unavailable"
  | "duplicate"
  | "out_of_range"
  | "other";

/** MySQL, or the connection to it, failed. The message has no SQL and no parameters: safe to log, not meant for clients. */
export class DatabaseError extends ExpectedError {
  override readonly name = "DatabaseError";

  constructor(
    readonly kind: DatabaseErrorKind,
    message: string,
  ) {
    super(message);
  }

  /** True if only time or an operator can fix it. */
  get isOutage(): boolean {
    return this.kind === "lost" || this.kind === "unavailable";
  }

  /** True if another transaction held a lock. */
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
/** The server does not know the host, the user, the password or the database. */
const ACCESS_DENIED = new Set([1044, 1045, 1049, 1698, 3118]);
const UNAVAILABLE = new Set([
  ...[1021, 1114, 1030, 1026], // disk or table full, error in a file
  ...[1037, 1038, 1041, 1135, 1206], // out of memory, no thread, lock table full
  ...[1040, 1203, 1226, 1129, 1130], // too many connections, host blocked or unknown
  ...ACCESS_DENIED,
  ...[1142, 1143, 1146, 1227], // a privilege or a table is missing
  ...[1047, 1053, 1077, 1079, 1152, 1158, 1159, 1160, 1161, 1184, 3168, 3169], // cluster not ready, shutdown, connection lost
  ...[1180, 1317, 1969, 3024], // commit failed, interrupted, statement too long
  ...[1290, 1792, 1836, 3100], // read-only, or a group replication that refuses
]);
/** The session was killed, or was idle for too long. */
const SESSION_ENDED = new Set([1927, 4031]);
const OUT_OF_RANGE = new Set([1264, 1690]);
const CONNECTION_LOST = /^(PROTOCOL_CONNECTION_LOST|ECONNRESET|EPIPE|ERR_STREAM_.*)$/;

const DRIVER_CODE = /^(ER_|WARN_|UNKNOWN_CODE|PROTOCOL_|HANDSHAKE_|AUTH_|ERR_STREAM_|E[A-Z0-9]+$)/;

/** Converts an error of Drizzle or mysql2 to a `DatabaseError`; returns any other error unchanged. */
export function databaseErrorOf(thrown: unknown): unknown {
  // Drizzle's own message contains every parameter: use only its cause, the driver's error.
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
  // The server's message may quote a value, but not if the server or the connection fails.
  const text = kind === "unavailable" ? `: ${message}` : "";
  const hint = ACCESS_DENIED.has(Number(errno)) ? ". Is DATABASE_URL right?" : "";
  return new DatabaseError(kind, `MySQL failed with ${code}${text}${hint}`);
}

function kindOf(code: string, errno: number): DatabaseErrorKind {
  if (CONNECTION_LOST.test(code) || SESSION_ENDED.has(errno)) return "lost";
  if (DEADLOCK.has(errno)) return "deadlock";
  if (errno === LOCK_WAIT_TIMEOUT) return "lock_timeout";
  if (errno === 1062) return "duplicate";
  if (OUT_OF_RANGE.has(errno)) return "out_of_range";
  // Errors of the socket and of the handshake have no server error number.
  return UNAVAILABLE.has(errno) || !(errno >= 1_000) ? "unavailable" : "other";
}
