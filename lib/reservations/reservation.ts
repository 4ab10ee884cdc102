import { Type } from "@sinclair/typebox";
import { v7 as uuidv7, validate as validateUuid } from "uuid";
import { type BrokenRule, showValue } from "../errors.ts";
import {
  broken,
  checkFields,
  described,
  field,
  headerKeyRules,
  idempotencyKeyField,
  invalidInput,
  optional,
  parseField,
  parseFields,
  timeField,
  type Values,
} from "../field.ts";
import { pointAmountField, userIdField } from "../points/point.ts";
import { RESERVATION_STATUSES, type ReservationStatus } from "../schema.ts";

export const statusField = field(
  Type.Unsafe<ReservationStatus>(Type.Union(RESERVATION_STATUSES.map((status) => Type.Literal(status)))),
  {
    sentence: "status must be PENDING, PROCESSING, DONE, FAILED or CANCELLED",
    must: "PENDING, PROCESSING, DONE, FAILED or CANCELLED",
  },
);

/** The name of a group of reservations, which can be cancelled together. */
export const campaignField = field(
  Type.String({
    pattern: "^[A-Za-z0-9_-]{1,64}$",
    description: "1 to 64 of A-Z, a-z, 0-9, _ and -; case matters",
    examples: ["summer-2029"],
  }),
  { sentence: "campaign is invalid format", must: "1 to 64 of A-Z, a-z, 0-9, _ and -" },
);

const executeAtField = described(
  timeField,
  `when the points are granted: ${timeField.schema.description}. A time in the past is due at once`,
);

/** The fields of `POST /point/reserve`. */
export const reservationFields = {
  user_id: userIdField,
  point_amount: pointAmountField,
  execute_at: executeAtField,
  idempotency_key: optional(idempotencyKeyField),
  campaign: optional(campaignField),
};

/** A valid reservation. */
export interface Reservation {
  /** UUID v7: ordered by time, so that inserts stay at the end of the index. */
  id: string;
  userId: string;
  pointAmount: number;
  executeAt: Date;
  /** The client's key, or the reservation's id if the client sent none. */
  idempotencyKey: string;
  campaign: string | null;
}

/**
 * Makes a reservation with a new UUID.
 *
 * @param input the parsed body, of any shape
 * @param headerKey the header `Idempotency-Key`, which is equivalent to the body's field
 * @throws {DomainError} INVALID_INPUT, with every broken rule
 */
export function newReservation(input: unknown, headerKey?: string): Reservation {
  const more = headerKeyRules(headerKey, input);
  return reservationOf(parseFields(reservationFields, input, { what: "reservation", more }), headerKey);
}

/** Makes the reservation of one row of a bulk request, or returns every rule that the row breaks. */
export function checkReservation(input: unknown): Reservation | { broken: readonly BrokenRule[] } {
  const checked = checkFields(reservationFields, input);
  return "broken" in checked ? checked : reservationOf(checked.values, undefined);
}

function reservationOf(
  { user_id, point_amount, execute_at, idempotency_key, campaign }: Values<typeof reservationFields>,
  headerKey: string | undefined,
): Reservation {
  const id = uuidv7();
  return {
    id,
    userId: user_id,
    pointAmount: point_amount,
    executeAt: execute_at,
    idempotencyKey: idempotency_key ?? headerKey ?? id,
    campaign: campaign ?? null,
  };
}

/** The fields of `PATCH /point/reservations/{id}`: at least one of them. */
export const reservationPatchFields = {
  execute_at: optional(executeAtField),
  point_amount: optional(pointAmountField),
};

/** The new values of a reservation; undefined keeps the old one. */
export interface ReservationPatch {
  executeAt?: Date | undefined;
  pointAmount?: number | undefined;
}

/**
 * Parses a change of a reservation.
 *
 * @throws {DomainError} INVALID_INPUT, with every broken rule
 */
export function newReservationPatch(input: unknown): ReservationPatch {
  const what = "change of a reservation";
  const { execute_at, point_amount } = parseFields(reservationPatchFields, input, { what });
  if (execute_at === undefined && point_amount === undefined) {
    throw invalidInput(what, [
      {
        sentence: "execute at or point amount is required",
        explanation: "the body must have execute_at, point_amount or both: received neither",
      },
    ]);
  }
  return { executeAt: execute_at, pointAmount: point_amount };
}

/** A reservation's id, converted to lower case as in the tables. */
export const reservationIdField = field(
  Type.String({ format: "uuid", description: "the reservation's id" }),
  {
    parse: (value, place) =>
      typeof value === "string" && validateUuid(value)
        ? { value: value.toLowerCase() }
        : broken("reservation id is invalid format", `${place} must be a UUID: received ${showValue(value)}`),
  },
);

/**
 * Parses a reservation's id.
 *
 * @throws {DomainError} INVALID_INPUT
 */
export function parseReservationId(value: unknown): string {
  return parseField(reservationIdField, value, { place: "the reservation id", what: "reservation id" });
}

/**
 * Parses a campaign's name.
 *
 * @throws {DomainError} INVALID_INPUT
 */
export function parseCampaign(value: unknown): string {
  return parseField(campaignField, value, { place: "campaign", what: "campaign" });
}
