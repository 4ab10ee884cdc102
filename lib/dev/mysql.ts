/** MySQL or MariaDB as a private server. */
import * as fs from "node:fs";
import { dirname, join } from "node:path";
import { createConnection } from "mysql2/promise";
import { binaryFolders, findExecutable, findMysqld, need, serverEnv } from "./binaries.ts";
import { lastLines, MARK, markOf, runCommand } from "./processes.ts";
import type { Recipe, ServerOptions } from "./recipe.ts";

/** MySQL or MariaDB with database, user and password `pointservice`. `folder` must exist, with its real path. */
export function mysqlRecipe({ folder, say, mysqlEnv = {} }: ServerOptions): Recipe {
  const asUser = process.getuid?.() === 0 ? ["--user=root"] : [];

  async function prepare([port]: number[], signal?: AbortSignal) {
    const mysqld = need(findMysqld(), "mysqld or mariadbd");
    const version = (await runCommand([mysqld, "--no-defaults", "--version"])).output;
    const mariadb = /mariadb/i.test(version);
    // A server must not open the files of another product or version: each has its own folder.
    const name = `mysql-${mariadb ? "mariadb" : "oracle"}-${/\d+\.\d+/.exec(version)?.[0] ?? "unknown"}`;
    const data = join(folder, name);
    if (!fs.existsSync(data)) {
      const others = fs.readdirSync(folder).filter((entry) => /^mysql-[a-z]+-[\d.]*\d$/.test(entry));
      if (others.length > 0)
        say(`starting with empty data in ${name}; other server versions use ${others.join(", ")}`);
      await initialise({ mysqld, mariadb, data, signal });
    }
    const files = join(folder, "mysql-files");
    fs.mkdirSync(files, { recursive: true, mode: 0o700 });
    const initFile = join(folder, "mysql-init.sql");
    fs.writeFileSync(
      initFile,
      `create database if not exists pointservice;
create user if not exists 'pointservice'@'%' identified by 'pointservice';
grant all privileges on *.* to 'pointservice'@'%' with grant option;
`,
    );
    const command = [mysqld, "--no-defaults", ...asUser, `--datadir=${data}`, `--init-file=${initFile}`];
    // Relative to the data folder, to keep it short: the path of a socket is cut at 107 bytes.
    command.push("--socket=mysql.sock", "--pid-file=mysqld.pid");
    command.push("--bind-address=127.0.0.1", `--port=${port}`, "--skip-name-resolve");
    command.push("--innodb-flush-log-at-trx-commit=1", "--skip-log-bin", `--secure-file-priv=${files}`);
    // With the defaults of 128 MB and 96 MB, a benchmark with a million reservations would measure the disk. The server
    // allocates memory on demand. With a small log it writes each page repeatedly (0.65 × the grants per second, with
    // 2,000,000 finished reservations on MariaDB 10.11).
    command.push("--innodb-buffer-pool-size=1G", "--innodb-io-capacity=2000");
    command.push(mariadb ? "--innodb-log-file-size=512M" : "--innodb-redo-log-capacity=512M");
    if (!mariadb) command.push("--mysqlx=OFF");
    return { command, env: mysqlEnv };
  }

  /** Makes a temporary folder and renames it: a killed run leaves no incomplete data folder. */
  async function initialise(options: {
    mysqld: string;
    mariadb: boolean;
    data: string;
    signal: AbortSignal | undefined;
  }): Promise<void> {
    const { mysqld, mariadb, data, signal } = options;
    const fresh = `${data}.new`;
    fs.rmSync(fresh, { recursive: true, force: true });
    const near = dirname(fs.realpathSync(mysqld));
    const installers = [near, join(near, "../bin"), join(near, "../scripts"), ...binaryFolders()];
    const command = mariadb
      ? [
          need(findExecutable(["mariadb-install-db", "mysql_install_db"], installers), "mariadb-install-db"),
          "--no-defaults",
          "--auth-root-authentication-method=normal",
          "--skip-test-db",
        ]
      : [mysqld, "--no-defaults", "--initialize-insecure"];
    const env = { ...serverEnv(), [MARK]: markOf(folder, "MySQL") };
    const made = await runCommand([...command, `--datadir=${fresh}`, ...asUser], { env, signal });
    signal?.throwIfAborted();
    if (made.code !== 0) {
      throw new Error(`${command[0]} could not make MySQL's data folder:\n${lastLines(made.output)}`);
    }
    fs.renameSync(fresh, data);
  }

  return {
    name: "MySQL",
    portCount: 1,
    main: /(mysqld|mariadbd) .*--port=/,
    url: (port) => `mysql://pointservice:pointservice@127.0.0.1:${port}/pointservice`,
    answers: answersMysql,
    prepare,
  };
}

/** Whether a server on this port accepts our user and has our database. */
export async function answersMysql(port: number): Promise<boolean> {
  const login = { user: "pointservice", password: "pointservice", database: "pointservice" };
  try {
    const connection = await createConnection({ host: "127.0.0.1", port, connectTimeout: 2_000, ...login });
    await connection.query("select 1").finally(() => connection.destroy());
    return true;
  } catch {
    return false;
  }
}
