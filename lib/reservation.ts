import { type Static, Type } from "@sinclair/typebox";
import { v7 as uuidv7, validate as validateUuid } from "uuid";
import { type BrokenRule, DomainError, showValue } from "./errors.ts";
import { brokenPointAmountRule, brokenUserIdRule, PointAmount, UserId } from "./point.ts";

/**
 * Where a reservation stands. PENDING → PROCESSING → DONE is the way of nearly all; FAILED and CANCELLED end it
 * without points.
 */
export const RESERVATION_STATUSES = ["PENDING", "PROCESSING", "DONE", "FAILED", "CANCELLED"] as const;
export type ReservationStatus = (typeof RESERVATION_STATUSES)[number];

const IDEMPOTENCY_KEY = /^[A-Za-z0-9_-]{1,100}$/;

/** The body of `POST /point/reserve`. */
export const ReservationCreateInput = Type.Object(
  {
    user_id: UserId,
    point_amount: PointAmount,
    execute_at: Type.String({
      format: "date-time",
      description:
        "RFC 3339 with seconds and offset, at most milliseconds, from 1970 to 9999 in UTC. A time that has passed is due at once",
      examples: ["2029-02-22T22:59:00+09:00"],
    }),
    idempotency_key: Type.Optional(
      Type.String({
        pattern: IDEMPOTENCY_KEY.source,
        description:
          "1 to 100 of A-Z, a-z, 0-9, _ and -. The same key with the same content gets the first answer again",
        examples: ["order-42"],
      }),
    ),
  },
  { additionalProperties: false },
);
export type ReservationCreateInput = Static<typeof ReservationCreateInput>;

/** A promise of points, valid by all rules of the domain. */
export interface Reservation {
  /** UUID v7: ordered by time, so that inserts stay at the right edge of the index. */
  id: string;
  userId: string;
  pointAmount: number;
  executeAt: Date;
  /** The client's, or the reservation's own id where the client gave none. */
  idempotencyKey: string;
}

// Whole seconds and an offset are demanded: a time without a zone would be read in the host's.
const RFC_3339 =
  /^(?<date>\d{4}-\d\d-\d\d)[Tt](?<time>\d\d:\d\d:\d\d)(?:\.(?<fraction>\d{1,3}))?(?:[Zz]|(?<sign>[+-])(?<hours>[01]\d|2[0-3]):(?<minutes>[0-5]\d))$/;
const EARLIEST_MS = Date.UTC(1970, 0, 1);
/** The last millisecond that a DATETIME(3) can hold. */
const LATEST_MS = Date.UTC(9999, 11, 31, 23, 59, 59, 999);

function parseExecuteAt(value: unknown): Date | BrokenRule {
  const received = `received ${showValue(value)}`;
  const parts = typeof value === "string" ? RFC_3339.exec(value)?.groups : undefined;
  if (!parts) {
    return {
      sentence: "execute at must be an RFC 3339 time with seconds and offset",
      explanation: `execute_at must look like 2029-02-22T22:59:00+09:00, with at most milliseconds: ${received}`,
    };
  }
  const { date, time, fraction = "0", sign, hours, minutes } = parts;
  const local = new Date(`${date}T${time}.${fraction.padEnd(3, "0")}Z`);
  // Feb 30, 24:00 and second 60 are either no date or come back as another one.
  if (Number.isNaN(local.getTime()) || !local.toISOString().startsWith(`${date}T${time}.`)) {
    return {
      sentence: "execute at must be a date that exists",
      explanation: `execute_at must name a day and a time of day of the calendar: ${received}`,
    };
  }
  const offsetMs = sign ? (sign === "+" ? 1 : -1) * (Number(hours) * 60 + Number(minutes)) * 60_000 : 0;
  const ms = local.getTime() - offsetMs;
  if (ms < EARLIEST_MS || ms > LATEST_MS) {
    return {
      sentence: "execute at must be from 1970 to 9999",
      explanation: `execute_at must be from 1970-01-01T00:00:00.000Z to 9999-12-31T23:59:59.999Z: ${received}`,
    };
  }
  return new Date(ms);
}

function brokenIdempotencyKeyRule(value: unknown, place: string): BrokenRule | undefined {
  if (value === undefined || (typeof value === "string" && IDEMPOTENCY_KEY.test(value))) return undefined;
  return {
    sentence: "idempotency key is invalid format",
    explanation: `${place} must be 1 to 100 of A-Z, a-z, 0-9, _ and -: received ${showValue(value)}`,
  };
}

/**
 * Makes a reservation of what a client sent: checks every rule, reports all broken ones at once, makes the UUID.
 *
 * @param input the parsed body, of any shape
 * @param headerKey the header `Idempotency-Key`, which counts as much as the body's field
 * @throws {DomainError} INVALID_INPUT, with one broken rule for each
 */
export function newReservation(input: unknown, headerKey?: string): Reservation {
  if (typeof input !== "object" || input === null || Array.isArray(input)) {
    throw new DomainError("INVALID_INPUT", "The body breaks a rule", [
      {
        sentence: "body must be a JSON object",
        explanation: `the body must be a JSON object: received ${showValue(input)}`,
      },
    ]);
  }
  const body = input as Partial<Record<keyof ReservationCreateInput, unknown>>;
  const executeAt = parseExecuteAt(body.execute_at);
  const broken = [
    brokenUserIdRule(body.user_id),
    brokenPointAmountRule(body.point_amount),
    executeAt instanceof Date ? undefined : executeAt,
    brokenIdempotencyKeyRule(body.idempotency_key, "idempotency_key"),
    headerKey === body.idempotency_key
      ? undefined
      : brokenIdempotencyKeyRule(headerKey, "the header Idempotency-Key"),
    differentKeysRule(body.idempotency_key, headerKey),
    ...unknownFieldRules(body),
  ].filter((rule) => rule !== undefined);
  if (broken.length > 0 || !(executeAt instanceof Date)) {
    throw new DomainError("INVALID_INPUT", "The reservation breaks a rule", broken);
  }
  const valid = input as ReservationCreateInput;
  const id = uuidv7();
  return {
    id,
    userId: valid.user_id,
    pointAmount: valid.point_amount,
    executeAt,
    idempotencyKey: valid.idempotency_key ?? headerKey ?? id,
  };
}

function differentKeysRule(bodyKey: unknown, headerKey: string | undefined): BrokenRule | undefined {
  if (bodyKey === undefined || headerKey === undefined || bodyKey === headerKey) return undefined;
  return {
    sentence: "idempotency key differs between header and body",
    explanation: `the header Idempotency-Key and the field idempotency_key must be the same where both are given: received ${showValue(headerKey)} and ${showValue(bodyKey)}`,
  };
}

function unknownFieldRules(body: object): BrokenRule[] {
  return Object.keys(body)
    .filter((field) => !Object.hasOwn(ReservationCreateInput.properties, field))
    .slice(0, 10)
    .map((field) => ({
      sentence: `unknown field ${showValue(field)}`,
      explanation: `the field ${showValue(field)} is not one of ${Object.keys(ReservationCreateInput.properties).join(", ")}`,
    }));
}

/**
 * Reads a reservation's id from outside, in the lower case in which ids are kept.
 *
 * @throws {DomainError} INVALID_INPUT
 */
export function parseReservationId(value: string): string {
  if (validateUuid(value)) return value.toLowerCase();
  throw new DomainError("INVALID_INPUT", "The reservation id breaks a rule", [
    {
      sentence: "reservation id is invalid format",
      explanation: `the reservation id must be a UUID: received ${showValue(value)}`,
    },
  ]);
}
