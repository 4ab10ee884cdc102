import { type Static, Type } from "@sinclair/typebox";
import { Elysia } from "elysia";
import { openUntilFree } from "../busy.ts";
import type { Database } from "../database.ts";
import type { DomainError } from "../errors.ts";
import { objectSchema } from "../field.ts";
import { answer, describe, NO_BODY, refusal, refused, UNAVAILABLE, Uuid } from "../http/describe.ts";
import {
  CANCELLED_ID,
  DONE_ID,
  FAILED_ID,
  FUTURE,
  NOW,
  PAST,
  PENDING_ID,
  PROCESSING_ID,
  UNKNOWN_ID,
} from "../http/examples.ts";
import { readJson } from "../http/request.ts";
import { newReservationPatch, parseReservationId, reservationPatchFields } from "./reservation.ts";
import type { ReservationDetails } from "./reservation_queries.ts";
import {
  cancelReservation,
  patchReservation,
  retryReservation,
  type Transitioned,
} from "./reservation_repository.ts";
import {
  ConflictProblem,
  conflict,
  DETAILS,
  Details,
  DONE,
  detailsOf,
  FAILED,
  idParams,
  NO_RESERVATION,
  type ReservationState,
  unknownReservation,
} from "./reservation_routes.ts";

export interface ReservationChangeOptions {
  database: Database;
  /** Sends the schedulers the time at which a committed reservation is due. */
  hint: (executeAt: Date) => void;
}

/** `DELETE` and `PATCH /point/reservations/{id}`, and `POST /point/reservations/{id}/retry`. */
export function reservationChangeRoutes({ database, hint }: ReservationChangeOptions) {
  const options = { untilFree: openUntilFree() };
  return new Elysia()
    .delete(
      "/point/reservations/:id",
      async ({ params }) => {
        const id = parseReservationId(params.id);
        requireDone(id, await cancelReservation(database, id, options), cannotCancel);
        return Response.json(cancelledOf(id));
      },
      CANCEL,
    )
    .patch(
      "/point/reservations/:id",
      async ({ params, request }) => {
        const id = parseReservationId(params.id);
        const patch = newReservationPatch(await readJson(request));
        const details = requireDone(id, await patchReservation(database, id, patch, options), cannotChange);
        hint(details.executeAt);
        return Response.json(detailsOf(details));
      },
      PATCH,
    )
    .post(
      "/point/reservations/:id/retry",
      async ({ params }) => {
        const id = parseReservationId(params.id);
        const details = requireDone(id, await retryReservation(database, id, options), cannotRetry);
        hint(details.executeAt);
        return Response.json(detailsOf(details));
      },
      RETRY,
    );
}

/**
 * The details of a reservation that is now as requested.
 *
 * @throws {DomainError} NOT_FOUND, or what `refuse` makes of its state
 */
function requireDone(
  id: string,
  transitioned: Transitioned | undefined,
  refuse: (state: ReservationState) => DomainError,
): ReservationDetails {
  if (!transitioned) throw unknownReservation(id);
  if (!transitioned.isDone) throw refuse(transitioned.details);
  return transitioned.details;
}

// ---- DELETE /point/reservations/{id}

const Cancelled = Type.Object({ reservation_id: Uuid, status: Type.Literal("CANCELLED") });

function cancelledOf(id: string): Static<typeof Cancelled> {
  return { reservation_id: id, status: "CANCELLED" };
}

function cannotCancel(state: ReservationState): DomainError {
  const { status, grantedAt, transactionId } = state;
  if (!grantedAt) {
    return conflict("cancel", state, {
      sentence: `reservation is ${status}`,
      explanation: `it is ${status}`,
    });
  }
  return conflict("cancel", state, {
    sentence: "reservation was granted",
    explanation: `it was granted at ${grantedAt.toISOString()} by the ledger entry ${transactionId}`,
  });
}

const CANCEL = describe({
  summary: "Cancel a reservation",
  description:
    "Possible until the grant. If a cancel and the grant happen at the same time, exactly one of them wins. After a 200 the points are never granted, even if the reservation was PROCESSING. The same request sent again gets the same answer.",
  params: idParams,
  answers: {
    200: answer(Cancelled, "Cancelled", {
      "it was PENDING": { params: { id: PENDING_ID }, answer: cancelledOf(PENDING_ID) },
      "it was PROCESSING": { params: { id: PROCESSING_ID }, answer: cancelledOf(PROCESSING_ID) },
      "it was CANCELLED before": { params: { id: CANCELLED_ID }, answer: cancelledOf(CANCELLED_ID) },
    }),
  },
  refusals: {
    ...NO_RESERVATION,
    409: refusal(
      "It was granted, or it is FAILED: then its points are granted only after a retry",
      {
        "it was granted": { params: { id: DONE_ID }, error: cannotCancel(DONE) },
        "it is FAILED": { params: { id: FAILED_ID }, error: cannotCancel(FAILED) },
      },
      ConflictProblem,
    ),
    ...UNAVAILABLE,
  },
});

// ---- PATCH /point/reservations/{id}

function cannotChange(state: ReservationState): DomainError {
  return conflict("change", state, {
    sentence: "reservation is not PENDING",
    explanation: `it is ${state.status}, and only a PENDING reservation can be changed`,
  });
}

const PATCH = describe({
  summary: "Change the time or the amount of a reservation",
  description:
    "Possible only while the reservation is PENDING. If an answer was lost, read the details before you send the request again. The original content is kept: the original request to reserve, sent again with its idempotency key, still gets the first answer.",
  params: idParams,
  body: objectSchema(reservationPatchFields, { minProperties: 1 }),
  answers: {
    200: answer(Details, "The changed details", {
      "another time and amount": {
        params: { id: PENDING_ID },
        body: { execute_at: "2029-03-01T00:00:00Z", point_amount: 250 },
        answer: {
          ...DETAILS,
          point_amount: 250,
          execute_at: "2029-03-01T00:00:00.000Z",
          original_point_amount: 100,
          original_execute_at: FUTURE,
          next_scan_at: "2029-03-01T00:00:00.000Z",
          updated_at: NOW,
        },
      },
    }),
  },
  refusals: {
    400: refusal("The request breaks rules", {
      "no field": refused({ params: { id: PENDING_ID }, body: {} }, ({ body }) => newReservationPatch(body)),
    }),
    404: refusal("There is no such reservation", {
      unknown: {
        params: { id: UNKNOWN_ID },
        body: { point_amount: 250 },
        error: unknownReservation(UNKNOWN_ID),
      },
    }),
    409: refusal(
      "It is not PENDING",
      {
        "it was granted": { params: { id: DONE_ID }, body: { point_amount: 250 }, error: cannotChange(DONE) },
      },
      ConflictProblem,
    ),
    ...NO_BODY,
    ...UNAVAILABLE,
  },
});

// ---- POST /point/reservations/{id}/retry

function cannotRetry(state: ReservationState): DomainError {
  return conflict("retry", state, {
    sentence: "reservation is not FAILED",
    explanation: `it is ${state.status}, and only a FAILED reservation can be retried`,
  });
}

const RETRY = describe({
  summary: "Retry a FAILED reservation",
  description:
    "FAILED → PENDING, due at once, with `attempts` reset to 0. Use it after the cause in `last_error` is fixed. If an answer was lost, the same request sent again gets a 409 with the state of the reservation.",
  params: idParams,
  answers: {
    200: answer(Details, "The changed details", {
      "it was FAILED": {
        params: { id: FAILED_ID },
        answer: {
          ...DETAILS,
          reservation_id: FAILED_ID,
          idempotency_key: "order-32",
          execute_at: PAST,
          next_scan_at: NOW,
          last_error: "The balance would be out of range",
          updated_at: NOW,
        },
      },
    }),
  },
  refusals: {
    ...NO_RESERVATION,
    409: refusal(
      "It is not FAILED",
      { "it was granted": { params: { id: DONE_ID }, error: cannotRetry(DONE) } },
      ConflictProblem,
    ),
    ...UNAVAILABLE,
  },
});
