import { type Static, Type } from "@sinclair/typebox";
import { v7 as uuidv7 } from "uuid";
import {
  amountRule,
  brokenFieldRules,
  brokenHeaderKeyRules,
  IdempotencyKey,
  idempotencyKeyRule,
  parseText,
  refuseBroken,
  ruleOf,
} from "./input.ts";

/** Who holds points. Case matters: `User1` and `user1` are two users. */
export const UserId = Type.String({
  pattern: "^[A-Za-z0-9]{1,20}$",
  description: "1 to 20 of A-Z, a-z and 0-9; case matters",
  examples: ["TestUser01"],
});

/** The largest amount of one grant, the same as MySQL's INT. */
export const MAX_POINT_AMOUNT = 2_147_483_647;
/** The largest balance, the same as MySQL's BIGINT. */
export const MAX_POINT_NUM = 9_223_372_036_854_775_807n;

/** Points as JSON: its numbers have no limit, but JavaScript's have. All digits of a BIGINT go out as they are. */
export function digitsOf(points: bigint): number {
  return (JSON as unknown as { rawJSON(text: string): number }).rawJSON(String(points));
}

/** How many points one grant gives. */
export const PointAmount = Type.Integer({
  minimum: 1,
  maximum: MAX_POINT_AMOUNT,
  description: "points to grant; a JSON number, not a string",
  examples: [100],
});

/** One entry of the ledger: it is added once and never changed. */
export interface PointTransaction {
  idempotencyKey: string;
  userId: Static<typeof UserId>;
  /** Negative where points are taken. */
  pointAmount: number;
}

export const userIdRule = ruleOf(UserId, {
  sentence: "user id is invalid format",
  must: "1 to 20 of A-Z, a-z and 0-9",
});
export const pointAmountRule = amountRule(PointAmount, "point amount");

/**
 * Reads a user id from outside.
 *
 * @throws {DomainError} INVALID_INPUT
 */
export function parseUserId(value: unknown): string {
  return parseText(value, userIdRule, { place: "user_id", what: "user id" });
}

/** The body of `PUT /point/add` and `PUT /point/sub`. */
export const PointChangeInput = Type.Object(
  {
    user_id: UserId,
    point_num: Type.Integer({
      minimum: 1,
      maximum: MAX_POINT_AMOUNT,
      description: "points to add or to subtract; a JSON number, not a string",
      examples: [100],
    }),
    idempotency_key: Type.Optional(IdempotencyKey),
  },
  { additionalProperties: false },
);

const POINT_CHANGE_RULES = {
  user_id: userIdRule,
  point_num: amountRule(PointChangeInput.properties.point_num, "point num"),
  idempotency_key: idempotencyKeyRule,
};

/**
 * Keys of entries that no reservation made. No client's key has a colon, so that an addition can never be taken for the
 * grant of a reservation with the same key.
 */
export const DIRECT = "direct:";

/**
 * Makes a ledger entry of what a client sent, without a reservation.
 *
 * @param input the parsed body, of any shape
 * @param options.sign 1 to add, -1 to subtract
 * @throws {DomainError} INVALID_INPUT, with one broken rule for each
 */
export function newPointChange(
  input: unknown,
  { sign, headerKey }: { sign: 1 | -1; headerKey?: string | undefined },
): PointTransaction {
  const bodyKey = (input as { idempotency_key?: unknown } | null)?.idempotency_key;
  const broken = brokenFieldRules(PointChangeInput, input, POINT_CHANGE_RULES);
  refuseBroken([...broken, ...brokenHeaderKeyRules(headerKey, bodyKey)], "change of points");
  const { user_id, point_num, idempotency_key } = input as Static<typeof PointChangeInput>;
  return {
    userId: user_id,
    pointAmount: sign * point_num,
    idempotencyKey: `${DIRECT}${idempotency_key ?? headerKey ?? uuidv7()}`,
  };
}

/** Whether an entry's key says that no reservation made it. */
export function isDirect(idempotencyKey: string): boolean {
  return idempotencyKey.startsWith(DIRECT);
}

/** Where an entry came from: a reservation, an addition or a subtraction. */
export const ENTRY_KINDS = ["grant", "add", "sub"] as const;
export type EntryKind = (typeof ENTRY_KINDS)[number];

export function kindOf({
  idempotencyKey,
  pointAmount,
}: Pick<PointTransaction, "idempotencyKey" | "pointAmount">): EntryKind {
  if (!isDirect(idempotencyKey)) return "grant";
  return pointAmount < 0 ? "sub" : "add";
}

/** The key as the client knows it. */
export function clientKeyOf(idempotencyKey: string): string {
  return isDirect(idempotencyKey) ? idempotencyKey.slice(DIRECT.length) : idempotencyKey;
}
