import { expect } from "bun:test";
import { randomBytes } from "node:crypto";
import { pino } from "pino";
import { DatabaseError } from "../../lib/database_errors.ts";

/** The servers' URLs; `setup.ts` has made sure that they are set. */
export const DATABASE_URL = Bun.env.DATABASE_URL ?? "";
export const AMQP_URL = Bun.env.AMQP_URL ?? "";

/** A logger that says nothing. */
export const silent = pino({ level: "silent" });

/** A name that no other run on these servers uses. */
export function uniqueName(prefix: string): string {
  return `${prefix}_${randomBytes(6).toString("hex")}`;
}

/** The DatabaseError that some work must end with. */
export async function errorOf(work: Promise<unknown>): Promise<DatabaseError> {
  const error = await work.then(
    () => undefined,
    (thrown) => thrown,
  );
  expect(error).toBeInstanceOf(DatabaseError);
  return error;
}

/** Waits until `condition` gives a value that is not false, undefined or null; fails with `what` after `withinMs`. */
export async function until<T>(
  what: string | (() => string),
  condition: () => T | Promise<T>,
  withinMs = 20_000,
): Promise<NonNullable<Exclude<T, false>>> {
  for (const end = performance.now() + withinMs; ; await Bun.sleep(20)) {
    const value = await condition();
    if (value !== false && value !== undefined && value !== null)
      return value as NonNullable<Exclude<T, false>>;
    if (performance.now() < end) continue;
    throw new Error(`Not within ${withinMs} ms: ${typeof what === "string" ? what : what()}`);
  }
}
