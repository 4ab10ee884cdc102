import { describe, expect, test } from "bun:test";
import { boundsOf, dayField, dayOf, daysBetween, newDays } from "../../lib/accounting/day.ts";
import { sentenceOf, sentencesOf } from "../harness/refusal.ts";

describe("boundsOf()", () => {
  test.each([
    ["2026-01-31", "UTC", "2026-01-31T00:00:00.000Z", 24],
    ["2026-01-31", "Asia/Tokyo", "2026-01-30T15:00:00.000Z", 24],
    ["2026-03-08", "America/New_York", "2026-03-08T05:00:00.000Z", 23],
    ["2026-11-01", "America/New_York", "2026-11-01T04:00:00.000Z", 25],
    // A zone that left out midnight itself, one that moves by half an hour, and one that left out a whole day.
    ["2018-11-04", "America/Sao_Paulo", "2018-11-04T03:00:00.000Z", 23],
    ["2026-04-05", "Australia/Lord_Howe", "2026-04-04T13:00:00.000Z", 24.5],
    ["2011-12-30", "Pacific/Apia", "2011-12-30T10:00:00.000Z", 0],
    ["2011-12-31", "Pacific/Apia", "2011-12-30T10:00:00.000Z", 24],
  ])("%s of %s begins at %s and has %d hours", (day, zone, begins, hours) => {
    const { from, until } = boundsOf(day, zone);
    expect(from.toISOString()).toBe(begins);
    expect((until.getTime() - from.getTime()) / 3_600_000).toBe(hours);
  });

  test.each(["UTC", "Asia/Tokyo", "America/New_York", "Australia/Lord_Howe", "America/Sao_Paulo"])(
    "of %s is what dayOf() says, to the millisecond",
    (zone) => {
      for (const day of daysBetween("2018-01-01", "2018-12-31")) {
        const { from, until } = boundsOf(day, zone);
        expect([dayOf(from, zone), dayOf(new Date(until.getTime() - 1), zone)]).toEqual([day, day]);
      }
    },
  );

  test("ends the last day with the last millisecond of a DATETIME", () => {
    expect(boundsOf("9999-12-31", "UTC").until.toISOString()).toBe("9999-12-31T23:59:59.999Z");
  });
});

test.each<[unknown, string | undefined]>([
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
])("dayField says of %p: %p", (value, sentence) => {
  expect(sentenceOf(dayField, value, "from")).toBe(sentence as string);
});

describe("newDays()", () => {
  const options = { timeZone: "UTC" };

  test("gives the last 31 days, or those until an end", () => {
    const { from, to } = newDays({}, options);
    expect([dayOf(new Date(), "UTC"), dayOf(new Date(Date.now() - 60_000), "UTC")]).toContain(to);
    expect(daysBetween(from, to)).toHaveLength(31);
    expect(newDays({ to: "2026-03-01" }, options)).toEqual({ from: "2026-01-30", to: "2026-03-01" });
  });

  test("takes a year, a leap year too", () => {
    const year = { from: "2024-01-01", to: "2024-12-31" };
    expect(daysBetween(year.from, year.to)).toHaveLength(366);
    expect(newDays(year, options)).toEqual(year);
  });

  test.each([
    [{ from: "2026-03-02", to: "2026-03-01" }, "from must not be after to"],
    [{ from: "2025-01-01", to: "2026-01-02" }, "days must be at most 366"],
  ])("refuses %p", (days, sentence) => {
    expect(sentencesOf(() => newDays(days, options))).toEqual([sentence]);
  });
});
