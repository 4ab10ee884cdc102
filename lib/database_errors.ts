import { ExpectedError } from "./errors.ts";

/**
 * The meaning of a failed statement for the caller:
 * - `lost`: the connection broke; the same work may succeed if it is tried again
 * - `timeout`: the work took longer than it may
 * - `deadlock`, `lock_timeout`: another transaction held a lock
 * - `unavailable`: MySQL is down, full, read-only or refuses the connection; no row is invalid
 * - `unsafe`: a setting of MySQL breaks a promise, or refuses our statements: an operator must change it
 * - `duplicate`, `out_of_range`: a row is invalid
 * - `other`: a statement or a row is invalid
 */
export type DatabaseErrorKind =
  | "lost"
  | "timeout"
  | "deadlock"
  | "lock_timeout"
  | "unavailable"
  | "unsafe"
  | "duplicate"
  | "out_of_range"
  | "other";

/** The reason of each kind, in our own words, if the error's number tells no more. */
const REASONS: Record<DatabaseErrorKind, string> = {
  lost: "the connection to MySQL was lost",
  timeout: "MySQL did not answer in time",
  deadlock: "another transaction held a lock",
  lock_timeout: "another transaction held a lock",
  unavailable: "MySQL does not answer",
  unsafe: "MySQL has unsafe settings",
  duplicate: "a row exists already",
  out_of_range: "a value is out of range",
  other: "MySQL refused a statement",
};

/** MySQL, or the connection to it, failed. The message has no SQL and no values of rows: safe to log, not meant for clients. */
export class DatabaseError extends ExpectedError {
  override readonly name = "DatabaseError";

  constructor(
    readonly kind: DatabaseErrorKind,
    message: string,
    /** What is wrong, in a few words of our own: safe for clients. */
    readonly reason: string = REASONS[kind],
  ) {
    super(message);
  }

  /** True if only time or an operator can fix it. */
  get isOutage(): boolean {
    return ["lost", "timeout", "unavailable", "unsafe"].includes(this.kind);
  }

  /** True if another transaction held a lock. */
  get isContended(): boolean {
    return this.kind === "deadlock" || this.kind === "lock_timeout";
  }
}

// Numbers of the MySQL and MariaDB reference manuals, "Server Error Message Reference". Never names: mysql2 knows those of MySQL,
// and MariaDB and proxies have numbers of their own.

/** The session was killed, or was idle for too long. */
const LOST = [1927, 4031];
const DEADLOCK = [
  1213, // deadlock
  1020, // MariaDB: record has changed since last read
  3101, // group replication rolled the transaction back
];
const LOCK_TIMEOUT = [
  1205, // also NOWAIT on MariaDB, and metadata locks
  3572, // NOWAIT on MySQL
];
const DUPLICATE = [1062];
const OUT_OF_RANGE = [1264, 1690];

/** The server does not know the host, the user, the password or the database. */
const ACCESS_DENIED = [1044, 1045, 1049, 1698];

/** Outages of a server that answers, with their reasons. */
const OUTAGES: [reason: string, numbers: number[]][] = [
  ["MySQL is read-only", [1036, 1290, 1792, 1836, 3100, 3989]],
  ["MySQL refuses the account", ACCESS_DENIED],
  ["MySQL has locked the account", [3118, 4151]],
  ["the password for MySQL has expired", [1820, 1862]],
  ["a right on MySQL is missing", [1142, 1143, 1227, 1370]],
  ["a table is missing", [1146]],
  ["MySQL is offline", [3032]],
  ["MySQL is shutting down", [1053, 1077, 1079]],
  ["MySQL has no connection left", [1040]],
  ["the account has reached a limit of MySQL", [1203, 1226]],
  ["MySQL refuses this host", [1129, 1130]],
  ["the disk of MySQL is full or fails", [1021, 1026, 1030, 1114]],
  ["MySQL is out of memory", [1037, 1038, 1041, 1135, 1206]],
  ["the binary log of MySQL refuses writes", [1598, 1665]],
  ["MySQL interrupted a statement", [1317, 1969, 3024]],
  ["the cluster of MySQL is not ready", [1047]],
  ["the proxy has no MySQL", [9001]],
];

/** A statement or a row is invalid, although the SQLSTATE does not say so. */
const INVALID = [
  ...[1093, 1210, 1267, 1270, 1271], // the statement: arguments, collations
  ...[1193, 1228, 1229, 1238, 1243, 1295, 1621], // a variable or a prepared statement
  ...[1153, 1162, 1197, 1301, 1436, 3170], // the statement or its transaction is too large: a smaller one may pass
  ...[1300, 1364, 1366, 1411, 1525, 3854], // a value that is missing, or wrong for its column
  ...[1369, 1526, 1748, 3819], // a broken check: of a view, of a partition, of a table
  ...[1906, 3105], // a value for a generated column
  ...[1175, 1442, 1456, 1644], // safe updates; a trigger that fails or refuses
];

/**
 * Classes of SQLSTATE of an invalid statement or row: warning, no data, not supported, wrong number of values, data, integrity,
 * syntax and access, view check, refused by a trigger. https://dev.mysql.com/doc/refman/8.4/en/server-error-reference.html
 */
const INVALID_CLASSES = ["01", "02", "0A", "20", "21", "22", "23", "42", "44", "45"];
/** The transaction was rolled back by the server: for a deadlock, or by a cluster. */
const ROLLED_BACK = "40";

const CONNECTION_LOST = /^(PROTOCOL_CONNECTION_LOST|ECONNRESET|EPIPE|ERR_STREAM_.*)$/;
const CLIENT_CODE = /^(PROTOCOL_|HANDSHAKE_|AUTH_|MYSQL_|ERR_STREAM_|ERR_TLS_|ERR_SSL_|E[A-Z0-9]+$)/;

/** From here on, MariaDB and MySQL use the same numbers for different errors. mysql2 has the names of MySQL. */
const AMBIGUOUS_NAMES = 4_000;
const MAX_TEXT = 300;

/** Converts an error of Drizzle or mysql2 to a `DatabaseError`; returns any other error unchanged. */
export function databaseErrorOf(thrown: unknown): unknown {
  // Drizzle's own message contains every parameter: use only its cause, the driver's error.
  let driver = thrown;
  while (driver instanceof Error && driver.cause instanceof Error) driver = driver.cause;
  if (!(driver instanceof Error) || driver instanceof DatabaseError) return driver;
  const { code, errno, sqlState, message } = driver as Error & Record<"code" | "errno" | "sqlState", unknown>;
  if (/in closed state/.test(message)) return new DatabaseError("lost", "The connection to MySQL was closed");
  if (/^(Pool is closed|Queue limit reached)/.test(message)) {
    return new DatabaseError("unavailable", message, "no connection to MySQL is free");
  }
  // mysql2 gives every error of a server a SQLSTATE, which may be empty; only those.
  if (typeof errno === "number" && typeof sqlState === "string") {
    return serverError(errno, { sqlState, name: code, text: message });
  }
  if (typeof code === "string" && CLIENT_CODE.test(code)) {
    const kind = CONNECTION_LOST.test(code) ? "lost" : "unavailable";
    return new DatabaseError(kind, `MySQL failed with ${code}${kind === "lost" ? "" : `: ${message}`}`);
  }
  return driver === thrown
    ? thrown
    : new DatabaseError("other", "A statement failed before it reached MySQL");
}

function serverError(
  errno: number,
  { sqlState, name, text }: { sqlState: string; name: unknown; text: string },
): DatabaseError {
  const kind = kindOf(errno, sqlState);
  const isNamed = typeof name === "string" && errno < AMBIGUOUS_NAMES;
  const what = `MySQL failed with ${isNamed ? `${name} (${errno})` : `error ${errno}`}`;
  // Its text may quote a value of a row, but not if the server or the connection fails.
  if (kind !== "unavailable") return new DatabaseError(kind, what);
  const hint = ACCESS_DENIED.includes(errno) ? ". Is DATABASE_URL right?" : "";
  const known = OUTAGES.find(([, numbers]) => numbers.includes(errno));
  const reason = known?.[0] ?? `MySQL failed with error ${errno}`;
  return new DatabaseError(kind, `${what}: ${text.slice(0, MAX_TEXT)}${hint}`, reason);
}

function kindOf(errno: number, sqlState: string): DatabaseErrorKind {
  if (LOST.includes(errno)) return "lost";
  if (DEADLOCK.includes(errno)) return "deadlock";
  if (LOCK_TIMEOUT.includes(errno)) return "lock_timeout";
  if (DUPLICATE.includes(errno)) return "duplicate";
  if (OUT_OF_RANGE.includes(errno)) return "out_of_range";
  // Before the classes: a missing right, account or table is 42, too.
  if (OUTAGES.some(([, numbers]) => numbers.includes(errno))) return "unavailable";
  const sqlClass = sqlState.slice(0, 2);
  if (sqlClass === ROLLED_BACK) return "deadlock";
  if (INVALID.includes(errno) || INVALID_CLASSES.includes(sqlClass)) return "other";
  // An unknown error is not the fault of a row: it must not cost the row an attempt.
  return "unavailable";
}
