import { hasEnded, kill, runCommand } from "../../lib/dev/processes.ts";
import { findServerBinaries, startPrivateServers } from "../../lib/dev/servers.ts";
import { AMQP_URL, DATABASE_URL, until } from "./harness.ts";
import { listenerOf } from "./listener.ts";
import { temporaryFolder } from "./temporary_folder.ts";

/** Whether there are servers that a test may kill. */
export const canRestart = Boolean(Bun.env.START_SERVICES || findServerBinaries());

export interface KillableServer {
  name: "MySQL" | "RabbitMQ";
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
  // The command may start both: never twice at once.
  let starting = Promise.resolve();
  async function startNow(url: string) {
    if (listenerOf(url) !== undefined) return;
    const { code, output } = await runCommand(["bash", "-c", command], { timeoutMs: 120_000 });
    if (code !== 0) throw new Error(`START_SERVICES ended with ${code}: ${output}`);
  }
  const serverOf = (name: KillableServer["name"], url: string): KillableServer => ({
    name,
    async kill() {
      const pid = listenerOf(url);
      if (pid === undefined)
        throw new Error(`Cannot kill ${name} as no process of this machine listens there`);
      kill(pid, "SIGKILL");
      await until(`${name} is gone`, () => hasEnded(pid) && listenerOf(url) === undefined);
    },
    start() {
      starting = starting.then(() => startNow(url));
      return starting;
    },
  });
  return {
    databaseUrl: DATABASE_URL,
    amqpUrl: AMQP_URL,
    servers: [serverOf("MySQL", DATABASE_URL), serverOf("RabbitMQ", AMQP_URL)],
    async [Symbol.asyncDispose]() {
      await startNow(DATABASE_URL);
      await startNow(AMQP_URL);
    },
  };
}

async function openPrivate(): Promise<Restartable> {
  const folder = await temporaryFolder();
  const { mysql, rabbitmq, stop } = await startPrivateServers({ folder: folder.path, say: () => {} });
  return {
    databaseUrl: mysql.url,
    amqpUrl: rabbitmq.url,
    servers: [
      { name: "MySQL", kill: () => mysql.stop("SIGKILL"), start: () => mysql.start() },
      { name: "RabbitMQ", kill: () => rabbitmq.stop("SIGKILL"), start: () => rabbitmq.start() },
    ],
    async [Symbol.asyncDispose]() {
      await stop();
      await folder[Symbol.asyncDispose]();
    },
  };
}
