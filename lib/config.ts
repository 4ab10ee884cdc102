import { type Static, type TSchema, Type } from "@sinclair/typebox";
import { Value } from "@sinclair/typebox/value";
import { DomainError, showValue } from "./errors.ts";

/** A setting that is a whole number. */
function whole(description: string, { range, preset }: { range: [number, number]; preset: number }) {
  return Type.Integer({ minimum: range[0], maximum: range[1], default: preset, description });
}

function port(process: string, preset: number) {
  return whole(`port of ${process}; 0 chooses a free one`, { range: [0, 65_535], preset });
}

/** Every setting: the variable, its rule, its default. The README describes them in a table. */
export const Settings = Type.Object({
  DATABASE_URL: Type.String({
    pattern: "^(mysql|mariadb)://[^/]+/[^/?]+",
    description: "MySQL, with database",
  }),
  AMQP_URL: Type.String({ pattern: "^amqps?://[^/]+", description: "RabbitMQ" }),
  QUEUE: Type.String({
    pattern: "^[A-Za-z0-9._-]{1,200}$",
    default: "reservationQueue",
    description: "queue of due reservations; its dead letters go to <QUEUE>.dead",
  }),
  HOST: Type.String({ pattern: "^\\S+$", default: "127.0.0.1", description: "address to listen on" }),
  PORT: port("the API", 1323),
  SCHEDULER_PORT: port("the scheduler's health checks", 1324),
  WORKER_PORT: port("the worker's health checks", 1325),
  // Writes are few, large batches. Only single reads and changes need more connections; with more than this they would only
  // wait inside MySQL.
  DATABASE_CONNECTIONS: whole("maximum number of connections to MySQL of one process", {
    range: [1, 1_000],
    preset: 10,
  }),
  SCAN_INTERVAL_MS: whole("longest sleep between two scans", { range: [10, 3_600_000], preset: 10_000 }),
  // A claim of 2,000 holds its locks for about 40 ms. A larger one delays cancels; a smaller one needs more round trips.
  SCAN_BATCH: whole("maximum number of reservations in one claim", { range: [1, 10_000], preset: 2_000 }),
  // As short as the ordinary waits allow: 5 s for RabbitMQ's confirms, and 22,000 reservations ahead in the queue at 2,500
  // grants/s. With a shorter lease, a slow database would get the same reservations again, and become even slower.
  LEASE_MS: whole("how long a claim holds; then its rows are claimed again", {
    range: [1_000, 86_400_000],
    preset: 15_000,
  }),
  // As large as a worker's batch: with 500, four workers on two cores took half batches and granted 0.81 × as much as one;
  // with 1,000 they granted 0.94 × (`bun run bench --part scale`).
  PUBLISH_CHUNK: whole("maximum number of reservations in one message; the same for schedulers and workers", {
    range: [1, 1_000],
    preset: 1_000,
  }),
  // One or two seconds of grants. The rest of a backlog stays in MySQL, where it can still be cancelled.
  QUEUED_RESERVATIONS: whole(
    "nothing is claimed while the queue holds this many; each message counts as PUBLISH_CHUNK",
    { range: [1, 1_000_000], preset: 20_000 },
  ),
  // 1,000 grants take MySQL about 0.1 s. For that time, all other changes of the same balances wait.
  WORKER_BATCH: whole("maximum number of reservations granted in one transaction", {
    range: [1, 5_000],
    preset: 1_000,
  }),
  MAX_ATTEMPTS: whole("failed attempts after which a reservation is FAILED", { range: [1, 100], preset: 10 }),
  // The entries of an hour are counted within seconds. Shorten it only if totals of the current day must be newer.
  AGGREGATE_INTERVAL_MS: whole("how often the schedulers aggregate and reconcile; 0: never", {
    range: [0, 86_400_000],
    preset: 3_600_000,
  }),
  AGGREGATE_TIME_ZONE: Type.String({
    pattern: "^[A-Z][A-Za-z0-9_+/-]*$",
    default: "UTC",
    description: "time zone of the days of the totals",
  }),
  // While a load balancer or Kubernetes takes a process out of service, requests still come for some seconds.
  DRAIN_MS: whole("how long the API goes on serving requests after SIGTERM, while /ready is 503", {
    range: [0, 300_000],
    preset: 0,
  }),
  ALLOW_LOSSY_DATABASE: Type.Boolean({ default: false, description: "run on a MySQL that may lose commits" }),
  LOG_LEVEL: Type.Union(
    ["trace", "debug", "info", "warn", "error", "fatal"].map((level) => Type.Literal(level)),
    { default: "info", description: "lowest level that is logged" },
  ),
});
export type Settings = Static<typeof Settings>;

const URLS = ["DATABASE_URL", "AMQP_URL"];

/**
 * Reads settings from the environment of this process.
 *
 * @throws {DomainError} INVALID_SETTING
 */
export function readSettings<Name extends keyof Settings>(names: readonly Name[]): Pick<Settings, Name> {
  return readConfig(Bun.env, names);
}

/**
 * Reads the settings that a process needs. An empty variable counts as unset.
 *
 * @throws {DomainError} INVALID_SETTING, one line with the variable, the rule and the value, never with a password
 */
export function readConfig<Name extends keyof Settings>(
  env: Record<string, string | undefined>,
  names: readonly Name[],
): Pick<Settings, Name> {
  const broken: string[] = [];
  const config = Object.fromEntries(
    names.map((name) => {
      const value = parse(Settings.properties[name], env[name]);
      const fault = findFault(name, value, env[name]);
      if (fault) broken.push(`${name} must be ${fault}`);
      return [name, value];
    }),
  );
  if (broken.length > 0) {
    throw new DomainError("INVALID_SETTING", `Cannot start as ${broken.join("; and as ")}`);
  }
  return config as Pick<Settings, Name>;
}

/** The value of a variable, or its default; undefined if it has neither. */
function parse(schema: TSchema, text: string | undefined): unknown {
  if (text === undefined || text === "") return schema.default;
  if (schema.type === "integer" && /^\d{1,15}$/.test(text)) return Number(text);
  if (schema.type === "boolean" && /^(true|false)$/.test(text)) return text === "true";
  return text;
}

/** The rule that a setting breaks, with the value; undefined if it breaks none. */
function findFault(name: keyof Settings, value: unknown, text: string | undefined): string | undefined {
  const rule = ruleOf(name);
  if (value === undefined) return `${rule}: it is not set`;
  const received = URLS.includes(name) ? withoutPassword(String(text)) : showValue(text);
  if (URLS.includes(name) && !isUrl(String(text))) {
    return `${rule}, with special characters percent-encoded: received ${received}`;
  }
  const isRight =
    Value.Check(Settings.properties[name], value) &&
    (name !== "AGGREGATE_TIME_ZONE" || isTimeZone(String(value)));
  return isRight ? undefined : `${rule}: received ${received}`;
}

/** Whether the drivers can parse it, including user and password. */
function isUrl(text: string): boolean {
  try {
    const { username, password } = new URL(text);
    decodeURIComponent(username + password);
    return true;
  } catch {
    return false;
  }
}

function withoutPassword(text: string): string {
  const parsed = URL.parse(text);
  return parsed?.host
    ? `${parsed.protocol}//${parsed.username ? "…@" : ""}${parsed.host}${parsed.pathname}`
    : "a value that is not a URL (not shown, as it may contain a password)";
}

const RULES: Partial<Record<keyof Settings, string>> = {
  DATABASE_URL: "like mysql://user:password@host:3306/database",
  AMQP_URL: "like amqp://user:password@host:5672",
  QUEUE: "1 to 200 of A-Z, a-z, 0-9, ., _ and -",
  HOST: "an IP address or a host name of this machine",
  AGGREGATE_TIME_ZONE: "UTC or the name of a time zone like Asia/Tokyo",
};

function ruleOf(name: keyof Settings): string {
  const schema: TSchema = Settings.properties[name];
  if (schema.type === "integer") return `a whole number from ${schema.minimum} to ${schema.maximum}`;
  if (schema.type === "boolean") return "true or false";
  if (schema.anyOf) return `one of ${schema.anyOf.map((option: TSchema) => option.const).join(", ")}`;
  return RULES[name] ?? `text that matches ${schema.pattern}`;
}

/** Whether it is the name of a time zone, spelled as in the IANA database, e.g. `Asia/Tokyo`. */
export function isTimeZone(name: string): boolean {
  if (name === "UTC") return true;
  // `Intl` alone would also accept offsets, abbreviations and names in the wrong case.
  if (!/^[A-Z][A-Za-z_]+(\/[A-Za-z0-9_+-]+)+$/.test(name)) return false;
  try {
    return new Intl.DateTimeFormat("en", { timeZone: name }).resolvedOptions().timeZone !== undefined;
  } catch {
    return false;
  }
}
