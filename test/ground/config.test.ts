import { describe, expect, test } from "bun:test";
import { isTimeZone, readConfig, Settings } from "../../lib/config.ts";
import { refusalOf } from "../harness/refusal.ts";

type Name = keyof Settings;
const NAMES = Object.keys(Settings.properties) as Name[];
const URLS = {
  DATABASE_URL: "mysql://user:password@db:3306/points",
  AMQP_URL: "amqp://user:password@mq:5672",
};

/** The line that refuses a setting. */
function lineOf(name: Name, value: string | undefined): string {
  const { code, message } = refusalOf(() => readConfig({ [name]: value }, [name]));
  expect(code).toBe("INVALID_SETTING");
  return message;
}

describe("readConfig() gives", () => {
  test("a default that keeps its own rule for everything but the URLs", () => {
    expect(Object.keys(readConfig(URLS, NAMES))).toEqual(NAMES);
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
    ["HOST", "::1", "::1"],
    ["PORT", "0", 0],
    ["AGGREGATE_TIME_ZONE", "America/Argentina/Buenos_Aires", "America/Argentina/Buenos_Aires"],
    ["ALLOW_LOSSY_DATABASE", "true", true],
    ["ALLOW_LOSSY_DATABASE", "false", false],
    ["LOG_LEVEL", "debug", "debug"],
  ])("%s=%s as %p", (name, text, value) => {
    expect(readConfig({ [name]: text }, [name])[name] as unknown).toBe(value);
  });
});

describe("readConfig() refuses, in one line with variable, rule and value,", () => {
  test.each<[Name, string, string[]]>([
    [
      "PORT",
      "a whole number from 0 to 65535",
      ["-1", "1.5", "80.0", "1e3", "0x50", " 80", "80\n", "http", "NaN", "9007199254740993"],
    ],
    ["ALLOW_LOSSY_DATABASE", "true or false", ["yes", "TRUE", "1"]],
    ["LOG_LEVEL", "one of trace, debug, info, warn, error, fatal", ["loud", "INFO"]],
    ["QUEUE", "1 to 200 of A-Z, a-z, 0-9, ., _ and -", ["a b", "q".repeat(201)]],
    ["HOST", "an IP address or a host name of this machine", ["a b"]],
    ["AGGREGATE_TIME_ZONE", "UTC or the name of a time zone like Asia/Tokyo", ["Asia/Tky", "JST", "UTC+9"]],
  ])("%s, which must be %s", (name, rule, values) => {
    for (const value of values) {
      const start = `Cannot start as ${name} must be ${rule}: received ${JSON.stringify(value).slice(0, 60)}`;
      expect(lineOf(name, value)).toStartWith(start);
    }
  });

  test("all wrong settings at once", () => {
    const env = { ...URLS, PORT: "http", LEASE_MS: "999", LOG_LEVEL: "info" };
    expect(() => readConfig(env, ["PORT", "LOG_LEVEL", "LEASE_MS"])).toThrow(
      'Cannot start as PORT must be a whole number from 0 to 65535: received "http"; and as LEASE_MS must be a whole number from 1000 to 86400000: received "999"',
    );
  });

  test.each(NAMES.filter((name) => "minimum" in Settings.properties[name]))(
    "%s beyond its limits, and takes its limits",
    (name) => {
      const { minimum, maximum } = Settings.properties[name] as { minimum: number; maximum: number };
      for (const limit of [minimum, maximum]) {
        expect(readConfig({ [name]: String(limit) }, [name])[name] as unknown).toBe(limit);
      }
      for (const beyond of [minimum - 1, maximum + 1]) {
        expect(lineOf(name, String(beyond))).toBe(
          `Cannot start as ${name} must be a whole number from ${minimum} to ${maximum}: received "${beyond}"`,
        );
      }
    },
  );

  test.each(["DATABASE_URL", "AMQP_URL"] as const)("%s if it is not set, as it has no default", (name) => {
    for (const value of [undefined, ""]) {
      expect(lineOf(name, value)).toMatch(
        new RegExp(`^Cannot start as ${name} must be like \\S+: it is not set$`),
      );
    }
  });
});

describe("readConfig() never shows a password:", () => {
  const secret = "s3cret";
  const NOT_SHOWN = "a value that is not a URL (not shown, as it may contain a password)";

  test.each<[Name, string, string]>([
    ["DATABASE_URL", `postgres://u:${secret}@h/d`, "postgres://…@h/d"],
    ["DATABASE_URL", `mysql://u:${secret}@h`, "mysql://…@h"],
    ["DATABASE_URL", `mysql://u:${secret}@h:3306/`, "mysql://…@h:3306/"],
    ["DATABASE_URL", `mysql://u@h?password=${secret}`, "mysql://…@h/"],
    ["DATABASE_URL", `mysql://u:%zz${secret}@h/d`, "mysql://…@h/d"],
    ["DATABASE_URL", `u:${secret}@h/d`, NOT_SHOWN],
    // A password with a slash that is not encoded: it looks like a URL, but its port would be "s3".
    ["DATABASE_URL", "mysql://u:s3/s3cret@h/d", NOT_SHOWN],
    ["DATABASE_URL", `mysql://u:${secret}@h:99999/d`, NOT_SHOWN],
    ["AMQP_URL", `http://u:${secret}@h`, "http://…@h/"],
    ["AMQP_URL", `amqp://u:s3/${secret}@h`, NOT_SHOWN],
  ])("%s=%s", (name, value, shown) => {
    expect(lineOf(name, value)).toEndWith(`: received ${shown}`);
    expect(lineOf(name, value)).not.toContain(secret);
  });
});

test("isTimeZone() takes the names of the IANA database, and no others that Intl knows", () => {
  const names = ["UTC", "Asia/Tokyo", "America/Argentina/Buenos_Aires", "Etc/GMT+5"];
  expect(names.filter(isTimeZone)).toEqual(names);
  expect(["asia/tokyo", "Asia/Nowhere", "JST", "+09:00", "Asia/", ""].filter(isTimeZone)).toEqual([]);
});
