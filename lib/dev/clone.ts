/** What each way to MySQL and RabbitMQ has in common: the clone that they are for, and where they are. */
import { readFileSync, realpathSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";

/** Where MySQL and RabbitMQ are. */
export interface Services {
  databaseUrl: string;
  amqpUrl: string;
  /** For people: "DATABASE_URL and AMQP_URL", "docker compose", "private servers in .services". */
  origin: string;
}

/** Options for all that finds, starts or stops them. */
export interface ServicesOptions {
  /** Hears of every step that takes time. */
  say: (line: string) => void;
  /** Gives up: what was begun is undone, and the call rejects with the signal's reason. */
  signal?: AbortSignal | undefined;
  /** The clone whose services they are: docker-compose.yml is there, and `.services`. Default: this one. */
  root?: string | undefined;
}

/** The clone, by its real path. */
export function rootOf({ root }: ServicesOptions): string {
  return realpathSync(root ?? join(import.meta.dir, "../.."));
}

/** What we keep in the clone: the lock, the users, the private servers. */
export function servicesFolder(options: ServicesOptions): string {
  return join(rootOf(options), ".services");
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
