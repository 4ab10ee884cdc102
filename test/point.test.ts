import { describe, expect, test } from "bun:test";
import { Value } from "@sinclair/typebox/value";
import { DomainError } from "../lib/errors.ts";
import {
  MAX_POINT_AMOUNT,
  PointAmount,
  parseUserId,
  pointAmountRule,
  UserId,
  userIdRule,
} from "../lib/point.ts";

test("MAX_POINT_AMOUNT is the largest INT of MySQL", () => {
  expect(MAX_POINT_AMOUNT).toBe(2 ** 31 - 1);
});

describe("pointAmountRule()", () => {
  test.each([[1], [100], [MAX_POINT_AMOUNT]])("takes %p", (amount) => {
    expect(pointAmountRule(amount, "point_amount")).toBeUndefined();
  });

  test.each<[unknown, string]>([
    [undefined, "point amount must be greater than 0"],
    [0, "point amount must be greater than 0"],
    [-1, "point amount must be greater than 0"],
    [-1.5, "point amount must be an integer"],
    [1.5, "point amount must be an integer"],
    [Number.POSITIVE_INFINITY, "point amount must be an integer"],
    ["1", "point amount must be an integer"],
    [null, "point amount must be an integer"],
    [MAX_POINT_AMOUNT + 1, "point amount must be at most 2147483647"],
    [Number.MAX_SAFE_INTEGER, "point amount must be at most 2147483647"],
  ])("refuses %p: %s", (amount, sentence) => {
    expect(pointAmountRule(amount, "point_amount")?.sentence).toBe(sentence);
  });

  test.each([[0], [1], [-1], [1.5], ["1"], [null], [MAX_POINT_AMOUNT], [MAX_POINT_AMOUNT + 1]])(
    "says of %p what the schema of the interface says",
    (amount) => {
      expect(pointAmountRule(amount, "point_amount") === undefined).toBe(Value.Check(PointAmount, amount));
    },
  );
});

describe("userIdRule()", () => {
  test.each([["a"], ["TestUser01"], ["9".repeat(20)]])("takes %p", (userId) => {
    expect(userIdRule(userId, "user_id")).toBeUndefined();
    expect(Value.Check(UserId, userId)).toBe(true);
  });

  test.each([[""], ["9".repeat(21)], ["a "], ["a\n"], ["é"], [1], [null], [undefined], [["a"]]])(
    "refuses %p with what, rule and value",
    (userId) => {
      const broken = userIdRule(userId, "user_id");
      expect(broken?.sentence).toBe("user id is invalid format");
      expect(broken?.explanation).toStartWith("user_id must be 1 to 20 of A-Z, a-z and 0-9: received ");
      expect(Value.Check(UserId, userId)).toBe(false);
    },
  );
});

describe("parseUserId()", () => {
  test("gives back a valid one as it is", () => {
    expect(parseUserId("TestUser01")).toBe("TestUser01");
  });

  test("refuses any other as INVALID_INPUT", () => {
    const refused = (() => {
      try {
        return parseUserId("x' or 1=1");
      } catch (error) {
        return error;
      }
    })();
    expect(refused).toBeInstanceOf(DomainError);
    expect(refused).toMatchObject({
      code: "INVALID_INPUT",
      brokenRules: [{ sentence: "user id is invalid format" }],
    });
  });
});
