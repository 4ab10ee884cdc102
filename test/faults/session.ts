import { createConnection, type RowDataPacket } from "mysql2/promise";

/** Runs a statement. */
export type Run = <Row extends object = Record<string, unknown>>(
  sql: string,
  values?: unknown[],
) => Promise<Row[]>;

/** What a session inherits, and the values with which it would do the most damage. */
export const WORST_SETTINGS: Record<string, string | number> = {
  completion_type: "CHAIN",
  autocommit: 0,
  sql_select_limit: 5,
  sql_mode: "",
  time_zone: "+09:00",
  unique_checks: 0,
  wait_timeout: 1,
};

/** So that a fault does what it says, whatever another one has set. */
const OWN_SETTINGS = `set session completion_type = 'NO_CHAIN', autocommit = 1, wait_timeout = 600, sql_select_limit = 18446744073709551615, time_zone = '+00:00'`;

/** Opens a session without our code, as an operator or a stranger has one. */
export async function openSession(url: string) {
  const session = await createConnection({ uri: url, connectTimeout: 2_000 });
  // Another fault may kill the server meanwhile.
  session.on("error", () => {});
  const run: Run = async <Row extends object>(sql: string, values?: unknown[]) =>
    (await session.query<RowDataPacket[]>(sql, values))[0] as unknown as Row[];
  const opened = {
    run,
    async [Symbol.asyncDispose]() {
      session.destroy();
    },
  };
  try {
    await run(OWN_SETTINGS);
    await run("set session transaction isolation level read committed");
    return opened;
  } catch (error) {
    session.destroy();
    throw error;
  }
}
