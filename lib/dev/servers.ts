/** Private MySQL and RabbitMQ servers: starts, watches and stops them; all their files are in one folder. */
import { spawn } from "node:child_process";
import * as fs from "node:fs";
import { createServer } from "node:net";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { findMysqld, findRabbitmq, serverEnv } from "./binaries.ts";
import { readJson, writeJson } from "./clone.ts";
import { mysqlRecipe } from "./mysql.ts";
import { hasEnded, kill, lastLines, MARK, markOf, processesMarked, whileSaying } from "./processes.ts";
import { rabbitmqRecipe } from "./rabbitmq.ts";
import type { Recipe, ServerOptions } from "./recipe.ts";

const READY_WITHIN_MS = 120_000;
const STOP_WITHIN_MS = 30_000;

/** A private server. Its ports are chosen at the first start, and kept as long as they stay free. */
export interface Server {
  /** Its address; valid after the first start. */
  readonly url: string;
  /** Resolves when it is ready. Does nothing if it already is. */
  start(signal?: AbortSignal): Promise<void>;
  /** Resolves when all its processes have ended. After 30 s, SIGKILL follows SIGTERM. */
  stop(signal?: "SIGTERM" | "SIGKILL"): Promise<void>;
  /** The main process (mysqld, or the Erlang virtual machine), even if another run has started it. */
  pid(): number | undefined;
  /** Whether it runs and answers. */
  answers(): Promise<boolean>;
}

/** Starts a private pair of servers in `folder`, on free ports. Needs their programs on this machine. */
export async function startPrivateServers(
  options: ServerOptions & { signal?: AbortSignal | undefined },
): Promise<{ mysql: Server; rabbitmq: Server; stop(): Promise<void> }> {
  const mysql = mysqlServer(options);
  const rabbitmq = rabbitmqServer(options);
  async function stop(): Promise<void> {
    await Promise.all([mysql.stop(), rabbitmq.stop()]);
  }
  const ran = [mysql, rabbitmq].filter((server) => server.pid() !== undefined);
  const starts = await Promise.allSettled([mysql.start(options.signal), rabbitmq.start(options.signal)]);
  const failed = starts.find((start) => start.status === "rejected");
  if (failed) {
    // Servers that ran before may have other users: they keep running.
    const begun = [mysql, rabbitmq].filter((server) => !ran.includes(server));
    await Promise.all(begun.map((server) => server.stop()));
    throw failed.reason;
  }
  return { mysql, rabbitmq, stop };
}

/** The MySQL or MariaDB of a folder. */
export function mysqlServer({ folder, say, mysqlEnv }: ServerOptions): Server {
  const own = makeFolder(folder);
  return ownServer(own, say, mysqlRecipe({ folder: own, say, mysqlEnv }));
}

/** The RabbitMQ of a folder. */
export function rabbitmqServer({ folder, say }: ServerOptions): Server {
  const own = makeFolder(folder);
  return ownServer(own, say, rabbitmqRecipe(own));
}

function makeFolder(path: string): string {
  fs.mkdirSync(join(path, "log"), { recursive: true, mode: 0o700 });
  return fs.realpathSync(path);
}

function ownServer(folder: string, say: (line: string) => void, recipe: Recipe): Server {
  const { name } = recipe;
  const mark = markOf(folder, name);
  const recordFile = join(folder, `${name.toLowerCase()}.json`);
  const logFile = join(folder, "log", `${name.toLowerCase()}.log`);

  function record(): { ports: number[]; stopping?: true } {
    return readJson(recordFile) ?? { ports: [] };
  }

  function pid(): number | undefined {
    return processesMarked(mark).find(({ command }) => recipe.main.test(command))?.pid;
  }

  async function answers(): Promise<boolean> {
    const [port] = record().ports;
    return port !== undefined && pid() !== undefined && (await recipe.answers(port));
  }

  async function start(signal?: AbortSignal): Promise<void> {
    // A run was killed while it stopped the server: the server may still answer, and end then.
    if (record().stopping) await stop();
    for (let triesLeft = 2; ; triesLeft--) {
      const foreign = pid() !== undefined;
      const ended = foreign ? () => pid() === undefined : await launch(signal);
      const outcome = await whileSaying(`waiting for ${name}`, say, () => untilReady(ended, signal));
      if (outcome === "ready") return;
      await stop("SIGKILL");
      signal?.throwIfAborted();
      const { ports } = record();
      const portTaken = String(await freePorts(recipe.portCount, ports)) !== String(ports);
      if (triesLeft > 0 && outcome === "ended" && (foreign || portTaken)) continue;
      const what =
        outcome === "ended" ? "ended while it started" : `did not serve within ${READY_WITHIN_MS / 1000} s`;
      throw new Error(
        `${name} ${what}; the end of ${logFile}:\n${lastLines(fs.readFileSync(logFile, "utf8"))}`,
      );
    }
  }

  /** @returns whether the process has ended */
  async function launch(signal?: AbortSignal): Promise<() => boolean> {
    await stop("SIGKILL"); // leftover processes of a server that died or did not start
    const ports = await freePorts(recipe.portCount, record().ports);
    writeJson(recordFile, { ports });
    const { command, env } = await recipe.prepare(ports, signal);
    signal?.throwIfAborted();
    const [file = "", ...args] = command;
    const log = fs.openSync(logFile, "w");
    // In its own session, so that a Ctrl-C at the terminal does not reach it.
    const child = spawn(file, args, {
      detached: true,
      cwd: folder,
      env: { ...serverEnv(), ...env, [MARK]: mark },
      stdio: ["ignore", log, log],
    });
    fs.closeSync(log);
    let ended = false;
    child.once("exit", () => {
      ended = true;
    });
    child.once("error", (error) => {
      fs.appendFileSync(logFile, `${error.message}\n`);
      ended = true;
    });
    child.unref();
    return () => ended;
  }

  async function untilReady(ended: () => boolean, signal?: AbortSignal): Promise<"ready" | "ended" | "late"> {
    const giveUpAt = Date.now() + READY_WITHIN_MS;
    while (Date.now() < giveUpAt && !signal?.aborted) {
      if (ended()) return "ended";
      if (await answers()) return "ready";
      await sleep(100);
    }
    return "late";
  }

  async function stop(by: "SIGTERM" | "SIGKILL" = "SIGTERM"): Promise<void> {
    if (processesMarked(mark).length === 0) return;
    const { ports } = record();
    writeJson(recordFile, { ports, stopping: true });
    const main = pid();
    if (by === "SIGTERM" && main !== undefined) {
      kill(main, "SIGTERM");
      const giveUpAt = Date.now() + STOP_WITHIN_MS;
      while (Date.now() < giveUpAt && !hasEnded(main)) await sleep(50);
    }
    // The rest has no data to save: epmd and the helpers of the Erlang virtual machine. Repeat, as they may be forking.
    const killed = new Set(main === undefined ? [] : [main]);
    for (let left = processesMarked(mark); left.length > 0; left = processesMarked(mark)) {
      for (const { pid } of left) {
        killed.add(pid);
        kill(pid, "SIGKILL");
      }
      await sleep(20);
    }
    // A process loses its environment, which identifies it, before it closes its ports and files.
    while (![...killed].every(hasEnded)) await sleep(20);
    writeJson(recordFile, { ports });
  }

  return {
    get url() {
      return recipe.url(record().ports[0] ?? 0);
    },
    start,
    stop,
    pid,
    answers,
  };
}

/** The programs of both servers on this machine; undefined if one is missing. */
export function findServerBinaries(): { mysqld: string; rabbitmq: string } | undefined {
  const mysqld = findMysqld();
  const rabbitmq = findRabbitmq();
  return mysqld && rabbitmq ? { mysqld, rabbitmq } : undefined;
}

/**
 * Free ports of 127.0.0.1: those of `wanted` that are free, and others instead of the rest.
 *
 * They are below the range of outgoing connections (from 32768 on Linux): otherwise an outgoing connection, even of a client
 * that tries to reach the stopped server, could hold the server's port when it restarts.
 */
export async function freePorts(count: number, wanted: number[] = []): Promise<number[]> {
  const ports: number[] = [];
  for (let i = 0; i < count; i++) {
    let port = wanted[i];
    while (port === undefined || ports.includes(port) || !(await isFree(port))) {
      port = 20_000 + Math.floor(Math.random() * 12_000);
    }
    ports.push(port);
  }
  return ports;
}

function isFree(port: number): Promise<boolean> {
  const { promise, resolve } = Promise.withResolvers<boolean>();
  const server = createServer();
  server.once("error", () => resolve(false));
  server.listen({ host: "127.0.0.1", port, exclusive: true }, () => server.close(() => resolve(true)));
  return promise;
}
