import { describe, expect, test } from "bun:test";
import { readConfig, Settings } from "../lib/config.ts";
import { DomainError } from "../lib/errors.ts";

type Name = keyof Settings;
const NAMES = Object.keys(Settings.properties) as Name[];
const URLS = {
  DATABASE_URL: "mysql://user:password@db:3306/points",
  AMQP_URL: "amqp://user:password@mq:5672",
};

function refusalOf(name: Name, value: string | undefined): string {
  try {
    readConfig({ [name]: value }, [name]);
  } catch (error) {
    expect(error).toBeInstanceOf(DomainError);
    expect((error as DomainError).code).toBe("INVALID_SETTING");
    return (error as DomainError).message;
  }
  throw new Error(`${name}=${value} was taken`);
}

describe("readConfig() gives", () => {
  test("the defaults where nothing but the URLs is set", () => {
    expect(readConfig(URLS, NAMES)).toEqual({
      ...URLS,
      QUEUE: "reservationQueue",
      HOST: "127.0.0.1",
      PORT: 1323,
      SCHEDULER_PORT: 1324,
      WORKER_PORT: 1325,
      DATABASE_CONNECTIONS: 10,
      RESERVE_BATCH: 500,
      SCAN_INTERVAL_MS: 10_000,
      SCAN_BATCH: 2_000,
      LEASE_MS: 15_000,
      PUBLISH_CHUNK: 1_000,
      PUBLISH_TIMEOUT_MS: 5_000,
      QUEUED_RESERVATIONS: 20_000,
      WORKER_BATCH: 1_000,
      WORKER_PREFETCH: 10,
      WORKER_TRANSACTIONS: 2,
      MAX_ATTEMPTS: 10,
      AGGREGATE_INTERVAL_MS: 3_600_000,
      AGGREGATE_TIME_ZONE: "UTC",
      ALLOW_LOSSY_DATABASE: false,
      LOG_LEVEL: "info",
    });
  });

  test("the default for an empty variable, as compose files write one", () => {
    expect(readConfig({ PORT: "" }, ["PORT"])).toEqual({ PORT: 1323 });
  });

  test("only what was asked for: one process does not stop at another one's setting", () => {
    expect(readConfig({ PORT: "8080", WORKER_BATCH: "many" }, ["PORT"])).toEqual({ PORT: 8080 });
  });

  test.each<[Name, string, unknown]>([
    ["DATABASE_URL", "mariadb://u:p@h/d", "mariadb://u:p@h/d"],
    ["AMQP_URL", "amqps://h", "amqps://h"],
    ["QUEUE", "points.v2_a-b", "points.v2_a-b"],
    ["HOST", "0.0.0.0", "0.0.0.0"],
    ["HOST", "::1", "::1"],
    ["PORT", "0", 0],
    ["PORT", "65535", 65_535],
    ["AGGREGATE_INTERVAL_MS", "0", 0],
    ["AGGREGATE_TIME_ZONE", "Asia/Tokyo", "Asia/Tokyo"],
    ["AGGREGATE_TIME_ZONE", "America/Argentina/Buenos_Aires", "America/Argentina/Buenos_Aires"],
    ["LEASE_MS", "1000", 1_000],
    ["LEASE_MS", "86400000", 86_400_000],
    ["PUBLISH_CHUNK", "1", 1],
    ["ALLOW_LOSSY_DATABASE", "true", true],
    ["ALLOW_LOSSY_DATABASE", "false", false],
    ["LOG_LEVEL", "debug", "debug"],
  ])("%s=%s as %p", (name, text, value) => {
    expect(readConfig({ [name]: text }, [name])[name] as unknown).toBe(value);
  });
});

describe("readConfig() refuses, in one line with variable, rule and value,", () => {
  const port = "Cannot start as PORT must be a whole number from 0 to 65535: received";
  const timeZone =
    "Cannot start as AGGREGATE_TIME_ZONE must be UTC or the name of a time zone like Asia/Tokyo: received";
  const lease = "Cannot start as LEASE_MS must be a whole number from 1000 to 86400000: received";
  const lossy = "Cannot start as ALLOW_LOSSY_DATABASE must be true or false: received";

  test.each<[Name, string, string]>([
    ["PORT", "65536", `${port} "65536"`],
    ["PORT", "-1", `${port} "-1"`],
    ["PORT", "1.5", `${port} "1.5"`],
    ["PORT", "80.0", `${port} "80.0"`],
    ["PORT", "1e3", `${port} "1e3"`],
    ["PORT", "0x50", `${port} "0x50"`],
    ["PORT", " 80", `${port} " 80"`],
    ["PORT", "80\n", `${port} "80\\n"`],
    ["PORT", "http", `${port} "http"`],
    ["PORT", "NaN", `${port} "NaN"`],
    ["PORT", "9007199254740993", `${port} "9007199254740993"`],
    ...["Asia/Tky", "asia/tokyo", "JST", "+09:00", "Asia/", "UTC+9"].map((zone): [Name, string, string] => [
      "AGGREGATE_TIME_ZONE",
      zone,
      `${timeZone} ${JSON.stringify(zone)}`,
    ]),
    ["LEASE_MS", "999", `${lease} "999"`],
    ["LEASE_MS", "86400001", `${lease} "86400001"`],
    ["ALLOW_LOSSY_DATABASE", "yes", `${lossy} "yes"`],
    ["ALLOW_LOSSY_DATABASE", "TRUE", `${lossy} "TRUE"`],
    ["ALLOW_LOSSY_DATABASE", "1", `${lossy} "1"`],
    [
      "LOG_LEVEL",
      "loud",
      'Cannot start as LOG_LEVEL must be one of trace, debug, info, warn, error, fatal: received "loud"',
    ],
    [
      "QUEUE",
      "a b",
      'Cannot start as QUEUE must be text that matches ^[A-Za-z0-9._-]{1,200}$: received "a b"',
    ],
    ["HOST", "a b", 'Cannot start as HOST must be text that matches ^\\S+$: received "a b"'],
  ])("%s=%p", (name, value, message) => {
    expect(refusalOf(name, value)).toBe(message);
  });

  test("all wrong settings at once", () => {
    const env = { ...URLS, PORT: "http", LEASE_MS: "999", LOG_LEVEL: "info" };
    expect(() => readConfig(env, ["PORT", "LOG_LEVEL", "LEASE_MS"])).toThrow(
      'Cannot start as PORT must be a whole number from 0 to 65535: received "http"; and as LEASE_MS must be a whole number from 1000 to 86400000: received "999"',
    );
  });

  const integers = NAMES.filter((name) => "minimum" in Settings.properties[name]);

  test.each(integers)("%s beyond its limits, and takes its limits", (name) => {
    const { minimum, maximum } = Settings.properties[name] as { minimum: number; maximum: number };
    expect(readConfig({ [name]: String(minimum) }, [name])[name] as unknown).toBe(minimum);
    expect(readConfig({ [name]: String(maximum) }, [name])[name] as unknown).toBe(maximum);
    for (const beyond of [minimum - 1, maximum + 1]) {
      expect(refusalOf(name, String(beyond))).toBe(
        `Cannot start as ${name} must be a whole number from ${minimum} to ${maximum}: received "${beyond}"`,
      );
    }
  });

  test.each<[Name, string | undefined]>([
    ["DATABASE_URL", undefined],
    ["DATABASE_URL", ""],
    ["AMQP_URL", undefined],
  ])("%s where it is %p and has no default", (name, value) => {
    expect(refusalOf(name, value)).toMatch(
      new RegExp(`^Cannot start as ${name} must be like \\S+: it is not set$`),
    );
  });
});

describe("readConfig() never shows a password:", () => {
  const secret = "s3cret";
  const database =
    "Cannot start as DATABASE_URL must be like mysql://user:password@host:3306/database: received";
  const notShown = "a value that is no URL (not shown, it may hold a password)";

  test.each<[Name, string, string]>([
    ["DATABASE_URL", `postgres://u:${secret}@h/d`, `${database} postgres://…@h/d`],
    ["DATABASE_URL", `mysql://u:${secret}@h`, `${database} mysql://…@h`],
    ["DATABASE_URL", `mysql://u:${secret}@h:3306/`, `${database} mysql://…@h:3306/`],
    ["DATABASE_URL", `mysql://u@h?password=${secret}`, `${database} mysql://…@h`],
    ["DATABASE_URL", `mysql://u:%zz${secret}@h/d`, `${database} mysql://…@h/d`],
    ["DATABASE_URL", secret, `${database} ${notShown}`],
    ["DATABASE_URL", `u:${secret}@h/d`, `${database} ${notShown}`],
    // A password with a slash that is not encoded: it looks like a URL, but its port would be "s3".
    ["DATABASE_URL", "mysql://u:s3/s3cret@h/d", `${database} ${notShown}`],
    ["DATABASE_URL", `mysql://u:${secret}@h:99999/d`, `${database} ${notShown}`],
    ["AMQP_URL", `http://u:${secret}@h`, `received http://…@h`],
    ["AMQP_URL", `amqp://u:s3/${secret}@h`, `received ${notShown}`],
  ])("%s=%s", (name, value, message) => {
    const refusal = refusalOf(name, value);
    expect(refusal).toContain(message);
    expect(refusal).not.toContain(secret);
  });
});
