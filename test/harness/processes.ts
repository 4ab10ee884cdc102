import { join } from "node:path";
import { AMQP_URL, until } from "./harness.ts";

const ROOT = join(import.meta.dir, "..", "..");

export const ENTRIES = ["api", "scheduler", "worker"] as const;
export type Entry = (typeof ENTRIES)[number];

export interface RunningService {
  pid: number;
  /** Where its HTTP port answers, e.g. `http://127.0.0.1:41234`; empty if that was not waited for. */
  url: string;
  /** The log so far, one object a line. */
  log(): Record<string, unknown>[];
  /** Sends a signal and waits for the end and all of its log: the exit code, or null if a signal ended it. */
  kill(signal: NodeJS.Signals): Promise<number | null>;
  exited: Promise<number | null>;
}

export interface StartOptions {
  waitForPort?: boolean;
  bunArgs?: readonly string[];
  /** An open file that gets its log; then `log()` has only what it says on stderr. */
  stdout?: number;
}

/** Starts a real process of an entry file, on a free port, with these settings; waits until its port answers unless told otherwise. */
export async function startService(
  entry: Entry,
  env: Record<string, string>,
  { waitForPort = true, bunArgs = [], stdout }: StartOptions = {},
): Promise<RunningService> {
  const child = Bun.spawn([process.execPath, ...bunArgs, `${entry}.ts`], {
    cwd: ROOT,
    env: {
      PATH: Bun.env.PATH,
      TZ: Bun.env.TZ,
      AMQP_URL,
      PORT: "0",
      SCHEDULER_PORT: "0",
      WORKER_PORT: "0",
      SCAN_INTERVAL_MS: "100",
      ...env,
    },
    stdout: stdout ?? "pipe",
    stderr: "pipe",
  });
  let text = "";
  async function collect(stream: ReadableStream<Uint8Array>) {
    const decoder = new TextDecoder();
    for await (const bytes of stream) text += decoder.decode(bytes, { stream: true });
  }
  const collected = [child.stdout, child.stderr].filter((stream) => typeof stream === "object").map(collect);
  const service: RunningService = {
    pid: child.pid,
    url: "",
    log: () => text.split("\n").slice(0, -1).filter(Boolean).map(parseLine),
    // Its last lines may still be in the pipes when it is gone.
    exited: Promise.all([child.exited, ...collected]).then(() => child.exitCode),
    async kill(signal) {
      child.kill(signal);
      return service.exited;
    },
  };
  if (!waitForPort) return service;
  try {
    service.url = await until(`${entry} serves its port`, () => {
      if (child.exitCode !== null) throw new Error(`${entry} exited with ${child.exitCode}`);
      const url = service.log().find((line) => typeof line.url === "string")?.url;
      return typeof url === "string" && url.replace(/\/$/, "");
    });
    return service;
  } catch (error) {
    // Nobody gets to know this process, so nobody else would end it.
    await service.kill("SIGKILL");
    throw new Error(`${entry} did not start; its log: ${text}`, { cause: error });
  }
}

function parseLine(line: string): Record<string, unknown> {
  try {
    return JSON.parse(line);
  } catch {
    return { line };
  }
}

/** Waits until a service logs a message; resolves to the first line that has it. */
export function untilLogged({ log }: RunningService, msg: string): Promise<Record<string, unknown>> {
  return until(`it logs "${msg}"`, () => log().find((line) => line.msg === msg));
}

/** Waits until services say that they can do their work. */
export async function untilReady(...services: readonly RunningService[]): Promise<void> {
  for (const { url } of services) {
    let seen = "";
    async function isReady() {
      const response = await fetch(`${url}/ready`);
      seen = await response.text();
      return response.status === 200;
    }
    await until(() => `it is ready, but ${seen}`, isReady);
  }
}
