/** `bun run services up|down|env|run`: finds MySQL and RabbitMQ, or starts them, and stops what it started. */
import { spawn } from "node:child_process";
import { existsSync, mkdirSync } from "node:fs";
import { constants } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { type Services, type ServicesOptions, servicesFolder } from "./clone.ts";
import { dockerAnswers, runningCompose, runningPorts, startCompose, stopCompose } from "./compose.ts";
import { install, mustInstall } from "./install.ts";
import { withLock } from "./lock.ts";
import { runningPrivate, startPrivate, stopPrivate } from "./private.ts";
import { kill } from "./processes.ts";
import { type Kind, readUsers, thisProcess, type User, writeUsers } from "./users.ts";

const RELEASE_WITHIN_MS = 60_000;

/**
 * Finds or starts MySQL and RabbitMQ, and registers this process as a user of what it started. The last user's
 * `release()` stops the servers, or says within a minute that they do not stop; a user that was killed no longer counts.
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
  async function release(): Promise<void> {
    released ??= underLock(unstoppable, leave);
    const late = sleep(RELEASE_WITHIN_MS, "late", { ref: false });
    if ((await Promise.race([released, late])) === "late") {
      options.say("MySQL and RabbitMQ do not stop; `bun run services down` tries again");
    }
  }
  options.say(`MySQL and RabbitMQ: ${services.origin}`);
  return { ...services, release };
}

/** Those that a clone's runs would use now, without starting any; undefined if there are none. */
export async function findRunning(options: ServicesOptions): Promise<Services | undefined> {
  const here = givenServices() ?? (await runningPrivate(servicesFolder(options)));
  return here ?? ((await dockerAnswers()) ? await runningCompose(options) : undefined);
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

function underLock<T>(options: ServicesOptions, work: () => Promise<T>): Promise<T> {
  const waiting = "waiting for another run that is starting or stopping the services";
  return withLock(join(servicesFolder(options), "lock.sqlite"), work, { ...options, waiting });
}

async function stop(kind: Kind, options: ServicesOptions): Promise<void> {
  await (kind === "docker" ? stopCompose(options) : stopPrivate(options));
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
    await services.release();
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
