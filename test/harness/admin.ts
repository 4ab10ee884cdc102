import { type Connection, createConnection, type RowDataPacket } from "mysql2/promise";
import { uniqueName } from "./harness.ts";

export type Admin = Awaited<ReturnType<typeof openAdmin>>;

/**
 * An operator of a server of one's own, who may change its settings and its accounts: root without a password if there is
 * one, else the user of the URL. `await using` puts the settings back that it has changed, and drops its accounts.
 */
export async function openAdmin(url: string) {
  const connection = await connectAdmin(url);
  const before = new Map<string, string | number | null>();
  const accounts: string[] = [];

  async function query<Row extends object>(sql: string, values?: unknown[]): Promise<Row[]> {
    const [rows] = await connection.query<(Row & RowDataPacket)[]>(sql, values);
    return rows;
  }
  // No try of its own may end because it waits, or take a setting that is under test.
  await query("set session wait_timeout = 28800");
  const [server] = await query<{ version: string; hasLog: number }>(
    "select version() version, @@global.log_bin hasLog",
  );

  async function setGlobal(variable: string, value: string | number | null): Promise<void> {
    const [row] = await query<{ value: string | number | null }>(`select @@global.${variable} value`);
    await setTo(variable, value);
    if (!before.has(variable)) before.set(variable, row?.value ?? null);
  }

  async function setTo(variable: string, value: string | number | null): Promise<void> {
    // A variable that is a number takes no text.
    const isNumber = typeof value === "string" && /^\d{16,}$/.test(value);
    await query(`set global ${variable} = ${isNumber ? value : "?"}`, [value]);
  }

  /** Puts all settings back. */
  async function restore(): Promise<void> {
    for (const [variable, value] of before) await setTo(variable, value);
    before.clear();
  }

  return {
    query,
    isMariaDb: server?.version.includes("Maria") === true,
    hasBinaryLog: server?.hasLog === 1,
    setGlobal,
    restore,
    /** Makes an account with the rights that the README names; resolves to its name and to the URL with it. */
    async createAccount(database: { name: string; url: string }): Promise<{ account: string; url: string }> {
      const user = uniqueName("plain");
      const account = `'${user}'@'%'`;
      accounts.push(account);
      await query(`create user ${account} identified by 'plain'`);
      await query(`grant select, insert, update, delete on ${database.name}.* to ${account}`);
      const { href } = Object.assign(new URL(database.url), { username: user, password: "plain" });
      return { account, url: href };
    },
    async [Symbol.asyncDispose]() {
      await restore();
      for (const account of accounts) await query(`drop user ${account}`);
      connection.destroy();
    },
  };
}

async function connectAdmin(url: string): Promise<Connection> {
  const { href: root } = Object.assign(new URL(url), { username: "root", password: "", pathname: "/mysql" });
  // Large numbers as text, so that none of their digits is lost.
  const connect = (uri: string) => createConnection({ uri, supportBigNumbers: true });
  return connect(root).catch(() => connect(url));
}
