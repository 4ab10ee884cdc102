import { type Static, Type } from "@sinclair/typebox";
import { Elysia } from "elysia";
import type { Database } from "../database.ts";
import { DomainError, notFound } from "../errors.ts";
import { idempotencyKeyField, objectSchema } from "../field.ts";
import {
  answer,
  describe,
  type Outgoing,
  orNull,
  Problem,
  refusal,
  refused,
  Time,
  UNAVAILABLE,
  Uuid,
} from "../http/describe.ts";
import {
  DONE_ID,
  FAILED_ID,
  FUTURE,
  PAST,
  PENDING_ID,
  TRANSACTION_ID,
  UNKNOWN_ID,
} from "../http/examples.ts";
import { parseQuery, parseQueryFields } from "../http/request.ts";
import { pointAmountField, userIdField } from "../points/point.ts";
import { campaignField, parseReservationId, reservationIdField, statusField } from "./reservation.ts";
import { findReservation, findReservationByKey, type ReservationDetails } from "./reservation_queries.ts";

/** `GET /point/reservations/{id}` and `GET /point/reservations?idempotency_key=`. */
export function reservationRoutes({ database }: { database: Database }) {
  return new Elysia()
    .get(
      "/point/reservations/:id",
      async ({ params }) => {
        const id = parseReservationId(params.id);
        const details = await findReservation(database, id);
        if (!details) throw unknownReservation(id);
        return Response.json(detailsOf(details));
      },
      READ,
    )
    .get(
      "/point/reservations",
      async ({ request }) => {
        const { idempotency_key: key } = parseQuery(request, keyFields);
        const details = await findReservationByKey(database, key);
        if (!details) throw unknownKey(key);
        return Response.json(detailsOf(details));
      },
      FIND_BY_KEY,
    );
}

// ---- The details of a reservation, which several routes return

export const Details = Type.Object({
  reservation_id: Uuid,
  user_id: userIdField.schema,
  point_amount: pointAmountField.schema,
  idempotency_key: Type.String(),
  campaign: orNull(campaignField.schema, "null if there is none"),
  status: statusField.schema,
  execute_at: Time,
  original_point_amount: orNull(pointAmountField.schema, "the original value; null if it was never changed"),
  original_execute_at: orNull(Time, "the original value; null if it was never changed"),
  next_scan_at: orNull(
    Time,
    "when the scheduler processes it next; null once it is DONE, FAILED or CANCELLED",
  ),
  attempts: Type.Integer({ description: "failed attempts to grant it; outages do not count" }),
  last_error: orNull(Type.String(), "why the last attempt failed; null if none has failed"),
  transaction_id: orNull(Uuid, "its ledger entry; null before the grant"),
  granted_at: orNull(Time, "when its points were granted; null before the grant"),
  late_ms: orNull(Type.Integer(), "milliseconds from execute_at to granted_at; null before the grant"),
  created_at: Time,
  updated_at: Time,
});

export function detailsOf(details: ReservationDetails): Outgoing<Static<typeof Details>> {
  return {
    reservation_id: details.id,
    user_id: details.userId,
    point_amount: details.pointAmount,
    idempotency_key: details.idempotencyKey,
    campaign: details.campaign,
    status: details.status,
    execute_at: details.executeAt,
    original_point_amount: details.originalPointAmount,
    original_execute_at: details.originalExecuteAt,
    next_scan_at: details.scanAt,
    attempts: details.attempts,
    last_error: details.lastError,
    transaction_id: details.transactionId,
    granted_at: details.grantedAt,
    late_ms: details.grantedAt && details.grantedAt.getTime() - details.executeAt.getTime(),
    created_at: details.createdAt,
    updated_at: details.updatedAt,
  };
}

/** The details of the reservation that is PENDING. */
export const DETAILS = {
  reservation_id: PENDING_ID,
  user_id: "TestUser01",
  point_amount: 100,
  idempotency_key: "order-41",
  campaign: "summer-2029",
  status: "PENDING",
  execute_at: FUTURE,
  original_point_amount: null,
  original_execute_at: null,
  next_scan_at: FUTURE,
  attempts: 0,
  last_error: null,
  transaction_id: null,
  granted_at: null,
  late_ms: null,
  created_at: PAST,
  updated_at: PAST,
};

export const idParams = objectSchema({ id: reservationIdField });

export function unknownReservation(id: string): DomainError {
  return notFound("reservation not found", `no reservation has the id ${id}`);
}

/** The refusals of an id. */
export const NO_RESERVATION = {
  400: refusal("The id is not a UUID", {
    "not a UUID": refused({ params: { id: "42" } }, ({ params }) => parseReservationId(params.id)),
  }),
  404: refusal("There is no such reservation", {
    unknown: { params: { id: UNKNOWN_ID }, error: unknownReservation(UNKNOWN_ID) },
  }),
};

// ---- The conflict between a change and the state of the reservation

/** A problem with the state of the reservation. */
export const ConflictProblem = Type.Object({
  ...Problem.properties,
  reservation_id: Uuid,
  reservation_status: statusField.schema,
  granted_at: orNull(Time, "when its points were granted; null if they were not"),
  transaction_id: orNull(Uuid, "its ledger entry; null if there is none"),
});

/** The state of a reservation in a conflict. */
export type ReservationState = Pick<ReservationDetails, "id" | "status" | "grantedAt" | "transactionId">;

/** The error for a change that the state of the reservation does not allow. */
export function conflict(
  verb: "cancel" | "change" | "retry",
  { id, status, grantedAt, transactionId }: ReservationState,
  { sentence, explanation }: { sentence: string; explanation: string },
): DomainError {
  return new DomainError("CONFLICT", `Cannot ${verb} the reservation`, [{ sentence, explanation }], {
    reservation_id: id,
    reservation_status: status,
    granted_at: grantedAt,
    transaction_id: transactionId,
  });
}

/** The states of the examples. */
export const DONE: ReservationState = {
  id: DONE_ID,
  status: "DONE",
  grantedAt: new Date(PAST),
  transactionId: TRANSACTION_ID,
};
export const FAILED: ReservationState = {
  id: FAILED_ID,
  status: "FAILED",
  grantedAt: null,
  transactionId: null,
};

// ---- GET /point/reservations/{id}

const READ = describe({
  summary: "Get the details of a reservation",
  description: "The status, the time of the grant or of the next attempt, and why the last attempt failed.",
  params: idParams,
  answers: {
    200: answer(Details, "The details", {
      "a PENDING reservation": { params: { id: PENDING_ID }, answer: DETAILS },
      "a granted reservation": {
        params: { id: DONE_ID },
        answer: {
          ...DETAILS,
          reservation_id: DONE_ID,
          idempotency_key: "order-31",
          status: "DONE",
          execute_at: PAST,
          next_scan_at: null,
          transaction_id: TRANSACTION_ID,
          granted_at: PAST,
          late_ms: 0,
        },
      },
    }),
  },
  refusals: { ...NO_RESERVATION, ...UNAVAILABLE },
});

// ---- GET /point/reservations?idempotency_key=

const keyFields = { idempotency_key: idempotencyKeyField };

function unknownKey(key: string): DomainError {
  return notFound("reservation not found", `no reservation has the idempotency key ${key}`);
}

const FIND_BY_KEY = describe({
  summary: "Find a reservation by its idempotency key",
  description: "Use it if you know the key, for instance an order number, but not the reservation id.",
  query: objectSchema(keyFields),
  answers: {
    200: answer(Details, "The details", {
      "a PENDING reservation": { query: { idempotency_key: "order-41" }, answer: DETAILS },
    }),
  },
  refusals: {
    400: refusal("The key breaks a rule", {
      "a blank": refused({ query: { idempotency_key: "order 41" } }, ({ query }) =>
        parseQueryFields(keyFields, query),
      ),
    }),
    404: refusal("No reservation has this key", {
      unknown: { query: { idempotency_key: "order-0" }, error: unknownKey("order-0") },
    }),
    ...UNAVAILABLE,
  },
});
