import { type Static, type TObject, type TOptional, type TSchema, Type } from "@sinclair/typebox";
import { TypeCompiler } from "@sinclair/typebox/compiler";
import { type BrokenRule, DomainError, showValue } from "./errors.ts";

/** The result of parsing a value from outside: the typed value, or the rule that it breaks. */
export type Parsed<T> = { value: T } | { broken: BrokenRule };

/** A value from outside: the schema for OpenAPI, and the parser that checks and converts the value. */
export interface Field<T = unknown, Schema extends TSchema = TSchema> {
  schema: Schema;
  /** `place` names the value in an explanation, e.g. `user_id`. */
  parse: (value: unknown, place: string) => Parsed<T>;
}

/** The fields of an object, by name. */
export type Fields = Record<string, Field>;

/** The typed values of some fields, by name. */
export type Values<F extends Fields> = { [Name in keyof F]: F[Name] extends Field<infer T> ? T : never };

/** A field whose rule is its schema. `sentence` is for clients; `must` is the rule in words, e.g. `1 to 20 of A-Z`. */
export function field<Schema extends TSchema>(
  schema: Schema,
  rule: { sentence: string; must: string },
): Field<Static<Schema>, Schema>;
/** A field with its own parser. */
export function field<Schema extends TSchema, T>(
  schema: Schema,
  rule: Pick<Field<T>, "parse">,
): Field<T, Schema>;
export function field(
  schema: TSchema,
  rule: { sentence: string; must: string } | Pick<Field, "parse">,
): Field {
  if ("parse" in rule) return { schema, parse: rule.parse };
  const { sentence, must } = rule;
  const compiled = TypeCompiler.Compile(schema);
  return {
    schema,
    parse: (value, place) =>
      compiled.Check(value)
        ? { value }
        : broken(sentence, `${place} must be ${must}: received ${showValue(value)}`),
  };
}

/** Makes the result of a parser that refuses a value. */
export function broken(sentence: string, explanation: string): { broken: BrokenRule } {
  return { broken: { sentence, explanation } };
}

/** The same field, but optional. */
export function optional<T, Schema extends TSchema>({
  schema,
  parse,
}: Field<T, Schema>): Field<T | undefined, TOptional<Schema>> {
  return {
    schema: Type.Optional(schema) as TOptional<Schema>,
    parse: (value, place) => (value === undefined ? { value } : parse(value, place)),
  };
}

/** The same field with another description in OpenAPI. */
export function described<T, Schema extends TSchema>(
  { schema, parse }: Field<T, Schema>,
  description: string,
): Field<T, Schema> {
  return { schema: { ...schema, description }, parse };
}

/**
 * A field for an amount, with one sentence each for a value that is not an integer, too small or too large.
 *
 * @param name the name in sentences, e.g. `point amount`
 */
export function amountField<Schema extends TSchema & { minimum?: number; maximum?: number }>(
  schema: Schema,
  name: string,
): Field<number, Schema> {
  const { minimum = 1, maximum = Number.MAX_SAFE_INTEGER } = schema;
  return field(schema, {
    parse(value, place): Parsed<number> {
      const received = `received ${showValue(value)}`;
      const range = `${place} must be an integer from ${minimum} to ${maximum}: ${received}`;
      if (value === undefined) return broken(`${name} must be greater than ${minimum - 1}`, range);
      if (typeof value !== "number" || !Number.isInteger(value)) {
        return broken(
          `${name} must be an integer`,
          `${place} must be a JSON number without a fraction: ${received}`,
        );
      }
      if (value < minimum) return broken(`${name} must be greater than ${minimum - 1}`, range);
      if (value > maximum) return broken(`${name} must be at most ${maximum}`, range);
      return { value };
    },
  });
}

/** The schema of an object with these fields and no others. */
export function objectSchema<F extends Fields>(
  fields: F,
  options: { minProperties?: number } = {},
): TObject<{ [Name in keyof F]: F[Name]["schema"] }> {
  const schemas = Object.fromEntries(Object.entries(fields).map(([name, { schema }]) => [name, schema]));
  return Type.Object(schemas as { [Name in keyof F]: F[Name]["schema"] }, {
    additionalProperties: false,
    ...options,
  });
}

/** The maximum number of unknown fields that are named. */
const MAX_UNKNOWN = 10;

/** Parses an object. Returns its values, or all rules that it breaks, with unknown fields last. */
export function checkFields<F extends Fields>(
  fields: F,
  input: unknown,
): { values: Values<F> } | { broken: BrokenRule[] } {
  if (typeof input !== "object" || input === null || Array.isArray(input)) {
    const explanation = `the body must be a JSON object: received ${showValue(input)}`;
    return { broken: [{ sentence: "body must be a JSON object", explanation }] };
  }
  const given = input as Record<string, unknown>;
  const values: Record<string, unknown> = {};
  const brokenRules: BrokenRule[] = [];
  // Not by Object.entries(), which would make arrays for each reservation.
  for (const name in fields) {
    const { parse } = fields[name] as Field;
    const parsed = parse(given[name], name);
    if ("broken" in parsed) brokenRules.push(parsed.broken);
    else values[name] = parsed.value;
  }
  const unknown = Object.keys(given).filter((name) => !Object.hasOwn(fields, name));
  for (const name of unknown.slice(0, MAX_UNKNOWN)) {
    brokenRules.push({
      sentence: `unknown field ${showValue(name)}`,
      explanation: `the field ${showValue(name)} is not one of ${Object.keys(fields).join(", ")}`,
    });
  }
  return brokenRules.length > 0 ? { broken: brokenRules } : { values: values as Values<F> };
}

/**
 * Parses an object.
 *
 * @param options.what names the object in the message, e.g. `reservation`
 * @param options.more broken rules that were found elsewhere
 * @throws {DomainError} INVALID_INPUT, with every broken rule
 */
export function parseFields<F extends Fields>(
  fields: F,
  input: unknown,
  { what, more = [] }: { what: string; more?: readonly BrokenRule[] },
): Values<F> {
  const checked = checkFields(fields, input);
  if ("broken" in checked) throw invalidInput(what, [...checked.broken, ...more]);
  if (more.length > 0) throw invalidInput(what, more);
  return checked.values;
}

/**
 * Parses one value.
 *
 * @param options.place names the value in the explanation, e.g. `user_id`
 * @param options.what names it in the message, e.g. `user id`
 * @throws {DomainError} INVALID_INPUT
 */
export function parseField<T>(
  { parse }: Field<T>,
  value: unknown,
  { place, what }: { place: string; what: string },
): T {
  const parsed = parse(value, place);
  if ("broken" in parsed) throw invalidInput(what, [parsed.broken]);
  return parsed.value;
}

/** The error for input that breaks rules. */
export function invalidInput(what: string, brokenRules: readonly BrokenRule[]): DomainError {
  return new DomainError("INVALID_INPUT", `The ${what} breaks a rule`, brokenRules);
}

// Seconds and an offset are required: a time without an offset would be read in the time zone of the host.
const RFC_3339 =
  /^(?<date>\d{4}-\d\d-\d\d)[Tt](?<time>\d\d:\d\d:\d\d)(?:\.(?<fraction>\d{1,3}))?(?:[Zz]|(?<sign>[+-])(?<hours>[01]\d|2[0-3]):(?<minutes>[0-5]\d))$/;
const EARLIEST_MS = Date.UTC(1970, 0, 1);
/** The last millisecond that a DATETIME(3) can hold. */
export const LATEST_MS = Date.UTC(9999, 11, 31, 23, 59, 59, 999);

/** A point in time. */
export const timeField = field(
  Type.String({
    format: "date-time",
    description:
      "RFC 3339 with seconds, offset and at most 3 decimals, from 1970 to 9999 in UTC; in a query, write + as %2B",
    examples: ["2029-02-22T22:59:00+09:00"],
  }),
  { parse: parseTime },
);

function parseTime(value: unknown, place: string): Parsed<Date> {
  const name = place.replaceAll("_", " ");
  const parts = typeof value === "string" ? RFC_3339.exec(value)?.groups : undefined;
  if (!parts) {
    return broken(
      `${name} must be an RFC 3339 time with seconds and offset`,
      `${place} must look like 2029-02-22T22:59:00+09:00, with at most 3 decimals: received ${showValue(value)}`,
    );
  }
  const { date, time, fraction = "0", sign, hours, minutes } = parts;
  const local = new Date(`${date}T${time}.${fraction.padEnd(3, "0")}Z`);
  // February 30, 24:00 and second 60 are invalid, or are converted to another time.
  if (Number.isNaN(local.getTime()) || !local.toISOString().startsWith(`${date}T${time}.`)) {
    return broken(
      `${name} must be a date that exists`,
      `${place} must be a date and a time of day that exist: received ${showValue(value)}`,
    );
  }
  const offsetMs = sign ? (sign === "+" ? 1 : -1) * (Number(hours) * 60 + Number(minutes)) * 60_000 : 0;
  const ms = local.getTime() - offsetMs;
  if (ms < EARLIEST_MS || ms > LATEST_MS) {
    return broken(
      `${name} must be from 1970 to 9999`,
      `${place} must be from 1970-01-01T00:00:00.000Z to 9999-12-31T23:59:59.999Z: received ${showValue(value)}`,
    );
  }
  return { value: new Date(ms) };
}

/** The client's key for a request, so that sending it again has no second effect. */
export const idempotencyKeyField = field(
  Type.String({
    pattern: "^[A-Za-z0-9_-]{1,100}$",
    description:
      "1 to 100 of A-Z, a-z, 0-9, _ and -. The same key with the same content gets the first answer again",
    examples: ["order-42"],
  }),
  { sentence: "idempotency key is invalid format", must: "1 to 100 of A-Z, a-z, 0-9, _ and -" },
);

/** The rules that the header `Idempotency-Key` breaks. It is equivalent to the body's field `idempotency_key`. */
export function headerKeyRules(headerKey: string | undefined, input: unknown): BrokenRule[] {
  const bodyKey = (input as { idempotency_key?: unknown } | null | undefined)?.idempotency_key;
  if (headerKey === undefined || headerKey === bodyKey) return [];
  const parsed = idempotencyKeyField.parse(headerKey, "the header Idempotency-Key");
  const rules = "broken" in parsed ? [parsed.broken] : [];
  if (bodyKey !== undefined) {
    rules.push({
      sentence: "idempotency key differs between header and body",
      explanation: `the header Idempotency-Key and the field idempotency_key must be equal if both are given: received ${showValue(headerKey)} and ${showValue(bodyKey)}`,
    });
  }
  return rules;
}
