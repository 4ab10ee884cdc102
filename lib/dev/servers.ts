/** Private MySQL and RabbitMQ servers: started, watched and stopped by us, all their files in one folder. */
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

/** One server of ours. Its ports are chosen at the first start and kept for as long as nobody else takes them. */
export interface Server {
  /** Where it listens; meaningful once it has been started. */
  readonly url: string;
  /** Resolves when it serves. Does nothing if it already does. */
  start(signal?: AbortSignal): Promise<void>;
  /** Resolves when none of its processes is left. SIGTERM is followed by SIGKILL after 30 s. */
  stop(signal?: "SIGTERM" | "SIGKILL"): Promise<void>;
  /** The main process (mysqld, or the Erlang machine), whichever run started it. */
  pid(): number | undefined;
  /** Whether it runs and serves now. */
  answers(): Promise<boolean>;
}

/** A pair of servers of one's own in `folder`, on free ports, both ready. Needs the binaries on this machine. */
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
    // What ran before may have other users, who can do without us.
    const begun = [mysql, rabbitmq].filter((server) => !ran.includes(server));
    await Promise.all(begun.map((server) => server.stop()));
    throw failed.reason;
  }
  return { mysql, rabbitmq, stop };
}

/** The MySQL or MariaDB whose files are in the folder, or will be. */
export function mysqlServer({ folder, say }: ServerOptions): Server {
  const own = makeFolder(folder);
  return ownServer(own, say, mysqlRecipe({ folder: own, say }));
}

/** The RabbitMQ whose files are in the folder, or will be. */
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
    // A run that was killed while it stopped the server: that may answer once more, and then be gone.
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
    await stop("SIGKILL"); // helpers of a server that died, or that was never seen to start
    const ports = await freePorts(recipe.portCount, record().ports);
    writeJson(recordFile, { ports });
    const { command, env } = await recipe.prepare(ports, signal);
    signal?.throwIfAborted();
    const [file = "", ...args] = command;
    const log = fs.openSync(logFile, "w");
    // A session of its own, so that a Ctrl-C at the terminal does not reach it.
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
    // What is left has nothing to save: epmd and the Erlang machine's helpers. Again, as they may just be forking.
    const killed = new Set(main === undefined ? [] : [main]);
    for (let left = processesMarked(mark); left.length > 0; left = processesMarked(mark)) {
      for (const { pid } of left) {
        killed.add(pid);
        kill(pid, "SIGKILL");
      }
      await sleep(20);
    }
    // A process loses its environment, by which we find it, before it lets go of its ports and files.
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

/** Both servers' programs on this machine; undefined if one is missing. */
export function findServerBinaries(): { mysqld: string; rabbitmq: string } | undefined {
  const mysqld = findMysqld();
  const rabbitmq = findRabbitmq();
  return mysqld && rabbitmq ? { mysqld, rabbitmq } : undefined;
}

/**
 * Ports of 127.0.0.1 that are free: those of `wanted` where they are, else others.
 *
 * They lie below the range of outgoing connections (from 32768 on Linux): one of those, even that of a client which tries
 * to reach the stopped server, could otherwise sit on a server's port when it comes back.
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
