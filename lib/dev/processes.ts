/** Processes of this machine: running a command, ending a process, and finding those that are ours. */
import { execFileSync, spawn } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";

/** What came of a command: `code` is null if it was killed or could not be run. */
export interface CommandResult {
  code: number | null;
  stdout: string;
  /** Both streams together, for messages. */
  output: string;
}

/** Runs a command to its end; never throws. At `timeoutMs` it and all of its children are killed. */
export async function runCommand(
  command: string[],
  options: {
    env?: NodeJS.ProcessEnv;
    cwd?: string | undefined;
    timeoutMs?: number;
    signal?: AbortSignal | undefined;
    /** Sent when `signal` is aborted, for a command that must tidy up. Default: SIGKILL, to the children as well. */
    abortWith?: "SIGINT";
  } = {},
): Promise<CommandResult> {
  const { env = process.env, cwd, timeoutMs, signal, abortWith } = options;
  if (signal?.aborted) return { code: null, stdout: "", output: "aborted" };
  const [file = "", ...args] = command;
  const { promise, resolve } = Promise.withResolvers<CommandResult>();
  let stdout = "";
  let output = "";
  // A session of its own: killed as a whole, and out of reach of a Ctrl-C at the terminal.
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

/** Sends a signal; a process (or, negative, a group) that has gone is no error. */
export function kill(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(pid, signal);
  } catch {}
}

/** When the process started, in the system's own notation; empty if there is no such process. */
export function startOf(pid: number): string {
  try {
    if (process.platform !== "linux") {
      return execFileSync("ps", ["-o", "lstart=", "-p", String(pid)], { encoding: "utf8" }).trim();
    }
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    // Fields are counted behind the command's closing bracket, as the command itself may hold spaces and brackets.
    const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
    return fields[0] === "Z" ? "" : (fields[19] ?? "");
  } catch {
    return "";
  }
}

/** Whether all of a process has ended, a zombie included. */
export function hasEnded(pid: number): boolean {
  try {
    if (process.platform !== "linux") return !process.kill(pid, 0);
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    // Threads may outlive the first one, and hold the ports and files for as long.
    return (
      stat.slice(stat.lastIndexOf(")") + 2).startsWith("Z") && readdirSync(`/proc/${pid}/task`).length <= 1
    );
  } catch {
    return true;
  }
}

/** Our servers carry this environment variable, and so does every process that they start. */
export const MARK = "POINTSERVICE_SERVER";

/** The mark of the server of that name in that folder. */
export function markOf(folder: string, name: string): string {
  return `${folder}:${name}`;
}

/** The processes that carry the mark, wherever they were moved to: what is found here is ours to kill. */
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

/** Does `work`, saying `line` every 10 s with the time it has taken. */
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
