import { expect, test } from "bun:test";
import { is } from "drizzle-orm";
import { getTableConfig, MySqlTable } from "drizzle-orm/mysql-core";
import * as schema from "../../lib/schema.ts";
import { openTestDatabase } from "../harness/database.ts";

const db = await openTestDatabase();

const tables = Object.values(schema).filter((value) => is(value, MySqlTable));

test.each(tables.map(getTableConfig).map(({ name, columns }) => [name, columns] as const))(
  "lib/schema.ts has the columns of %s as sql/ makes them",
  async (table, columns) => {
    const found = await db.query<{ name: string; type: string; nullable: string; is_generated: number }>(
      `select column_name name, column_type type, is_nullable nullable, ifnull(generation_expression, '') <> '' is_generated
       from information_schema.columns where table_schema = database() and table_name = ?`,
      [table],
    );
    const made = found.map(({ name, type, nullable, is_generated }) => ({
      name,
      // MariaDB writes the width of integers.
      type: type.replace(/int\(\d+\)/, "int"),
      isGenerated: Number(is_generated) === 1,
      notNull: nullable === "NO",
    }));
    const known = columns.map((column) => ({
      name: column.name,
      type: column.getSQLType(),
      isGenerated: column.generated !== undefined,
      notNull: column.notNull,
    }));
    expect(known.toSorted(byName)).toEqual(made.toSorted(byName));
  },
);

function byName(a: { name: string }, b: { name: string }): number {
  return a.name < b.name ? -1 : 1;
}
