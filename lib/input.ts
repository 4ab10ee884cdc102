import { type Static, type TObject, type TSchema, Type } from "@sinclair/typebox";
import { TypeCompiler } from "@sinclair/typebox/compiler";
import { type BrokenRule, DomainError, showValue } from "./errors.ts";

/** Says which rule a value breaks, or nothing where it breaks none. `place` names the value, e.g. `user_id`. */
export type FieldRule = (value: unknown, place: string) => BrokenRule | undefined;

/** A rule for each field of a schema. */
export type FieldRules<Schema extends TObject> = { [Field in keyof Static<Schema>]-?: FieldRule };

/**
 * Makes the rule that a value must match its schema, the one that the description shows.
 *
 * @param sentence what clients are told, e.g. `user id is invalid format`
 * @param must the rule in words, e.g. `1 to 20 of A-Z, a-z and 0-9`
 */
export function ruleOf(schema: TSchema, { sentence, must }: { sentence: string; must: string }): FieldRule {
  const compiled = TypeCompiler.Compile(schema);
  return (value, place) =>
    compiled.Check(value)
      ? undefined
      : { sentence, explanation: `${place} must be ${must}: received ${showValue(value)}` };
}

/**
 * Makes the rule of an amount of points, with a sentence of its own for what is no integer, too small or too large.
 *
 * @param name what clients call it, e.g. `point amount`
 */
export function amountRule(
  { minimum = 1, maximum = Number.MAX_SAFE_INTEGER }: { minimum?: number; maximum?: number },
  name: string,
): FieldRule {
  return (value, place) => {
    const received = `received ${showValue(value)}`;
    const range = `${place} must be an integer from ${minimum} to ${maximum}: ${received}`;
    if (value !== undefined && !(typeof value === "number" && Number.isInteger(value))) {
      return {
        sentence: `${name} must be an integer`,
        explanation: `${place} must be a JSON number without a fraction: ${received}`,
      };
    }
    if (value === undefined || value < minimum) {
      return { sentence: `${name} must be greater than ${minimum - 1}`, explanation: range };
    }
    if (value > maximum) return { sentence: `${name} must be at most ${maximum}`, explanation: range };
    return undefined;
  };
}

/** The most unknown fields that are named. */
const MAX_UNKNOWN = 10;

/**
 * All rules that an object breaks: its fields one by one, then the fields that nobody knows. A field that may be left out
 * and is, breaks none.
 */
export function brokenFieldRules<Schema extends TObject>(
  schema: Schema,
  input: unknown,
  rules: FieldRules<Schema>,
): BrokenRule[] {
  if (typeof input !== "object" || input === null || Array.isArray(input)) {
    return [
      {
        sentence: "body must be a JSON object",
        explanation: `the body must be a JSON object: received ${showValue(input)}`,
      },
    ];
  }
  const values = input as Record<string, unknown>;
  const broken: BrokenRule[] = [];
  for (const field in rules) {
    if (values[field] === undefined && !schema.required?.includes(field)) continue;
    const found = rules[field as keyof typeof rules](values[field], field);
    if (found) broken.push(found);
  }
  const unknown = Object.keys(values).filter((field) => !Object.hasOwn(schema.properties, field));
  for (const field of unknown.slice(0, MAX_UNKNOWN)) {
    broken.push({
      sentence: `unknown field ${showValue(field)}`,
      explanation: `the field ${showValue(field)} is not one of ${Object.keys(schema.properties).join(", ")}`,
    });
  }
  return broken;
}

/** Throws where rules are broken. */
export function refuseBroken(broken: readonly BrokenRule[], what: string): void {
  if (broken.length > 0) throw new DomainError("INVALID_INPUT", `The ${what} breaks a rule`, broken);
}

/**
 * Reads a text from outside that has one rule.
 *
 * @param place names the value in the explanation, e.g. `user_id`
 * @param what names it in the message, e.g. `user id`
 * @throws {DomainError} INVALID_INPUT
 */
export function parseText(
  value: unknown,
  rule: FieldRule,
  { place, what }: { place: string; what: string },
): string {
  const broken = rule(value, place);
  refuseBroken(broken ? [broken] : [], what);
  return value as string;
}

/** A moment, as it must be written. */
export const Time = Type.String({
  format: "date-time",
  description:
    "RFC 3339 with seconds and offset, at most milliseconds, from 1970 to 9999 in UTC; in a query + is written %2B",
  examples: ["2029-02-22T22:59:00+09:00"],
});

// Whole seconds and an offset are demanded: a time without a zone would be read in the host's.
const RFC_3339 =
  /^(?<date>\d{4}-\d\d-\d\d)[Tt](?<time>\d\d:\d\d:\d\d)(?:\.(?<fraction>\d{1,3}))?(?:[Zz]|(?<sign>[+-])(?<hours>[01]\d|2[0-3]):(?<minutes>[0-5]\d))$/;
const EARLIEST_MS = Date.UTC(1970, 0, 1);
/** The last millisecond that a DATETIME(3) can hold. */
export const LATEST_MS = Date.UTC(9999, 11, 31, 23, 59, 59, 999);

/** Reads a moment; says which rule it breaks where it is none. */
export function parseTime(value: unknown, place: string): Date | BrokenRule {
  const name = place.replaceAll("_", " ");
  const received = `received ${showValue(value)}`;
  const parts = typeof value === "string" ? RFC_3339.exec(value)?.groups : undefined;
  if (!parts) {
    return {
      sentence: `${name} must be an RFC 3339 time with seconds and offset`,
      explanation: `${place} must look like 2029-02-22T22:59:00+09:00, with at most milliseconds: ${received}`,
    };
  }
  const { date, time, fraction = "0", sign, hours, minutes } = parts;
  const local = new Date(`${date}T${time}.${fraction.padEnd(3, "0")}Z`);
  // Feb 30, 24:00 and second 60 are either no date or come back as another one.
  if (Number.isNaN(local.getTime()) || !local.toISOString().startsWith(`${date}T${time}.`)) {
    return {
      sentence: `${name} must be a date that exists`,
      explanation: `${place} must name a day and a time of day of the calendar: ${received}`,
    };
  }
  const offsetMs = sign ? (sign === "+" ? 1 : -1) * (Number(hours) * 60 + Number(minutes)) * 60_000 : 0;
  const ms = local.getTime() - offsetMs;
  if (ms < EARLIEST_MS || ms > LATEST_MS) {
    return {
      sentence: `${name} must be from 1970 to 9999`,
      explanation: `${place} must be from 1970-01-01T00:00:00.000Z to 9999-12-31T23:59:59.999Z: ${received}`,
    };
  }
  return new Date(ms);
}

/** The rule that a value must be a moment. */
export const timeRule: FieldRule = (value, place) => {
  const time = parseTime(value, place);
  return time instanceof Date ? undefined : time;
};

/** What a client calls a request, so that the same again counts once. */
export const IdempotencyKey = Type.String({
  pattern: "^[A-Za-z0-9_-]{1,100}$",
  description:
    "1 to 100 of A-Z, a-z, 0-9, _ and -. The same key with the same content gets the first answer again",
  examples: ["order-42"],
});

export const idempotencyKeyRule = ruleOf(IdempotencyKey, {
  sentence: "idempotency key is invalid format",
  must: "1 to 100 of A-Z, a-z, 0-9, _ and -",
});

/** The rules of the header `Idempotency-Key`, which counts as much as the body's field `idempotency_key`. */
export function brokenHeaderKeyRules(headerKey: string | undefined, bodyKey: unknown): BrokenRule[] {
  if (headerKey === undefined || headerKey === bodyKey) return [];
  const broken = idempotencyKeyRule(headerKey, "the header Idempotency-Key");
  const differs = bodyKey !== undefined && {
    sentence: "idempotency key differs between header and body",
    explanation: `the header Idempotency-Key and the field idempotency_key must be the same where both are given: received ${showValue(headerKey)} and ${showValue(bodyKey)}`,
  };
  return [broken, differs].filter((rule) => rule !== undefined && rule !== false);
}
