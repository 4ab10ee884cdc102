import { expect } from "bun:test";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { findServerBinaries, startPrivateServers } from "../lib/dev/servers.ts";
import { AMQP_URL, DATABASE_URL } from "./harness.ts";

/** Whether there are servers that a test may restart. */
export const canRestart = Boolean(Bun.env.RESTART_SERVICES || findServerBinaries());

export interface Restartable extends AsyncDisposable {
  databaseUrl: string;
  amqpUrl: string;
  restarts: { name: string; restart: () => Promise<void> }[];
}

/** Servers that may be restarted: those given where RESTART_SERVICES says how, else a private pair. */
export async function openRestartable(): Promise<Restartable> {
  const command = Bun.env.RESTART_SERVICES;
  if (command) {
    async function restart() {
      const child = Bun.spawn(["bash", "-c", command ?? ""], { stdout: "ignore", stderr: "inherit" });
      expect(await child.exited).toBe(0);
    }
    const restarts = [{ name: "MySQL and RabbitMQ", restart }];
    return { databaseUrl: DATABASE_URL, amqpUrl: AMQP_URL, restarts, async [Symbol.asyncDispose]() {} };
  }
  const folder = await mkdtemp(join(tmpdir(), "pointservice-faults-"));
  const servers = await startPrivateServers({ folder, say: () => {} });
  const restarts = [
    { name: "MySQL", server: servers.mysql },
    { name: "RabbitMQ", server: servers.rabbitmq },
  ].map(({ name, server }) => ({
    name,
    async restart() {
      await server.stop("SIGKILL");
      await server.start();
    },
  }));
  return {
    databaseUrl: servers.mysql.url,
    amqpUrl: servers.rabbitmq.url,
    restarts,
    async [Symbol.asyncDispose]() {
      await servers.stop();
      await rm(folder, { recursive: true, force: true });
    },
  };
}
