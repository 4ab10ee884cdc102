/** Common parts of all ways to run MySQL and RabbitMQ: the clone that they belong to, and their addresses. */
import { readFileSync, realpathSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";

/** The addresses of MySQL and RabbitMQ. */
export interface Services {
  databaseUrl: string;
  amqpUrl: string;
  /** For people: "DATABASE_URL and AMQP_URL", "docker compose", "private servers in .services". */
  origin: string;
}

/** Options for finding, starting and stopping them. */
export interface ServicesOptions {
  /** Receives a line for every step that takes time. */
  say: (line: string) => void;
  /** Cancels the call: it undoes its steps, and rejects with the signal's reason. */
  signal?: AbortSignal | undefined;
  /** The clone that they belong to, with docker-compose.yml and `.services`. Default: this one. */
  root?: string | undefined;
}

/** The clone, by its real path. */
export function rootOf({ root }: ServicesOptions): string {
  return realpathSync(root ?? join(import.meta.dir, "../.."));
}

/** The folder with the lock, the users and the private servers. */
export function servicesFolder(options: ServicesOptions): string {
  return join(rootOf(options), ".services");
}

/** The content of a JSON file; undefined if it is missing or invalid (an edited file must not stop a run). */
export function readJson<T>(file: string): T | undefined {
  try {
    return JSON.parse(readFileSync(file, "utf8")) as T;
  } catch {
    return undefined;
  }
}

/** Writes a temporary file and renames it: a reader sees the old or the new content, never a part. */
export function writeJson(file: string, value: unknown): void {
  writeFileSync(`${file}.new`, `${JSON.stringify(value)}\n`);
  renameSync(`${file}.new`, file);
}
