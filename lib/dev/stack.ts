/** Runs the three processes as children of one process, for `dev` and `demo`. */
import { join } from "node:path";
import { migrate } from "../../sql/migrate.ts";
import { readConfig } from "../config.ts";
import { sleep } from "../loop.ts";
import { acquireServices } from "./services.ts";

const ROOT = join(import.meta.dir, "../..");
const NAMES = ["api", "scheduler", "worker"] as const;
export type Name = (typeof NAMES)[number];
const PORTS = { api: "PORT", scheduler: "SCHEDULER_PORT", worker: "WORKER_PORT" } as const;

/** The longest time until a process serves its port, in milliseconds. */
const START_MS = 20_000;
/** The longest time until a process ends, in milliseconds: a little more than the 10 s that it promises. */
const STOP_MS = 12_000;
/** One Ctrl-C may arrive twice, from the terminal and from npm. A signal after this time, in milliseconds, is a second one. */
const REPEATED_MS = 1_000;

export interface StackOptions {
  /** Settings of the children, in addition to the environment. */
  env: Record<string, string>;
  /** True: the children listen on their usual ports if those are free; false: on any free ports. */
  usualPorts: boolean;
  say: (line: string) => void;
  /** Called with each line that a child logs. */
  onLog: (name: Name, line: string) => void;
  /** Called with the signal or the exit code if a child ends unexpectedly. */
  onExit: (name: Name, how: string) => void;
}

export interface Stack {
  databaseUrl: string;
  amqpUrl: string;
  /** The URL of the API, e.g. `http://127.0.0.1:1323`. */
  apiUrl: string;
  /** Aborted when this process must end. */
  signal: AbortSignal;
}

/**
 * Finds or starts MySQL and RabbitMQ, migrates, starts api, scheduler and worker, and runs `main`. Always stops everything that
 * it has started.
 *
 * @returns the exit code that `main` returns; 129, 130 or 143 if a signal ended it
 */
export async function runWithStack(
  options: StackOptions,
  main: (stack: Stack) => Promise<number>,
): Promise<number> {
  const stop = new AbortController();
  const children: Child[] = [];
  let code = 0;
  let endsSince = 0;
  function end(exitCode: number) {
    if (!stop.signal.aborted) {
      code = exitCode;
      endsSince = Date.now();
      stop.abort();
    } else if (Date.now() - endsSince > REPEATED_MS) {
      for (const child of children) child.kill();
      process.exit(exitCode);
    }
  }
  process.on("SIGINT", () => end(130));
  process.on("SIGTERM", () => end(143));
  process.on("SIGHUP", () => end(129));
  const parent = process.ppid;
  // A killed parent cannot send a signal: without this check, the children would keep running.
  const watch = setInterval(() => process.ppid !== parent && !stop.signal.aborted && end(143), 500);

  let services: Awaited<ReturnType<typeof acquireServices>> | undefined;
  try {
    services = await acquireServices({ say: options.say, signal: stop.signal });
    const { databaseUrl, amqpUrl } = services;
    options.say("bringing the tables up to date");
    await migrate(databaseUrl);
    const env = { ...options.env, DATABASE_URL: databaseUrl, AMQP_URL: amqpUrl };
    for (const name of NAMES) {
      if (!stop.signal.aborted) children.push(startChild(name, { ...options, env }, stop.signal));
    }
    const urls = await Promise.all(children.map((child) => child.served));
    const apiUrl = urls[0]?.replace(/\/$/, "");
    if (apiUrl && !stop.signal.aborted) {
      const result = await main({
        databaseUrl,
        amqpUrl,
        apiUrl,
        signal: stop.signal,
      });
      if (!stop.signal.aborted) code = result;
    }
  } catch (error) {
    if (!stop.signal.aborted) options.say((error as Error).message);
    code ||= 1;
  } finally {
    clearInterval(watch);
    stop.abort();
    await Promise.all(children.map((child) => child.stop()));
    await services?.release();
  }
  return code;
}

interface Child {
  /** Its URL; undefined if it was stopped before. */
  served: Promise<string | undefined>;
  stop(): Promise<void>;
  kill(): void;
}

function startChild(
  name: Name,
  { env, usualPorts, say, onLog, onExit }: StackOptions,
  signal: AbortSignal,
): Child {
  const port = PORTS[name];
  const child = Bun.spawn([process.execPath, `${name}.ts`], {
    cwd: ROOT,
    // A child logs its address at level info.
    env: { ...Bun.env, LOG_LEVEL: "info", [port]: usualPorts ? portFor(name, say) : "0", ...env },
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
    // In its own session: Ctrl-C reaches it once, through this process; a second signal would interrupt its work.
    detached: true,
  });
  const { promise: served, resolve, reject } = Promise.withResolvers<string | undefined>();
  const timer = setTimeout(
    () => reject(new Error(`${name} did not serve its port within ${START_MS} ms`)),
    START_MS,
  );
  let lastLine = "";
  function read(line: string) {
    lastLine = line;
    onLog(name, line);
    const url = fieldOf(line, "url");
    if (url) resolve(url);
  }
  const output = Promise.all([readLines(child.stdout, read), readLines(child.stderr, read)]);
  child.exited.then(async () => {
    await output;
    if (signal.aborted) return resolve(undefined);
    const how = String(child.signalCode ?? `exit code ${child.exitCode}`);
    onExit(name, how);
    reject(new Error(`${name} ended with ${how}: ${fieldOf(lastLine, "msg") ?? lastLine}`));
  });
  signal.addEventListener("abort", () => resolve(undefined), { once: true });
  served.then(
    () => clearTimeout(timer),
    () => clearTimeout(timer),
  );
  return {
    served,
    async stop() {
      clearTimeout(timer);
      child.kill("SIGTERM");
      const late = await Promise.race([child.exited.then(() => false), sleep(STOP_MS).then(() => true)]);
      if (late) child.kill("SIGKILL");
      await child.exited;
      await Promise.race([output, sleep(1_000)]);
    },
    kill: () => child.kill("SIGKILL"),
  };
}

/** The port of the settings, or 0 if it is in use. */
function portFor(name: Name, say: (line: string) => void): string {
  const setting = PORTS[name];
  const { HOST, [setting]: port } = readConfig(Bun.env, ["HOST", setting]);
  if (Bun.env[setting]) return String(port);
  try {
    Bun.listen({ hostname: HOST, port, socket: { data() {} } }).stop(true);
    return String(port);
  } catch {
    say(`port ${port} is in use, so ${name} uses a free one`);
    return "0";
  }
}

/** A field of a line of JSON; undefined if it is missing. */
export function fieldOf(line: string, field: string): string | undefined {
  try {
    const value = JSON.parse(line)[field];
    return value === undefined ? undefined : String(value);
  } catch {
    return undefined;
  }
}

async function readLines(stream: ReadableStream<Uint8Array>, onLine: (line: string) => void): Promise<void> {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const bytes of stream) {
    const lines = (rest + decoder.decode(bytes, { stream: true })).split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines) if (line) onLine(line);
  }
  if (rest) onLine(rest);
}
