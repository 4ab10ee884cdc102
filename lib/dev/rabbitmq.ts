/** RabbitMQ as a private server. */
import * as fs from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import { findRabbitmq, need } from "./binaries.ts";
import type { Recipe } from "./recipe.ts";

/**
 * RabbitMQ with its default user `guest` and its own epmd: it does not use that of the machine. `folder` must exist, with its
 * real path.
 */
export function rabbitmqRecipe(folder: string): Recipe {
  async function prepare([port, distribution, epmd]: number[]) {
    const script = need(findRabbitmq(), "rabbitmq-server");
    // One folder per version: RabbitMQ refuses upgrades that skip versions, and the broker's data is disposable.
    const version = /rabbitmq[^/]*[-_/](\d+\.\d+)/.exec(fs.realpathSync(script))?.[1] ?? "unknown";
    const base = join(folder, `rabbitmq-${version}`);
    fs.mkdirSync(join(base, "home"), { recursive: true });
    const config = `listeners.tcp.1 = 127.0.0.1:${port}\ndisk_free_limit.absolute = 50MB\n`;
    fs.writeFileSync(join(base, "rabbitmq.conf"), config);
    fs.writeFileSync(join(base, "enabled_plugins"), "[].\n");
    fs.writeFileSync(join(base, "env.conf"), "");
    const env = {
      HOME: join(base, "home"),
      // Constant, since the data is stored under this name. It conflicts with no other node: each has its own epmd.
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
      // Otherwise RabbitMQ would read the files of the machine's own server in /etc/rabbitmq.
      RABBITMQ_CONF_ENV_FILE: join(base, "env.conf"),
      RABBITMQ_ADVANCED_CONFIG_FILE: join(base, "advanced.config"),
      RABBITMQ_CONFIG_FILES: join(base, "conf.d"),
    };
    return { command: [script], env };
  }

  return {
    name: "RabbitMQ",
    portCount: 3,
    main: / -s rabbit boot /,
    url: (port) => `amqp://guest:guest@127.0.0.1:${port}`,
    answers: answersAmqp,
    prepare,
  };
}

/** Sends the AMQP 0-9-1 header; a broker answers with a method frame (type 1), connection.start. */
export function answersAmqp(port: number): Promise<boolean> {
  const { promise, resolve } = Promise.withResolvers<boolean>();
  const socket = connect({ host: "127.0.0.1", port }, () => socket.write("AMQP\x00\x00\x09\x01"));
  socket.setTimeout(2_000, () => resolve(false));
  socket.once("data", (data) => resolve(data[0] === 1));
  socket.once("error", () => resolve(false));
  socket.once("close", () => resolve(false));
  return promise.finally(() => socket.destroy());
}
