import { Type } from "@sinclair/typebox";
import {
  Balance,
  BulkReserved,
  CampaignCancelled,
  Cancelled,
  Messages,
  Reserved,
  ReservedPoints,
  StandsProblem,
  Story,
  Totals,
  Transactions,
} from "./answers.ts";
import { BulkReservationInput } from "./bulk.ts";
import { Day, MAX_DAYS } from "./day.ts";
import { IdempotencyKey, Time } from "./input.ts";
import { answer, describe, refusal } from "./openapi.ts";
import { Cursor, encodeCursor, Limit } from "./page.ts";
import { PointChangeInput, UserId } from "./point.ts";
import { Campaign, ReservationCreateInput, ReservationPatchInput, Status } from "./reservation.ts";

// What each route is for, what it takes and what it answers: the description at /openapi, and the types of a client.
// The ids of the examples stand for reservations of one's own, in the state that the example's name says.

const PENDING_ID = "01a20990-e435-753e-b29b-6ac429ed0c37";
const PROCESSING_ID = "01a20990-e436-7a01-9c55-1f0c6e1b7d02";
const DONE_ID = "01a20990-e437-7c44-8a3e-94b5f7a2c603";
const FAILED_ID = "01a20990-e438-7e19-b7d0-2c8e5d3f9a04";
const CANCELLED_ID = "01a20990-e439-71b2-a6f4-7d9c0b8e1505";
const UNKNOWN_ID = "01a20990-e43a-7000-8000-000000000000";
const TRANSACTION_ID = "01a20990-f00d-7b3a-8e21-5a6c4d2e1f06";
const TIME = "2029-02-22T13:59:00.000Z";
const PAST = "2026-01-31T15:00:00.000Z";
const SUBTRACTED = "2026-01-31T16:00:00.000Z";
/** When the examples that change a reservation are sent. */
const NOW = "2026-02-01T00:00:00.000Z";

const AFTER_PROCESSING = encodeCursor({ time: new Date(PAST), id: PROCESSING_ID });

const ROW = { user_id: "TestUser01", point_amount: 100, execute_at: "2029-02-22T22:59:00+09:00" };
const RESERVED = { reservation_id: PENDING_ID, status: "PENDING", execute_at: TIME };
const STORY = {
  reservation_id: PENDING_ID,
  user_id: "TestUser01",
  point_amount: 100,
  idempotency_key: "order-41",
  campaign: "summer-2029",
  status: "PENDING",
  execute_at: TIME,
  original_point_amount: null,
  original_execute_at: null,
  next_scan_at: TIME,
  attempts: 0,
  last_error: null,
  transaction_id: null,
  granted_at: null,
  late_ms: null,
  created_at: PAST,
  updated_at: PAST,
};
const GRANTED = {
  reservation_id: DONE_ID,
  reservation_status: "DONE",
  granted_at: PAST,
  transaction_id: TRANSACTION_ID,
};

const STANDS_FAILED = {
  reservation_id: FAILED_ID,
  reservation_status: "FAILED",
  granted_at: null,
  transaction_id: null,
};

const ReservationParams = Type.Object({
  id: Type.String({ format: "uuid", description: "the reservation's id" }),
});
const UserParams = Type.Object({ user_id: UserId });
const Paging = { limit: Type.Optional(Limit), cursor: Type.Optional(Cursor) };
export const PointsQuery = Type.Object({ at: Type.Optional(Time) });
export const ReservedPointsQuery = Type.Object({
  status: Type.Optional(Status),
  campaign: Type.Optional(Campaign),
  ...Paging,
});
export const KeyQuery = Type.Object({ idempotency_key: IdempotencyKey });
export const ConfirmQuery = Type.Object({ user_id: UserId });
export const TotalsQuery = Type.Object({
  from: Type.Optional({ ...Day, description: "the first day; without it the 31 days until `to`" }),
  to: Type.Optional({ ...Day, description: "the last day; without it today" }),
  campaign: Type.Optional(Campaign),
});
export const TransactionsQuery = Type.Object(Paging);

const REPLAYED = { "Idempotent-Replayed": "`true` where the same request came before; else left out" };
const UNAVAILABLE = {
  500: {
    ...refusal("An unforeseen error: the fault is ours"),
    headers: { "X-Request-Id": "by which the log tells more" },
  },
  503: {
    ...refusal(
      "MySQL does not answer, or more wait than can be served in time. Send the same again after the seconds of Retry-After; with an idempotency key it cannot count twice",
    ),
    headers: { "Retry-After": "seconds", "X-Request-Id": "by which the log tells more" },
  },
};
const NO_JSON = {
  408: refusal("The body did not arrive within 10 seconds"),
  415: refusal("The body is not application/json in UTF-8, or compressed"),
};
const NO_BODY = { ...NO_JSON, 413: refusal("The body is larger than 64 KiB") };
const NO_ID = {
  "not a UUID": {
    params: { id: "42" },
    errors: ["reservation id is invalid format"],
    detail: 'The reservation id breaks a rule: the reservation id must be a UUID: received "42"',
  },
};
const UNKNOWN = {
  params: { id: UNKNOWN_ID },
  errors: ["reservation not found"],
  detail: `Not found: no reservation has the id ${UNKNOWN_ID}`,
};
const NO_RESERVATION = {
  400: refusal("The id is no UUID", NO_ID),
  404: refusal("There is no such reservation", { unknown: UNKNOWN }),
};
const KEY_CONFLICT = {
  errors: ["idempotency key is used with other content"],
  detail:
    "The idempotency key was used before, with other content: one key must always come with the same content; nothing was done",
};
const NO_CHANGE = {
  ...NO_BODY,
  ...UNAVAILABLE,
  422: refusal("The idempotency key came before, with other content. Nothing was changed", {
    "the key of another change": {
      body: { user_id: "TestUser01", point_num: 100, idempotency_key: "refund-7" },
      ...KEY_CONFLICT,
    },
  }),
};
const CHANGE_KEYS =
  "The same `idempotency_key` (field or header) with the same content changes nothing again and gets the same answer, with the header `Idempotent-Replayed: true`. These keys and those of reservations are apart; additions and subtractions share theirs.";
const NO_USER_ID = {
  "not a user id": {
    params: { user_id: "Test-User" },
    errors: ["user id is invalid format"],
    detail: 'The user id breaks a rule: user_id must be 1 to 20 of A-Z, a-z and 0-9: received "Test-User"',
  },
};

export const health = describe({
  summary: "The process lives",
  description: "Answers as long as the process does, whatever MySQL does.",
  answers: { 200: answer(Messages, "It lives", { alive: { answer: { messages: ["ok"] } } }) },
  refusals: {},
});

export const ready = describe({
  summary: "The process can serve",
  description: "Asks MySQL, for 2 seconds at most.",
  answers: { 200: answer(Messages, "MySQL answers", { ready: { answer: { messages: ["ok"] } } }) },
  refusals: { 503: refusal("MySQL does not answer") },
});

export const reserve = describe({
  summary: "Promise points at a time",
  description:
    "A 201 means that the reservation is committed: at `execute_at` the points come, once. The same `idempotency_key` (field or header; the same where both are given) with the same content gets the first answer again, whatever has become of the reservation since; with other content 422. Without a key every request is a reservation of its own. The body is 64 KiB at most.",
  body: ReservationCreateInput,
  takesKey: true,
  answers: {
    201: {
      headers: { Location: "where its story is told", ...REPLAYED },
      ...answer(Reserved, "Reserved", {
        "a key in the body": {
          body: { ...ROW, idempotency_key: "order-42" },
          answer: RESERVED,
        },
        "a key in the header, and a campaign": {
          headers: { "idempotency-key": "order-43" },
          body: { ...ROW, campaign: "summer-2029" },
          answer: RESERVED,
        },
        "the same again": {
          body: { ...ROW, campaign: "summer-2029", idempotency_key: "order-41" },
          answer: RESERVED,
        },
      }),
    },
  },
  refusals: {
    400: refusal("Broken rules, all of them at once", {
      "two broken rules": {
        body: { user_id: "Test-User", point_amount: 0, execute_at: TIME },
        errors: ["user id is invalid format", "point amount must be greater than 0"],
        detail:
          'The reservation breaks a rule: user_id must be 1 to 20 of A-Z, a-z and 0-9: received "Test-User"; point_amount must be an integer from 1 to 2147483647: received 0',
      },
      "a time without an offset": {
        body: { ...ROW, execute_at: "2029-02-22T22:59:00" },
        errors: ["execute at must be an RFC 3339 time with seconds and offset"],
        detail:
          'The reservation breaks a rule: execute_at must look like 2029-02-22T22:59:00+09:00, with at most milliseconds: received "2029-02-22T22:59:00"',
      },
    }),
    ...NO_BODY,
    422: refusal("The idempotency key came before, with other content", {
      "the key of another reservation": {
        body: { ...ROW, point_amount: 200, idempotency_key: "order-41" },
        ...KEY_CONFLICT,
      },
    }),
    ...UNAVAILABLE,
  },
});

export const reserveBulk = describe({
  summary: "Promise points to many, in one request",
  description:
    "1 to 10,000 reservations, in a body of 8 MiB at most. `atomic`: all or none; 400 and 422 name every broken row by its index. `each`: every row for itself, with a result for each row in their order: `created`, `replayed`, or `refused` with its `errors`. Idempotency keys count within the request too. A row without a key gets one from the request's header `Idempotency-Key` and its index, or from the content of all rows where there is no such header: the same request sent again, for instance after a cut connection, changes nothing and gets the same ids. So, without keys and without the header, send after a correction only the corrected rows; and to reserve the same rows twice, give them keys.",
  body: BulkReservationInput,
  takesKey: true,
  answers: {
    200: answer(BulkReserved, "mode `each`: what became of each row", {
      "one of three is refused": {
        body: {
          mode: "each",
          reservations: [
            { ...ROW, idempotency_key: "order-44" },
            { ...ROW, point_amount: 0 },
            { ...ROW, idempotency_key: "order-44" },
          ],
        },
        answer: {
          results: [
            { result: "created", ...RESERVED },
            { result: "refused", errors: ["point amount must be greater than 0"] },
            { result: "replayed", ...RESERVED },
          ],
        },
      },
    }),
    201: answer(BulkReserved, "mode `atomic`: all of them are reserved", {
      "all of them": {
        headers: { "idempotency-key": "bulk-7" },
        body: { mode: "atomic", reservations: [ROW, { ...ROW, user_id: "TestUser02" }] },
        answer: {
          results: [
            { result: "created", ...RESERVED },
            { result: "created", ...RESERVED, reservation_id: PROCESSING_ID },
          ],
        },
      },
    }),
  },
  refusals: {
    400: refusal("Broken rules; of the rows' only in mode `atomic`. Nothing was reserved", {
      "a broken row": {
        body: { mode: "atomic", reservations: [ROW, { ...ROW, point_amount: 0 }] },
        errors: ["reservations[1]: point amount must be greater than 0"],
        detail:
          "The bulk of reservations breaks a rule: reservations[1]: point_amount must be an integer from 1 to 2147483647: received 0",
      },
      "no rows": {
        body: { mode: "all", reservations: [] },
        errors: ["reservations must be an array of 1 to 10000", "mode must be atomic or each"],
        detail:
          'The bulk of reservations breaks a rule: reservations must be an array of 1 to 10000 reservations: received an array of 0; mode must be atomic or each: received "all"',
      },
    }),
    413: refusal("The body is larger than 8 MiB"),
    ...NO_JSON,
    422: refusal("mode `atomic`: some keys came before, with other content. Nothing was reserved", {
      "the key of another reservation": {
        body: {
          mode: "atomic",
          reservations: [ROW, { ...ROW, point_amount: 200, idempotency_key: "order-41" }],
        },
        errors: ["reservations[1]: idempotency key is used with other content"],
        detail:
          "The idempotency key was used before, with other content: reservations[1]: one key must always come with the same content; nothing was done",
      },
    }),
    ...UNAVAILABLE,
  },
});

export const readReservation = describe({
  summary: "The whole story of one reservation",
  description: "Where it stands, when it was or will be granted, and what went wrong.",
  params: ReservationParams,
  answers: {
    200: answer(Story, "Its story", {
      "a reservation to come": { params: { id: PENDING_ID }, answer: STORY },
      "one that was granted": {
        params: { id: DONE_ID },
        answer: {
          ...STORY,
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

export const findByKey = describe({
  summary: "The whole story of the reservation with an idempotency key",
  description: "For whoever has the number of an order, and no reservation's id.",
  query: KeyQuery,
  answers: {
    200: answer(Story, "Its story", {
      "a reservation to come": { query: { idempotency_key: "order-41" }, answer: STORY },
    }),
  },
  refusals: {
    400: refusal("The key breaks a rule", {
      "a blank": {
        query: { idempotency_key: "order 41" },
        errors: ["idempotency key is invalid format"],
        detail:
          'The query breaks a rule: idempotency_key must be 1 to 100 of A-Z, a-z, 0-9, _ and -: received "order 41"',
      },
    }),
    404: refusal("No reservation has this key", {
      unknown: {
        query: { idempotency_key: "order-0" },
        errors: ["reservation not found"],
        detail: "Not found: no reservation has the idempotency key order-0",
      },
    }),
    ...UNAVAILABLE,
  },
});

export const cancel = describe({
  summary: "Cancel a reservation",
  description:
    "Works until the very grant: where both come at once, one of them wins. After a 200 the points never come, also where the reservation is on its way already; the same request again gets the same answer.",
  params: ReservationParams,
  answers: {
    200: answer(Cancelled, "It is cancelled", {
      "before its time": {
        params: { id: PENDING_ID },
        answer: { reservation_id: PENDING_ID, status: "CANCELLED" },
      },
      "on its way": {
        params: { id: PROCESSING_ID },
        answer: { reservation_id: PROCESSING_ID, status: "CANCELLED" },
      },
      "the same again": {
        params: { id: CANCELLED_ID },
        answer: { reservation_id: CANCELLED_ID, status: "CANCELLED" },
      },
    }),
  },
  refusals: {
    ...NO_RESERVATION,
    409: {
      schema: StandsProblem,
      description: "It was granted, or is FAILED: no points come of it unless it is retried",
      examples: {
        "it was granted": {
          params: { id: DONE_ID },
          errors: ["reservation was granted"],
          detail: `Cannot cancel the reservation: it was granted at ${PAST} by the ledger entry ${TRANSACTION_ID}`,
          facts: GRANTED,
        },
        "it is FAILED": {
          params: { id: FAILED_ID },
          errors: ["reservation is FAILED"],
          detail: "Cannot cancel the reservation: it is FAILED",
          facts: STANDS_FAILED,
        },
      },
    },
    ...UNAVAILABLE,
  },
});

export const patch = describe({
  summary: "Give a reservation another time or amount",
  description:
    "Only while it is PENDING; where an answer was lost, ask for the story before sending it again. What was reserved first is kept: a request with its idempotency key and its first content still gets the first answer.",
  params: ReservationParams,
  body: ReservationPatchInput,
  answers: {
    200: answer(Story, "Its story from now on", {
      "another time and amount": {
        params: { id: PENDING_ID },
        body: { execute_at: "2029-03-01T00:00:00Z", point_amount: 250 },
        answer: {
          ...STORY,
          point_amount: 250,
          execute_at: "2029-03-01T00:00:00.000Z",
          original_point_amount: 100,
          original_execute_at: TIME,
          next_scan_at: "2029-03-01T00:00:00.000Z",
          updated_at: NOW,
        },
      },
    }),
  },
  refusals: {
    400: refusal("Broken rules, all of them at once", {
      nothing: {
        params: { id: PENDING_ID },
        body: {},
        errors: ["execute at or point amount is required"],
        detail:
          "The change of a reservation breaks a rule: the body must have execute_at, point_amount or both: received neither",
      },
    }),
    404: refusal("There is no such reservation", { unknown: { ...UNKNOWN, body: { point_amount: 250 } } }),
    409: {
      schema: StandsProblem,
      description: "It is on its way, or over",
      examples: {
        "it was granted": {
          params: { id: DONE_ID },
          body: { point_amount: 250 },
          errors: ["reservation is not PENDING"],
          detail: "Cannot change the reservation: it is DONE, and only what is PENDING can be changed",
          facts: GRANTED,
        },
      },
    },
    ...NO_BODY,
    ...UNAVAILABLE,
  },
});

export const retry = describe({
  summary: "Try a FAILED reservation again",
  description:
    "FAILED → PENDING, due at once, with all its attempts: for when the reason that `last_error` names is mended. Where an answer was lost, the same again gets a 409 that says where it stands.",
  params: ReservationParams,
  answers: {
    200: answer(Story, "Its story from now on", {
      "it was FAILED": {
        params: { id: FAILED_ID },
        answer: {
          ...STORY,
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
    409: {
      schema: StandsProblem,
      description: "It is not FAILED",
      examples: {
        "it was granted": {
          params: { id: DONE_ID },
          errors: ["reservation is not FAILED"],
          detail: "Cannot retry the reservation: it is DONE, and only what is FAILED can be tried again",
          facts: GRANTED,
        },
      },
    },
    ...UNAVAILABLE,
  },
});

export const cancelAll = describe({
  summary: "Cancel a campaign",
  description:
    "Cancels all of a campaign's reservations that can still be cancelled, 1,000 at a time, and counts where all of them stand then, whoever brought them there. It stops after 20 seconds: where `open` is not 0, send the same again. What is FAILED stays so. What is reserved while it runs may be missed.",
  params: Type.Object({ campaign: Campaign }),
  answers: {
    200: answer(CampaignCancelled, "Where all of it stands", {
      "one of five was granted": {
        params: { campaign: "summer-2029" },
        answer: { campaign: "summer-2029", cancelled: 3, granted: 1, failed: 1, open: 0 },
      },
    }),
  },
  refusals: {
    400: refusal("The campaign breaks a rule", {
      "a blank": {
        params: { campaign: "summer 2029" },
        errors: ["campaign is invalid format"],
        detail:
          'The campaign breaks a rule: campaign must be 1 to 64 of A-Z, a-z, 0-9, _ and -: received "summer 2029"',
      },
    }),
    404: refusal("No reservation is of this campaign", {
      unknown: {
        params: { campaign: "winter-1999" },
        errors: ["campaign not found"],
        detail: "Not found: no reservation is of the campaign winter-1999",
      },
    }),
    ...UNAVAILABLE,
  },
});

export const readPoints = describe({
  summary: "What a user has, and what is still to come",
  description:
    "`reserved_point_num` is the sum of all that is neither granted, nor failed, nor cancelled. With `at`: what the user had at that time, by the ledger. Entries that are being committed can still come into the last 30 seconds; a time to come gives what is there now.",
  params: UserParams,
  query: PointsQuery,
  answers: {
    200: answer(Balance, "The balance", {
      now: {
        params: { user_id: "TestUser01" },
        answer: {
          user_id: "TestUser01",
          point_num: 130,
          reserved_point_num: 200,
          next_execute_at: PAST,
          updated_at: SUBTRACTED,
        },
      },
      "at a time": {
        params: { user_id: "TestUser01" },
        query: { at: "2026-01-01T00:00:00Z" },
        answer: { user_id: "TestUser01", point_num: 0, at: "2026-01-01T00:00:00.000Z", updated_at: null },
      },
    }),
  },
  refusals: {
    400: refusal("Broken rules, all of them at once", {
      ...NO_USER_ID,
      "a day is no time": {
        params: { user_id: "TestUser01" },
        query: { at: "2026-01-01" },
        errors: ["at must be an RFC 3339 time with seconds and offset"],
        detail:
          'The query breaks a rule: at must look like 2029-02-22T22:59:00+09:00, with at most milliseconds: received "2026-01-01"',
      },
    }),
    404: refusal("The user has no balance, and nothing is to come", {
      unknown: {
        params: { user_id: "Nobody" },
        errors: ["user not found"],
        detail: "Not found: the user Nobody never got points, and none are to come",
      },
    }),
    ...UNAVAILABLE,
  },
});

export const listReserved = describe({
  summary: "The reservations of a user",
  description:
    "By `execute_at`, in pages of `limit`; each page costs the same, but one of PENDING passes over what is PROCESSING, and the other way round. A user who is not known has none. `status` and `campaign` filter.",
  params: UserParams,
  query: ReservedPointsQuery,
  answers: {
    200: answer(ReservedPoints, "One page", {
      "the first that are PENDING": {
        params: { user_id: "TestUser01" },
        query: { status: "PENDING", limit: 1 },
        answer: {
          reserved_points: [
            {
              reservation_id: PENDING_ID,
              point: 100,
              status: "PENDING",
              add_date: TIME,
              campaign: "summer-2029",
            },
          ],
          next_cursor: null,
        },
      },
      "all of a campaign": {
        params: { user_id: "TestUser01" },
        query: { campaign: "summer-2029", limit: 1 },
        answer: {
          reserved_points: [
            {
              reservation_id: PROCESSING_ID,
              point: 100,
              status: "PROCESSING",
              add_date: PAST,
              campaign: "summer-2029",
            },
          ],
          next_cursor: AFTER_PROCESSING,
        },
      },
      "the page after": {
        params: { user_id: "TestUser01" },
        query: {
          campaign: "summer-2029",
          status: "PENDING",
          cursor: AFTER_PROCESSING,
        },
        answer: {
          reserved_points: [
            {
              reservation_id: PENDING_ID,
              point: 100,
              status: "PENDING",
              add_date: TIME,
              campaign: "summer-2029",
            },
          ],
          next_cursor: null,
        },
      },
      "an unknown user": {
        params: { user_id: "Nobody" },
        answer: { reserved_points: [], next_cursor: null },
      },
    }),
  },
  refusals: {
    400: refusal("Broken rules, all of them at once", {
      ...NO_USER_ID,
      "a status that is none": {
        params: { user_id: "TestUser01" },
        query: { status: "OPEN", limit: 0 },
        errors: [
          "status must be PENDING, PROCESSING, DONE, FAILED or CANCELLED",
          "limit must be greater than 0",
        ],
        detail:
          'The query breaks a rule: status must be PENDING, PROCESSING, DONE, FAILED or CANCELLED: received "OPEN"; limit must be an integer from 1 to 1000: received 0',
      },
    }),
    ...UNAVAILABLE,
  },
});

export const listLedger = describe({
  summary: "What has changed a user's balance",
  description:
    "The ledger, newest first, in pages of `limit`; each page costs the same. Each entry names the reservation it came from. A user who is not known has none.",
  params: UserParams,
  query: TransactionsQuery,
  answers: {
    200: answer(Transactions, "One page", {
      "the newest": {
        params: { user_id: "TestUser01" },
        query: { limit: 2 },
        answer: {
          transactions: [
            {
              ...{ transaction_id: "01a20990-f011-7d52-b6c8-3e1f9a7b5c08", kind: "sub", point: -20 },
              ...{
                reservation_id: null,
                campaign: null,
                idempotency_key: "refund-7",
                created_at: SUBTRACTED,
              },
            },
            {
              ...{ transaction_id: TRANSACTION_ID, kind: "grant", point: 100, reservation_id: DONE_ID },
              ...{ campaign: "summer-2029", idempotency_key: "order-31", created_at: PAST },
            },
          ],
          next_cursor: encodeCursor({ time: new Date(PAST), id: TRANSACTION_ID }),
        },
      },
      "an unknown user": { params: { user_id: "Nobody" }, answer: { transactions: [], next_cursor: null } },
    }),
  },
  refusals: {
    400: refusal("Broken rules, all of them at once", {
      ...NO_USER_ID,
      "a cursor that is none": {
        params: { user_id: "TestUser01" },
        query: { cursor: "2" },
        errors: ["cursor is invalid format"],
        detail: 'The query breaks a rule: cursor must be the next_cursor of another page: received "2"',
      },
    }),
    ...UNAVAILABLE,
  },
});

export const totals = describe({
  summary: "How many points were issued on which day",
  description: `The ledger by day, kind and campaign, and what all users had in the end of each day, for at most ${MAX_DAYS} days. A day is one of \`time_zone\`. The schedulers count what is new every hour; \`bun run aggregate\` does so at once. As CSV where the header Accept prefers text/csv: the same columns as \`totals\`, with a first line of their names.`,
  query: TotalsQuery,
  answers: {
    200: {
      alsoAs: "text/csv",
      ...answer(Totals, "The totals", {
        "two days": {
          query: { from: "2026-01-31", to: "2026-02-01" },
          answer: {
            ...{ time_zone: "Asia/Tokyo", from: "2026-01-31", to: "2026-02-01", aggregated_at: NOW },
            totals: [
              {
                ...{ day: "2026-02-01", kind: "grant", campaign: "summer-2029" },
                ...{ entries: 1, points: 100, users: 1, late_ms_mean: 0, late_ms_max: 0 },
              },
              {
                ...{ day: "2026-02-01", kind: "sub", campaign: null },
                ...{ entries: 1, points: -20, users: 1, late_ms_mean: null, late_ms_max: null },
              },
            ],
            balances: [
              { day: "2026-01-31", point_num: 50 },
              { day: "2026-02-01", point_num: 130 },
            ],
          },
        },
        "one campaign": {
          query: { from: "2026-01-31", to: "2026-02-01", campaign: "winter-2029" },
          answer: {
            ...{ time_zone: "Asia/Tokyo", from: "2026-01-31", to: "2026-02-01", aggregated_at: NOW },
            totals: [],
          },
        },
      }),
    },
  },
  refusals: {
    400: refusal("Broken rules, or more than 10000 totals", {
      "no day": {
        query: { from: "31.1.2026" },
        errors: ["from must be a day like 2026-01-31"],
        detail:
          'The query breaks a rule: from must be a day like 2026-01-31, from 1970 to 9999: received "31.1.2026"',
      },
      "the wrong order": {
        query: { from: "2026-02-02", to: "2026-02-01" },
        errors: ["from must not be after to"],
        detail:
          "The range of days breaks a rule: from must not be after to: received 2026-02-02 and 2026-02-01",
      },
    }),
    ...UNAVAILABLE,
  },
});

export const add = describe({
  summary: "Add points now",
  description: `Without a reservation: ledger entry and balance in one transaction, once for each idempotency key. ${CHANGE_KEYS}`,
  body: PointChangeInput,
  takesKey: true,
  answers: {
    200: {
      headers: REPLAYED,
      ...answer(Messages, "They are in the balance", {
        "100 points": {
          body: { user_id: "TestUser01", point_num: 100, idempotency_key: "gift-1" },
          answer: { messages: ["point updated"] },
        },
      }),
    },
  },
  refusals: {
    400: refusal("Broken rules, all of them at once, or a balance too large to hold. Nothing was changed", {
      "broken rules": {
        body: { user_id: "Test-User", point_num: 0 },
        errors: ["user id is invalid format", "point num must be greater than 0"],
        detail:
          'The change of points breaks a rule: user_id must be 1 to 20 of A-Z, a-z and 0-9: received "Test-User"; point_num must be an integer from 1 to 2147483647: received 0',
      },
    }),
    ...NO_CHANGE,
  },
});

export const sub = describe({
  summary: "Subtract points now",
  description: `A negative ledger entry and the balance, in one transaction. A balance never falls below 0. ${CHANGE_KEYS}`,
  body: PointChangeInput,
  takesKey: true,
  answers: {
    200: {
      headers: REPLAYED,
      ...answer(Messages, "They are gone", {
        "30 points": {
          body: { user_id: "TestUser01", point_num: 30, idempotency_key: "spend-1" },
          answer: { messages: ["point subtracted"] },
        },
      }),
    },
  },
  refusals: {
    400: refusal("Broken rules, an unknown user, or fewer points than that. Nothing was changed", {
      "more than there are": {
        body: { user_id: "TestUser01", point_num: 1000 },
        errors: ["points must be greater than 0"],
        detail: "Cannot subtract 1000 points: the balance of TestUser01 would fall below 0",
      },
      "an unknown user": {
        body: { user_id: "Nobody", point_num: 1 },
        errors: ["user not found"],
        detail: "Cannot subtract 1 points: the user Nobody never got any",
      },
    }),
    ...NO_CHANGE,
  },
});

export const confirm = describe({
  summary: "A balance in the original's words",
  description: "The user comes in the query. `GET /users/{user_id}/points` says more.",
  query: ConfirmQuery,
  answers: {
    200: answer(Messages, "The balance", {
      "a balance": {
        query: { user_id: "TestUser01" },
        answer: { messages: ["userID: TestUser01", "pointNum: 130"] },
      },
    }),
  },
  refusals: {
    400: refusal("The user id breaks a rule, or the user never got points", {
      "an unknown user": {
        query: { user_id: "Nobody" },
        errors: ["user not found"],
        detail: "Cannot confirm points: the user Nobody never got any",
      },
    }),
    ...UNAVAILABLE,
  },
});
