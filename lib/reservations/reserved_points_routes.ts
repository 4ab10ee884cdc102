import { type Static, Type } from "@sinclair/typebox";
import { Elysia } from "elysia";
import type { Database } from "../database.ts";
import { objectSchema, optional } from "../field.ts";
import {
  answer,
  describe,
  NextCursor,
  type Outgoing,
  orNull,
  refusal,
  refused,
  UNAVAILABLE,
  Uuid,
} from "../http/describe.ts";
import { FUTURE, PAST, PENDING_ID, PROCESSING_ID } from "../http/examples.ts";
import { parseQuery, parseQueryFields } from "../http/request.ts";
import { encodeCursor, nextCursor, pageFields, pageOf } from "../page.ts";
import { parseUserId, pointAmountField } from "../points/point.ts";
import { NO_USER_ID, userParams } from "../points/user_routes.ts";
import { campaignField, statusField } from "./reservation.ts";
import { type ListedReservation, listReservations } from "./reservation_queries.ts";

/** `GET /users/{user_id}/reserved-points`. */
export function reservedPointsRoutes({ database }: { database: Database }) {
  return new Elysia().get(
    "/users/:user_id/reserved-points",
    async ({ params, request }) => {
      const userId = parseUserId(params.user_id);
      const { status, campaign, ...paging } = parseQuery(request, queryFields);
      const page = pageOf(paging);
      const found = await listReservations(database, userId, { ...page, status, campaign });
      const positions = found.map(({ executeAt, id }) => ({ time: executeAt, id }));
      return Response.json({
        reserved_points: found.slice(0, page.limit).map(reservedPointOf),
        next_cursor: nextCursor(positions, page.limit),
      });
    },
    LIST,
  );
}

const queryFields = { status: optional(statusField), campaign: optional(campaignField), ...pageFields };

const ReservedPoint = Type.Object({
  reservation_id: Uuid,
  point: pointAmountField.schema,
  status: statusField.schema,
  add_date: Type.String({ format: "date-time", description: "its execute_at" }),
  campaign: orNull(campaignField.schema, "null if there is none"),
});
const ReservedPoints = Type.Object({
  reserved_points: Type.Array(ReservedPoint, { description: "in the order of add_date" }),
  next_cursor: NextCursor,
});

function reservedPointOf({
  id,
  pointAmount,
  status,
  executeAt,
  campaign,
}: ListedReservation): Outgoing<Static<typeof ReservedPoint>> {
  return { reservation_id: id, point: pointAmount, status, add_date: executeAt, campaign };
}

const PENDING = {
  reservation_id: PENDING_ID,
  point: 100,
  status: "PENDING",
  add_date: FUTURE,
  campaign: "summer-2029",
};
const PROCESSING = { ...PENDING, reservation_id: PROCESSING_ID, status: "PROCESSING", add_date: PAST };
const AFTER_PROCESSING = encodeCursor({ time: new Date(PAST), id: PROCESSING_ID });

const LIST = describe({
  summary: "List the reservations of a user",
  description:
    "In the order of `execute_at`, in pages of `limit` reservations. `status` and `campaign` filter the list. Every page costs the same, except that a page of PENDING reads past PROCESSING reservations, and the reverse. The list of an unknown user is empty.",
  params: userParams,
  query: objectSchema(queryFields),
  answers: {
    200: answer(ReservedPoints, "One page of reservations", {
      "the first PENDING reservation": {
        params: { user_id: "TestUser01" },
        query: { status: "PENDING", limit: 1 },
        answer: { reserved_points: [PENDING], next_cursor: null },
      },
      "the first page of a campaign": {
        params: { user_id: "TestUser01" },
        query: { campaign: "summer-2029", limit: 1 },
        answer: { reserved_points: [PROCESSING], next_cursor: AFTER_PROCESSING },
      },
      "the next page": {
        params: { user_id: "TestUser01" },
        query: { campaign: "summer-2029", status: "PENDING", cursor: AFTER_PROCESSING },
        answer: { reserved_points: [PENDING], next_cursor: null },
      },
      "an unknown user": {
        params: { user_id: "Nobody" },
        answer: { reserved_points: [], next_cursor: null },
      },
    }),
  },
  refusals: {
    400: refusal("The request breaks rules", {
      ...NO_USER_ID,
      "not a status": refused(
        { params: { user_id: "TestUser01" }, query: { status: "OPEN", limit: 0 } },
        ({ query }) => parseQueryFields(queryFields, query),
      ),
    }),
    ...UNAVAILABLE,
  },
});
