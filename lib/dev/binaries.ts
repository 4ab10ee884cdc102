/** The programs of the servers on this machine. */
import * as fs from "node:fs";
import { delimiter, join } from "node:path";

/** Path of `mysqld` or `mariadbd`. */
export function findMysqld(): string | undefined {
  return findExecutable(["mysqld", "mariadbd"], binaryFolders());
}

/** Path of RabbitMQ's own script: the wrapper that Debian puts into /usr/sbin changes to another user. */
export function findRabbitmq(): string | undefined {
  const scripts = fs.globSync(["/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin", "/opt/rabbitmq*/sbin"]);
  return findExecutable(["rabbitmq-server"], [...scripts, ...binaryFolders()]);
}

/** The folders that may have programs: the PATH, then the usual folders. */
export function binaryFolders(): string[] {
  const homebrew = fs.globSync([
    "/opt/homebrew/opt/{mysql,mariadb}*/bin",
    "/usr/local/opt/{mysql,mariadb}*/bin",
  ]);
  const usual = ["/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin", "/usr/local/mysql/bin"];
  const path = (process.env.PATH ?? "").split(delimiter).filter(Boolean);
  return [...path, ...usual, "/opt/homebrew/sbin", "/opt/homebrew/bin", ...homebrew];
}

/** The first executable of `names`; searches all folders for each name. */
export function findExecutable(names: string[], folders: string[]): string | undefined {
  const paths = names.flatMap((name) => folders.map((folder) => join(folder, name)));
  return paths.find((path) => {
    try {
      fs.accessSync(path, fs.constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}

/** @throws {Error} if `path` is undefined */
export function need(path: string | undefined, what: string): string {
  if (path === undefined) throw new Error(`Cannot start private servers without ${what} on this machine`);
  return path;
}

/** The environment of a server. It must not inherit settings (MYSQL_…, RABBITMQ_…, ERL_…). */
export function serverEnv(): Record<string, string> {
  return { PATH: binaryFolders().join(delimiter), HOME: process.env.HOME ?? "/", LANG: "C.UTF-8" };
}
