import { createHash } from "node:crypto";
import { readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import type { RowDataPacket } from "mysql2/promise";
import type { Database } from "../lib/database.ts";
import { DatabaseError, databaseErrorOf } from "../lib/database_errors.ts";
import { openSession } from "../lib/database_session.ts";
import { DomainError } from "../lib/errors.ts";
import { type LockWaiter, runWhenFree, TRY_SECONDS, waitForLock } from "./lock_wait.ts";

/**
 * A file of SQL. A statement ends with `;` at the end of a line; a line that begins with `--` is a comment. After a crash between
 * two statements, the file runs again: errors of statements that have already created, added or dropped something are
 * ignored, and every INSERT must be safe to run twice.
 */
interface Migration {
  name: string;
  statements: string[];
  checksum: string;
}

interface Applied {
  name: string;
  checksum: string;
  finished: number;
}

const CONNECT_MS = 10_000;
/** How long a migration waits for a lock that another connection holds. */
export const WAIT_MS = 600_000;

/** Errors of a statement that an interrupted run has already done, by their numbers in MySQL and MariaDB. */
const DONE_BEFORE = new Set([
  ...[1050, 1051], // the table exists; it no longer exists
  ...[1060, 1061], // the column, the key exists
  ...[1826, 3822], // the check exists: MariaDB, MySQL
  ...[1091, 3821, 3940], // the column or key, the check, the constraint no longer exists
]);

function schemaError(message: string): DomainError {
  return new DomainError("SCHEMA", message);
}

/** The migrations of a folder, in the order of their numbers. */
async function readMigrations(folder: string): Promise<Migration[]> {
  const names = (await readdir(folder)).filter((name) => name.endsWith(".sql")).sort();
  const misnamed = names.find((name, index) => !name.startsWith(`${String(index + 1).padStart(4, "0")}_`));
  if (misnamed) {
    throw schemaError(`Cannot order the migrations as their numbers must be 0001_, 0002_ …: ${misnamed}`);
  }
  return Promise.all(
    names.map(async (name) => {
      const statements = statementsOf(await readFile(join(folder, name), "utf8"));
      // Only of the statements: other line ends or changed comments do not change the migration.
      const text = statements.map((sql) => sql.replaceAll(/\s+/g, " ")).join(";\n");
      return { name, statements, checksum: createHash("sha256").update(text).digest("hex") };
    }),
  );
}

function statementsOf(sql: string): string[] {
  return sql
    .replaceAll(/^\s*--.*$/gm, "")
    .split(/;\s*$/m)
    .map((statement) => statement.trim())
    .filter((statement) => statement !== "");
}

/** The migrations that have not run yet; throws if one that has run was changed. */
function pendingOf(migrations: readonly Migration[], applied: readonly Applied[]): Migration[] {
  if (applied.some((row) => isUnreleased(row, migrations, applied))) {
    throw schemaError(
      "Cannot use this database as it was made by SQL files that were never released: create an empty database, point DATABASE_URL at it and run `bun run migrate`",
    );
  }
  return migrations.filter(({ name, checksum }) => {
    const before = applied.find((row) => row.name === name);
    // A file that failed in the middle may be fixed; one that has run must not change.
    if (before?.finished && before.checksum !== checksum) {
      throw schemaError(
        `Cannot use ${name} as it has run on this database, and its statements were changed since: restore the file, and put the change in a new file`,
      );
    }
    return !before?.finished;
  });
}

/** Whether a file that has run is one of the unreleased files that 0001_points.sql has replaced. */
function isUnreleased(
  { name, checksum, finished }: Applied,
  migrations: readonly Migration[],
  applied: readonly Applied[],
): boolean {
  const ours = migrations.find((migration) => migration.name.slice(0, 4) === name.slice(0, 4));
  if (!ours) return false;
  if (ours.name !== name) return true;
  const isRewritten = finished === 1 && checksum !== ours.checksum;
  return isRewritten && applied.some((row) => row.name === "0002_changes_and_campaigns.sql");
}

const SELECT_APPLIED =
  "/* find_applied */ select name, checksum, finished_at is not null finished from schema_migrations";

/**
 * Refuses a schema that is older than this code, or made from other files. Accepts a newer schema: while a new version rolls
 * out, the old one still runs.
 *
 * @throws {DomainError} SCHEMA, with the command that fixes it
 */
export async function checkSchema(database: Database, folder: string = import.meta.dir): Promise<void> {
  const applied = await database.run(async (connection) => {
    const [table] = await connection.select(
      `/* find_schema_migrations */ select 1 from information_schema.tables
       where table_schema = database() and table_name = 'schema_migrations'`,
    );
    return table ? connection.select<Applied>(SELECT_APPLIED) : [];
  });
  const pending = pendingOf(await readMigrations(folder), applied);
  if (pending.length > 0) {
    throw schemaError(
      `The schema is behind: ${pending.map(({ name }) => name).join(", ")} must run. Run \`bun run migrate\` with this DATABASE_URL`,
    );
  }
}

export interface MigrateOptions {
  folder?: string;
  /** How long to wait for each lock that another connection holds, in milliseconds. */
  waitMs?: number;
  /** Called with each line of output. */
  say?: (line: string) => void;
}

/**
 * Runs the migrations that have not run yet, in order, under a lock: if several processes start at once, one migrates, and the
 * others find nothing to do.
 *
 * @throws {DatabaseError} if MySQL is unavailable
 * @throws {DomainError} SCHEMA, if MySQL refuses a statement, a lock is not free within `waitMs`, a file that has run was changed,
 *   or the database has other tables with the same names
 */
export async function migrate(
  url: string,
  { folder = import.meta.dir, waitMs = WAIT_MS, say = () => {} }: MigrateOptions = {},
): Promise<void> {
  const migrations = await readMigrations(folder);
  const connection = await openSession(url, { program: "pointservice-migrate", connectMs: CONNECT_MS });
  async function query<Row extends object>(sql: string, values?: unknown[]): Promise<Row[]> {
    return (await connection.query<(Row & RowDataPacket)[]>(sql, values))[0];
  }
  try {
    await query(`/* set_lock_wait */ set lock_wait_timeout = ${TRY_SECONDS}`);
    await lockMigrations({ query, waitMs, say });
    await runPending({ query, waitMs, say }, migrations);
  } catch (error) {
    throw databaseErrorOf(error);
  } finally {
    // The lock ends with its connection.
    connection.destroy();
  }
}

/** DDL commits by itself in MySQL: only a lock prevents two processes from running the same file. */
async function lockMigrations(waiter: LockWaiter): Promise<void> {
  const name = "concat('migrate.', left(sha2(database(), 256), 40))";
  async function attempt(): Promise<boolean> {
    const [lock] = await waiter.query<{ held: number }>(
      `/* lock_migrations */ select get_lock(${name}, ${TRY_SECONDS}) held`,
    );
    return lock?.held === 1;
  }
  await waitForLock(waiter, attempt, {
    what: "another migration of this database runs",
    advice: "This run has changed nothing",
    async look() {
      const [lock] = await waiter.query<{ id: number | null }>(
        `/* find_other_migration */ select is_used_lock(${name}) id`,
      );
      const holders = lock?.id ? [`Held by connection ${lock.id}`] : [];
      return { holders, hint: "To see what it does: show full processlist" };
    },
  });
}

async function runPending(waiter: LockWaiter, migrations: readonly Migration[]): Promise<void> {
  const { query, say } = waiter;
  await runWhenFree(
    waiter,
    `/* create_schema_migrations */ create table if not exists schema_migrations (
       name varchar(200) character set ascii collate ascii_bin not null primary key,
       checksum char(64) character set ascii collate ascii_bin not null,
       started_at datetime(3) not null default (utc_timestamp(3)),
       finished_at datetime(3) null
     ) engine = InnoDB`,
    { file: "before the first file" },
  );
  const applied = await query<Applied>(SELECT_APPLIED);
  const pending = pendingOf(migrations, applied);
  for (const migration of pending) {
    const { name, checksum } = migration;
    const isInterrupted = applied.some((row) => row.name === name);
    if (!isInterrupted) await refuseStrangers(waiter, migration);
    say(`Running ${name}${isInterrupted ? " again, as it was interrupted" : ""}`);
    await runWhenFree(
      waiter,
      `/* start_migration */ insert into schema_migrations (name, checksum) values (?, ?)
       on duplicate key update checksum = values(checksum)`,
      { file: name, values: [name, checksum] },
    );
    await runFile(waiter, migration, { isInterrupted });
    await runWhenFree(
      waiter,
      "/* finish_migration */ update schema_migrations set finished_at = utc_timestamp(3) where name = ?",
      { file: name, values: [name] },
    );
  }
  say(pending.length > 0 ? "The schema is up to date" : "The schema was up to date already");
}

async function runFile(
  waiter: LockWaiter,
  { name, statements }: Migration,
  { isInterrupted }: { isInterrupted: boolean },
): Promise<void> {
  for (const sql of statements) {
    try {
      await runWhenFree(waiter, sql, { file: name });
    } catch (error) {
      if (isInterrupted && DONE_BEFORE.has((error as { errno: number }).errno)) continue;
      const known = databaseErrorOf(error);
      if (!(known instanceof DatabaseError)) throw known;
      if (known.isOutage) throw new DatabaseError(known.kind, `${name}: ${known.message}`, known.reason);
      // The statement contains no data of users, and the author of the file needs MySQL's message.
      throw schemaError(`Cannot run ${name}: ${(error as Error).message}. Fix the file and run it again`);
    }
  }
}

/** An interrupted file skips existing tables, so on its first run tables of another program must not exist. */
async function refuseStrangers({ query }: LockWaiter, { name, statements }: Migration): Promise<void> {
  const tables = statements.flatMap((sql) => /^create table (?:if not exists )?(\w+)/i.exec(sql)?.[1] ?? []);
  if (tables.length === 0) return;
  const found = await query<{ name: string }>(
    `/* find_strangers */ select table_name as name from information_schema.tables
     where table_schema = database() and table_name in (?)`,
    [tables],
  );
  if (found.length > 0) {
    throw schemaError(
      `Cannot run ${name} as the database holds tables that it would create: ${found.map((table) => table.name).join(", ")}. Use an empty database, or rename them`,
    );
  }
}
