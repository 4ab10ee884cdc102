import { describe, expect, test } from "bun:test";
import { Type } from "@sinclair/typebox";
import { Value } from "@sinclair/typebox/value";
import fc from "fast-check";
import { DomainError } from "../lib/errors.ts";
import {
  amountRule,
  brokenFieldRules,
  brokenHeaderKeyRules,
  IdempotencyKey,
  idempotencyKeyRule,
  LATEST_MS,
  parseTime,
  refuseBroken,
  ruleOf,
  timeRule,
} from "../lib/input.ts";

describe("ruleOf()", () => {
  const colour = ruleOf(Type.Union([Type.Literal("red"), Type.Literal("blue")]), {
    sentence: "colour must be red or blue",
    must: "red or blue",
  });

  test("takes what matches its schema", () => {
    expect(colour("red", "car.colour")).toBeUndefined();
  });

  test("tells the sentence, and the same with place, rule and value", () => {
    expect(colour("green", "car.colour")).toEqual({
      sentence: "colour must be red or blue",
      explanation: 'car.colour must be red or blue: received "green"',
    });
    expect(colour(undefined, "colour")?.explanation).toBe("colour must be red or blue: received nothing");
  });

  test("shows no more than 60 characters of a value", () => {
    expect(colour("x".repeat(100_000), "colour")?.explanation.length).toBeLessThan(120);
  });
});

describe("amountRule()", () => {
  const rule = amountRule({ minimum: 5, maximum: 10 }, "size");

  test.each([[5], [10]])("takes %p, the end of its range", (value) => {
    expect(rule(value, "shirt_size")).toBeUndefined();
  });

  test.each<[unknown, string, string]>([
    [
      undefined,
      "size must be greater than 4",
      "shirt_size must be an integer from 5 to 10: received nothing",
    ],
    [4, "size must be greater than 4", "shirt_size must be an integer from 5 to 10: received 4"],
    [11, "size must be at most 10", "shirt_size must be an integer from 5 to 10: received 11"],
    [7.5, "size must be an integer", "shirt_size must be a JSON number without a fraction: received 7.5"],
    ["7", "size must be an integer", 'shirt_size must be a JSON number without a fraction: received "7"'],
    [null, "size must be an integer", "shirt_size must be a JSON number without a fraction: received null"],
  ])("refuses %p: %s", (value, sentence, explanation) => {
    expect(rule(value, "shirt_size")).toEqual({ sentence, explanation });
  });

  test("without an end of its own goes from 1 to the largest safe integer", () => {
    const open = amountRule({}, "size");
    expect(open(1, "size")).toBeUndefined();
    expect(open(Number.MAX_SAFE_INTEGER, "size")).toBeUndefined();
    expect(open(0, "size")?.sentence).toBe("size must be greater than 0");
    expect(open(2 ** 53, "size")?.sentence).toBe(`size must be at most ${Number.MAX_SAFE_INTEGER}`);
  });
});

describe("brokenFieldRules()", () => {
  const schema = Type.Object({ name: Type.String(), size: Type.Optional(Type.Integer()) });
  const rules = {
    name: ruleOf(Type.String(), { sentence: "name is wrong", must: "text" }),
    size: amountRule({}, "size"),
  };
  const sentencesOf = (input: unknown) =>
    brokenFieldRules(schema, input, rules).map(({ sentence }) => sentence);

  test.each([[{ name: "a" }], [{ name: "a", size: 1 }], [{ size: 1, name: "" }]])("takes %j", (input) => {
    expect(sentencesOf(input)).toEqual([]);
  });

  test("tells all broken rules at once, in the order of the rules, then the unknown fields", () => {
    expect(sentencesOf({ colour: 1, size: 0, name: 2, weight: 3 })).toEqual([
      "name is wrong",
      "size must be greater than 0",
      'unknown field "colour"',
      'unknown field "weight"',
    ]);
  });

  test("demands what its schema requires, and nothing else", () => {
    expect(sentencesOf({})).toEqual(["name is wrong"]);
    expect(sentencesOf({ size: undefined, name: undefined })).toEqual(["name is wrong"]);
  });

  test("takes null for a value, not for a field that is left out", () => {
    expect(sentencesOf({ name: "a", size: null })).toEqual(["size must be an integer"]);
  });

  test("names which fields there are where one is unknown", () => {
    expect(brokenFieldRules(schema, { name: "a", Size: 1 }, rules)).toEqual([
      { sentence: 'unknown field "Size"', explanation: 'the field "Size" is not one of name, size' },
    ]);
  });

  test.each(["constructor", "toString", "hasOwnProperty", "__proto__"])(
    "knows no field %s, which every object has",
    (field) => {
      expect(sentencesOf(JSON.parse(`{"name": "a", ${JSON.stringify(field)}: 1}`))).toEqual([
        `unknown field "${field}"`,
      ]);
    },
  );

  test("names no more than ten unknown fields, and each in 60 characters", () => {
    const many = Object.fromEntries(Array.from({ length: 1_000 }, (_, index) => [`field${index}`, 1]));
    expect(sentencesOf({ name: "a", ...many })).toHaveLength(10);
    const [long] = sentencesOf({ name: "a", ["x".repeat(10_000)]: 1 });
    expect(long?.length).toBeLessThan(100);
  });

  test.each<[unknown]>([[null], [undefined], ["text"], [1], [true], [[]], [[{ name: "a" }]]])(
    "refuses %j: it is no object",
    (input) => {
      expect(sentencesOf(input)).toEqual(["body must be a JSON object"]);
    },
  );
});

describe("refuseBroken()", () => {
  test("throws nothing where no rule is broken", () => {
    expect(() => refuseBroken([], "query")).not.toThrow();
  });

  test("throws an INVALID_INPUT with all the rules", () => {
    const broken = [{ sentence: "a is wrong", explanation: "a must be b" }];
    let error: unknown;
    try {
      refuseBroken(broken, "query");
    } catch (thrown) {
      error = thrown;
    }
    expect(error).toBeInstanceOf(DomainError);
    expect(error).toMatchObject({
      code: "INVALID_INPUT",
      brokenRules: broken,
      message: "The query breaks a rule",
    });
  });
});

describe("parseTime()", () => {
  const times = fc.date({ min: new Date(0), max: new Date(LATEST_MS), noInvalidDate: true });

  test("reads back every moment that a DATETIME(3) can hold, to the millisecond", () => {
    fc.assert(fc.property(times, (time) => expect(parseTime(time.toISOString(), "at")).toEqual(time)));
  });

  test("takes off the offset, whichever it is", () => {
    const offsets = fc.record({
      sign: fc.constantFrom(1, -1),
      minutes: fc.integer({ min: 0, max: 24 * 60 - 1 }),
    });
    // A day from either end: with the offset it must stay within four digits of a year.
    const inner = fc.date({
      min: new Date(86_400_000),
      max: new Date(LATEST_MS - 86_400_000),
      noInvalidDate: true,
    });
    fc.assert(
      fc.property(inner, offsets, (time, { sign, minutes }) => {
        const local = new Date(time.getTime() + sign * minutes * 60_000).toISOString().slice(0, -1);
        const [hours, rest] = [Math.floor(minutes / 60), minutes % 60];
        const offset = [hours, rest].map((part) => String(part).padStart(2, "0")).join(":");
        expect(parseTime(`${local}${sign > 0 ? "+" : "-"}${offset}`, "at")).toEqual(time);
      }),
    );
  });

  test("names the field in words, and the value, where it is none", () => {
    expect(parseTime("now", "execute_at")).toEqual({
      sentence: "execute at must be an RFC 3339 time with seconds and offset",
      explanation:
        'execute_at must look like 2029-02-22T22:59:00+09:00, with at most milliseconds: received "now"',
    });
  });

  test("never throws, whatever it is given, and never gives a Date that is none", () => {
    const likely = fc.stringMatching(/^\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,4})?(Z|[+-]\d\d:\d\d)?$/);
    fc.assert(
      fc.property(fc.oneof(fc.anything(), fc.string(), likely), (value) => {
        const time = parseTime(value, "at");
        if (time instanceof Date) expect(time.getTime()).toBeWithin(0, LATEST_MS + 1);
        else expect(time.sentence).toStartWith("at must be ");
      }),
      { numRuns: 1_000 },
    );
  });
});

describe("timeRule", () => {
  test("says what parseTime() says", () => {
    expect(timeRule("2029-02-22T22:59:00+09:00", "at")).toBeUndefined();
    for (const wrong of ["2029-02-22", "2029-02-30T00:00:00Z", "1969-12-31T23:59:59Z", 5, null]) {
      expect(timeRule(wrong, "at")).toEqual(parseTime(wrong, "at") as never);
    }
  });
});

describe("idempotencyKeyRule", () => {
  test.each([["a"], ["order-42"], ["A_z-09"], ["k".repeat(100)]])("takes %p", (key) => {
    expect(idempotencyKeyRule(key, "idempotency_key")).toBeUndefined();
    expect(Value.Check(IdempotencyKey, key)).toBe(true);
  });

  // Keys of the program's own have a colon: a client must not be able to write one.
  test.each([[""], ["k".repeat(101)], ["direct:a"], ["bulk:a:0"], ["a b"], ["a\n"], ["é"], [1], [null]])(
    "refuses %p",
    (key) => {
      expect(idempotencyKeyRule(key, "idempotency_key")?.sentence).toBe("idempotency key is invalid format");
      expect(Value.Check(IdempotencyKey, key)).toBe(false);
    },
  );
});

describe("brokenHeaderKeyRules()", () => {
  const sentencesOf = (...keys: [string | undefined, unknown]) =>
    brokenHeaderKeyRules(...keys).map(({ sentence }) => sentence);

  test.each<[string | undefined, unknown]>([
    [undefined, undefined],
    [undefined, "a"],
    ["a", undefined],
    ["a", "a"],
  ])("takes the header %p with the field %p", (header, field) => {
    expect(sentencesOf(header, field)).toEqual([]);
  });

  test.each<[string, unknown, string[]]>([
    ["a b", undefined, ["idempotency key is invalid format"]],
    ["", undefined, ["idempotency key is invalid format"]],
    ["a", "b", ["idempotency key differs between header and body"]],
    ["a", null, ["idempotency key differs between header and body"]],
    ["1", 1, ["idempotency key differs between header and body"]],
    ["a b", "b", ["idempotency key is invalid format", "idempotency key differs between header and body"]],
  ])("refuses the header %p with the field %p", (header, field, sentences) => {
    expect(sentencesOf(header, field)).toEqual(sentences);
  });
});
