import { describe, expect, test } from "bun:test";
import { boundsOf, dayOf, dayRule, daysBetween, isTimeZone, newDays } from "../lib/day.ts";
import { DomainError } from "../lib/errors.ts";

const HOUR_MS = 3_600_000;

describe("boundsOf() gives the moments of a day", () => {
  test.each([
    ["2026-01-31", "UTC", "2026-01-31T00:00:00.000Z", 24],
    ["2026-01-31", "Asia/Tokyo", "2026-01-30T15:00:00.000Z", 24],
    ["2026-03-08", "America/New_York", "2026-03-08T05:00:00.000Z", 23],
    ["2026-11-01", "America/New_York", "2026-11-01T04:00:00.000Z", 25],
    ["2026-03-29", "Europe/Berlin", "2026-03-28T23:00:00.000Z", 23],
    // Midnight itself was left out.
    ["2018-11-04", "America/Sao_Paulo", "2018-11-04T03:00:00.000Z", 23],
    // Half an hour.
    ["2026-04-05", "Australia/Lord_Howe", "2026-04-04T13:00:00.000Z", 24.5],
    // A whole day that was left out.
    ["2011-12-30", "Pacific/Apia", "2011-12-30T10:00:00.000Z", 0],
    ["2011-12-31", "Pacific/Apia", "2011-12-30T10:00:00.000Z", 24],
  ])("%s of %s begins at %s and has %d hours", (day, zone, begins, hours) => {
    const { from, until } = boundsOf(day, zone);
    expect(from.toISOString()).toBe(begins);
    expect((until.getTime() - from.getTime()) / HOUR_MS).toBe(hours);
  });

  test("which dayOf() gives back, to the millisecond", () => {
    for (const zone of [
      "UTC",
      "Asia/Tokyo",
      "America/New_York",
      "Australia/Lord_Howe",
      "America/Sao_Paulo",
    ]) {
      for (const day of daysBetween("2018-01-01", "2018-12-31")) {
        const { from, until } = boundsOf(day, zone);
        expect([dayOf(from, zone), dayOf(new Date(until.getTime() - 1), zone)]).toEqual([day, day]);
      }
    }
  });

  test("and for the last day that MySQL knows its last moment", () => {
    expect(boundsOf("9999-12-31", "UTC").until.toISOString()).toBe("9999-12-31T23:59:59.999Z");
  });
});

test.each([
  ["UTC", true],
  ["Asia/Tokyo", true],
  ["America/Argentina/Buenos_Aires", true],
  ["Etc/GMT+5", true],
  ["asia/tokyo", false],
  ["Asia/Nowhere", false],
  ["JST", false],
  ["+09:00", false],
  ["", false],
])("isTimeZone(%p) is %p", (name, is) => {
  expect(isTimeZone(name)).toBe(is);
});

test.each([
  ["2026-01-31", undefined],
  ["2024-02-29", undefined],
  ["1970-01-01", undefined],
  ["9999-12-31", undefined],
  ["2026-02-29", "from must be a day that exists"],
  ["2026-13-01", "from must be a day that exists"],
  ["1969-12-31", "from must be a day that exists"],
  ["2026-1-31", "from must be a day like 2026-01-31"],
  ["2026-01-31T00:00:00Z", "from must be a day like 2026-01-31"],
  ["", "from must be a day like 2026-01-31"],
  [undefined, "from must be a day like 2026-01-31"],
  [20260131, "from must be a day like 2026-01-31"],
])("dayRule() says of %p: %p", (value, sentence) => {
  expect(dayRule(value, "from")?.sentence).toBe(sentence as string);
});

describe("newDays()", () => {
  const options = { timeZone: "UTC" };

  test("gives the last 31 days where nothing is said, and those until an end", () => {
    const { from, to } = newDays({}, options);
    expect(to).toBe(dayOf(new Date(), "UTC"));
    expect(daysBetween(from, to)).toHaveLength(31);
    expect(newDays({ to: "2026-03-01" }, options)).toEqual({ from: "2026-01-30", to: "2026-03-01" });
  });

  test.each([
    [{ from: "2026-03-02", to: "2026-03-01" }, "from must not be after to"],
    [{ from: "2025-01-01", to: "2026-01-02" }, "days must be at most 366"],
  ])("refuses %p", (days, sentence) => {
    try {
      newDays(days, options);
      expect.unreachable();
    } catch (error) {
      expect(error).toBeInstanceOf(DomainError);
      expect((error as DomainError).brokenRules.map((rule) => rule.sentence)).toEqual([sentence]);
    }
  });

  test("takes a year, leap years too", () => {
    expect(daysBetween("2024-01-01", "2024-12-31")).toHaveLength(366);
    expect(newDays({ from: "2024-01-01", to: "2024-12-31" }, options).from).toBe("2024-01-01");
  });
});
