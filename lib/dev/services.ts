/** Finds or starts MySQL and RabbitMQ, and stops started servers when their last user ends. */
import { existsSync, mkdirSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { type Services, type ServicesOptions, servicesFolder } from "./clone.ts";
import { dockerAnswers, runningCompose, runningPorts, startCompose, stopCompose } from "./compose.ts";
import { install, mustInstall } from "./install.ts";
import { withLock } from "./lock.ts";
import { runningPrivate, startPrivate, stopPrivate } from "./private.ts";
import { type Kind, readUsers, thisProcess, type User, writeUsers } from "./users.ts";

const RELEASE_WITHIN_MS = 60_000;

/**
 * Finds or starts MySQL and RabbitMQ, and registers this process as a user of the started servers. The last user's
 * `release()` stops the servers, or reports after a minute that they do not stop. A killed user no longer counts.
 *
 * @throws {Error} if no servers are found and none can be started; the message says what to do
 */
export async function acquireServices(
  options: ServicesOptions,
): Promise<Services & { release(): Promise<void> }> {
  return await acquireAs(thisProcess, options);
}

async function acquireAs(makeUser: (kind: Kind) => User, options: ServicesOptions) {
  const given = givenServices();
  if (given) return { ...given, release: async () => undefined };
  // Undo and release must finish even if the signal is their reason.
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
      options.say("MySQL and RabbitMQ do not stop; run `bun run services down` to try again");
    }
  }
  options.say(`MySQL and RabbitMQ: ${services.origin}`);
  return { ...services, release };
}

/** The running services that a run in this clone would use; undefined if there are none. Starts nothing. */
export async function findRunning(options: ServicesOptions): Promise<Services | undefined> {
  const here = givenServices() ?? (await runningPrivate(servicesFolder(options)));
  return here ?? ((await dockerAnswers()) ? await runningCompose(options) : undefined);
}

function givenServices(): Services | undefined {
  const { DATABASE_URL: databaseUrl, AMQP_URL: amqpUrl } = process.env;
  if (databaseUrl && amqpUrl) return { databaseUrl, amqpUrl, origin: "DATABASE_URL and AMQP_URL" };
  if (!databaseUrl && !amqpUrl) return undefined;
  const [set, missing] = databaseUrl ? ["DATABASE_URL", "AMQP_URL"] : ["AMQP_URL", "DATABASE_URL"];
  throw new Error(`${set} is set, but ${missing} is not: set both, or neither to find or start both servers`);
}

function underLock<T>(options: ServicesOptions, work: () => Promise<T>): Promise<T> {
  const waiting = "waiting for another run that starts or stops the services";
  return withLock(join(servicesFolder(options), "lock.sqlite"), work, { ...options, waiting });
}

async function stop(kind: Kind, options: ServicesOptions): Promise<void> {
  await (kind === "docker" ? stopCompose(options) : stopPrivate(options));
}

/** Finds or starts both servers, and leaves them running until `stopServices()`. */
export function keepServices(options: ServicesOptions): Promise<Services> {
  return acquireAs((kind) => ({ id: "up", kind, pid: 0, started: "" }), options);
}

/** Stops the servers of this clone, unless a process still uses them. */
export async function stopServices(options: ServicesOptions): Promise<void> {
  const folder = servicesFolder(options);
  if (!existsSync(folder)) return;
  await underLock(options, async () => {
    const users = readUsers(folder).filter(({ id }) => id !== "up");
    writeUsers(folder, users);
    if (users.length > 0) {
      const pids = users.map(({ pid }) => pid).join(", ");
      return options.say(
        `MySQL and RabbitMQ are still in use (process ids: ${pids}); they stop when the last of these processes ends`,
      );
    }
    await stop("private", options);
    if ((await dockerAnswers()) && (await runningPorts(options))) await stop("docker", options);
  });
}
