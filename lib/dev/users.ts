/** Who uses the services of a clone: the last user to go stops them. */
import { join } from "node:path";
import { readJson, writeJson } from "./clone.ts";
import { startOf } from "./processes.ts";

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
