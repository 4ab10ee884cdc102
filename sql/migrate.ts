import { createHash } from "node:crypto";
import { readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { type Connection, createConnection, type RowDataPacket } from "mysql2/promise";
import { readConfig, type Settings } from "../lib/config.ts";
import {
  checkDurability,
  type Database,
  DatabaseError,
  databaseErrorOf,
  openDatabase,
} from "../lib/database.ts";
import { DomainError } from "../lib/errors.ts";

interface Migration {
  name: string;
  sql: string;
  checksum: string;
}

type Applied = { name: string; checksum: string; finished: number };

const CONNECT_MS = 10_000;
const LOCK_SECONDS = 60;

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
      // A checkout with CRLF is the same migration.
      const sql = (await readFile(join(folder, name), "utf8")).replaceAll("\r\n", "\n");
      return { name, sql, checksum: createHash("sha256").update(sql).digest("hex") };
    }),
  );
}

/** The migrations that have not run yet; throws where one that has run was changed since. */
function pendingOf(migrations: readonly Migration[], applied: readonly Applied[]): Migration[] {
  return migrations.filter(({ name, checksum }) => {
    const before = applied.find((row) => row.name === name);
    // One that failed in the middle may be mended; one that has run is history.
    if (before?.finished && before.checksum !== checksum) {
      throw schemaError(
        `Cannot go on as ${name} was changed after it had run: restore it, and put the change in a new file`,
      );
    }
    return !before?.finished;
  });
}

const SELECT_APPLIED = "select name, checksum, finished_at is not null finished from schema_migrations";

/**
 * Refuses a schema that is behind this code, or made of other files. A schema that is ahead is accepted: while a new
 * version rolls out, the old one still runs.
 *
 * @throws {DomainError} SCHEMA, with the command that mends it
 */
export async function checkSchema(database: Database, folder: string = import.meta.dir): Promise<void> {
  const applied = await database.run(async (connection) => {
    const [table] = await connection.select(
      "select 1 from information_schema.tables where table_schema = database() and table_name = 'schema_migrations'",
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

/**
 * What each process asks before it starts: is the schema the one it was written for, and does MySQL keep what it commits?
 *
 * @throws {DomainError} SCHEMA
 * @throws {DatabaseError}
 */
export async function checkDatabase(
  database: Database,
  { ALLOW_LOSSY_DATABASE }: Pick<Settings, "ALLOW_LOSSY_DATABASE">,
): Promise<void> {
  await checkSchema(database);
  if (!ALLOW_LOSSY_DATABASE) await checkDurability(database);
}

export interface MigrateOptions {
  folder?: string;
  say?: (line: string) => void;
}

/**
 * Runs what has not run yet, in order, under a lock: of ten processes that start at once, one migrates and the others find
 * it done. A file that a crash interrupted runs again from its start, so its statements must be ones that may.
 *
 * @throws {DatabaseError} where MySQL cannot be reached or refuses a statement
 * @throws {DomainError} SCHEMA, where a file that has run was changed, or a table of its name was there before
 */
export async function migrate(
  url: string,
  { folder = import.meta.dir, say = () => {} }: MigrateOptions = {},
): Promise<void> {
  const migrations = await readMigrations(folder);
  let connection: Connection | undefined;
  try {
    connection = await createConnection({
      uri: url.replace(/^mariadb:/, "mysql:"),
      multipleStatements: true,
      connectTimeout: CONNECT_MS,
      timezone: "Z",
    });
    // MySQL's DDL commits by itself: only a lock keeps two processes out of one file.
    const [[lock]] = await connection.query<RowDataPacket[]>({
      sql: "select get_lock(concat('migrate.', left(sha2(database(), 256), 40)), ?) held",
      values: [LOCK_SECONDS],
      timeout: 2 * LOCK_SECONDS * 1_000,
    });
    if (lock?.held !== 1) {
      throw schemaError(`Cannot migrate as another process has held the lock for ${LOCK_SECONDS} s`);
    }
    await runPending(connection, migrations, say);
  } catch (error) {
    throw databaseErrorOf(error);
  } finally {
    // The lock goes with its connection.
    connection?.destroy();
  }
}

async function runPending(
  connection: Connection,
  migrations: readonly Migration[],
  say: (line: string) => void,
) {
  await connection.query(
    `create table if not exists schema_migrations (
       name varchar(200) character set ascii collate ascii_bin not null primary key,
       checksum char(64) character set ascii collate ascii_bin not null,
       started_at datetime(3) not null default (utc_timestamp(3)),
       finished_at datetime(3) null
     ) engine = InnoDB`,
  );
  const [applied] = await connection.query<(Applied & RowDataPacket)[]>(SELECT_APPLIED);
  const pending = pendingOf(migrations, applied);
  for (const { name, sql, checksum } of pending) {
    const interrupted = applied.some((row) => row.name === name);
    if (!interrupted) await refuseStrangers(connection, { name, sql });
    say(`Running ${name}${interrupted ? " again, as it was interrupted" : ""}`);
    await connection.query(
      `insert into schema_migrations (name, checksum) values (?, ?)
       on duplicate key update checksum = values(checksum)`,
      [name, checksum],
    );
    await runFile(connection, { name, sql });
    await connection.query("update schema_migrations set finished_at = utc_timestamp(3) where name = ?", [
      name,
    ]);
  }
  say(pending.length > 0 ? "The schema is up to date" : "The schema was up to date already");
}

async function runFile(connection: Connection, { name, sql }: Pick<Migration, "name" | "sql">) {
  try {
    await connection.query(sql);
  } catch (error) {
    const known = databaseErrorOf(error);
    if (!(known instanceof DatabaseError) || known.isOutage) throw known;
    // Our own statement without anybody's data: MySQL's sentence is what whoever wrote the file needs.
    throw schemaError(`Cannot run ${name}: ${(error as Error).message}. Mend the file and run it again`);
  }
}

// `if not exists` lets an interrupted file run again; it must not take another program's table for ours.
async function refuseStrangers(connection: Connection, { name, sql }: Pick<Migration, "name" | "sql">) {
  const tables = [...sql.matchAll(/^create table if not exists (\w+)/gm)].map(([, table]) => table);
  if (tables.length === 0) return;
  const [found] = await connection.query<RowDataPacket[]>(
    "select table_name as name from information_schema.tables where table_schema = database() and table_name in (?)",
    [tables],
  );
  if (found.length > 0) {
    throw schemaError(
      `Cannot run ${name} as the database holds tables that it would create: ${found.map((table) => table.name).join(", ")}. Use an empty database, or rename them`,
    );
  }
}

if (import.meta.main) {
  const [option, ...more] = Bun.argv.slice(2);
  if ((option !== undefined && option !== "--check") || more.length > 0) {
    console.error("Usage: bun sql/migrate.ts [--check]: brings the tables up to date; --check only looks");
    process.exit(2);
  }
  try {
    const { DATABASE_URL } = readConfig(Bun.env, ["DATABASE_URL"]);
    if (option === "--check") {
      const database = openDatabase(DATABASE_URL);
      await checkSchema(database).finally(() => database.close());
      console.log("The schema is up to date");
    } else {
      await migrate(DATABASE_URL, { say: console.log });
    }
  } catch (error) {
    console.error(
      error instanceof DatabaseError ? `Cannot migrate: ${error.message}` : (error as Error).message,
    );
    process.exit(1);
  }
}
