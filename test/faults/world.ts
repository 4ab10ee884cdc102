import { readFileSync, readlinkSync } from "node:fs";
import { connect } from "amqplib";
import { runCommand } from "../../lib/dev/processes.ts";
import { createTestDatabase } from "../harness/database.ts";
import { uniqueName } from "../harness/harness.ts";
import { listenerOf } from "../harness/listener.ts";
import { deleteQueue } from "../harness/queue.ts";
import { openRestartable } from "../harness/restartable.ts";
import { openNode } from "./node.ts";

/** The processes under test, by their place in `World.nodes`. */
export const NODES = ["api", "api", "scheduler", "scheduler", "worker", "worker", "worker"] as const;

export type World = Awaited<ReturnType<typeof openWorld>>;

/** Small, so that a few hundred reservations a second are many messages and many transactions. */
const DEFAULTS = {
  LEASE_MS: "5000",
  SCAN_INTERVAL_MS: "2000",
  AGGREGATE_INTERVAL_MS: "5000",
  SCAN_BATCH: "200",
  PUBLISH_CHUNK: "20",
  WORKER_BATCH: "50",
  QUEUED_RESERVATIONS: "2000",
};
const READY_MS = 60_000;
const ALARM_MS = 20_000;

/** Starts servers, a database, a queue and the processes under test on them. */
export async function openWorld(settings: Record<string, string>) {
  const restartable = await openRestartable();
  const { databaseUrl, amqpUrl, servers } = restartable;
  const test = await createTestDatabase({ server: databaseUrl });
  const queueName = uniqueName("faults");
  const env = { ...DEFAULTS, ...settings, QUEUE: queueName };
  /** What a process did that none may do, whatever is broken around it. */
  const misdeeds: string[] = [];
  /** Contents of messages that a fault has taken away; they are sent again at the end. */
  const delayed: Buffer[] = [];
  const nodes = await Promise.all(
    NODES.map((entry, place) => {
      const name = `${entry}-${place - NODES.indexOf(entry) + 1}`;
      return openNode(entry, { name, env, urls: [test.url, amqpUrl], misdeeds });
    }),
  );
  const world = {
    test,
    queueName,
    servers,
    nodes,
    settings: { leaseMs: Number(env.LEASE_MS), scanMs: Number(env.SCAN_INTERVAL_MS) },
    misdeeds,
    delayed,
    /** The logs of all processes. */
    logs: () => nodes.flatMap((node) => node.logs()),
    /** Opens a channel as an operator has one, without our code. */
    async openChannel() {
      const connection = await connect(amqpUrl, { timeout: 2_000 });
      // Whoever uses it sees its calls fail.
      connection.on("error", () => {});
      const channel = await connection.createChannel();
      channel.on("error", () => {});
      return { channel, [Symbol.asyncDispose]: () => connection.close().catch(() => undefined) };
    },
    /** Switches RabbitMQ's memory alarm: nobody may publish while it is on. */
    setAlarm: (isOn: boolean) => setAlarm(amqpUrl, isOn),
    /** Mends every connection, and waits until every process runs in the ordinary way and is ready. */
    async heal(): Promise<void> {
      for (const node of nodes) {
        node.strike("SIGCONT");
        for (const proxy of [node.mysql, node.amqp, node.http]) proxy.slow();
      }
      const waiting = new Set(nodes);
      for (const end = performance.now() + READY_MS; waiting.size > 0; await Bun.sleep(50)) {
        for (const node of waiting) if (await node.isReady()) waiting.delete(node);
        if (performance.now() < end) continue;
        const names = Array.from(waiting, ({ name }) => name).join(", ");
        misdeeds.push(`Not ready within ${READY_MS} ms: ${names}`);
        return;
      }
    },
    async [Symbol.asyncDispose](): Promise<void> {
      await Promise.all(nodes.map((node) => node.stop()));
      await Promise.allSettled([deleteQueue(queueName, amqpUrl), test.drop()]);
      await restartable[Symbol.asyncDispose]();
    },
  };
  await world.heal();
  if (misdeeds.length === 0) return world;
  const log = world
    .logs()
    .slice(-20)
    .map((line) => JSON.stringify(line))
    .join("\n");
  await world[Symbol.asyncDispose]();
  throw new Error(`Cannot start: ${misdeeds.join("; ")}\n${log}`);
}

/** Uses the `rabbitmqctl` of the very server, as an operator does. Linux only. */
async function setAlarm(amqpUrl: string, isOn: boolean): Promise<void> {
  const pid = listenerOf(amqpUrl);
  if (pid === undefined) throw new Error("RabbitMQ does not run");
  const needed = /^(HOME|PATH|LANG|ERL_EPMD_\w+|RABBITMQ_(NODENAME|CONF_ENV_FILE|CONFIG_FILE|MNESIA_BASE))=/;
  const environment = readFileSync(`/proc/${pid}/environ`, "utf8").split("\0");
  // A server may live in a root folder of its own.
  const root = readlinkSync(`/proc/${pid}/root`);
  const ctl = 'exec "$(ls /usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmqctl | head -n 1)" "$@"';
  const inPlace = ["env", "-i", ...environment.filter((pair) => needed.test(pair)), "chroot", root];
  const { code, output } = await runCommand(
    [...inPlace, "sh", "-c", ctl, "sh", "set_vm_memory_high_watermark", isOn ? "0" : "0.4"],
    { timeoutMs: ALARM_MS },
  );
  if (code !== 0) throw new Error(`rabbitmqctl ended with ${code}: ${output}`);
}
