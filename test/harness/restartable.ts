import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { hasEnded, kill, runCommand } from "../../lib/dev/processes.ts";
import { findServerBinaries, startPrivateServers } from "../../lib/dev/servers.ts";
import { AMQP_URL, DATABASE_URL, until } from "./harness.ts";
import { listenerOf } from "./listener.ts";

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

const START_MS = 120_000;

function openGiven(command: string): Restartable {
  // The command may start both: never twice at once.
  let starting: Promise<void> = Promise.resolve();
  async function startNow(url: string) {
    if (listenerOf(url) !== undefined) return;
    const { code, output } = await runCommand(["bash", "-c", command], { timeoutMs: START_MS });
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
      await Promise.all([startNow(DATABASE_URL), startNow(AMQP_URL)]);
    },
  };
}

async function openPrivate(): Promise<Restartable> {
  const folder = await mkdtemp(join(tmpdir(), "pointservice-faults-"));
  const { mysql, rabbitmq, stop } = await startPrivateServers({ folder, say: () => {} });
  const serverOf = (name: KillableServer["name"], server: typeof mysql): KillableServer => ({
    name,
    kill: () => server.stop("SIGKILL"),
    start: () => server.start(),
  });
  return {
    databaseUrl: mysql.url,
    amqpUrl: rabbitmq.url,
    servers: [serverOf("MySQL", mysql), serverOf("RabbitMQ", rabbitmq)],
    async [Symbol.asyncDispose]() {
      await stop();
      await rm(folder, { recursive: true, force: true });
    },
  };
}
