import { describe, expect, test } from "bun:test";
import { validate, version } from "uuid";
import { DomainError } from "../lib/errors.ts";
import { newReservation, parseReservationId } from "../lib/reservation.ts";

const VALID = { user_id: "TestUser01", point_amount: 100, execute_at: "2029-02-22T22:59:00+09:00" };

const USER_ID = "user id is invalid format";
const NOT_POSITIVE = "point amount must be greater than 0";
const NO_INTEGER = "point amount must be an integer";
const TOO_MANY = "point amount must be at most 2147483647";
const NO_RFC_3339 = "execute at must be an RFC 3339 time with seconds and offset";
const NO_DATE = "execute at must be a date that exists";
const OUT_OF_TIME = "execute at must be from 1970 to 9999";
const KEY = "idempotency key is invalid format";
const KEYS_DIFFER = "idempotency key differs between header and body";

function refusal(work: () => unknown): DomainError {
  try {
    work();
  } catch (error) {
    if (error instanceof DomainError) return error;
    throw error;
  }
  throw new Error("It was not refused");
}

/** The sentences of the broken rules; each explanation must tell the value too. */
function sentencesOf(input: unknown, headerKey?: string): string[] {
  const { code, brokenRules } = refusal(() => newReservation(input, headerKey));
  expect(code).toBe("INVALID_INPUT");
  return brokenRules.map(({ sentence }) => sentence);
}

function without(field: keyof typeof VALID) {
  return Object.fromEntries(Object.entries(VALID).filter(([name]) => name !== field));
}

describe("newReservation() makes", () => {
  test("a reservation of what a client sent", () => {
    const reservation = newReservation({ ...VALID, idempotency_key: "order-42" });
    expect(reservation).toEqual({
      id: reservation.id,
      userId: "TestUser01",
      pointAmount: 100,
      executeAt: new Date("2029-02-22T13:59:00.000Z"),
      idempotencyKey: "order-42",
      campaign: null,
    });
  });

  test("an id that is a UUID v7, another one each time, in their order", () => {
    const ids = Array.from({ length: 1_000 }, () => newReservation(VALID).id);
    expect(ids.every((id) => validate(id) && version(id) === 7)).toBe(true);
    expect(new Set(ids).size).toBe(1_000);
    expect(ids.toSorted()).toEqual(ids);
  });

  test("the id the idempotency key where the client gives none", () => {
    const reservation = newReservation(VALID);
    expect(reservation.idempotencyKey).toBe(reservation.id);
  });
});

describe("newReservation() user_id", () => {
  test.each([["a"], ["Z"], ["0"], ["TestUser01"], ["x".repeat(20)]])("takes %p", (user_id) => {
    expect(newReservation({ ...VALID, user_id }).userId).toBe(user_id);
  });

  test.each([
    [""],
    ["x".repeat(21)],
    ["a b"],
    [" a"],
    ["a\n"],
    ["a_b"],
    ["a-b"],
    ["ü"],
    ["ａ"],
    ["٣"],
    [1],
    [true],
    [null],
    [["a"]],
    [{}],
  ])("refuses %p in the original's sentence", (user_id) => {
    expect(sentencesOf({ ...VALID, user_id })).toEqual([USER_ID]);
  });

  test("refuses a missing one", () => {
    expect(sentencesOf(without("user_id"))).toEqual([USER_ID]);
  });

  test("keeps the case: User1 and user1 are two users", () => {
    expect(newReservation({ ...VALID, user_id: "User1" }).userId).toBe("User1");
    expect(newReservation({ ...VALID, user_id: "user1" }).userId).toBe("user1");
  });
});

describe("newReservation() point_amount", () => {
  test.each([[1], [2], [2147483647]])("takes %p", (point_amount) => {
    expect(newReservation({ ...VALID, point_amount }).pointAmount).toBe(point_amount);
  });

  test.each<[unknown, string]>([
    [0, NOT_POSITIVE],
    [-0, NOT_POSITIVE],
    [-1, NOT_POSITIVE],
    [-2147483648, NOT_POSITIVE],
    [2147483648, TOO_MANY],
    [JSON.parse("9007199254740993"), TOO_MANY],
    [1.5, NO_INTEGER],
    [0.5, NO_INTEGER],
    [JSON.parse("1e999"), NO_INTEGER],
    [Number.NaN, NO_INTEGER],
    ["1", NO_INTEGER],
    ["", NO_INTEGER],
    [null, NO_INTEGER],
    [true, NO_INTEGER],
    [[1], NO_INTEGER],
    [{}, NO_INTEGER],
  ])("refuses %p: %s", (point_amount, sentence) => {
    expect(sentencesOf({ ...VALID, point_amount })).toEqual([sentence]);
  });

  test("refuses a missing one in the original's sentence", () => {
    expect(sentencesOf(without("point_amount"))).toEqual([NOT_POSITIVE]);
  });
});

describe("newReservation() execute_at", () => {
  test.each([
    ["2029-02-22T22:59:00+09:00", "2029-02-22T13:59:00.000Z"],
    ["2029-02-22T22:59:00Z", "2029-02-22T22:59:00.000Z"],
    ["2029-02-22t22:59:00z", "2029-02-22T22:59:00.000Z"],
    ["2029-02-22T22:59:00.1Z", "2029-02-22T22:59:00.100Z"],
    ["2029-02-22T22:59:00.12Z", "2029-02-22T22:59:00.120Z"],
    ["2029-02-22T22:59:00.123Z", "2029-02-22T22:59:00.123Z"],
    ["2029-02-22T22:59:00.001Z", "2029-02-22T22:59:00.001Z"],
    ["2029-02-22T22:59:00-00:00", "2029-02-22T22:59:00.000Z"],
    ["2029-02-22T08:59:00+09:00", "2029-02-21T23:59:00.000Z"],
    ["2029-02-22T23:00:00-01:30", "2029-02-23T00:30:00.000Z"],
    ["2029-01-01T00:00:00+00:01", "2028-12-31T23:59:00.000Z"],
    ["2028-12-31T23:59:59-23:59", "2029-01-01T23:58:59.000Z"],
    ["2024-02-29T00:00:00Z", "2024-02-29T00:00:00.000Z"],
    ["2000-02-29T00:00:00Z", "2000-02-29T00:00:00.000Z"],
    ["2024-02-29T00:00:00+23:59", "2024-02-28T00:01:00.000Z"],
    ["1970-01-01T00:00:00Z", "1970-01-01T00:00:00.000Z"],
    ["1969-12-31T23:00:00-01:00", "1970-01-01T00:00:00.000Z"],
    ["9999-12-31T23:59:59.999Z", "9999-12-31T23:59:59.999Z"],
    ["9999-12-31T23:59:59.999+09:00", "9999-12-31T14:59:59.999Z"],
  ])("takes %s as %s", (execute_at, utc) => {
    expect(newReservation({ ...VALID, execute_at }).executeAt.toISOString()).toBe(utc);
  });

  test.each<[unknown, string]>([
    ["2029-02-22T22:59:00", NO_RFC_3339],
    ["2029-02-22T22:59:00.123", NO_RFC_3339],
    ["2029-02-22T22:59Z", NO_RFC_3339],
    ["2029-02-22T22Z", NO_RFC_3339],
    ["2029-02-22", NO_RFC_3339],
    ["2029-02-22 22:59:00Z", NO_RFC_3339],
    ["2029-02-22T22:59:00 Z", NO_RFC_3339],
    ["2029-02-22T22:59:00Z\n", NO_RFC_3339],
    [" 2029-02-22T22:59:00Z", NO_RFC_3339],
    ["2029-02-22T22:59:00.Z", NO_RFC_3339],
    ["2029-02-22T22:59:00.1234Z", NO_RFC_3339],
    ["2029-02-22T22:59:00,123Z", NO_RFC_3339],
    ["2029-02-22T22:59:00+0900", NO_RFC_3339],
    ["2029-02-22T22:59:00+09", NO_RFC_3339],
    ["2029-02-22T22:59:00+9:00", NO_RFC_3339],
    ["2029-02-22T22:59:00+24:00", NO_RFC_3339],
    ["2029-02-22T22:59:00+09:60", NO_RFC_3339],
    ["2029-02-22T22:59:00 09:00", NO_RFC_3339],
    ["2029-02-22T22:59:00JST", NO_RFC_3339],
    ["01/02/2024", NO_RFC_3339],
    ["Thu, 22 Feb 2029 22:59:00 GMT", NO_RFC_3339],
    ["10000-01-01T00:00:00Z", NO_RFC_3339],
    ["+010000-01-01T00:00:00Z", NO_RFC_3339],
    ["-000001-01-01T00:00:00Z", NO_RFC_3339],
    ["29-02-22T22:59:00Z", NO_RFC_3339],
    ["２029-02-22T22:59:00Z", NO_RFC_3339],
    ["", NO_RFC_3339],
    [1866469140000, NO_RFC_3339],
    [null, NO_RFC_3339],
    [{}, NO_RFC_3339],
    [["2029-02-22T22:59:00Z"], NO_RFC_3339],
    ["2024-02-30T00:00:00Z", NO_DATE],
    ["2023-02-29T00:00:00Z", NO_DATE],
    ["2100-02-29T00:00:00Z", NO_DATE],
    ["2024-04-31T00:00:00Z", NO_DATE],
    ["2024-00-01T00:00:00Z", NO_DATE],
    ["2024-13-01T00:00:00Z", NO_DATE],
    ["2024-01-00T00:00:00Z", NO_DATE],
    ["2024-01-32T00:00:00Z", NO_DATE],
    ["2024-01-01T24:00:00Z", NO_DATE],
    ["2024-01-01T24:00:01Z", NO_DATE],
    ["2024-01-01T25:00:00Z", NO_DATE],
    ["2024-01-01T00:60:00Z", NO_DATE],
    ["2016-12-31T23:59:60Z", NO_DATE],
    ["1969-12-31T23:59:59.999Z", OUT_OF_TIME],
    ["1970-01-01T00:00:00+00:01", OUT_OF_TIME],
    ["0000-01-01T00:00:00Z", OUT_OF_TIME],
    ["9999-12-31T23:59:59.999-00:01", OUT_OF_TIME],
    ["9999-12-31T15:00:00-09:00", OUT_OF_TIME],
  ])("refuses %p: %s", (execute_at, sentence) => {
    expect(sentencesOf({ ...VALID, execute_at })).toEqual([sentence]);
  });

  test("refuses a missing one", () => {
    expect(sentencesOf(without("execute_at"))).toEqual([NO_RFC_3339]);
  });
});

describe("newReservation() idempotency key", () => {
  const longest = "k".repeat(100);

  test.each([["a"], ["-"], ["_"], ["order-42"], ["A_z-09"], [longest]])(
    "takes %p, in body or header",
    (key) => {
      expect(newReservation({ ...VALID, idempotency_key: key }).idempotencyKey).toBe(key);
      expect(newReservation(VALID, key).idempotencyKey).toBe(key);
      expect(newReservation({ ...VALID, idempotency_key: key }, key).idempotencyKey).toBe(key);
    },
  );

  test.each([[""], [`${longest}k`], ["a b"], ["a.b"], ["a/b"], ["é"], ["a\n"]])(
    "refuses %p, in body or header, in the original's sentence",
    (key) => {
      expect(sentencesOf({ ...VALID, idempotency_key: key })).toEqual([KEY]);
      expect(sentencesOf(VALID, key)).toEqual([KEY]);
      expect(sentencesOf({ ...VALID, idempotency_key: key }, key)).toEqual([KEY]);
    },
  );

  test.each([[null], [42], [["order-42"]], [{}], [false]])("refuses %p in the body", (key) => {
    expect(sentencesOf({ ...VALID, idempotency_key: key })).toEqual([KEY]);
  });

  test.each([
    ["order-42", "order-43", [KEYS_DIFFER]],
    ["order-42", "Order-42", [KEYS_DIFFER]],
    ["order-42", "a b", [KEY, KEYS_DIFFER]],
    ["a b", "order-42", [KEY, KEYS_DIFFER]],
  ])("refuses %p in the body with %p in the header", (body, header, sentences) => {
    expect(sentencesOf({ ...VALID, idempotency_key: body }, header)).toEqual(sentences);
  });
});

describe("newReservation() reports", () => {
  test("all broken rules at once, in the order of the fields", () => {
    expect(
      sentencesOf({ user_id: "x y", point_amount: 0, execute_at: "soon", idempotency_key: "?", extra: 1 }),
    ).toEqual([USER_ID, NOT_POSITIVE, NO_RFC_3339, KEY, 'unknown field "extra"']);
    expect(sentencesOf({})).toEqual([USER_ID, NOT_POSITIVE, NO_RFC_3339]);
  });

  test.each([["User_id"], ["id"], ["status"], ["__proto__"], ["constructor"], ["toString"], [""]])(
    "the unknown field %p",
    (field) => {
      // Built as JSON: `{__proto__: …}` in the source would set the prototype instead.
      const input = JSON.parse(`${JSON.stringify(VALID).slice(0, -1)},${JSON.stringify(field)}:1}`);
      expect(sentencesOf(input)).toEqual([`unknown field ${JSON.stringify(field)}`]);
    },
  );

  test("no more than 10 unknown fields, however many there are", () => {
    const strangers = Object.fromEntries(Array.from({ length: 5_000 }, (_, index) => [`field${index}`, 1]));
    expect(sentencesOf({ ...VALID, ...strangers })).toHaveLength(10);
  });

  test.each([[null], [undefined], ["text"], [1], [true], [[]], [[VALID]]])("%j as no object", (input) => {
    expect(sentencesOf(input)).toEqual(["body must be a JSON object"]);
  });

  test("what, rule and value in each explanation", () => {
    const { brokenRules } = refusal(() =>
      newReservation({ user_id: "x y", point_amount: 0, execute_at: "soon", idempotency_key: "?" }),
    );
    expect(brokenRules.map(({ explanation }) => explanation)).toEqual([
      'user_id must be 1 to 20 of A-Z, a-z and 0-9: received "x y"',
      "point_amount must be an integer from 1 to 2147483647: received 0",
      'execute_at must look like 2029-02-22T22:59:00+09:00, with at most milliseconds: received "soon"',
      'idempotency_key must be 1 to 100 of A-Z, a-z, 0-9, _ and -: received "?"',
    ]);
  });

  test.each([[100], [60_000]])(
    "values of %d characters cut, so that no input can flood an answer",
    (length) => {
      const long = "ü".repeat(length);
      const input = { user_id: long, point_amount: long, execute_at: long, idempotency_key: long, [long]: 1 };
      const { brokenRules } = refusal(() => newReservation(input, long));
      expect(brokenRules).toHaveLength(5);
      for (const { sentence, explanation } of brokenRules) {
        expect(sentence + explanation).not.toContain("ü".repeat(60));
      }
    },
  );
});

describe("parseReservationId()", () => {
  const id = "01890a5d-ac96-774b-bcce-b302099a8057";

  test.each([[id], [id.toUpperCase()]])("reads %s in lower case, as ids are kept", (value) => {
    expect(parseReservationId(value)).toBe(id);
  });

  test.each([
    [""],
    ["1"],
    [id.slice(1)],
    [`${id}0`],
    [`{${id}}`],
    [`${id}\n`],
    [id.replaceAll("-", "")],
    [`g${id.slice(1)}`],
  ])("refuses %p", (value) => {
    const { code, brokenRules } = refusal(() => parseReservationId(value));
    expect(code).toBe("INVALID_INPUT");
    expect(brokenRules.map(({ sentence }) => sentence)).toEqual(["reservation id is invalid format"]);
  });
});
