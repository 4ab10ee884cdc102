import { afterAll, setDefaultTimeout } from "bun:test";
import { createConnection } from "mysql2/promise";
import { type Database, openDatabase } from "../../lib/database.ts";
import { migrate } from "../../sql/migrate.ts";
import { DATABASE_URL, uniqueName, until } from "./harness.ts";

export interface TestDatabase {
  url: string;
  name: string;
  database: Database;
  /** Runs a statement as an operator does, without our code. */
  query<Row extends object>(sql: string, values?: unknown[]): Promise<Row[]>;
}

interface Options {
  migrated?: boolean;
  /** The URL of the server. */
  server?: string;
}

/**
 * Creates a database of its own for a test file. To be called at the file's top level: it is dropped after all of its tests,
 * which may take 30 s each.
 */
export async function openTestDatabase(options?: Options): Promise<TestDatabase> {
  // Nothing here is slow, but a machine can be: 5 s are not enough on one that is busy.
  setDefaultTimeout(30_000);
  const { drop, ...db } = await createTestDatabase(options);
  afterAll(drop);
  return db;
}

/** The same for what is not a test file, which calls `drop()` when done. */
export async function createTestDatabase({
  migrated = true,
  server = DATABASE_URL,
}: Options = {}): Promise<TestDatabase & { drop(): Promise<void> }> {
  const name = uniqueName("pointservice_test");
  await runOn(server, `create database ${name}`);
  const { href: url } = Object.assign(new URL(server), { pathname: `/${name}` });
  if (migrated) await migrate(url);
  const database = openDatabase(url);
  return {
    url,
    name,
    database,
    query: (sql, values) => database.run((connection) => connection.select(sql, values)),
    async drop() {
      await database.close();
      await runOn(server, `drop database if exists ${name}`);
    },
  };
}

async function runOn(server: string, sql: string): Promise<void> {
  const connection = await createConnection({ uri: server });
  await connection.query(sql);
  await connection.end();
}

/** A second pool to the same database, as another process has. */
export function openAnother({ url }: TestDatabase): Database & AsyncDisposable {
  const database = openDatabase(url);
  return Object.assign(database, { [Symbol.asyncDispose]: () => database.close() });
}

/**
 * Waits until the server is at a statement of that name, or at so many: they run, or wait for a lock. The server lists one
 * that has ended for a moment more, so it counts only if two looks in a row find it.
 */
export async function untilRunning(
  { query, name: db }: TestDatabase,
  name: string,
  count = 1,
): Promise<void> {
  let before: number[] = [];
  await until(`${count} × ${name}`, async () => {
    const threads = await query<{ Id: number; db: string; Info: string | null }>("show full processlist");
    const now = threads
      .filter((one) => one.db === db && one.Info?.startsWith(`/* ${name} */`))
      .map(({ Id }) => Id);
    const stayed = now.filter((id) => before.includes(id));
    before = now;
    return stayed.length >= count;
  });
}

const TABLES = [
  "point_transactions",
  "point_reservations",
  "point_root",
  "point_daily_totals",
  "point_daily_users",
  "point_user_totals",
  "point_reservation_totals",
  "point_suspects",
  "point_checked_days",
  "point_reconciliations",
  "point_repairs",
  "point_aggregation_turns",
];

/** Leaves the tables as they were when the database was new. */
export async function emptyTables({ query }: TestDatabase): Promise<void> {
  for (const table of TABLES) await query(`delete from ${table}`);
  await query("insert into point_aggregation_turns (id) values (1)");
  await query("update point_aggregation set generation = 1, time_zone = ''");
  await query("update point_scan_state set clock_at = null, open_from = null");
}

/**
 * Counts the rows and entries of indexes and temporary tables that the server reads for some work.
 *
 * @param single a pool of one connection: the counters are the session's
 */
export async function countReads(
  single: Database,
  work: (database: Database) => Promise<unknown>,
): Promise<number> {
  const count = async () => {
    const counters = await single.run(({ select }) =>
      select<{ Value: string }>("show session status where variable_name like 'Handler_read%'"),
    );
    return counters.reduce((sum, { Value }) => sum + Number(Value), 0);
  };
  await count();
  const [first, second] = [await count(), await count()];
  await work(single);
  // Reading the counters counts as well.
  return (await count()) - second - (second - first);
}
