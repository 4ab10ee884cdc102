import { hostname } from "node:os";
import type { ConnectionOptions } from "mysql2";
import { type Connection as Client, createConnection, type RowDataPacket } from "mysql2/promise";
import { DatabaseError, databaseErrorOf } from "./database_errors.ts";
import { withDeadline } from "./loop.ts";

/** How a process introduces itself to MySQL, and what it accepts. */
export interface SessionOptions {
  /** The name of the program, for MySQL's lists of connections, e.g. `pointservice-worker`. */
  program?: string | undefined;
  /** Whether to accept settings of the server that lose commits in a crash. */
  allowLossy?: boolean | undefined;
}

/** A connection as its server knows it. */
export interface ServerSession {
  id: number;
  /** Which server: behind a balancer, or after a failover, another one may have the same id. */
  server: string;
}

/** The size of the largest statement of any setting, in bytes, with a reserve. */
export const NEEDED_PACKET = 4 * 1_024 * 1_024;

/** The longest time for ending sessions, in milliseconds. */
const END_MS = 2_000;

// What the statements rely on. Every connection sets it, whatever the defaults of the server are: each variable that changes what
// one of our statements means, what it locks, or whether it works, and that an ordinary user may set.

const BOTH = [
  // First, as the server may ignore the character set of the handshake.
  "names utf8mb4 collate utf8mb4_unicode_ci",
  "time_zone = '+00:00'",
  "sql_mode = 'STRICT_ALL_TABLES,NO_ZERO_IN_DATE,NO_ZERO_DATE,ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION'",
  // With CHAIN, what follows a COMMIT would be in a transaction that nobody commits.
  "autocommit = 1, completion_type = 0",
  // A row that a SELECT leaves out looks like one that does not exist.
  "sql_select_limit = 18446744073709551615, sql_big_selects = 1, sql_auto_is_null = 0",
  // Without unique_checks, InnoDB may accept a duplicate in a unique index.
  "unique_checks = 1, foreign_key_checks = 1, sql_safe_updates = 0",
  // ORDER BY cuts its keys to max_sort_length bytes. The other one sets the decimals of a quotient, also inside CEILING.
  "max_sort_length = 1024, div_precision_increment = 4",
  // Callers try again, so a lock holds them up only briefly.
  "innodb_lock_wait_timeout = 1, lock_wait_timeout = 5",
  // If a process hangs in the middle of a transaction, or its machine dies, its locks are held for this long and not for the
  // server's 8 hours. The default lease is as long: the rows that it has claimed are not claimed again earlier.
  "wait_timeout = 15",
  // On a bad line, a statement or an answer takes its time.
  "net_read_timeout = 30, net_write_timeout = 60",
];

const MYSQL = [
  "transaction_isolation = 'READ-COMMITTED', transaction_read_only = 0",
  "max_execution_time = 0",
  // No limit: `id in (…)` with thousands of ids would not use its index.
  "range_optimizer_max_mem_size = 0",
];

const MARIADB = [
  "tx_isolation = 'READ-COMMITTED', tx_read_only = 0",
  "max_statement_time = 0",
  // wait_timeout covers them.
  "idle_transaction_timeout = 0, idle_readonly_transaction_timeout = 0, idle_write_transaction_timeout = 0",
  "check_constraint_checks = 1",
  // `id in (…)` with thousands of ids would not use its index.
  "in_predicate_conversion_threshold = 0, optimizer_max_sel_arg_weight = 32000",
  "max_session_mem_used = 9223372036854775807, tmp_disk_table_size = 18446744073709551615",
  // An old mode changes what index hints cover.
  "old_mode = ''",
  // Migrations: without an error that must not be ignored, or with one that must not occur.
  "sql_if_exists = 0, alter_algorithm = 'DEFAULT'",
];

// MariaDB skips comments with versions from 50700 to 99999; MySQL skips `/*M!`.
const SET_SESSION = `/* set_session */ set ${BOTH.join(", ")}
  /*!80000 , ${MYSQL.join(", ")} */ /*M! , ${MARIADB.join(", ")} */`;

const SERVER = "concat_ws(' ', @@hostname, @@port, @@server_id) server";

// No table of information_schema: a MariaDB that is shutting down may crash at its temporary table (seen on 10.11.19, in
// ha_maria::drop_table).
const CHECK_SERVER = `/* check_server */ select @@global.innodb_flush_log_at_trx_commit flush, @@global.log_bin log_bin,
  @@global.sync_binlog sync, @@session.binlog_format format, @@global.binlog_format next_format, @@global.read_only read_only,
  least(@@session.max_allowed_packet, @@global.max_allowed_packet) packet, connection_id() id,
  ${SERVER}`;

/** The settings of a server that decide whether it can be used. */
export interface ServerSettings {
  flush: number;
  log_bin: number;
  sync: number;
  /** `binlog_format` of this session, and of the next one. */
  format: string;
  next_format: string;
  /** MariaDB 12 has a word for it. */
  read_only: number | string;
  packet: number;
}

/** The options of mysql2 for each connection. */
export function connectionOptions(
  url: string,
  { program = "pointservice", connectMs }: { program?: string | undefined; connectMs: number },
) {
  return {
    uri: url.replace(/^mariadb:/, "mysql:"),
    connectTimeout: connectMs,
    // So that a dead peer is noticed before a caller waits for it.
    enableKeepAlive: true,
    keepAliveInitialDelay: 10_000,
    timezone: "Z",
    supportBigNumbers: true,
    connectAttributes: { program_name: program, host: hostname(), pid: String(process.pid) },
  } satisfies ConnectionOptions;
}

/**
 * Opens a connection of its own, with the settings of every session.
 *
 * @throws {DatabaseError}
 */
export async function openSession(
  url: string,
  { program, allowLossy, connectMs }: SessionOptions & { connectMs: number },
): Promise<Client> {
  let client: Client | undefined;
  try {
    client = await createConnection(connectionOptions(url, { program, connectMs }));
    await prepareSession(client, { allowLossy });
    return client;
  } catch (error) {
    client?.destroy();
    throw databaseErrorOf(error);
  }
}

/**
 * Sets the variables of a new connection, and checks its server.
 *
 * @throws {DatabaseError} as checkServer(); `unsafe` if the server does not know a variable
 */
export async function prepareSession(client: Client, options: SessionOptions): Promise<ServerSession> {
  try {
    await client.query(SET_SESSION);
  } catch (thrown) {
    const error = databaseErrorOf(thrown);
    if (!(error instanceof DatabaseError && error.kind === "other")) throw error;
    // The statement has no data: the server's text may be shown.
    throw new DatabaseError(
      "unsafe",
      `${error.message}: ${(thrown as Error).message}. Is it MySQL 8.4 or MariaDB 10.11?`,
    );
  }
  return checkServer(client, options);
}

/**
 * Checks that the server keeps what it commits, takes writes, and takes our largest statement.
 *
 * @throws {DatabaseError} `unsafe` or `unavailable`, with the setting, the rule and the value
 */
export async function checkServer(
  client: Pick<Client, "query">,
  options: SessionOptions,
): Promise<ServerSession> {
  type Row = ServerSettings & ServerSession & RowDataPacket;
  const [[settings]] = await client.query<Row[]>(CHECK_SERVER);
  if (!settings) throw new DatabaseError("unavailable", "MySQL does not tell its settings");
  refuseSettings(settings, options);
  return { id: settings.id, server: settings.server };
}

/** @throws {DatabaseError} `unsafe` or `unavailable`, with the setting, the rule and the value */
export function refuseSettings(settings: ServerSettings, { allowLossy = true }: SessionOptions): void {
  const { flush, log_bin, sync, format, next_format, read_only, packet } = settings;
  const isStatement = log_bin === 1 && [format, next_format].includes("STATEMENT");
  refuse("Cannot work with this MySQL", ". Change that in MySQL", "MySQL has settings that cannot work", [
    // It refuses every write at READ COMMITTED.
    isStatement && "binlog_format must be ROW or MIXED: it is STATEMENT",
    packet < NEEDED_PACKET && `max_allowed_packet must be at least ${NEEDED_PACKET}: it is ${packet}`,
  ]);
  if (!allowLossy) {
    const advice = ". Change that in MySQL, or set ALLOW_LOSSY_DATABASE=true to run anyway";
    refuse("Cannot promise points on a MySQL that may lose commits", advice, "MySQL may lose commits", [
      flush !== 1 && `innodb_flush_log_at_trx_commit must be 1: it is ${flush}`,
      log_bin === 1 && sync !== 1 && `sync_binlog must be 1: it is ${sync}`,
    ]);
  }
  if (read_only !== 0 && read_only !== "OFF") {
    throw new DatabaseError(
      "unavailable",
      `MySQL is read-only: read_only is ${read_only}. Is it a replica?`,
      "MySQL is read-only",
    );
  }
}

function refuse(what: string, advice: string, reason: string, rules: (string | false)[]): void {
  const broken = rules.filter((rule) => rule !== false);
  if (broken.length > 0) throw new DatabaseError("unsafe", `${what}: ${broken.join("; ")}${advice}`, reason);
}

/** Ends sessions on the server. */
export interface SessionEnder {
  /** Ends a session, so that its statement stops and its locks are free: within 2 s, or not at all. Never throws. */
  end(session: ServerSession): void;
  /** Resolves when it has nothing left to do. */
  settled(): Promise<void>;
}

/** Opens an ender. It connects when it has something to end: the pool may have no connection left. */
export function openSessionEnder(url: string, options: { program?: string | undefined }): SessionEnder {
  const waiting: ServerSession[] = [];
  let running: Promise<void> | undefined;

  async function endAll(): Promise<void> {
    let client: Client | undefined;
    async function work() {
      client = await createConnection(connectionOptions(url, { ...options, connectMs: END_MS }));
      for (let session = waiting.shift(); session; session = waiting.shift()) await endOne(client, session);
    }
    // If the server does not answer, its connections are lost, and their locks with them.
    await withDeadline(work(), END_MS, () => new Error("late")).catch(() => undefined);
    waiting.length = 0;
    client?.destroy();
    running = undefined;
  }

  return {
    end(session) {
      waiting.push(session);
      running ??= endAll();
    },
    settled: async () => running,
  };
}

async function endOne(client: Client, { id, server }: ServerSession): Promise<void> {
  const [[me]] = await client.query<RowDataPacket[]>(
    `/* find_server */ select ${SERVER}, substring_index(user(), '@', 1) user, database() db`,
  );
  if (me?.server !== server) return;
  const [sessions] = await client.query<RowDataPacket[]>("/* find_session */ show processlist");
  // If the server has restarted, the id may be that of another client.
  const isOurs = sessions.some(({ Id, User, db }) => Id === id && User === me.user && db === me.db);
  if (isOurs) await client.query("/* end_session */ kill ?", [id]);
}
