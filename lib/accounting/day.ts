import { Type } from "@sinclair/typebox";
import { type BrokenRule, showValue } from "../errors.ts";
import { broken, field, invalidInput, LATEST_MS, type Parsed, timeField } from "../field.ts";

/** A calendar day, as text. The time zone decides its start and end. */
export const dayField = field(
  Type.String({
    format: "date",
    description: "a calendar day, from 1970-01-01 to 9999-12-31",
    examples: ["2026-01-31"],
  }),
  { parse: parseDayText },
);

function parseDayText(value: unknown, place: string): Parsed<string> {
  const explanation = `${place} must be a day that exists, like 2026-01-31, from 1970 to 9999: received ${showValue(value)}`;
  if (typeof value !== "string" || !/^\d{4}-\d\d-\d\d$/.test(value)) {
    return broken(`${place} must be a day like 2026-01-31`, explanation);
  }
  const exists = "value" in timeField.parse(`${value}T00:00:00Z`, place);
  return exists ? { value } : broken(`${place} must be a day that exists`, explanation);
}

/** The day of a point in time. */
export function dayOf(time: Date, timeZone: string): string {
  return Temporal.Instant.fromEpochMilliseconds(time.getTime())
    .toZonedDateTimeISO(timeZone)
    .toPlainDate()
    .toString();
}

/**
 * Start (inclusive) and end (exclusive) of a day. It has 24 hours, 23 or 25 if clocks change, and 0 if the time zone skipped the
 * day.
 */
export function boundsOf(day: string, timeZone: string): { from: Date; until: Date } {
  const date = Temporal.PlainDate.from(day);
  const startOf = (one: Temporal.PlainDate) =>
    new Date(Math.min(LATEST_MS, one.toZonedDateTime(timeZone).epochMilliseconds));
  return { from: startOf(date), until: startOf(date.add({ days: 1 })) };
}

/** The day that is `days` days after another. */
export function plusDays(day: string, days: number): string {
  return Temporal.PlainDate.from(day).add({ days }).toString();
}

/** The number of days in a range, both ends included. */
function countDays(from: string, to: string): number {
  return Temporal.PlainDate.from(from).until(to).days + 1;
}

/** The days of a range, both ends included. */
export function daysBetween(from: string, to: string): string[] {
  return Array.from({ length: Math.max(0, countDays(from, to)) }, (_, index) => plusDays(from, index));
}

/** The maximum number of days in one range: a year. */
export const MAX_DAYS = 366;
const DEFAULT_DAYS = 31;

/** A range of days, both ends included. */
export interface Days {
  from: string;
  to: string;
}

/**
 * Makes a range of days. By default, the end is today, and the range has 31 days.
 *
 * @param options.places names both ends in an explanation
 * @throws {DomainError} INVALID_INPUT if the start is after the end, or if there are more than 366 days
 */
export function newDays(
  { from, to }: { from?: string | undefined; to?: string | undefined },
  { timeZone, places = { from: "from", to: "to" } }: { timeZone: string; places?: Days },
): Days {
  const last = to ?? dayOf(new Date(), timeZone);
  const first = from ?? plusDays(last, 1 - DEFAULT_DAYS);
  const rule = brokenRangeRule({ from: first, to: last }, places);
  if (rule) throw invalidInput("range of days", [rule]);
  return { from: first, to: last };
}

function brokenRangeRule({ from, to }: Days, places: Days): BrokenRule | undefined {
  const received = `received ${from} and ${to}`;
  const count = countDays(from, to);
  if (count < 1) {
    return {
      sentence: "from must not be after to",
      explanation: `${places.from} must not be after ${places.to}: ${received}`,
    };
  }
  if (count <= MAX_DAYS) return undefined;
  return {
    sentence: `days must be at most ${MAX_DAYS}`,
    explanation: `there must be at most ${MAX_DAYS} days from ${places.from} to ${places.to}: ${received}`,
  };
}
