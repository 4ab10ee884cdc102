import { describe, expect, test } from "bun:test";
import { Value } from "@sinclair/typebox/value";
import { validate } from "uuid";
import {
  digitsOf,
  MAX_POINT_AMOUNT,
  MAX_POINT_NUM,
  newPointChange,
  parseUserId,
  pointAmountField,
  userIdField,
} from "../../lib/points/point.ts";
import { refusalOf, sentenceOf, sentencesOf } from "../harness/refusal.ts";

test("MAX_POINT_AMOUNT is MySQL's largest INT, MAX_POINT_NUM its largest BIGINT", () => {
  expect([MAX_POINT_AMOUNT, MAX_POINT_NUM]).toEqual([2 ** 31 - 1, 2n ** 63n - 1n]);
});

test("digitsOf() gives a JSON number with all digits of a BIGINT", () => {
  expect(JSON.stringify([MAX_POINT_NUM, -MAX_POINT_NUM, 0n].map(digitsOf))).toBe(
    "[9223372036854775807,-9223372036854775807,0]",
  );
});

test.each<[unknown, string | undefined]>([
  [1, undefined],
  [MAX_POINT_AMOUNT, undefined],
  [undefined, "point amount must be greater than 0"],
  [0, "point amount must be greater than 0"],
  [MAX_POINT_AMOUNT + 1, "point amount must be at most 2147483647"],
  [0.5, "point amount must be an integer"],
  ["1", "point amount must be an integer"],
])("pointAmountField says of %p: %p, and so does its schema", (value, sentence) => {
  expect(sentenceOf(pointAmountField, value)).toBe(sentence as string);
  expect(Value.Check(pointAmountField.schema, value)).toBe(sentence === undefined);
});

test("userIdField takes 1 to 20 of A-Z, a-z and 0-9 as they are, and so does its schema", () => {
  for (const value of ["a", "Z", "0", "TestUser01", "9".repeat(20)]) {
    expect(userIdField.parse(value, "user_id")).toEqual({ value });
    expect(Value.Check(userIdField.schema, value)).toBe(true);
  }
  const strangers = ["", "9".repeat(21), "a b", " a", "a\n", "a_b", "a-b", "é", "ａ", "٣"];
  for (const value of [...strangers, 1, true, null, undefined, ["a"], {}]) {
    expect([value, sentenceOf(userIdField, value)]).toEqual([value, "user id is invalid format"]);
    expect(Value.Check(userIdField.schema, value)).toBe(false);
  }
});

test("parseUserId() gives a valid one, and throws INVALID_INPUT otherwise", () => {
  expect(parseUserId("TestUser01")).toBe("TestUser01");
  expect(sentencesOf(() => parseUserId("x' or 1=1"))).toEqual(["user id is invalid format"]);
});

describe("newPointChange()", () => {
  const input = { user_id: "TestUser01", point_num: 40 };

  test.each([
    ["add", 40],
    ["sub", -40],
  ] as const)(
    "makes an entry of kind %s with %d points, which belongs to no reservation",
    (kind, pointAmount) => {
      expect(newPointChange({ ...input, idempotency_key: "k" }, { kind })).toEqual({
        idempotencyKey: "k",
        userId: "TestUser01",
        pointAmount,
        kind,
        reservationId: null,
      });
    },
  );

  test("takes the key of the body or of the header, or makes a UUID", () => {
    expect(newPointChange(input, { kind: "add", headerKey: "h" }).idempotencyKey).toBe("h");
    const [first, second] = [newPointChange(input, { kind: "add" }), newPointChange(input, { kind: "add" })];
    expect(validate(first.idempotencyKey)).toBe(true);
    expect(second.idempotencyKey).not.toBe(first.idempotencyKey);
  });

  test("throws all broken rules at once", () => {
    const wrong = { user_id: "", point_num: 0, idempotency_key: "k", point_amount: 1 };
    expect(refusalOf(() => newPointChange(wrong, { kind: "sub", headerKey: "h" }))).toMatchObject({
      message: "The change of points breaks a rule",
      brokenRules: [
        { sentence: "user id is invalid format" },
        { sentence: "point num must be greater than 0" },
        { sentence: 'unknown field "point_amount"' },
        { sentence: "idempotency key differs between header and body" },
      ],
    });
  });
});
