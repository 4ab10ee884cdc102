/** MySQL and RabbitMQ as private servers in `.services`. */
import { existsSync } from "node:fs";
import { type Services, type ServicesOptions, servicesFolder } from "./clone.ts";
import { mysqlServer, rabbitmqServer, startPrivateServers } from "./servers.ts";

/** Resolves when both servers are ready. */
export async function startPrivate(options: ServicesOptions): Promise<Services> {
  const folder = servicesFolder(options);
  if (!(await runningPrivate(folder))) options.say("starting MySQL and RabbitMQ in .services");
  const { mysql, rabbitmq } = await startPrivateServers({ ...options, folder });
  return { databaseUrl: mysql.url, amqpUrl: rabbitmq.url, origin: "private servers in .services" };
}

/** Stops the running servers, and keeps their data. */
export async function stopPrivate(options: ServicesOptions): Promise<void> {
  const server = { folder: servicesFolder(options), say: options.say };
  const servers = [mysqlServer(server), rabbitmqServer(server)];
  if (servers.some((each) => each.pid() !== undefined)) options.say("stopping MySQL and RabbitMQ");
  await Promise.all(servers.map((each) => each.stop()));
}

/** The services in the folder; undefined if they are not ready. */
export async function runningPrivate(folder: string): Promise<Services | undefined> {
  if (!existsSync(folder)) return undefined;
  const server = { folder, say: () => undefined };
  const [mysql, rabbitmq] = [mysqlServer(server), rabbitmqServer(server)];
  if (!(await mysql.answers()) || !(await rabbitmq.answers())) return undefined;
  return { databaseUrl: mysql.url, amqpUrl: rabbitmq.url, origin: "private servers in .services" };
}
