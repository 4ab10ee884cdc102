import { hasEnded, kill, runCommand } from "../../lib/dev/processes.ts";
import { findServerBinaries, startPrivateServers } from "../../lib/dev/servers.ts";
import { AMQP_URL, DATABASE_URL, until } from "./harness.ts";
import { environmentOf, listenerOf } from "./listener.ts";
import { temporaryFolder } from "./temporary_folder.ts";

/** How often START_SERVICES is tried: a server that recovers from a crash listens before it serves. */
const START_TRIES = 20;

/** Whether there are servers that a test may kill. */
export const canRestart = Boolean(Bun.env.START_SERVICES || findServerBinaries());

export interface KillableServer {
  name: "MySQL" | "RabbitMQ";
  /** Variables of its environment, in addition to the usual ones; heeded at each start. Only MySQL's are. */
  env: Record<string, string>;
  /** As `kill -9`; resolves when the process is gone. */
  kill(): Promise<void>;
  /** Resolves when it serves. */
  start(): Promise<void>;
}

export interface Restartable extends AsyncDisposable {
  databaseUrl: string;
  amqpUrl: string;
  servers: [mysql: KillableServer, rabbitmq: KillableServer];
}

/**
 * Servers that may be killed: those of DATABASE_URL and AMQP_URL if START_SERVICES is a command that starts what does not
 * run of them, else a private pair.
 */
export async function openRestartable(): Promise<Restartable> {
  const command = Bun.env.START_SERVICES;
  return command ? openGiven(command) : openPrivate();
}

function openGiven(command: string): Restartable {
  // The command may start both: never twice at once, and neither is killed meanwhile.
  let before: Promise<unknown> = Promise.resolve();
  function inTurn(work: () => Promise<void>): Promise<void> {
    const done = before.then(work);
    before = done.catch(() => undefined);
    return done;
  }
  async function killNow(name: string, url: string) {
    const pid = listenerOf(url);
    if (pid === undefined) throw new Error(`Cannot kill ${name} as no process of this machine listens there`);
    kill(pid, "SIGKILL");
    await until(`${name} is gone`, () => hasEnded(pid) && listenerOf(url) === undefined);
  }
  async function startNow(url: string, added: Record<string, string>) {
    if (listenerOf(url) !== undefined) return;
    const env = { ...process.env, ...added };
    const run = () => runCommand(["bash", "-c", command], { env, timeoutMs: 120_000 });
    let result = await run();
    // It may have asked a server that was not quite ready.
    for (let tries = 1; result.code !== 0 && tries < START_TRIES; tries++) {
      await Bun.sleep(1_000);
      result = await run();
    }
    if (result.code !== 0) throw new Error(`START_SERVICES ended with ${result.code}: ${result.output}`);
  }
  function serverOf(name: KillableServer["name"], url: string, other: string): KillableServer {
    const env: Record<string, string> = {};
    return {
      name,
      env,
      kill: () => inTurn(() => killNow(name, url)),
      start: () =>
        inTurn(async () => {
          // The command may start both, and this environment is for one.
          await startNow(url, listenerOf(other) === undefined ? {} : env);
          if (hasEnvironment(url, env)) return;
          await killNow(name, url);
          await startNow(url, env);
        }),
    };
  }
  return {
    databaseUrl: DATABASE_URL,
    amqpUrl: AMQP_URL,
    servers: [serverOf("MySQL", DATABASE_URL, AMQP_URL), serverOf("RabbitMQ", AMQP_URL, DATABASE_URL)],
    async [Symbol.asyncDispose]() {
      await startNow(DATABASE_URL, {});
      await startNow(AMQP_URL, {});
    },
  };
}

function hasEnvironment(url: string, env: Record<string, string>): boolean {
  const found = environmentOf(listenerOf(url));
  return Object.entries(env).every(([name, value]) => found.includes(`${name}=${value}`));
}

async function openPrivate(): Promise<Restartable> {
  const folder = await temporaryFolder();
  const mysqlEnv: Record<string, string> = {};
  const pair = await startPrivateServers({ folder: folder.path, say: () => {}, mysqlEnv });
  const { mysql, rabbitmq, stop } = pair;
  return {
    databaseUrl: mysql.url,
    amqpUrl: rabbitmq.url,
    servers: [
      { name: "MySQL", env: mysqlEnv, kill: () => mysql.stop("SIGKILL"), start: () => mysql.start() },
      { name: "RabbitMQ", env: {}, kill: () => rabbitmq.stop("SIGKILL"), start: () => rabbitmq.start() },
    ],
    async [Symbol.asyncDispose]() {
      await stop();
      await folder[Symbol.asyncDispose]();
    },
  };
}
