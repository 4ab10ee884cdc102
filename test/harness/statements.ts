import type { Connection, Database } from "../../lib/database.ts";

/** The same database, but `before` is awaited before each statement of plain SQL that a piece of work sends. */
export function beforeStatements(database: Database, before: (sql: string) => unknown): Database {
  const around = <C extends Connection>(connection: C): C => ({
    ...connection,
    async select(...args: Parameters<Connection["select"]>) {
      await before(args[0]);
      return connection.select(...args);
    },
    async execute(...args: Parameters<Connection["execute"]>) {
      await before(args[0]);
      return connection.execute(...args);
    },
  });
  return {
    ...database,
    run: (work, options) => database.run((connection) => work(around(connection)), options),
    transaction: (work, options) => database.transaction((connection) => work(around(connection)), options),
  };
}
