import { type Static, Type } from "@sinclair/typebox";
import { Elysia } from "elysia";
import type { Database } from "../database.ts";
import { type DomainError, notFound } from "../errors.ts";
import { objectSchema, optional, timeField } from "../field.ts";
import {
  answer,
  describe,
  NextCursor,
  type Outgoing,
  orNull,
  refusal,
  refused,
  Time,
  UNAVAILABLE,
  Uuid,
} from "../http/describe.ts";
import { DONE_ID, PAST, SUBTRACTED, TRANSACTION_ID } from "../http/examples.ts";
import { parseQuery, parseQueryFields } from "../http/request.ts";
import { encodeCursor, nextCursor, pageFields, pageOf } from "../page.ts";
import {
  findBalanceAt,
  findHoldings,
  type Holdings,
  type ListedTransaction,
  listTransactions,
} from "./balance_queries.ts";
import { digitsOf, EntryKindName, parseUserId, userIdField } from "./point.ts";

/** `GET /users/{user_id}/points` and `GET /users/{user_id}/transactions`. */
export function userRoutes({ database }: { database: Database }) {
  return new Elysia()
    .get(
      "/users/:user_id/points",
      async ({ params, request }) => {
        const userId = parseUserId(params.user_id);
        const { at } = parseQuery(request, balanceFields);
        if (at === undefined) {
          const holdings = await findHoldings(database, userId);
          if (!holdings) throw unknownUser(userId);
          return Response.json(balanceOf(userId, holdings));
        }
        const balance = await findBalanceAt(database, userId, at);
        if (!balance) throw unknownUser(userId);
        return Response.json(balanceAtOf(userId, { ...balance, at }));
      },
      READ_BALANCE,
    )
    .get(
      "/users/:user_id/transactions",
      async ({ params, request }) => {
        const userId = parseUserId(params.user_id);
        const page = pageOf(parseQuery(request, pageFields));
        const found = await listTransactions(database, userId, page);
        const positions = found.map(({ createdAt, id }) => ({ time: createdAt, id }));
        return Response.json({
          transactions: found.slice(0, page.limit).map(transactionOf),
          next_cursor: nextCursor(positions, page.limit),
        });
      },
      LIST_TRANSACTIONS,
    );
}

export const userParams = objectSchema({ user_id: userIdField });

/** The refusals of a user id. */
export const NO_USER_ID = {
  "not a user id": refused({ params: { user_id: "Test-User" } }, ({ params }) => parseUserId(params.user_id)),
};

// ---- GET /users/{user_id}/points

const balanceFields = { at: optional(timeField) };

const BIG = "up to 9223372036854775807, more than some JSON parsers can hold";
const Balance = Type.Object({
  user_id: userIdField.schema,
  point_num: Type.Integer({ description: BIG }),
  reserved_point_num: Type.Optional(
    Type.Integer({ description: `the sum of the open reservations; left out if \`at\` is given; ${BIG}` }),
  ),
  next_execute_at: Type.Optional(
    orNull(Time, "when the next open reservation is due; null if there is none; left out if `at` is given"),
  ),
  at: Type.Optional(Time),
  updated_at: orNull(Time, "when the balance last changed; null if it has never changed"),
});

function balanceOf(userId: string, holdings: Holdings): Outgoing<Static<typeof Balance>> {
  return {
    user_id: userId,
    point_num: digitsOf(holdings.pointNum),
    reserved_point_num: digitsOf(holdings.reservedPointNum),
    next_execute_at: holdings.nextExecuteAt,
    updated_at: holdings.updatedAt,
  };
}

function balanceAtOf(
  userId: string,
  { pointNum, updatedAt, at }: Pick<Holdings, "pointNum" | "updatedAt"> & { at: Date },
): Outgoing<Static<typeof Balance>> {
  return { user_id: userId, point_num: digitsOf(pointNum), at, updated_at: updatedAt };
}

function unknownUser(userId: string): DomainError {
  return notFound("user not found", `the user ${userId} has no balance and no open reservation`);
}

const READ_BALANCE = describe({
  summary: "Get a balance, and the points still to be granted",
  description:
    "`reserved_point_num` is the sum of the open reservations: those that are PENDING or PROCESSING. With `at`, the answer has the balance at that time, by the ledger. Transactions that are not committed yet can still change the balance at times within the last 30 seconds. A time in the future gives the current balance.",
  params: userParams,
  query: objectSchema(balanceFields),
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
    400: refusal("The request breaks rules", {
      ...NO_USER_ID,
      "a day instead of a time": refused(
        { params: { user_id: "TestUser01" }, query: { at: "2026-01-01" } },
        ({ query }) => parseQueryFields(balanceFields, query),
      ),
    }),
    404: refusal("The user has no balance and no open reservation", {
      unknown: { params: { user_id: "Nobody" }, error: unknownUser("Nobody") },
    }),
    ...UNAVAILABLE,
  },
});

// ---- GET /users/{user_id}/transactions

const Transaction = Type.Object({
  transaction_id: Uuid,
  kind: EntryKindName,
  point: Type.Integer({ description: "negative if points were subtracted" }),
  reservation_id: orNull(Uuid, "the reservation that was granted; null for a direct change"),
  campaign: orNull(Type.String(), "the campaign of the reservation; null if there is none"),
  idempotency_key: Type.String(),
  created_at: Time,
});
const Transactions = Type.Object({
  transactions: Type.Array(Transaction, { description: "newest first" }),
  next_cursor: NextCursor,
});

function transactionOf(entry: ListedTransaction): Outgoing<Static<typeof Transaction>> {
  return {
    transaction_id: entry.id,
    kind: entry.kind,
    point: entry.pointAmount,
    reservation_id: entry.reservationId,
    campaign: entry.campaign,
    idempotency_key: entry.idempotencyKey,
    created_at: entry.createdAt,
  };
}

const LIST_TRANSACTIONS = describe({
  summary: "List the ledger entries of a user",
  description:
    "Newest first, in pages of `limit` entries; every page costs the same. The entry of a grant has the id of its reservation. The list of an unknown user is empty.",
  params: userParams,
  query: objectSchema(pageFields),
  answers: {
    200: answer(Transactions, "One page of entries", {
      "the newest": {
        params: { user_id: "TestUser01" },
        query: { limit: 2 },
        answer: {
          transactions: [
            {
              transaction_id: "01a20990-f011-7d52-b6c8-3e1f9a7b5c08",
              kind: "sub",
              point: -20,
              reservation_id: null,
              campaign: null,
              idempotency_key: "refund-7",
              created_at: SUBTRACTED,
            },
            {
              transaction_id: TRANSACTION_ID,
              kind: "grant",
              point: 100,
              reservation_id: DONE_ID,
              campaign: "summer-2029",
              idempotency_key: "order-31",
              created_at: PAST,
            },
          ],
          next_cursor: encodeCursor({ time: new Date(PAST), id: TRANSACTION_ID }),
        },
      },
      "an unknown user": { params: { user_id: "Nobody" }, answer: { transactions: [], next_cursor: null } },
    }),
  },
  refusals: {
    400: refusal("The request breaks rules", {
      ...NO_USER_ID,
      "not a cursor": refused({ params: { user_id: "TestUser01" }, query: { cursor: "2" } }, ({ query }) =>
        parseQueryFields(pageFields, query),
      ),
    }),
    ...UNAVAILABLE,
  },
});
