import { type Static, Type } from "@sinclair/typebox";
import { v7 as uuidv7 } from "uuid";
import {
  amountField,
  field,
  headerKeyRules,
  idempotencyKeyField,
  optional,
  parseField,
  parseFields,
} from "../field.ts";
import { ENTRY_KINDS, type EntryKind } from "../schema.ts";

/** The id of a user. Case matters: `User1` and `user1` are two users. */
export const userIdField = field(
  Type.String({
    pattern: "^[A-Za-z0-9]{1,20}$",
    description: "1 to 20 of A-Z, a-z and 0-9; case matters",
    examples: ["TestUser01"],
  }),
  { sentence: "user id is invalid format", must: "1 to 20 of A-Z, a-z and 0-9" },
);

/**
 * Parses a user id.
 *
 * @throws {DomainError} INVALID_INPUT
 */
export function parseUserId(value: unknown): string {
  return parseField(userIdField, value, { place: "user_id", what: "user id" });
}

/** The largest amount of one grant: the maximum of MySQL's INT. */
export const MAX_POINT_AMOUNT = 2_147_483_647;
/** The largest balance: the maximum of MySQL's BIGINT. */
export const MAX_POINT_NUM = 9_223_372_036_854_775_807n;

/** Points as a JSON number with all digits of a BIGINT, which a JavaScript number cannot hold. */
export function digitsOf(points: bigint): number {
  return (JSON as unknown as { rawJSON(text: string): number }).rawJSON(String(points));
}

function pointsSchema(description: string) {
  return Type.Integer({ minimum: 1, maximum: MAX_POINT_AMOUNT, description, examples: [100] });
}

/** The points of one grant. */
export const pointAmountField = amountField(
  pointsSchema("points to grant; a JSON number, not a string"),
  "point amount",
);

/** The origin of a ledger entry. */
export const EntryKindName = Type.Unsafe<EntryKind>(
  Type.Union(
    ENTRY_KINDS.map((kind) => Type.Literal(kind)),
    { description: "`grant` of a reservation, or a direct `add` or `sub`" },
  ),
);

/** One entry of the ledger. It is added once and never changed. */
export interface PointTransaction {
  /** A grant has the key of its reservation. The keys of grants and direct changes are separate. */
  idempotencyKey: string;
  userId: Static<typeof userIdField.schema>;
  /** Negative if points are subtracted. */
  pointAmount: number;
  kind: EntryKind;
  /** The reservation that was granted; null for a direct change. */
  reservationId: string | null;
}

/** The fields of `PUT /point/add` and `PUT /point/sub`. */
export const pointChangeFields = {
  user_id: userIdField,
  point_num: amountField(
    pointsSchema("points to add or to subtract; a JSON number, not a string"),
    "point num",
  ),
  idempotency_key: optional(idempotencyKeyField),
};

/**
 * Makes the ledger entry for a client's direct change of points.
 *
 * @param input the parsed body, of any shape
 * @throws {DomainError} INVALID_INPUT, with every broken rule
 */
export function newPointChange(
  input: unknown,
  { kind, headerKey }: { kind: "add" | "sub"; headerKey?: string | undefined },
): PointTransaction {
  const { user_id, point_num, idempotency_key } = parseFields(pointChangeFields, input, {
    what: "change of points",
    more: headerKeyRules(headerKey, input),
  });
  return {
    idempotencyKey: idempotency_key ?? headerKey ?? uuidv7(),
    userId: user_id,
    pointAmount: kind === "add" ? point_num : -point_num,
    kind,
    reservationId: null,
  };
}
