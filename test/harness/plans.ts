import { expect } from "bun:test";
import { type Database, openDatabase } from "../../lib/database.ts";
import type { TestDatabase } from "./database.ts";
import { nameOf, SESSION } from "./fault_points.ts";
import { startProxy } from "./proxy.ts";

/** A statement as it was sent, with its values. */
export interface Statement {
  name: string;
  sql: string;
}

/** The statements that some work sends, without the bounds of its transactions. */
export async function recordStatements(
  { url }: TestDatabase,
  work: (database: Database) => Promise<unknown>,
): Promise<Statement[]> {
  await using proxy = await startProxy(url);
  const statements: Statement[] = [];
  function test(sql: string) {
    if (sql.startsWith("/*") && !SESSION.includes(nameOf(sql))) statements.push({ name: nameOf(sql), sql });
    return false;
  }
  proxy.trap({ command: { test }, moment: "unsent", spring() {} });
  const database = openDatabase(proxy.url);
  await work(database).finally(() => database.close());
  return statements;
}

/** One table of a plan. */
interface Step {
  table: string | null;
  type: string | null;
  key: string | null;
  rows: number | string | null;
  Extra: string | null;
}

export interface Plan {
  /** For each table the index that must serve it. */
  keys: Record<string, string>;
  /** The most rows that the server may expect to read of one table. */
  maxRows: number;
  /** The most rows in a temporary table, which may be sorted; no such table unless told. */
  maxTemporary?: number;
  /** The table whose rows must not be read, only its index. */
  fromIndexAlone?: string | undefined;
}

/** A plan may reach its rows by a key in these ways; the others read a whole table or a whole index. */
const BY_KEY = ["const", "eq_ref", "ref", "range"];

/** Checks that every table of a statement is read by its index, in the index's order. */
export async function expectServed(
  { query }: TestDatabase,
  { name, sql }: Statement,
  { keys, maxRows, maxTemporary = 0, fromIndexAlone }: Plan,
): Promise<void> {
  // `traditional` gives a row for each table on any server; later versions of MySQL draw a tree unless told.
  const all = await query<Step>(`explain format=traditional ${sql}`);
  // A SELECT of the clock alone reads nothing.
  const steps = all.filter(({ Extra }) => Extra !== "No tables used");
  const isTemporary = ({ table }: Step) => table?.startsWith("<") === true;
  const unserved = steps.filter((step) => {
    const { table, type, key, rows, Extra } = step;
    const expected = Number.parseInt(String(rows ?? 0), 10);
    if (isTemporary(step)) return expected > maxTemporary;
    const isByKey = BY_KEY.includes(type ?? "") && key === keys[table ?? ""];
    // Not "Using index condition", which is another thing.
    const isRead = table === fromIndexAlone && !/Using index(;|$)/.test(Extra ?? "");
    return !isByKey || isRead || /filesort|temporary/.test(Extra ?? "") || expected > maxRows;
  });
  const tables = steps.filter((step) => !isTemporary(step)).map(({ table }) => table ?? "none");
  const hasTemporary = steps.some(isTemporary) && maxTemporary === 0;
  expect({ name, unserved, tables: new Set(tables), hasTemporary }).toEqual({
    name,
    unserved: [],
    tables: new Set(Object.keys(keys)),
    hasTemporary: false,
  });
}
