import { readFileSync, readlinkSync } from "node:fs";
import { join } from "node:path";
import { type Channel, connect } from "amqplib";
import { kill, runCommand } from "../lib/dev/processes.ts";
import { freePorts } from "../lib/dev/servers.ts";
import { withDeadline } from "../lib/loop.ts";
import {
  createTestDatabase,
  deleteQueue,
  type RunningService,
  startService,
  type TestDatabase,
  uniqueName,
} from "./harness.ts";
import { listenerOf } from "./listener.ts";
import { startProxy, type TcpProxy } from "./proxy.ts";
import { openRestartable, type Restartable } from "./restartable.ts";

export type Entry = "api" | "scheduler" | "worker";

/** One process under test, by name, across all its lives; every way to its servers leads through a proxy of its own. */
export interface Node {
  name: string;
  entry: Entry;
  mysql: TcpProxy;
  amqp: TcpProxy;
  /** What its clients talk to; of an api only. */
  http?: TcpProxy;
  /** Sends a signal; where it ends the process, the next life begins after `backInMs`, with `way` of running. */
  strike(signal: NodeJS.Signals, next?: { backInMs?: number; way?: WayOfRunning }): void;
  /** Its process now; undefined while it is away. */
  service(): RunningService | undefined;
  /** Whether it says that it can do its work now. */
  isReady(): Promise<boolean>;
  /** Adds to the misdeeds where it has told in this life what cannot be. */
  findLies(): void;
}

/** What makes a life of a process different from an ordinary one. */
export interface WayOfRunning {
  clockOffMs?: number;
  timeZone?: string;
}

export interface World extends AsyncDisposable {
  test: TestDatabase;
  queueName: string;
  amqpUrl: string;
  servers: Restartable["servers"];
  nodes: Node[];
  settings: { LEASE_MS: number; SCAN_INTERVAL_MS: number };
  /** Of all processes' logs, those of before included. */
  logs(): Record<string, unknown>[];
  /** A channel as an operator has one, past our own code. */
  openChannel(): Promise<{ channel: Channel } & AsyncDisposable>;
  /** Whether RabbitMQ's memory alarm is on: nobody may publish then. */
  setAlarm(isOn: boolean): Promise<void>;
  /** All proxies serve, and every process runs, in the ordinary way, and says that it is ready. */
  heal(): Promise<void>;
  /** What a process did that none may do, whatever is broken around it. */
  misdeeds: string[];
  /** Contents of messages that somebody has taken away, to come again when all is over. */
  delayed: Buffer[];
}

const COUNTS: Record<Entry, number> = { api: 2, scheduler: 2, worker: 3 };
/** Small, so that a few hundred reservations a second are many messages and many transactions. */
const SMALL = { SCAN_BATCH: "200", PUBLISH_CHUNK: "20", WORKER_BATCH: "50", QUEUED_RESERVATIONS: "2000" };
const PUBLISH = "basic.publish";
const ENDS_WITHIN_MS = 10_000;
const READY_MS = 60_000;

/** Starts servers, a database, a queue, and on them 2 apis, 2 schedulers and 3 workers; every process that dies comes back. */
export async function openWorld(settings: Record<string, string>): Promise<World> {
  const restartable = await openRestartable();
  const test = await createTestDatabase({ server: restartable.databaseUrl });
  const queueName = uniqueName("faults");
  const own = { LEASE_MS: "5000", SCAN_INTERVAL_MS: "2000", AGGREGATE_INTERVAL_MS: "5000" };
  const env = { ...own, ...SMALL, ...settings, QUEUE: queueName };
  const misdeeds: string[] = [];
  const lives: Record<string, unknown>[][] = [];
  let isClosing = false;

  async function openNode(entry: Entry, number: number): Promise<Node & { stop(): Promise<void> }> {
    const name = `${entry}-${number}`;
    const [port = 0] = await freePorts(1);
    const [mysql, amqp, http] = await Promise.all([
      startProxy(test.url),
      startProxy(restartable.amqpUrl),
      startProxy(`http://127.0.0.1:${port}`),
    ]);
    let service: RunningService | undefined;
    let next: { backInMs?: number; way?: WayOfRunning } = {};
    /** The signals that each life was sent. */
    let struck: NodeJS.Signals[] = [];

    /** What had been published before this life. */
    let passedBefore = 0;

    /** Nobody may take for confirmed what was never sent. */
    function findLies(log: Record<string, unknown>[]) {
      const confirmed = log.reduce((sum, line) => sum + Number(line.confirmed ?? 0), 0);
      const passed = amqp.passed(PUBLISH) - passedBefore;
      if (confirmed > passed)
        misdeeds.push(`${name} took ${confirmed} messages for confirmed, but had sent ${passed}`);
    }

    async function live() {
      while (!isClosing) {
        const { clockOffMs = 0, timeZone } = next.way ?? {};
        next = {};
        struck = [];
        passedBefore = amqp.passed(PUBLISH);
        const bunArgs = clockOffMs === 0 ? [] : ["--preload", join(import.meta.dir, "faults_clock.ts")];
        service = await startService(
          entry,
          {
            ...{ ...env, DATABASE_URL: mysql.url, AMQP_URL: amqp.url, PORT: String(port) },
            ...(clockOffMs !== 0 && { CLOCK_OFF_MS: String(clockOffMs) }),
            ...(timeZone && { TZ: timeZone }),
          },
          { waitForPort: false, bunArgs },
        );
        const code = await service.exited;
        const log = service.log();
        lives.push(log);
        findLies(log);
        service = undefined;
        if (isClosing) return;
        const isAsTold =
          struck.includes("SIGKILL") || (struck.includes("SIGTERM") && (code === 0 || log.length === 0));
        if (!isAsTold) {
          misdeeds.push(
            `${name} ended with ${code} after ${struck.join(" and ") || "no signal"}: ${JSON.stringify(log.at(-1))}`,
          );
        }
        await Bun.sleep(next.backInMs ?? 0);
      }
    }
    const living = live();

    return {
      ...{ name, entry, mysql, amqp, ...(entry === "api" && { http }) },
      service: () => service,
      async isReady() {
        const url = service?.log().find((line) => typeof line.url === "string")?.url;
        if (!url) return false;
        const answer = await fetch(`${url}ready`, { signal: AbortSignal.timeout(3_000) }).catch(
          () => undefined,
        );
        return answer?.status === 200;
      },
      findLies: () => service && findLies(service.log()),
      strike(signal, after = {}) {
        // A second SIGTERM ends a process at once, as it says; and none can end in time that must stand still.
        const isEnding = struck.includes("SIGTERM");
        if (!service || (isEnding && (signal === "SIGTERM" || signal === "SIGSTOP"))) return;
        struck.push(signal);
        if (signal === "SIGKILL" || signal === "SIGTERM") next = after;
        kill(service.pid, signal);
        if (signal !== "SIGTERM") return;
        const struckOne = service;
        withDeadline(struckOne.exited, ENDS_WITHIN_MS, () => new Error("late")).catch(() => {
          misdeeds.push(`${name} did not end within ${ENDS_WITHIN_MS} ms of SIGTERM`);
          struck.push("SIGKILL");
          kill(struckOne.pid, "SIGKILL");
        });
      },
      async stop() {
        if (service) kill(service.pid, "SIGKILL");
        await living;
        await Promise.all([mysql.close(), amqp.close(), http.close()]);
      },
    };
  }

  const nodes = await Promise.all(
    Object.entries(COUNTS).flatMap(([entry, count]) =>
      Array.from({ length: count }, (_, index) => openNode(entry as Entry, index + 1)),
    ),
  );

  const world: World = {
    test,
    queueName,
    amqpUrl: restartable.amqpUrl,
    servers: restartable.servers,
    nodes,
    settings: { LEASE_MS: Number(env.LEASE_MS), SCAN_INTERVAL_MS: Number(env.SCAN_INTERVAL_MS) },
    misdeeds,
    delayed: [],
    logs: () => [...lives, ...nodes.map((node) => node.service()?.log() ?? [])].flat(),
    async openChannel() {
      const connection = await connect(restartable.amqpUrl, { timeout: 2_000 });
      // Whoever uses it sees its calls fail.
      connection.on("error", () => {});
      const channel = await connection.createChannel();
      channel.on("error", () => {});
      return { channel, [Symbol.asyncDispose]: () => connection.close().catch(() => undefined) };
    },
    setAlarm: (isOn) => setAlarm(restartable.amqpUrl, isOn),
    async heal() {
      for (const node of nodes) {
        node.strike("SIGCONT");
        for (const proxy of [node.mysql, node.amqp, node.http]) proxy?.slow(undefined);
      }
      const end = performance.now() + READY_MS;
      const waiting = new Set(nodes);
      while (waiting.size > 0) {
        for (const node of waiting) if (await node.isReady()) waiting.delete(node);
        if (performance.now() > end) {
          misdeeds.push(
            `Not ready within ${READY_MS} ms: ${[...waiting].map(({ name }) => name).join(", ")}`,
          );
          return;
        }
        await Bun.sleep(50);
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
  if (misdeeds.length > 0) {
    const log = world
      .logs()
      .slice(-20)
      .map((line) => JSON.stringify(line));
    await world[Symbol.asyncDispose]();
    throw new Error(`Cannot start: ${misdeeds.join("; ")}\n${log.join("\n")}`);
  }
  return world;
}

const ALARM_MS = 20_000;

/** As an operator does, with the `rabbitmqctl` of the very server; Linux only. */
async function setAlarm(amqpUrl: string, isOn: boolean): Promise<void> {
  const pid = listenerOf(amqpUrl);
  if (pid === undefined) throw new Error("RabbitMQ does not run");
  const environment = readFileSync(`/proc/${pid}/environ`, "utf8")
    .split("\0")
    .filter((pair) =>
      /^(HOME|PATH|LANG|ERL_EPMD_\w+|RABBITMQ_(NODENAME|CONF_ENV_FILE|CONFIG_FILE|MNESIA_BASE))=/.test(pair),
    )
    .map((pair) => [pair.slice(0, pair.indexOf("=")), pair.slice(pair.indexOf("=") + 1)] as const);
  // A server may live in a root folder of its own.
  const root = readlinkSync(`/proc/${pid}/root`);
  const ctl = 'exec "$(ls /usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmqctl | head -n 1)" "$@"';
  const { code, output } = await runCommand(
    ["chroot", root, "sh", "-c", ctl, "sh", "set_vm_memory_high_watermark", isOn ? "0" : "0.4"],
    { env: Object.fromEntries(environment), timeoutMs: ALARM_MS },
  );
  if (code !== 0) throw new Error(`rabbitmqctl ended with ${code}: ${output}`);
}
