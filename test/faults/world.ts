import { readFileSync, readlinkSync } from "node:fs";
import { join } from "node:path";
import { connect } from "amqplib";
import { kill, runCommand } from "../../lib/dev/processes.ts";
import { freePorts } from "../../lib/dev/servers.ts";
import { withDeadline } from "../../lib/loop.ts";
import { createTestDatabase } from "../harness/database.ts";
import { uniqueName } from "../harness/harness.ts";
import { listenerOf } from "../harness/listener.ts";
import { type RunningService, startService } from "../harness/processes.ts";
import { startProxy, type TcpProxy } from "../harness/proxy.ts";
import { deleteQueue } from "../harness/queue.ts";
import { openRestartable } from "../harness/restartable.ts";

/** The processes under test, by their place in `World.nodes`. */
export const NODES = ["api", "api", "scheduler", "scheduler", "worker", "worker", "worker"] as const;
export type Entry = (typeof NODES)[number];

/** What makes one life of a process different from an ordinary one. */
export interface WayOfRunning {
  clockOffMs?: number;
  timeZone?: string;
}

/** One process under test, across all its lives. It reaches its servers only through proxies of its own. */
export interface Node {
  name: string;
  entry: Entry;
  mysql: TcpProxy;
  amqp: TcpProxy;
  /** What clients of an API talk to. */
  http: TcpProxy;
  /** Sends a signal. If it ends the process, the next life begins after `backInMs` and runs in that `way`. */
  strike(signal: NodeJS.Signals, next?: { backInMs?: number; way?: WayOfRunning | undefined }): void;
  /** Its process now; undefined between two lives. */
  service(): RunningService | undefined;
  /** Whether it says that it can do its work now. */
  isReady(): Promise<boolean>;
  /** Reports a misdeed if this life has logged more confirmed messages than it sent. */
  checkConfirmed(): void;
}

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
const PUBLISH = "basic.publish";
const ENDS_WITHIN_MS = 10_000;
const READY_MS = 60_000;
const ALARM_MS = 20_000;

/** Starts servers, a database, a queue and the processes under test on them; a process that dies is started again. */
export async function openWorld(settings: Record<string, string>) {
  const restartable = await openRestartable();
  const test = await createTestDatabase({ server: restartable.databaseUrl });
  const queueName = uniqueName("faults");
  const env = { ...DEFAULTS, ...settings, QUEUE: queueName };
  /** What a process did that none may do, whatever is broken around it. */
  const misdeeds: string[] = [];
  /** Contents of messages that a fault has taken away; they are sent again at the end. */
  const delayed: Buffer[] = [];
  const logs: Record<string, unknown>[] = [];
  let isClosing = false;

  async function openNode(entry: Entry, place: number): Promise<Node & { stop(): Promise<void> }> {
    const name = `${entry}-${place - NODES.indexOf(entry) + 1}`;
    const [port = 0] = await freePorts(1);
    const [mysql, amqp, http] = await Promise.all([
      startProxy(test.url),
      startProxy(restartable.amqpUrl),
      startProxy(`http://127.0.0.1:${port}`),
    ]);
    let service: RunningService | undefined;
    let next: { backInMs?: number; way?: WayOfRunning | undefined } = {};
    /** The signals that this life was sent. */
    let signals: NodeJS.Signals[] = [];
    let passedBefore = 0;

    function checkConfirmed() {
      const confirmed = service?.log().reduce((sum, line) => sum + Number(line.confirmed ?? 0), 0) ?? 0;
      const passed = amqp.passed(PUBLISH) - passedBefore;
      if (confirmed > passed)
        misdeeds.push(`${name} logged ${confirmed} confirmed messages, but sent ${passed}`);
    }

    async function live() {
      while (!isClosing) {
        const { clockOffMs = 0, timeZone } = next.way ?? {};
        next = {};
        signals = [];
        passedBefore = amqp.passed(PUBLISH);
        const urls = { DATABASE_URL: mysql.url, AMQP_URL: amqp.url, PORT: String(port) };
        const way = { CLOCK_OFF_MS: String(clockOffMs), ...(timeZone && { TZ: timeZone }) };
        const bunArgs = clockOffMs === 0 ? [] : ["--preload", join(import.meta.dir, "clock.ts")];
        service = await startService(entry, { ...env, ...urls, ...way }, { waitForPort: false, bunArgs });
        const code = await service.exited;
        const log = service.log();
        logs.push(...log);
        checkConfirmed();
        service = undefined;
        if (isClosing) return;
        const isExpected =
          signals.includes("SIGKILL") || (signals.includes("SIGTERM") && (code === 0 || log.length === 0));
        const cause = signals.join(" and ") || "no signal";
        if (!isExpected)
          misdeeds.push(`${name} ended with ${code} after ${cause}: ${JSON.stringify(log.at(-1))}`);
        await Bun.sleep(next.backInMs ?? 0);
      }
    }
    const living = live();

    return {
      name,
      entry,
      mysql,
      amqp,
      http,
      service: () => service,
      checkConfirmed,
      async isReady() {
        const url = service?.log().find((line) => typeof line.url === "string")?.url;
        if (!url) return false;
        const asking = fetch(`${url}ready`, { signal: AbortSignal.timeout(3_000) });
        return (await asking.catch(() => undefined))?.status === 200;
      },
      strike(signal, after = {}) {
        // A second SIGTERM ends a process at once, by design; and a stopped process cannot end in time.
        const isEnding = signals.includes("SIGTERM");
        if (!service || (isEnding && (signal === "SIGTERM" || signal === "SIGSTOP"))) return;
        signals.push(signal);
        if (signal === "SIGKILL" || signal === "SIGTERM") next = after;
        const { pid, exited } = service;
        kill(pid, signal);
        if (signal !== "SIGTERM") return;
        withDeadline(exited, ENDS_WITHIN_MS, () => new Error("late")).catch(() => {
          misdeeds.push(`${name} did not end within ${ENDS_WITHIN_MS} ms of SIGTERM`);
          signals.push("SIGKILL");
          kill(pid, "SIGKILL");
        });
      },
      async stop() {
        if (service) kill(service.pid, "SIGKILL");
        await living;
        await Promise.all([mysql.close(), amqp.close(), http.close()]);
      },
    };
  }

  const nodes = await Promise.all(NODES.map(openNode));

  const world = {
    test,
    queueName,
    servers: restartable.servers,
    nodes: nodes as readonly Node[],
    settings: { LEASE_MS: Number(env.LEASE_MS), SCAN_INTERVAL_MS: Number(env.SCAN_INTERVAL_MS) },
    misdeeds,
    delayed,
    /** The logs of all processes, earlier lives included. */
    logs: () => [...logs, ...nodes.flatMap((node) => node.service()?.log() ?? [])],
    /** Opens a channel as an operator has one, without our code. */
    async openChannel() {
      const connection = await connect(restartable.amqpUrl, { timeout: 2_000 });
      // Whoever uses it sees its calls fail.
      connection.on("error", () => {});
      const channel = await connection.createChannel();
      channel.on("error", () => {});
      return { channel, [Symbol.asyncDispose]: () => connection.close().catch(() => undefined) };
    },
    /** Switches RabbitMQ's memory alarm: nobody may publish while it is on. */
    setAlarm: (isOn: boolean) => setAlarm(restartable.amqpUrl, isOn),
    /** Mends every connection, and waits until every process runs in the ordinary way and is ready. */
    async heal() {
      for (const node of nodes) {
        node.strike("SIGCONT");
        for (const proxy of [node.mysql, node.amqp, node.http]) proxy.slow();
      }
      const waiting = new Set(nodes);
      for (const end = performance.now() + READY_MS; waiting.size > 0; await Bun.sleep(50)) {
        for (const node of waiting) if (await node.isReady()) waiting.delete(node);
        if (performance.now() < end) continue;
        misdeeds.push(`Not ready within ${READY_MS} ms: ${[...waiting].map(({ name }) => name).join(", ")}`);
        return;
      }
    },
    async [Symbol.asyncDispose]() {
      isClosing = true;
      await Promise.all(nodes.map((node) => node.stop()));
      await Promise.allSettled([deleteQueue(queueName, restartable.amqpUrl), test.drop()]);
      await restartable[Symbol.asyncDispose]();
    },
  };
  await world.heal();
  if (misdeeds.length === 0) return world;
  const log = world.logs().slice(-20);
  await world[Symbol.asyncDispose]();
  throw new Error(
    `Cannot start: ${misdeeds.join("; ")}\n${log.map((line) => JSON.stringify(line)).join("\n")}`,
  );
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
