/** MySQL and RabbitMQ of docker-compose.yml. */
import { createHash } from "node:crypto";
import { rootOf, type Services, type ServicesOptions } from "./clone.ts";
import { answersMysql } from "./mysql.ts";
import { type CommandResult, runCommand, whileSaying } from "./processes.ts";
import { answersAmqp } from "./rabbitmq.ts";
import { freePorts } from "./servers.ts";

const DOCKER_WITHIN_MS = 2_000;

/** Whether a Docker engine and the compose plugin are available. A client without an engine may hang: it gets 2 s. */
export async function dockerAnswers(): Promise<boolean> {
  const options = { timeoutMs: DOCKER_WITHIN_MS };
  const [engine, plugin] = await Promise.all([
    runCommand(["docker", "info", "--format", "{{.ServerVersion}}"], options),
    runCommand(["docker", "compose", "version"], options),
  ]);
  return engine.code === 0 && engine.stdout.trim() !== "" && plugin.code === 0;
}

/** Resolves when both servers are ready. Running containers keep their ports. */
export async function startCompose(options: ServicesOptions): Promise<Services> {
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
  if (!running) say("starting MySQL and RabbitMQ with docker compose (the first time, it downloads them)");
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

/** Stops the containers and keeps their data. */
export async function stopCompose(options: ServicesOptions): Promise<void> {
  options.say("stopping MySQL and RabbitMQ in docker compose");
  const stopped = await compose(["stop"], options);
  if (stopped.code !== 0) throw new Error(`docker compose stop failed:\n${stopped.output.trim()}`);
}

/** The services in the clone's containers; undefined if they are not ready. */
export async function runningCompose(options: ServicesOptions): Promise<Services | undefined> {
  const [mysql = 0, amqp = 0] = (await runningPorts(options)) ?? [];
  if (!mysql || !(await answersMysql(mysql)) || !(await answersAmqp(amqp))) return undefined;
  return {
    // As root, since the user `pointservice` cannot create databases.
    databaseUrl: `mysql://root:pointservice@127.0.0.1:${mysql}/pointservice`,
    amqpUrl: `amqp://pointservice:pointservice@127.0.0.1:${amqp}`,
    origin: "docker compose",
  };
}

/** The ports of the clone's containers on 127.0.0.1, in the order of the settings. */
export async function runningPorts(options: ServicesOptions): Promise<number[] | undefined> {
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

async function compose(
  args: string[],
  options: ServicesOptions,
  env: Record<string, string> = {},
): Promise<CommandResult> {
  const root = rootOf(options);
  // One project per clone: the default name is that of the folder, and the folders of clones often have the same name.
  const project = `pointservice-${createHash("sha256").update(root).digest("hex").slice(0, 8)}`;
  return await runCommand(["docker", "compose", ...args], {
    cwd: root,
    env: { COMPOSE_PROJECT_NAME: project, ...process.env, ...env },
    signal: options.signal,
    abortWith: "SIGINT",
  });
}
