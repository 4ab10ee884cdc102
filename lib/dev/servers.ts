/** Private MySQL and RabbitMQ servers: started, watched and stopped by us, all their files in one folder. */
import { spawn } from "node:child_process";
import * as fs from "node:fs";
import { connect, createServer } from "node:net";
import { delimiter, dirname, join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { createConnection } from "mysql2/promise";
import {
  hasEnded,
  kill,
  MARK,
  processesMarked,
  readJson,
  runCommand,
  whileSaying,
  writeJson,
} from "./lock.ts";

const READY_WITHIN_MS = 120_000;
const STOP_WITHIN_MS = 30_000;

/** One server of ours. Its ports are chosen at the first start and kept for as long as nobody else takes them. */
export interface Server {
  /** Where it listens; meaningful once it has been started. */
  readonly url: string;
  /** Resolves when it serves. Does nothing if it already does. */
  start(signal?: AbortSignal): Promise<void>;
  /** Resolves when none of its processes is left. SIGTERM is followed by SIGKILL after 30 s. */
  stop(signal?: "SIGTERM" | "SIGKILL"): Promise<void>;
  /** The main process (mysqld, or the Erlang machine), whichever run started it. */
  pid(): number | undefined;
  /** Whether it runs and serves now. */
  answers(): Promise<boolean>;
}

/** Where a server lives, and who hears of it. */
export interface ServerOptions {
  folder: string;
  say: (line: string) => void;
}

/** What differs between the two servers. */
interface Recipe {
  name: "MySQL" | "RabbitMQ";
  portCount: number;
  /** Matches the command line of the main process. */
  main: RegExp;
  url(port: number): string;
  answers(port: number): Promise<boolean>;
  /** Makes the data folder if need be, and says how to start the server on it. */
  prepare(
    ports: number[],
    signal?: AbortSignal,
  ): Promise<{ command: string[]; env?: Record<string, string> }>;
}

/** A pair of servers of one's own in `folder`, on free ports, both ready. Needs the binaries on this machine. */
export async function startPrivateServers(
  options: ServerOptions & { signal?: AbortSignal | undefined },
): Promise<{ mysql: Server; rabbitmq: Server; stop(): Promise<void> }> {
  const mysql = mysqlServer(options);
  const rabbitmq = rabbitmqServer(options);
  async function stop(): Promise<void> {
    await Promise.all([mysql.stop(), rabbitmq.stop()]);
  }
  const ran = [mysql, rabbitmq].filter((server) => server.pid() !== undefined);
  const starts = await Promise.allSettled([mysql.start(options.signal), rabbitmq.start(options.signal)]);
  const failed = starts.find((start) => start.status === "rejected");
  if (failed) {
    // What ran before may have other users, who can do without us.
    const begun = [mysql, rabbitmq].filter((server) => !ran.includes(server));
    await Promise.all(begun.map((server) => server.stop()));
    throw failed.reason;
  }
  return { mysql, rabbitmq, stop };
}

/** MySQL or MariaDB with database, user and password `pointservice`. */
export function mysqlServer(options: ServerOptions): Server {
  const { say } = options;
  const folder = makeFolder(options.folder);
  const asUser = process.getuid?.() === 0 ? ["--user=root"] : [];

  async function prepare([port]: number[], signal?: AbortSignal): Promise<{ command: string[] }> {
    const mysqld = need(findMysqld(), "mysqld or mariadbd");
    const version = (await runCommand([mysqld, "--no-defaults", "--version"])).output;
    const mariadb = /mariadb/i.test(version);
    // A server must not be let loose on the files of another flavour or version: a folder for each.
    const name = `mysql-${mariadb ? "mariadb" : "oracle"}-${/\d+\.\d+/.exec(version)?.[0] ?? "unknown"}`;
    const data = join(folder, name);
    if (!fs.existsSync(data)) {
      const others = fs.readdirSync(folder).filter((entry) => /^mysql-[a-z]+-[\d.]*\d$/.test(entry));
      if (others.length > 0)
        say(`starting with empty data in ${name}: ${others.join(", ")} is of another MySQL`);
      await initialise({ mysqld, mariadb, data, signal });
    }
    const files = join(folder, "mysql-files");
    fs.mkdirSync(files, { recursive: true, mode: 0o700 });
    const initFile = join(folder, "mysql-init.sql");
    fs.writeFileSync(
      initFile,
      `create database if not exists pointservice;
create user if not exists 'pointservice'@'%' identified by 'pointservice';
grant all privileges on *.* to 'pointservice'@'%';
`,
    );
    const command = [mysqld, "--no-defaults", ...asUser, `--datadir=${data}`, `--init-file=${initFile}`];
    // Relative to the data folder, and so short: the path of a socket is cut at 107 bytes.
    command.push("--socket=mysql.sock", "--pid-file=mysqld.pid");
    command.push("--bind-address=127.0.0.1", `--port=${port}`, "--skip-name-resolve");
    command.push("--innodb-flush-log-at-trx-commit=1", "--skip-log-bin", `--secure-file-priv=${files}`);
    if (!mariadb) command.push("--mysqlx=OFF");
    return { command };
  }

  /** Makes a folder beside and renames it: a run that is killed here leaves no half-made data folder. */
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
      throw new Error(`MySQL's data folder could not be made by ${command[0]}:\n${lastLines(made.output)}`);
    }
    fs.renameSync(fresh, data);
  }

  return ownServer(folder, say, {
    name: "MySQL",
    portCount: 1,
    main: /(mysqld|mariadbd) .*--port=/,
    url: (port) => `mysql://pointservice:pointservice@127.0.0.1:${port}/pointservice`,
    answers: answersMysql,
    prepare,
  });
}

/** RabbitMQ with its default user `guest` and an epmd of its own: the machine's, if any, is not touched. */
export function rabbitmqServer(options: ServerOptions): Server {
  const folder = makeFolder(options.folder);

  async function prepare([port, distribution, epmd]: number[]) {
    const script = need(findRabbitmq(), "rabbitmq-server");
    // A folder for each version: RabbitMQ refuses upgrades that skip versions, and the broker's data is disposable.
    const version = /rabbitmq[^/]*[-_/](\d+\.\d+)/.exec(fs.realpathSync(script))?.[1] ?? "unknown";
    const base = join(folder, `rabbitmq-${version}`);
    fs.mkdirSync(join(base, "home"), { recursive: true });
    const config = `listeners.tcp.1 = 127.0.0.1:${port}\ndisk_free_limit.absolute = 50MB\n`;
    fs.writeFileSync(join(base, "rabbitmq.conf"), config);
    fs.writeFileSync(join(base, "enabled_plugins"), "[].\n");
    fs.writeFileSync(join(base, "env.conf"), "");
    const env = {
      HOME: join(base, "home"),
      // Constant, as the data is kept under this name. It clashes with no other node: each has its own epmd.
      RABBITMQ_NODENAME: "pointservice@localhost",
      RABBITMQ_DIST_PORT: String(distribution),
      ERL_EPMD_PORT: String(epmd),
      ERL_EPMD_ADDRESS: "127.0.0.1",
      RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS: "-kernel inet_dist_use_interface {127,0,0,1}",
      RABBITMQ_MNESIA_BASE: join(base, "data"),
      RABBITMQ_LOG_BASE: join(base, "log"),
      RABBITMQ_LOGS: "-",
      RABBITMQ_PID_FILE: join(base, "rabbitmq.pid"),
      RABBITMQ_ENABLED_PLUGINS_FILE: join(base, "enabled_plugins"),
      RABBITMQ_CONFIG_FILE: join(base, "rabbitmq.conf"),
      // These would otherwise be the machine's, in /etc/rabbitmq, which are meant for the machine's own server.
      RABBITMQ_CONF_ENV_FILE: join(base, "env.conf"),
      RABBITMQ_ADVANCED_CONFIG_FILE: join(base, "advanced.config"),
      RABBITMQ_CONFIG_FILES: join(base, "conf.d"),
    };
    return { command: [script], env };
  }

  return ownServer(folder, options.say, {
    name: "RabbitMQ",
    portCount: 3,
    main: / -s rabbit boot /,
    url: (port) => `amqp://guest:guest@127.0.0.1:${port}`,
    answers: answersAmqp,
    prepare,
  });
}

function ownServer(folder: string, say: (line: string) => void, recipe: Recipe): Server {
  const { name } = recipe;
  const mark = markOf(folder, name);
  const recordFile = join(folder, `${name.toLowerCase()}.json`);
  const logFile = join(folder, "log", `${name.toLowerCase()}.log`);

  function record(): { ports: number[]; stopping?: true } {
    return readJson(recordFile) ?? { ports: [] };
  }

  function pid(): number | undefined {
    return processesMarked(mark).find(({ command }) => recipe.main.test(command))?.pid;
  }

  async function answers(): Promise<boolean> {
    const [port] = record().ports;
    return port !== undefined && pid() !== undefined && (await recipe.answers(port));
  }

  async function start(signal?: AbortSignal): Promise<void> {
    // A run that was killed while it stopped the server: that may answer once more, and then be gone.
    if (record().stopping) await stop();
    for (let triesLeft = 2; ; triesLeft--) {
      const foreign = pid() !== undefined;
      const ended = foreign ? () => pid() === undefined : await launch(signal);
      const outcome = await whileSaying(`waiting for ${name}`, say, () => untilReady(ended, signal));
      if (outcome === "ready") return;
      await stop("SIGKILL");
      signal?.throwIfAborted();
      const { ports } = record();
      const portTaken = String(await freePorts(recipe.portCount, ports)) !== String(ports);
      if (triesLeft > 0 && outcome === "ended" && (foreign || portTaken)) continue;
      const what =
        outcome === "ended" ? "ended while it started" : `did not serve within ${READY_WITHIN_MS / 1000} s`;
      throw new Error(
        `${name} ${what}; the end of ${logFile}:\n${lastLines(fs.readFileSync(logFile, "utf8"))}`,
      );
    }
  }

  /** @returns whether the process has ended */
  async function launch(signal?: AbortSignal): Promise<() => boolean> {
    await stop("SIGKILL"); // helpers of a server that died, or that was never seen to start
    const ports = await freePorts(recipe.portCount, record().ports);
    writeJson(recordFile, { ports });
    const { command, env } = await recipe.prepare(ports, signal);
    signal?.throwIfAborted();
    const [file = "", ...args] = command;
    const log = fs.openSync(logFile, "w");
    // A session of its own, so that a Ctrl-C at the terminal does not reach it.
    const child = spawn(file, args, {
      detached: true,
      cwd: folder,
      env: { ...serverEnv(), ...env, [MARK]: mark },
      stdio: ["ignore", log, log],
    });
    fs.closeSync(log);
    let ended = false;
    child.once("exit", () => {
      ended = true;
    });
    child.once("error", (error) => {
      fs.appendFileSync(logFile, `${error.message}\n`);
      ended = true;
    });
    child.unref();
    return () => ended;
  }

  async function untilReady(ended: () => boolean, signal?: AbortSignal): Promise<"ready" | "ended" | "late"> {
    const giveUpAt = Date.now() + READY_WITHIN_MS;
    while (Date.now() < giveUpAt && !signal?.aborted) {
      if (ended()) return "ended";
      if (await answers()) return "ready";
      await sleep(100);
    }
    return "late";
  }

  async function stop(by: "SIGTERM" | "SIGKILL" = "SIGTERM"): Promise<void> {
    if (processesMarked(mark).length === 0) return;
    const { ports } = record();
    writeJson(recordFile, { ports, stopping: true });
    const main = pid();
    if (by === "SIGTERM" && main !== undefined) {
      kill(main, "SIGTERM");
      const giveUpAt = Date.now() + STOP_WITHIN_MS;
      while (Date.now() < giveUpAt && !hasEnded(main)) await sleep(50);
    }
    // What is left has nothing to save: epmd and the Erlang machine's helpers. Again, as they may just be forking.
    const killed = new Set(main === undefined ? [] : [main]);
    for (let left = processesMarked(mark); left.length > 0; left = processesMarked(mark)) {
      for (const { pid } of left) {
        killed.add(pid);
        kill(pid, "SIGKILL");
      }
      await sleep(20);
    }
    // A process loses its environment, by which we find it, before it lets go of its ports and files.
    while (![...killed].every(hasEnded)) await sleep(20);
    writeJson(recordFile, { ports });
  }

  return {
    get url() {
      return recipe.url(record().ports[0] ?? 0);
    },
    start,
    stop,
    pid,
    answers,
  };
}

/** Whether a server with our database and user serves there. */
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

/** Says hello in AMQP 0-9-1; a broker answers with a method frame (type 1), connection.start. */
export function answersAmqp(port: number): Promise<boolean> {
  const { promise, resolve } = Promise.withResolvers<boolean>();
  const socket = connect({ host: "127.0.0.1", port }, () => socket.write("AMQP\x00\x00\x09\x01"));
  socket.setTimeout(2_000, () => resolve(false));
  socket.once("data", (data) => resolve(data[0] === 1));
  socket.once("error", () => resolve(false));
  socket.once("close", () => resolve(false));
  return promise.finally(() => socket.destroy());
}

/** Both servers' programs on this machine; undefined if one is missing. */
export function findServerBinaries(): { mysqld: string; rabbitmq: string } | undefined {
  const mysqld = findMysqld();
  const rabbitmq = findRabbitmq();
  return mysqld && rabbitmq ? { mysqld, rabbitmq } : undefined;
}

/** Path of `mysqld` or `mariadbd`. */
export function findMysqld(): string | undefined {
  return findExecutable(["mysqld", "mariadbd"], binaryFolders());
}

/** Path of RabbitMQ's own script: the wrapper that Debian puts into /usr/sbin changes to another user. */
export function findRabbitmq(): string | undefined {
  const scripts = fs.globSync(["/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin", "/opt/rabbitmq*/sbin"]);
  return findExecutable(["rabbitmq-server"], [...scripts, ...binaryFolders()]);
}

function binaryFolders(): string[] {
  const homebrew = fs.globSync([
    "/opt/homebrew/opt/{mysql,mariadb}*/bin",
    "/usr/local/opt/{mysql,mariadb}*/bin",
  ]);
  const usual = ["/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin", "/usr/local/mysql/bin"];
  const path = (process.env.PATH ?? "").split(delimiter).filter(Boolean);
  return [...path, ...usual, "/opt/homebrew/sbin", "/opt/homebrew/bin", ...homebrew];
}

function findExecutable(names: string[], folders: string[]): string | undefined {
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

function need(path: string | undefined, what: string): string {
  if (path === undefined) throw new Error(`Cannot start private servers without ${what} on this machine`);
  return path;
}

/** Only what a server needs: settings of ours or of the user's (MYSQL_…, RABBITMQ_…, ERL_…) must not reach it. */
function serverEnv(): Record<string, string> {
  return { PATH: binaryFolders().join(delimiter), HOME: process.env.HOME ?? "/", LANG: "C.UTF-8" };
}

/**
 * Ports of 127.0.0.1 that are free: those of `wanted` where they are, else others.
 *
 * They lie below the range of outgoing connections (from 32768 on Linux): one of those, even that of a client which tries
 * to reach the stopped server, could otherwise sit on a server's port when it comes back.
 */
export async function freePorts(count: number, wanted: number[] = []): Promise<number[]> {
  const ports: number[] = [];
  for (let i = 0; i < count; i++) {
    let port = wanted[i];
    while (port === undefined || ports.includes(port) || !(await isFree(port))) {
      port = 20_000 + Math.floor(Math.random() * 12_000);
    }
    ports.push(port);
  }
  return ports;
}

function isFree(port: number): Promise<boolean> {
  const { promise, resolve } = Promise.withResolvers<boolean>();
  const server = createServer();
  server.once("error", () => resolve(false));
  server.listen({ host: "127.0.0.1", port, exclusive: true }, () => server.close(() => resolve(true)));
  return promise;
}

function makeFolder(path: string): string {
  fs.mkdirSync(join(path, "log"), { recursive: true, mode: 0o700 });
  return fs.realpathSync(path);
}

function markOf(folder: string, name: string): string {
  return `${folder}:${name}`;
}

function lastLines(text: string): string {
  return text.trimEnd().split("\n").slice(-20).join("\n");
}
