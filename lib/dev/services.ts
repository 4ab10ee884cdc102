/** `bun run services up|down|env|run`: finds MySQL and RabbitMQ, or starts them, and stops what it started. */
import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, realpathSync, rmSync, writeFileSync } from "node:fs";
import { constants } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import {
  type CommandResult,
  type Kind,
  kill,
  readUsers,
  runCommand,
  thisProcess,
  type User,
  whileSaying,
  withLock,
  writeUsers,
} from "./lock.ts";
import {
  answersAmqp,
  answersMysql,
  findMysqld,
  findRabbitmq,
  findServerBinaries,
  freePorts,
  mysqlServer,
  rabbitmqServer,
  startPrivateServers,
} from "./servers.ts";

/** Where MySQL and RabbitMQ are. */
export interface Services {
  databaseUrl: string;
  amqpUrl: string;
  /** For people: "DATABASE_URL and AMQP_URL", "docker compose", "private servers in .services". */
  origin: string;
}

/** Options for {@link acquireServices}. */
export interface ServicesOptions {
  /** Hears of every step that takes time. */
  say: (line: string) => void;
  /** Gives up: what was begun is undone, and the call rejects with the signal's reason. */
  signal?: AbortSignal | undefined;
  /** The clone whose services they are: docker-compose.yml is there, and `.services`. Default: this one. */
  root?: string | undefined;
}

const DOCKER_WITHIN_MS = 2_000;
const APT_WITHIN_MS = 5 * 60_000;
const RELEASE_WITHIN_MS = 60_000;
const POLICY_FILE = "/usr/sbin/policy-rc.d";
const POLICY =
  "#!/bin/sh\n# pointservice: no service starts while `bun run services` installs packages\nexit 101\n";

/**
 * Finds or starts MySQL and RabbitMQ, and registers this process as a user of what it started. The last user's
 * `release()` stops the servers; a user that was killed no longer counts.
 *
 * @throws Error saying what can be done, where nothing is found and nothing can be started
 */
export async function acquireServices(
  options: ServicesOptions,
): Promise<Services & { release(): Promise<void> }> {
  return await acquireAs(thisProcess, options);
}

async function acquireAs(makeUser: (kind: Kind) => User, options: ServicesOptions) {
  const given = givenServices();
  if (given) return { ...given, release: async () => undefined };
  // Undoing and releasing go to their end even where the signal is the reason for them.
  const unstoppable = { ...options, signal: undefined };
  const folder = servicesFolder(options);
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  const kind = readUsers(folder)[0]?.kind ?? ((await dockerAnswers()) ? "docker" : "private");
  if (kind === "private" && mustInstall()) await install(options);
  const user = makeUser(kind);
  const others = () => readUsers(folder).filter(({ id }) => id !== user.id);

  async function leave(): Promise<void> {
    writeUsers(folder, others());
    if (!others().some((other) => other.kind === kind)) await stop(kind, unstoppable);
  }
  const services = await underLock(options, async () => {
    writeUsers(folder, [...others(), user]);
    try {
      return await (kind === "docker" ? startCompose(options) : startPrivate(options));
    } catch (error) {
      await leave();
      throw error;
    }
  });
  let released: Promise<void> | undefined;
  function release(): Promise<void> {
    released ??= underLock(unstoppable, leave);
    return released;
  }
  options.say(`MySQL and RabbitMQ: ${services.origin}`);
  return { ...services, release };
}

function givenServices(): Services | undefined {
  const { DATABASE_URL: databaseUrl, AMQP_URL: amqpUrl } = process.env;
  if (databaseUrl && amqpUrl) return { databaseUrl, amqpUrl, origin: "DATABASE_URL and AMQP_URL" };
  if (!databaseUrl && !amqpUrl) return undefined;
  const [set, missing] = databaseUrl ? ["DATABASE_URL", "AMQP_URL"] : ["AMQP_URL", "DATABASE_URL"];
  throw new Error(
    `${set} is set, but ${missing} is not: set both, or neither to have both servers found or started`,
  );
}

function rootOf({ root }: ServicesOptions): string {
  return realpathSync(root ?? join(import.meta.dir, "../.."));
}

function servicesFolder(options: ServicesOptions): string {
  return join(rootOf(options), ".services");
}

function underLock<T>(options: ServicesOptions, work: () => Promise<T>): Promise<T> {
  const waiting = "waiting for another run that is starting or stopping the services";
  return withLock(join(servicesFolder(options), "lock.sqlite"), work, { ...options, waiting });
}

async function stop(kind: Kind, options: ServicesOptions): Promise<void> {
  if (kind === "docker") {
    options.say("stopping MySQL and RabbitMQ in docker compose");
    const stopped = await compose(["stop"], options);
    if (stopped.code !== 0) throw new Error(`docker compose stop failed:\n${stopped.output.trim()}`);
    return;
  }
  const server = { folder: servicesFolder(options), say: options.say };
  const servers = [mysqlServer(server), rabbitmqServer(server)];
  if (servers.some((each) => each.pid() !== undefined)) options.say("stopping MySQL and RabbitMQ");
  await Promise.all(servers.map((each) => each.stop()));
}

async function startPrivate(options: ServicesOptions): Promise<Services> {
  const folder = servicesFolder(options);
  if (!(await runningPrivate(folder))) options.say("starting MySQL and RabbitMQ in .services");
  const { mysql, rabbitmq } = await startPrivateServers({ ...options, folder });
  return { databaseUrl: mysql.url, amqpUrl: rabbitmq.url, origin: "private servers in .services" };
}

async function runningPrivate(folder: string): Promise<Services | undefined> {
  if (!existsSync(folder)) return undefined;
  const server = { folder, say: () => undefined };
  const [mysql, rabbitmq] = [mysqlServer(server), rabbitmqServer(server)];
  if (!(await mysql.answers()) || !(await rabbitmq.answers())) return undefined;
  return { databaseUrl: mysql.url, amqpUrl: rabbitmq.url, origin: "private servers in .services" };
}

/** Whether there is an engine and a compose plugin. A client without an engine may hang: it gets 2 s. */
async function dockerAnswers(): Promise<boolean> {
  const options = { timeoutMs: DOCKER_WITHIN_MS };
  const [engine, plugin] = await Promise.all([
    runCommand(["docker", "info", "--format", "{{.ServerVersion}}"], options),
    runCommand(["docker", "compose", "version"], options),
  ]);
  return engine.code === 0 && engine.stdout.trim() !== "" && plugin.code === 0;
}

async function compose(
  args: string[],
  options: ServicesOptions,
  env: Record<string, string> = {},
): Promise<CommandResult> {
  const root = rootOf(options);
  // A project for each clone: by default it is named after the folder, and clones' folders often have the same name.
  const project = `pointservice-${createHash("sha256").update(root).digest("hex").slice(0, 8)}`;
  return await runCommand(["docker", "compose", ...args], {
    cwd: root,
    env: { COMPOSE_PROJECT_NAME: project, ...process.env, ...env },
    signal: options.signal,
    abortWith: "SIGINT",
  });
}

async function startCompose(options: ServicesOptions): Promise<Services> {
  const { say, signal } = options;
  // The settings of docker-compose.yml with their defaults. Another clone may have taken those ports.
  const wanted = { MYSQL_PORT: 13306, AMQP_PORT: 13672, MANAGEMENT_PORT: 13673 };
  const running = await runningPorts(options);
  const free = running ? [] : await freePorts(3, Object.values(wanted));
  const ports = Object.keys(wanted).map((name, i) => [
    name,
    process.env[name] || String((running ?? free)[i]),
  ]);
  const up = ["up", "--wait", "mysql", "rabbitmq"];
  if (!running) say("starting MySQL and RabbitMQ with docker compose (the first time it downloads them)");
  const started = await whileSaying("waiting for docker compose up", say, () =>
    compose(up, options, Object.fromEntries(ports)),
  );
  signal?.throwIfAborted();
  if (started.code !== 0) throw new Error(`docker compose ${up.join(" ")} failed:\n${started.output.trim()}`);
  const services = await runningCompose(options);
  if (!services)
    throw new Error("docker compose started MySQL and RabbitMQ, but they do not answer on 127.0.0.1");
  return services;
}

/** The ports of 127.0.0.1 at which the clone's containers listen, in the order of the settings. */
async function runningPorts(options: ServicesOptions): Promise<number[] | undefined> {
  const ports = [];
  for (const [service, port] of [
    ["mysql", "3306"],
    ["rabbitmq", "5672"],
    ["rabbitmq", "15672"],
  ] as const) {
    const shown = await compose(["port", service, port], options);
    ports.push(shown.code === 0 ? Number(/:(\d+)\s*$/.exec(shown.stdout)?.[1] ?? 0) : 0);
  }
  return ports.every((port) => port > 0) ? ports : undefined;
}

async function runningCompose(options: ServicesOptions): Promise<Services | undefined> {
  const [mysql = 0, amqp = 0] = (await runningPorts(options)) ?? [];
  if (!mysql || !(await answersMysql(mysql)) || !(await answersAmqp(amqp))) return undefined;
  return {
    // root, as its user `pointservice` may not create databases.
    databaseUrl: `mysql://root:pointservice@127.0.0.1:${mysql}/pointservice`,
    amqpUrl: `amqp://pointservice:pointservice@127.0.0.1:${amqp}`,
    origin: "docker compose",
  };
}

/** Also where a run was killed in the midst of it: the policy file must go, once apt-get is through. */
function mustInstall(): boolean {
  return !findServerBinaries() || (process.getuid?.() === 0 && isOurPolicy());
}

/** Installs what is missing, as root of Debian or Ubuntu, without starting any service of the machine. */
async function install({ say, signal }: ServicesOptions): Promise<void> {
  const missing = [findMysqld() ? "" : "mysqld or mariadbd", findRabbitmq() ? "" : "rabbitmq-server"];
  if (process.getuid?.() !== 0 || !Bun.which("apt-get")) {
    throw new Error(`No DATABASE_URL and AMQP_URL, no Docker engine with the compose plugin, and no ${missing.filter(Boolean).join(", no ")} on this machine. One of these helps:
  - set DATABASE_URL=mysql://user:password@host:3306/database and AMQP_URL=amqp://user:password@host:5672
  - start Docker
  - install mysqld or mariadbd, and rabbitmq-server (root of Debian or Ubuntu has it done; macOS: brew install mariadb rabbitmq)`);
  }
  say("no Docker engine, and not both servers on this machine: installing MariaDB and RabbitMQ with apt-get");
  // One at a time on the whole machine, or one run would take away the policy file that another still needs.
  await withLock(
    "/run/pointservice-install.sqlite",
    async () => {
      if (mustInstall()) await installPackages({ say, signal });
    },
    {
      say,
      signal,
      waiting: "waiting for another run that is installing them",
      deadlineMs: 2 * APT_WITHIN_MS,
    },
  );
  if (!findServerBinaries())
    throw new Error("apt-get is done, but mysqld or rabbitmq-server is still not to be found");
}

async function installPackages({ say, signal }: ServicesOptions): Promise<void> {
  const giveUpAt = Date.now() + APT_WITHIN_MS;
  async function apt(args: string[]): Promise<CommandResult> {
    const command = [
      "apt-get",
      "-y",
      "-q",
      "-o",
      "DPkg::Lock::Timeout=60",
      "-o",
      "Acquire::Retries=3",
      ...args,
    ];
    const env = { ...process.env, DEBIAN_FRONTEND: "noninteractive", LC_ALL: "C" };
    for (;;) {
      // On SIGINT apt-get finishes the package in hand: killed, it would leave a half-installed one.
      const result = await runCommand(command, { env, signal, abortWith: "SIGINT" });
      signal?.throwIfAborted();
      const locked = /could not get lock|unable to (lock|acquire)/i.test(result.output);
      if (result.code === 0 || !locked || Date.now() > giveUpAt) return result;
      await sleep(2_000);
    }
  }
  const updated = await whileSaying("still updating the package lists", say, () => apt(["update"]));
  const packages: string[] = [];
  if (!findMysqld()) packages.push(...(await mysqlPackages()));
  const newRabbitmq = !findRabbitmq();
  if (newRabbitmq) packages.push("rabbitmq-server");
  say(["apt-get install", ...packages].join(" "));

  const ours = writePolicy();
  try {
    const done = await whileSaying("still installing", say, () =>
      apt(["install", "--no-install-recommends", ...packages]),
    );
    if (done.code !== 0) {
      const output = updated.code === 0 ? done.output : `${updated.output}\n${done.output}`;
      throw new Error(`apt-get install failed:\n${output.trim().split("\n").slice(-20).join("\n")}`);
    }
  } finally {
    if (ours) rmSync(POLICY_FILE, { force: true });
  }
  // The package has enabled its service, which would run from the next boot on.
  if (newRabbitmq && Bun.which("systemctl")) await runCommand(["systemctl", "disable", "rabbitmq-server"]);
}

/** The server without its service, and what `mariadb-install-db` needs; older releases have the version in the name. */
async function mysqlPackages(): Promise<string[]> {
  for (const version of ["", "-10.6", "-10.5"]) {
    const packages = [`mariadb-server-core${version}`, `mariadb-client-core${version}`];
    if ((await runCommand(["apt-cache", "madison", ...packages])).stdout.trim() !== "") return packages;
  }
  return ["mysql-server-core"];
}

/** Forbids packages to start their services (see invoke-rc.d(8)). @returns whether the file is ours to remove */
function writePolicy(): boolean {
  try {
    writeFileSync(POLICY_FILE, POLICY, { flag: "wx", mode: 0o755 });
    return true;
  } catch {
    return isOurPolicy();
  }
}

function isOurPolicy(): boolean {
  return existsSync(POLICY_FILE) && readFileSync(POLICY_FILE, "utf8") === POLICY;
}

/** Those that a clone's runs would use now, without starting any; undefined if there are none. */
export async function findRunning(options: ServicesOptions): Promise<Services | undefined> {
  const here = givenServices() ?? (await runningPrivate(servicesFolder(options)));
  return here ?? ((await dockerAnswers()) ? await runningCompose(options) : undefined);
}

async function up(options: ServicesOptions): Promise<number> {
  print(await acquireAs((kind) => ({ id: "up", kind, pid: 0, started: "" }), options));
  return 0;
}

async function down(options: ServicesOptions): Promise<number> {
  const folder = servicesFolder(options);
  if (!existsSync(folder)) return 0;
  await underLock(options, async () => {
    const users = readUsers(folder).filter(({ id }) => id !== "up");
    writeUsers(folder, users);
    if (users.length > 0) {
      const pids = users.map(({ pid }) => pid).join(", ");
      return options.say(`MySQL and RabbitMQ are still used by process ${pids}, which stops them at its end`);
    }
    await stop("private", options);
    if ((await dockerAnswers()) && (await runningPorts(options))) await stop("docker", options);
  });
  return 0;
}

async function env(options: ServicesOptions): Promise<number> {
  const services = await findRunning(options);
  if (!services)
    throw new Error("No MySQL and RabbitMQ of this clone are running; `bun run services up` starts them");
  print(services);
  return 0;
}

function print({ databaseUrl, amqpUrl }: Services): void {
  console.log(`DATABASE_URL=${databaseUrl}\nAMQP_URL=${amqpUrl}`);
}

/** Runs a command with the services in its environment. @returns its exit code */
async function run(
  command: string[],
  options: ServicesOptions,
  onInterrupt: (listener: (signal: NodeJS.Signals) => void) => void,
): Promise<number> {
  const services = await acquireServices(options);
  try {
    options.signal?.throwIfAborted();
    const [file = "", ...args] = command;
    // In a session of its own: a Ctrl-C at the terminal then reaches it once, through us, and not twice.
    const child = spawn(file === "bun" ? process.execPath : file, args, {
      detached: true,
      stdio: "inherit",
      env: { ...process.env, DATABASE_URL: services.databaseUrl, AMQP_URL: services.amqpUrl },
    });
    const { promise, resolve } = Promise.withResolvers<number>();
    child.once("error", (error) => {
      options.say(`Cannot run ${file}: ${error.message}`);
      resolve(127);
    });
    child.once("exit", (code, signal) => resolve(code ?? signalCode(signal)));
    onInterrupt((signal) => child.pid !== undefined && kill(-child.pid, signal));
    return await promise;
  } finally {
    const late = sleep(RELEASE_WITHIN_MS, "late", { ref: false });
    if ((await Promise.race([services.release(), late])) === "late") {
      options.say("MySQL and RabbitMQ do not stop; `bun run services down` tries again");
    }
  }
}

/** The exit code by which a shell tells that a signal ended a process. */
function signalCode(signal: NodeJS.Signals | null): number {
  return 128 + (signal ? constants.signals[signal] : 0);
}

/** The command. @returns its exit code */
async function main([subcommand, ...rest]: string[]): Promise<number> {
  const stopping = new AbortController();
  let interruptedBy: NodeJS.Signals | undefined;
  let listener = (_signal: NodeJS.Signals): unknown => undefined;
  function interrupt(signal: NodeJS.Signals): void {
    interruptedBy ??= signal;
    stopping.abort(new Error(`Stopped by ${signal}`));
    listener(signal);
  }
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) process.on(signal, () => interrupt(signal));
  const parent = process.ppid;
  // A parent that was killed cannot tell us; one that was interrupted may go before us, which is no second signal.
  const watch = setInterval(() => process.ppid !== parent && !interruptedBy && interrupt("SIGTERM"), 500);
  const options = { say: (line: string) => console.error(`services: ${line}`), signal: stopping.signal };
  try {
    if (subcommand === "up" && rest.length === 0) return await up(options);
    if (subcommand === "down" && rest.length === 0) return await down(options);
    if (subcommand === "env" && rest.length === 0) return await env(options);
    const command = rest[0] === "--" ? rest.slice(1) : rest;
    if (subcommand === "run" && command.length > 0) {
      return await run(command, options, (added) => {
        listener = added;
      });
    }
    console.error("Usage: bun run services up | down | env | run COMMAND…");
    return 2;
  } catch (error) {
    options.say(error instanceof Error ? error.message : String(error));
    return interruptedBy ? signalCode(interruptedBy) : 1;
  } finally {
    clearInterval(watch);
  }
}

if (import.meta.main) process.exit(await main(process.argv.slice(2)));
