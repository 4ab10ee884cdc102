import { type Static, Type } from "@sinclair/typebox";
import { TypeCompiler } from "@sinclair/typebox/compiler";
import { type BrokenRule, DomainError, showValue } from "./errors.ts";

/** Who holds points. Case matters: `User1` and `user1` are two users. */
export const UserId = Type.String({
  pattern: "^[A-Za-z0-9]{1,20}$",
  description: "1 to 20 of A-Z, a-z and 0-9; case matters",
  examples: ["TestUser01"],
});

/** The largest amount of one grant, the same as MySQL's INT. */
export const MAX_POINT_AMOUNT = 2_147_483_647;

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
  pointAmount: Static<typeof PointAmount>;
}

const userIdCheck = TypeCompiler.Compile(UserId);

/** Says which rule `user_id` breaks, or nothing where it breaks none. */
export function brokenUserIdRule(value: unknown): BrokenRule | undefined {
  if (userIdCheck.Check(value)) return undefined;
  return {
    sentence: "user id is invalid format",
    explanation: `user_id must be 1 to 20 of A-Z, a-z and 0-9: received ${showValue(value)}`,
  };
}

/** Says which rule `point_amount` breaks, or nothing where it breaks none. */
export function brokenPointAmountRule(value: unknown): BrokenRule | undefined {
  const received = `received ${showValue(value)}`;
  if (value !== undefined && !(typeof value === "number" && Number.isInteger(value))) {
    return {
      sentence: "point amount must be an integer",
      explanation: `point_amount must be a JSON number without a fraction: ${received}`,
    };
  }
  if (value === undefined || value < 1) {
    return {
      sentence: "point amount must be greater than 0",
      explanation: `point_amount must be an integer from 1 to ${MAX_POINT_AMOUNT}: ${received}`,
    };
  }
  if (value > MAX_POINT_AMOUNT) {
    return {
      sentence: `point amount must be at most ${MAX_POINT_AMOUNT}`,
      explanation: `point_amount must be an integer from 1 to ${MAX_POINT_AMOUNT}: ${received}`,
    };
  }
  return undefined;
}

/**
 * Reads a user id from outside.
 *
 * @throws {DomainError} INVALID_INPUT
 */
export function parseUserId(value: unknown): string {
  const broken = brokenUserIdRule(value);
  if (broken) throw new DomainError("INVALID_INPUT", "The user id breaks a rule", [broken]);
  return value as string;
}
