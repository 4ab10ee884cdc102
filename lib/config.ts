import { type Static, type TSchema, Type } from "@sinclair/typebox";
import { Value } from "@sinclair/typebox/value";
import { isTimeZone } from "./day.ts";
import { DomainError, showValue } from "./errors.ts";

/** A setting that is a whole number; a default that suits production. */
function whole(minimum: number, maximum: number, value: number, description: string) {
  return Type.Integer({ minimum, maximum, default: value, description });
}

/** Every setting: the variable, its rule, its default. The README's table says the same in more words. */
export const Settings = Type.Object({
  DATABASE_URL: Type.String({
    pattern: "^(mysql|mariadb)://[^/]+/[^/?]+",
    description: "MySQL, with database",
  }),
  AMQP_URL: Type.String({ pattern: "^amqps?://[^/]+", description: "RabbitMQ" }),
  QUEUE: Type.String({
    pattern: "^[A-Za-z0-9._-]{1,200}$",
    default: "reservationQueue",
    description: "queue of due reservations; its dead letters go to the queue of this name and .dead",
  }),
  HOST: Type.String({ pattern: "^\\S+$", default: "127.0.0.1", description: "address to listen on" }),
  PORT: whole(0, 65_535, 1323, "port of the API; 0 takes a free one"),
  SCHEDULER_PORT: whole(0, 65_535, 1324, "port of the scheduler's health; 0 takes a free one"),
  WORKER_PORT: whole(0, 65_535, 1325, "port of the worker's health; 0 takes a free one"),
  // Writers are few by their batches: what needs the others are single reads and changes, of which more at once only queue
  // inside MySQL.
  DATABASE_CONNECTIONS: whole(1, 1_000, 10, "most connections to MySQL of one process"),
  // More than waits in a round trip: at 256 connections batches of 128 made 1.0 ×, of 64 0.8 × the reservations of this.
  RESERVE_BATCH: whole(1, 5_000, 500, "most reservations in one INSERT"),
  SCAN_INTERVAL_MS: whole(10, 3_600_000, 10_000, "longest sleep between two scans"),
  // 2,000 lock for some 40 ms; a larger claim makes those who cancel wait, a smaller one pays the round trips more often.
  SCAN_BATCH: whole(1, 10_000, 2_000, "most reservations of one claim"),
  // As short as what is only waiting allows: 5 s for RabbitMQ's confirms, and 22,000 in front of it in the queue at 2,500
  // grants/s. A shorter one would publish again what a slow database has yet to grant, and so slow it down more.
  LEASE_MS: whole(1_000, 86_400_000, 15_000, "how long a claim holds before the row is claimed again"),
  // As large as a worker's batch: with 500, four workers on two cores took half batches and granted 0.81 × of what one
  // did, with 1,000 0.94 × (`bun run bench --part scale`).
  PUBLISH_CHUNK: whole(1, 1_000, 1_000, "most reservations in one message"),
  PUBLISH_TIMEOUT_MS: whole(100, 60_000, 5_000, "how long to wait for RabbitMQ's confirms"),
  // A second or two of grants at hand; what is behind them can still be cancelled without a worker's doing.
  QUEUED_RESERVATIONS: whole(
    1,
    1_000_000,
    20_000,
    "nothing is claimed while the queue holds this many, each message counted as PUBLISH_CHUNK",
  ),
  // 1,000 grants keep MySQL for some 0.1 s: so long do those wait who want the same balances.
  WORKER_BATCH: whole(1, 5_000, 1_000, "most reservations granted in one transaction"),
  // While one transaction waits for the disk, the other computes: 1.06 × the grants of one on two cores.
  WORKER_TRANSACTIONS: whole(1, 100, 2, "transactions of a worker at once"),
  // Two batches under way and the next ones at hand; what a worker holds is what waits for its lease if it hangs.
  WORKER_PREFETCH: whole(1, 10_000, 10, "most messages in a worker's hands"),
  MAX_ATTEMPTS: whole(1, 100, 10, "failures of its own after which a reservation is FAILED"),
  // An hour's entries are counted within seconds; sooner than that only the figures of today are.
  AGGREGATE_INTERVAL_MS: whole(0, 86_400_000, 3_600_000, "how often the daily totals are made; 0: never"),
  AGGREGATE_TIME_ZONE: Type.String({
    pattern: "^[A-Z][A-Za-z0-9_+/-]*$",
    default: "UTC",
    description: "whose days the totals are of",
  }),
  ALLOW_LOSSY_DATABASE: Type.Boolean({
    default: false,
    description: "run on a MySQL whose settings lose commits",
  }),
  LOG_LEVEL: Type.Union(
    ["trace", "debug", "info", "warn", "error", "fatal"].map((level) => Type.Literal(level)),
    { default: "info", description: "least level that is logged" },
  ),
});
export type Settings = Static<typeof Settings>;

const URLS = ["DATABASE_URL", "AMQP_URL"];

/**
 * Reads the settings that a process needs. An empty variable counts as not set.
 *
 * @throws {DomainError} INVALID_SETTING, one line with the variable, the rule and the value; passwords are left out
 */
export function readConfig<Name extends keyof Settings>(
  env: Record<string, string | undefined>,
  names: readonly Name[],
): Pick<Settings, Name> {
  const broken: string[] = [];
  const config = Object.fromEntries(
    names.map((name) => {
      const value = parse(Settings.properties[name], env[name]);
      const received = findFault(name, value, env[name]);
      if (received) broken.push(`${name} must be ${ruleOf(name)}: ${received}`);
      return [name, value];
    }),
  );
  if (broken.length > 0) {
    throw new DomainError("INVALID_SETTING", `Cannot start as ${broken.join("; and as ")}`);
  }
  return config as Pick<Settings, Name>;
}

/** What is wrong with a setting, or undefined. */
function findFault(name: keyof Settings, value: unknown, text: string | undefined): string | undefined {
  if (value === undefined) return "it is not set";
  const isRight =
    Value.Check(Settings.properties[name], value) &&
    (!URLS.includes(name) || isUrl(String(text))) &&
    (name !== "AGGREGATE_TIME_ZONE" || isTimeZone(String(value)));
  return isRight ? undefined : showSetting(name, String(text));
}

/** Whether the drivers can read it, user and password included. */
function isUrl(text: string): boolean {
  try {
    const { username, password } = new URL(text);
    decodeURIComponent(username + password);
    return true;
  } catch {
    return false;
  }
}

/** The value of a variable, or its default; undefined where it has neither. */
function parse(schema: TSchema, text: string | undefined): unknown {
  if (text === undefined || text === "") return schema.default;
  if (schema.type === "integer" && /^\d{1,15}$/.test(text)) return Number(text);
  if (schema.type === "boolean" && /^(true|false)$/.test(text)) return text === "true";
  return text;
}

/** A value as an error may show it: never a URL's password. */
function showSetting(name: keyof Settings, text: string): string {
  if (!URLS.includes(name)) return `received ${showValue(text)}`;
  const parsed = URL.parse(text);
  return parsed?.host
    ? `received ${parsed.protocol}//${parsed.username ? "…@" : ""}${parsed.host}${parsed.pathname}`
    : "received a value that is no URL (not shown, it may hold a password)";
}

function ruleOf(name: keyof Settings): string {
  const schema: TSchema = Settings.properties[name];
  if (name === "DATABASE_URL") return "like mysql://user:password@host:3306/database";
  if (name === "AMQP_URL") return "like amqp://user:password@host:5672";
  if (name === "AGGREGATE_TIME_ZONE") return "UTC or the name of a time zone like Asia/Tokyo";
  if (schema.type === "integer") return `a whole number from ${schema.minimum} to ${schema.maximum}`;
  if (schema.type === "boolean") return "true or false";
  if (schema.anyOf) return `one of ${schema.anyOf.map((option: TSchema) => option.const).join(", ")}`;
  return `text that matches ${schema.pattern}`;
}
