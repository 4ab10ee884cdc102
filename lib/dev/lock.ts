/** Processes of this machine: running them, finding them, and a lock and a list of users that outlive none of them. */
import { Database } from "bun:sqlite";
import { execFileSync, spawn } from "node:child_process";
import { readdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

/** Options for {@link withLock}. */
export interface LockOptions {
  /** Called once, with `waiting`, when somebody else holds the lock. */
  say: (line: string) => void;
  waiting: string;
  signal?: AbortSignal | undefined;
  /** Default 5 minutes: a first start may download images or packages. */
  deadlineMs?: number;
}

/**
 * Runs `work` while holding the lock on `file`, which is created if need be.
 *
 * The lock is SQLite's write lock on an empty database: the kernel drops it with the process that holds it, so a
 * holder that was killed leaves nothing to clean up. We poll, as SQLite's own busy timeout would block the event loop.
 */
export async function withLock<T>(file: string, work: () => Promise<T>, options: LockOptions): Promise<T> {
  const deadlineMs = options.deadlineMs ?? 5 * 60_000;
  const giveUpAt = Date.now() + deadlineMs;
  const database = new Database(file, { create: true });
  let said = false;
  try {
    while (!takeLock(database)) {
      options.signal?.throwIfAborted();
      if (Date.now() > giveUpAt) {
        throw new Error(
          `Another run has held the lock for more than ${Math.round(deadlineMs / 1000)} s: ${file}`,
        );
      }
      if (!said) options.say(options.waiting);
      said = true;
      await sleep(100);
    }
    return await work();
  } finally {
    database.close();
  }
}

function takeLock(database: Database): boolean {
  try {
    database.run("begin exclusive");
    return true;
  } catch (error) {
    if (error instanceof Error && "code" in error && String(error.code).startsWith("SQLITE_BUSY"))
      return false;
    throw error;
  }
}

/** What a user's servers run in. */
export type Kind = "docker" | "private";

/** One user of the services: a process, or `services up` (id `up`, pid 0), which lives until `services down`. */
export interface User {
  id: string;
  kind: Kind;
  pid: number;
  /** When the process started: with it, a pid that the system gave out again is not taken for the old process. */
  started: string;
}

/** The users that are alive. Those whose process has gone are left out. */
export function readUsers(folder: string): User[] {
  const users = readJson<User[]>(join(folder, "users.json")) ?? [];
  return users.filter(
    (user) => user.id === "up" || (user.started !== "" && startOf(user.pid) === user.started),
  );
}

/** Replaces the list of users. Call it under the lock. */
export function writeUsers(folder: string, users: User[]): void {
  writeJson(join(folder, "users.json"), users);
}

/** This process as a user. */
export function thisProcess(kind: Kind): User {
  return { id: crypto.randomUUID(), kind, pid: process.pid, started: startOf(process.pid) };
}

/** When the process started, in the system's own notation; empty if there is no such process. */
function startOf(pid: number): string {
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

/** A JSON file of ours; undefined if it is missing or broken (a hand-edited file must not stop a run). */
export function readJson<T>(file: string): T | undefined {
  try {
    return JSON.parse(readFileSync(file, "utf8")) as T;
  } catch {
    return undefined;
  }
}

/** Writes beside the file and renames: a reader sees the old content or the new, never half of it. */
export function writeJson(file: string, value: unknown): void {
  writeFileSync(`${file}.new`, `${JSON.stringify(value)}\n`);
  renameSync(`${file}.new`, file);
}

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

/** Sends a signal; a process (or, negative, a group) that has gone is no error. */
export function kill(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(pid, signal);
  } catch {}
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

/** Our servers carry this environment variable, and so does every process that they start. */
export const MARK = "POINTSERVICE_SERVER";

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
