import { type Static, type TProperties, Type } from "@sinclair/typebox";
import { v7 as uuidv7, validate as validateUuid } from "uuid";
import { showValue } from "./errors.ts";
import {
  brokenFieldRules,
  brokenHeaderKeyRules,
  type FieldRule,
  IdempotencyKey,
  idempotencyKeyRule,
  parseText,
  parseTime,
  refuseBroken,
  ruleOf,
  Time,
  timeRule,
} from "./input.ts";
import { PointAmount, pointAmountRule, UserId, userIdRule } from "./point.ts";

/**
 * Where a reservation stands. PENDING → PROCESSING → DONE is the way of nearly all; FAILED and CANCELLED end it
 * without points.
 */
export const RESERVATION_STATUSES = ["PENDING", "PROCESSING", "DONE", "FAILED", "CANCELLED"] as const;
export type ReservationStatus = (typeof RESERVATION_STATUSES)[number];

export const Status = Type.Unsafe<ReservationStatus>(
  Type.Union(RESERVATION_STATUSES.map((status) => Type.Literal(status))),
);
export const statusRule = ruleOf(Status, {
  sentence: "status must be PENDING, PROCESSING, DONE, FAILED or CANCELLED",
  must: "PENDING, PROCESSING, DONE, FAILED or CANCELLED",
});

/** What some reservations are made for; they can be cancelled together. */
export const Campaign = Type.String({
  pattern: "^[A-Za-z0-9_-]{1,64}$",
  description: "1 to 64 of A-Z, a-z, 0-9, _ and -; case matters",
  examples: ["summer-2029"],
});
export const campaignRule = ruleOf(Campaign, {
  sentence: "campaign is invalid format",
  must: "1 to 64 of A-Z, a-z, 0-9, _ and -",
});

const ExecuteAt = Type.String({
  ...Time,
  description: `when the points shall be there: ${Time.description}. A time that has passed is due at once`,
});

function strict<Fields extends TProperties>(fields: Fields) {
  return Type.Object(fields, { additionalProperties: false });
}

/** The body of `POST /point/reserve`. */
export const ReservationCreateInput = strict({
  user_id: UserId,
  point_amount: PointAmount,
  execute_at: ExecuteAt,
  idempotency_key: Type.Optional(IdempotencyKey),
  campaign: Type.Optional(Campaign),
});
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
  campaign: string | null;
}

/**
 * Makes a reservation of what a client sent: checks every rule, reports all broken ones at once, makes the UUID.
 *
 * @param input the parsed body, of any shape
 * @param headerKey the header `Idempotency-Key`, which counts as much as the body's field
 * @throws {DomainError} INVALID_INPUT, with one broken rule for each
 */
export function newReservation(input: unknown, headerKey?: string): Reservation {
  const { execute_at, idempotency_key: bodyKey } = (input ?? {}) as Record<string, unknown>;
  const executeAt = parseTime(execute_at, "execute_at");
  const broken = brokenFieldRules(ReservationCreateInput, input, {
    user_id: userIdRule,
    point_amount: pointAmountRule,
    execute_at: () => (executeAt instanceof Date ? undefined : executeAt),
    idempotency_key: idempotencyKeyRule,
    campaign: campaignRule,
  });
  refuseBroken([...broken, ...brokenHeaderKeyRules(headerKey, bodyKey)], "reservation");
  const valid = input as ReservationCreateInput;
  const id = uuidv7();
  return {
    id,
    userId: valid.user_id,
    pointAmount: valid.point_amount,
    executeAt: executeAt as Date,
    idempotencyKey: valid.idempotency_key ?? headerKey ?? id,
    campaign: valid.campaign ?? null,
  };
}

/** The body of `PATCH /point/reservations/{id}`: at least one of its fields. */
export const ReservationPatchInput = Type.Object(
  { execute_at: Type.Optional(ExecuteAt), point_amount: Type.Optional(PointAmount) },
  { additionalProperties: false, minProperties: 1 },
);

/** What shall be another. */
export interface ReservationPatch {
  executeAt?: Date | undefined;
  pointAmount?: number | undefined;
}

/**
 * Reads what a client wants to be another in a reservation.
 *
 * @throws {DomainError} INVALID_INPUT, with one broken rule for each
 */
export function newReservationPatch(input: unknown): ReservationPatch {
  const broken = brokenFieldRules(ReservationPatchInput, input, {
    execute_at: timeRule,
    point_amount: pointAmountRule,
  });
  const patch = input as Static<typeof ReservationPatchInput>;
  if (broken.length === 0 && Object.keys(patch).length === 0) {
    broken.push({
      sentence: "execute at or point amount is required",
      explanation: "the body must have execute_at, point_amount or both: received neither",
    });
  }
  refuseBroken(broken, "change of a reservation");
  const { execute_at, point_amount } = patch;
  return {
    executeAt: execute_at === undefined ? undefined : (parseTime(execute_at, "execute_at") as Date),
    pointAmount: point_amount,
  };
}

const reservationIdRule: FieldRule = (value, place) =>
  validateUuid(value)
    ? undefined
    : {
        sentence: "reservation id is invalid format",
        explanation: `${place} must be a UUID: received ${showValue(value)}`,
      };

/**
 * Reads a reservation's id from outside, in the lower case in which ids are kept.
 *
 * @throws {DomainError} INVALID_INPUT
 */
export function parseReservationId(value: string): string {
  const names = { place: "the reservation id", what: "reservation id" };
  return parseText(value, reservationIdRule, names).toLowerCase();
}

/**
 * Reads a campaign's name from outside.
 *
 * @throws {DomainError} INVALID_INPUT
 */
export function parseCampaign(value: unknown): string {
  return parseText(value, campaignRule, { place: "campaign", what: "campaign" });
}
