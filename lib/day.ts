import { Type } from "@sinclair/typebox";
import { showValue } from "./errors.ts";
import { type FieldRule, LATEST_MS, parseText } from "./input.ts";

/** A day of the calendar; which moments it holds is a question of the time zone. */
export const Day = Type.String({
  format: "date",
  description: "a day of the calendar, from 1970-01-01 to 9999-12-31",
  examples: ["2026-01-31"],
});

const EARLIEST = "1970-01-01";

export const dayRule: FieldRule = (value, place) => {
  const explanation = `${place} must be a day like 2026-01-31, from 1970 to 9999: received ${showValue(value)}`;
  if (typeof value !== "string" || !/^\d{4}-\d\d-\d\d$/.test(value)) {
    return { sentence: `${place} must be a day like 2026-01-31`, explanation };
  }
  const date = new Date(`${value}T00:00:00Z`);
  const exists = !Number.isNaN(date.getTime()) && date.toISOString().startsWith(value) && value >= EARLIEST;
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
