/** The users of the services of a clone: the last one to end stops them. */
import { join } from "node:path";
import { readJson, writeJson } from "./clone.ts";
import { startOf } from "./processes.ts";

/** How the servers of a user run. */
export type Kind = "docker" | "private";

/** One user of the services: a process, or `services up` (id `up`, pid 0), which lasts until `services down`. */
export interface User {
  id: string;
  kind: Kind;
  pid: number;
  /** The start time of the process: it distinguishes the process from a later one with the same pid. */
  started: string;
}

/** The users whose process still runs. */
export function readUsers(folder: string): User[] {
  const users = readJson<User[]>(join(folder, "users.json")) ?? [];
  return users.filter(
    (user) => user.id === "up" || (user.started !== "" && startOf(user.pid) === user.started),
  );
}

/** Replaces the list of users. The caller must hold the lock. */
export function writeUsers(folder: string, users: User[]): void {
  writeJson(join(folder, "users.json"), users);
}

/** This process as a user. */
export function thisProcess(kind: Kind): User {
  return { id: crypto.randomUUID(), kind, pid: process.pid, started: startOf(process.pid) };
}
