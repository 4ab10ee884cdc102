/** Processes of this machine: runs commands, ends processes, and finds the processes of private servers. */
import { execFileSync, spawn } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";

/** The result of a command: `code` is null if it was killed or could not be run. */
export interface CommandResult {
  code: number | null;
  stdout: string;
  /** Both streams together, for messages. */
  output: string;
}

/** Runs a command until it ends; never throws. After `timeoutMs` it is killed, with all its children. */
export async function runCommand(
  command: string[],
  options: {
    env?: NodeJS.ProcessEnv;
    cwd?: string | undefined;
    timeoutMs?: number;
    signal?: AbortSignal | undefined;
    /** Sent when `signal` is aborted, for a command that must clean up. Default: SIGKILL, also to the children. */
    abortWith?: "SIGINT";
  } = {},
): Promise<CommandResult> {
  const { env = process.env, cwd, timeoutMs, signal, abortWith } = options;
  if (signal?.aborted) return { code: null, stdout: "", output: "aborted" };
  const [file = "", ...args] = command;
  const { promise, resolve } = Promise.withResolvers<CommandResult>();
  let stdout = "";
  let output = "";
  // In its own session: it can be killed as a whole, and a Ctrl-C at the terminal does not reach it.
  const child = spawn(file, args, { detached: true, env, cwd, stdio: ["ignore", "pipe", "pipe"] });
  child.stdout.on("data", (chunk) => {
    stdout += chunk;
    output += chunk;
  });
  child.stderr.on("data", (chunk) => {
    output += chunk;
  });
  child.once("error", (error) => resolve({ code: null, stdout, output: error.message }));
  child.once("close", (code) => resolve({ code, stdout, output }));
  function end(): void {
    if (child.pid === undefined) return;
    if (signal?.aborted && abortWith) kill(child.pid, abortWith);
    else kill(-child.pid, "SIGKILL");
  }
  signal?.addEventListener("abort", end, { once: true });
  const timer = timeoutMs === undefined ? undefined : setTimeout(end, timeoutMs);
  try {
    return await promise;
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", end);
  }
}

/** The end of an output, for an error message. */
export function lastLines(text: string): string {
  return text.trimEnd().split("\n").slice(-20).join("\n");
}

/** Sends a signal to a process or, if `pid` is negative, to a group; ignores one that has ended. */
export function kill(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(pid, signal);
  } catch {}
}

/** The start time of a process, in the format of the system; empty if there is no such process. */
export function startOf(pid: number): string {
  try {
    if (process.platform !== "linux") {
      return execFileSync("ps", ["-o", "lstart=", "-p", String(pid)], { encoding: "utf8" }).trim();
    }
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    // Fields are counted after the closing bracket of the command, which may contain spaces and brackets.
    const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
    return fields[0] === "Z" ? "" : (fields[19] ?? "");
  } catch {
    return "";
  }
}

/** Whether a process has ended with all its threads; a zombie counts as ended. */
export function hasEnded(pid: number): boolean {
  try {
    if (process.platform !== "linux") return !process.kill(pid, 0);
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    // Threads may outlive the first one, and keep ports and files open.
    return (
      stat.slice(stat.lastIndexOf(")") + 2).startsWith("Z") && readdirSync(`/proc/${pid}/task`).length <= 1
    );
  } catch {
    return true;
  }
}

/** Private servers have this environment variable, and so has every process that they start. */
export const MARK = "POINTSERVICE_SERVER";

/** The mark of a server, by its folder and name. */
export function markOf(folder: string, name: string): string {
  return `${folder}:${name}`;
}

/** The processes that have the mark. They belong to a private server, and may be killed. */
export function processesMarked(mark: string): { pid: number; command: string }[] {
  const wanted = `${MARK}=${mark}`;
  if (process.platform !== "linux") {
    const list = execFileSync("ps", ["-axEww", "-o", "pid=,command="], { encoding: "utf8" }).split("\n");
    const ours = list.filter((line) => `${line} `.includes(` ${wanted} `));
    return ours.map((line) => ({ pid: Number.parseInt(line, 10), command: line }));
  }
  const found = [];
  for (const name of readdirSync("/proc")) {
    if (!/^\d+$/.test(name)) continue;
    try {
      // Empty for a zombie, unreadable for other users' processes.
      if (!readFileSync(`/proc/${name}/environ`, "utf8").split("\0").includes(wanted)) continue;
      const command = readFileSync(`/proc/${name}/cmdline`, "utf8").replaceAll("\0", " ");
      found.push({ pid: Number(name), command });
    } catch {}
  }
  return found;
}

/** Runs `work`, and prints `line` with the elapsed time every 10 s. */
export async function whileSaying<T>(
  line: string,
  say: (line: string) => void,
  work: () => Promise<T>,
): Promise<T> {
  const startedAt = Date.now();
  const timer = setInterval(() => say(`${line} (${Math.round((Date.now() - startedAt) / 1000)} s)`), 10_000);
  try {
    return await work();
  } finally {
    clearInterval(timer);
  }
}
