import type { Static } from "@sinclair/typebox";
import { Elysia } from "elysia";
import { BUSY, openUntilFree } from "../busy.ts";
import { coalesce } from "../coalesce.ts";
import type { Database } from "../database.ts";
import { DomainError, keyConflict, plural } from "../errors.ts";
import { objectSchema } from "../field.ts";
import {
  answer,
  describe,
  Messages,
  NO_BODY,
  REPLAYED,
  refusal,
  refused,
  replayed,
  UNAVAILABLE,
} from "../http/describe.ts";
import { BATCHING, headerKeyOf, parseQuery, parseQueryFields, readJson } from "../http/request.ts";
import { findBalance } from "./balance_queries.ts";
import { type ChangeOutcome, changePoints } from "./change_repository.ts";
import {
  MAX_POINT_NUM,
  newPointChange,
  type PointTransaction,
  pointChangeFields,
  userIdField,
} from "./point.ts";

/** `PUT /point/add`, `PUT /point/sub` and `GET /point/confirm`, in the format of the Go original. */
export function pointRoutes({ database }: { database: Database }) {
  const change = pointChanger(database);
  return new Elysia()
    .put("/point/add", ({ request }) => change(request, "add"), ADD)
    .put("/point/sub", ({ request }) => change(request, "sub"), SUB)
    .get(
      "/point/confirm",
      async ({ request }) => {
        const { user_id } = parseQuery(request, confirmFields);
        const balance = await findBalance(database, user_id);
        if (!balance) throw unknownUser("Cannot confirm points", user_id);
        return Response.json(messagesOf(`userID: ${user_id}`, `pointNum: ${balance.pointNum}`));
      },
      CONFIRM,
    );
}

function messagesOf(...messages: string[]): Static<typeof Messages> {
  return { messages };
}

function refusedBy(what: string, sentence: string, explanation: string): DomainError {
  return new DomainError("INVALID_INPUT", what, [{ sentence, explanation }]);
}

function unknownUser(what: string, userId: string): DomainError {
  return refusedBy(what, "user not found", `the user ${userId} has never received points`);
}

// ---- PUT /point/add and PUT /point/sub

const MESSAGES = { add: "point updated", sub: "point subtracted" };

function pointChanger(database: Database) {
  const changeMany = (batch: PointTransaction[]) => changePoints(database, batch);
  const change = coalesce(changeMany, BATCHING);
  // Those that wait for a locked balance come again and again: they must not fill the batches of the others.
  const changeAgain = coalesce(changeMany, BATCHING);
  const untilFree = openUntilFree();
  return async (request: Request, kind: "add" | "sub"): Promise<Response> => {
    const entry = newPointChange(await readJson(request), { kind, headerKey: headerKeyOf(request) });
    let next = change;
    const outcome = await untilFree(async () => {
      const outcome = await next(entry);
      next = changeAgain;
      return outcome === "busy" ? BUSY : outcome;
    });
    if (outcome !== "changed" && outcome !== "replayed") throw refusedChange(entry, outcome);
    return Response.json(messagesOf(MESSAGES[kind]), { headers: replayed(outcome) });
  };
}

type RefusedChange = Exclude<ChangeOutcome, "changed" | "replayed" | "busy">;

function refusedChange(
  { userId, pointAmount }: Pick<PointTransaction, "userId" | "pointAmount">,
  outcome: RefusedChange,
): DomainError {
  const amount = Math.abs(pointAmount);
  const what = `Cannot ${pointAmount > 0 ? "add" : "subtract"} ${plural(amount, "point")}`;
  switch (outcome) {
    case "conflict":
      return keyConflict();
    case "unknown_user":
      return unknownUser(what, userId);
    case "too_few":
      return refusedBy(what, "points must be greater than 0", `the balance of ${userId} would fall below 0`);
    case "too_many":
      return refusedBy(
        what,
        `points must be at most ${MAX_POINT_NUM}`,
        `the balance of ${userId} would be more than ${MAX_POINT_NUM}`,
      );
  }
}

const KEYS =
  "A request with the same `idempotency_key` (field or header) and the same content has no second effect; it gets the same answer, with the header `Idempotent-Replayed: true`. Additions and subtractions share their keys; the keys of reservations are separate.";
const changeSchema = objectSchema(pointChangeFields);
const NO_CHANGE = {
  ...NO_BODY,
  ...UNAVAILABLE,
  422: refusal("The idempotency key was used before, with other content. Nothing was changed", {
    "the key of another change": {
      body: { user_id: "TestUser01", point_num: 100, idempotency_key: "refund-7" },
      error: keyConflict(),
    },
  }),
};

const ADD = describe({
  summary: "Add points now",
  description: `Changes the balance without a reservation: ledger entry and balance in one transaction, once per idempotency key. ${KEYS}`,
  body: changeSchema,
  takesKey: true,
  answers: {
    200: {
      ...answer(Messages, "The points are in the balance", {
        "100 points": {
          body: { user_id: "TestUser01", point_num: 100, idempotency_key: "gift-1" },
          answer: messagesOf(MESSAGES.add),
        },
      }),
      headers: REPLAYED,
    },
  },
  refusals: {
    400: refusal("The request breaks rules, or the balance would be too large. Nothing was changed", {
      "broken rules": refused({ body: { user_id: "Test-User", point_num: 0 } }, ({ body }) =>
        newPointChange(body, { kind: "add" }),
      ),
    }),
    ...NO_CHANGE,
  },
});

const SUB = describe({
  summary: "Subtract points now",
  description: `Changes the balance at once: a negative ledger entry and the balance in one transaction, once per idempotency key. A balance never falls below 0. ${KEYS}`,
  body: changeSchema,
  takesKey: true,
  answers: {
    200: {
      ...answer(Messages, "The points are subtracted", {
        "30 points": {
          body: { user_id: "TestUser01", point_num: 30, idempotency_key: "spend-1" },
          answer: messagesOf(MESSAGES.sub),
        },
      }),
      headers: REPLAYED,
    },
  },
  refusals: {
    400: refusal("The request breaks rules, or the user has too few points. Nothing was changed", {
      "more points than the balance": {
        body: { user_id: "TestUser01", point_num: 1000 },
        error: refusedChange({ userId: "TestUser01", pointAmount: -1000 }, "too_few"),
      },
      "an unknown user": {
        body: { user_id: "Nobody", point_num: 1 },
        error: refusedChange({ userId: "Nobody", pointAmount: -1 }, "unknown_user"),
      },
    }),
    ...NO_CHANGE,
  },
});

// ---- GET /point/confirm

const confirmFields = { user_id: userIdField };

const CONFIRM = describe({
  summary: "Get a balance in the format of the Go original",
  description: "The user id is in the query. `GET /users/{user_id}/points` returns more details.",
  query: objectSchema(confirmFields),
  answers: {
    200: answer(Messages, "The balance", {
      "a balance": {
        query: { user_id: "TestUser01" },
        answer: messagesOf("userID: TestUser01", "pointNum: 130"),
      },
    }),
  },
  refusals: {
    400: refusal("The user id breaks a rule, or the user has never received points", {
      "not a user id": refused({ query: { user_id: "Test-User" } }, ({ query }) =>
        parseQueryFields(confirmFields, query),
      ),
      "an unknown user": {
        query: { user_id: "Nobody" },
        error: unknownUser("Cannot confirm points", "Nobody"),
      },
    }),
    ...UNAVAILABLE,
  },
});
