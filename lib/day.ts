import { Type } from "@sinclair/typebox";
import { type BrokenRule, showValue } from "./errors.ts";
import { type FieldRule, LATEST_MS, parseText, parseTime, refuseBroken } from "./input.ts";

/** A day of the calendar; which moments it holds is a question of the time zone. */
export const Day = Type.String({
  format: "date",
  description: "a day of the calendar, from 1970-01-01 to 9999-12-31",
  examples: ["2026-01-31"],
});

export const dayRule: FieldRule = (value, place) => {
  const explanation = `${place} must be a day like 2026-01-31, from 1970 to 9999: received ${showValue(value)}`;
  if (typeof value !== "string" || !/^\d{4}-\d\d-\d\d$/.test(value)) {
    return { sentence: `${place} must be a day like 2026-01-31`, explanation };
  }
  const exists = parseTime(`${value}T00:00:00Z`, place) instanceof Date;
  return exists ? undefined : { sentence: `${place} must be a day that exists`, explanation };
};

/**
 * Reads a day from outside.
 *
 * @param place names the value, e.g. `--from`
 * @throws {DomainError} INVALID_INPUT
 */
export function parseDay(value: unknown, place: string): string {
  return parseText(value, dayRule, { place, what: "day" });
}

/** Whether it is the name of a time zone, e.g. `Asia/Tokyo`, in the spelling of the IANA database. */
export function isTimeZone(name: string): boolean {
  if (name === "UTC") return true;
  if (!/^[A-Z][A-Za-z_]+(\/[A-Za-z0-9_+-]+)+$/.test(name)) return false;
  try {
    // What differs only in case is a name to it as well.
    return new Intl.DateTimeFormat("en", { timeZone: name }).resolvedOptions().timeZone !== undefined;
  } catch {
    return false;
  }
}

/** The day that holds a moment. */
export function dayOf(time: Date, timeZone: string): string {
  return Temporal.Instant.fromEpochMilliseconds(time.getTime())
    .toZonedDateTimeISO(timeZone)
    .toPlainDate()
    .toString();
}

/** From when until before when a day lasts: 24 hours, 23 or 25 where clocks change, none where a zone has left it out. */
export function boundsOf(day: string, timeZone: string): { from: Date; until: Date } {
  const date = Temporal.PlainDate.from(day);
  const startOf = (one: Temporal.PlainDate) =>
    new Date(Math.min(LATEST_MS, one.toZonedDateTime(timeZone).epochMilliseconds));
  return { from: startOf(date), until: startOf(date.add({ days: 1 })) };
}

/** The day some days after another. */
export function plusDays(day: string, days: number): string {
  return Temporal.PlainDate.from(day).add({ days }).toString();
}

/** How many days there are from one to another, both included. */
function countDays(from: string, to: string): number {
  return Temporal.PlainDate.from(from).until(to).days + 1;
}

/** The days from one to another, both included. */
export function daysBetween(from: string, to: string): string[] {
  const days: string[] = [];
  for (let left = countDays(from, to); left > 0; left--) days.push(plusDays(from, days.length));
  return days;
}

/** The most days that are asked for at once: a year. */
export const MAX_DAYS = 366;
const DEFAULT_DAYS = 31;

/**
 * Some days from outside, both included: without an end until today, without a beginning the last 31.
 *
 * @throws {DomainError} INVALID_INPUT where they are no days, in the wrong order or more than 366
 */
export function newDays(
  { from, to }: { from?: unknown; to?: unknown },
  {
    timeZone,
    places = { from: "from", to: "to" },
  }: { timeZone: string; places?: { from: string; to: string } },
): { from: string; to: string } {
  const last = to === undefined ? dayOf(new Date(), timeZone) : parseDay(to, places.to);
  const first = from === undefined ? plusDays(last, 1 - DEFAULT_DAYS) : parseDay(from, places.from);
  const received = `received ${first} and ${last}`;
  const broken: BrokenRule[] = [];
  const count = countDays(first, last);
  if (count < 1) {
    broken.push({
      sentence: "from must not be after to",
      explanation: `${places.from} must not be after ${places.to}: ${received}`,
    });
  } else if (count > MAX_DAYS) {
    broken.push({
      sentence: `days must be at most ${MAX_DAYS}`,
      explanation: `${places.from} and ${places.to} must be the ends of at most ${MAX_DAYS} days: ${received}`,
    });
  }
  refuseBroken(broken, "range of days");
  return { from: first, to: last };
}
