import { describe, expect, test } from "bun:test";
import { Type } from "@sinclair/typebox";
import { Value } from "@sinclair/typebox/value";
import fc from "fast-check";
import {
  amountField,
  checkFields,
  described,
  field,
  headerKeyRules,
  idempotencyKeyField,
  LATEST_MS,
  objectSchema,
  optional,
  parseFields,
  timeField,
} from "../../lib/field.ts";
import { refusalOf, sentenceOf, sentencesOf } from "../harness/refusal.ts";

const colour = field(Type.Union([Type.Literal("red"), Type.Literal("blue")]), {
  sentence: "colour must be red or blue",
  must: "red or blue",
});

test.each([
  ["green", '"green"'],
  [undefined, "nothing"],
  [["red"], "an array of 1"],
  [{}, "an object"],
  ["x".repeat(100_000), `"${"x".repeat(59)}…`],
])("field() takes what matches its schema, and refuses %p with place, rule and value", (value, shown) => {
  expect(colour.parse("red", "car.colour")).toEqual({ value: "red" });
  expect(colour.parse(value, "car.colour")).toEqual({
    broken: {
      sentence: "colour must be red or blue",
      explanation: `car.colour must be red or blue: received ${shown}`,
    },
  });
});

test("optional() takes nothing for a value, but not null; described() changes only the description", () => {
  const either = described(optional(colour), "of the car");
  expect(either.parse(undefined, "colour")).toEqual({ value: undefined });
  expect(sentenceOf(either, null)).toBe("colour must be red or blue");
  expect(either.schema).toEqual({ ...optional(colour).schema, description: "of the car" });
  expect(Value.Check(objectSchema({ colour: either }), {})).toBe(true);
});

describe("amountField()", () => {
  const size = amountField(Type.Integer({ minimum: 5, maximum: 10 }), "size");

  const range = "shirt_size must be an integer from 5 to 10";
  const type = "shirt_size must be a JSON number without a fraction";
  test.each<[unknown, string, string]>([
    [undefined, "size must be greater than 4", `${range}: received nothing`],
    [4, "size must be greater than 4", `${range}: received 4`],
    [11, "size must be at most 10", `${range}: received 11`],
    [7.5, "size must be an integer", `${type}: received 7.5`],
    [JSON.parse("1e999"), "size must be an integer", `${type}: received null`],
    [JSON.parse("9007199254740993"), "size must be at most 10", `${range}: received 9007199254740992`],
    ["7", "size must be an integer", `${type}: received "7"`],
    [null, "size must be an integer", `${type}: received null`],
    [[7], "size must be an integer", `${type}: received an array of 1`],
  ])("refuses %p: %s", (value, sentence, explanation) => {
    expect(size.parse(value, "shirt_size")).toEqual({ broken: { sentence, explanation } });
    expect(Value.Check(size.schema, value)).toBe(false);
  });

  test("takes the ends of its range: 1 and the largest safe integer if its schema has none", () => {
    expect([size.parse(5, "size"), size.parse(10, "size")]).toEqual([{ value: 5 }, { value: 10 }]);
    const open = amountField(Type.Integer(), "size");
    expect(sentenceOf(open, Number.MAX_SAFE_INTEGER)).toBeUndefined();
    expect(sentenceOf(open, 0)).toBe("size must be greater than 0");
    expect(sentenceOf(open, 2 ** 53)).toBe(`size must be at most ${Number.MAX_SAFE_INTEGER}`);
  });
});

describe("parseFields()", () => {
  const fields = {
    colour,
    size: optional(amountField(Type.Integer({ minimum: 1 }), "size")),
    at: optional(timeField),
  };
  const parse = (input: unknown) => parseFields(fields, input, { what: "car" });

  test("gives the typed values, in the names of the fields", () => {
    const at = "2029-02-22T22:59:00Z";
    expect(parse({ at, colour: "red" })).toEqual({ colour: "red", size: undefined, at: new Date(at) });
  });

  test("throws all broken rules at once, in the order of the fields, then unknown fields, then others", () => {
    const more = [{ sentence: "road is closed", explanation: "the road must be open" }];
    const input = { weight: 1, size: 0, colour: 2, Size: 3 };
    const { message, brokenRules } = refusalOf(() => parseFields(fields, input, { what: "car", more }));
    expect(message).toBe("The car breaks a rule");
    expect(brokenRules.map(({ sentence }) => sentence)).toEqual([
      "colour must be red or blue",
      "size must be greater than 0",
      'unknown field "weight"',
      'unknown field "Size"',
      "road is closed",
    ]);
    expect(brokenRules[2]?.explanation).toBe('the field "weight" is not one of colour, size, at');
    expect(sentencesOf(() => parseFields(fields, { colour: "red" }, { what: "car", more }))).toEqual([
      "road is closed",
    ]);
  });

  test.each(["constructor", "toString", "__proto__", ""])("knows no field %p", (name) => {
    // As JSON: `{__proto__: …}` in the source would set the prototype instead.
    const input = JSON.parse(`{"colour": "red", ${JSON.stringify(name)}: 1}`);
    expect(sentencesOf(() => parse(input))).toEqual([`unknown field ${JSON.stringify(name)}`]);
  });

  test("names at most ten unknown fields, each in 60 characters", () => {
    const unknown = Array.from({ length: 1_000 }, (_, index) => [`${index} ${"ü".repeat(60_000)}`, 1]);
    const sentences = sentencesOf(() => parse({ colour: "red", ...Object.fromEntries(unknown) }));
    expect(sentences).toHaveLength(10);
    expect(Math.max(...sentences.map(({ length }) => length))).toBeLessThan(100);
  });

  test("refuses what is no object", () => {
    for (const input of [null, undefined, "text", 1, true, [], [{ colour: "red" }]]) {
      expect(sentencesOf(() => parse(input))).toEqual(["body must be a JSON object"]);
    }
  });

  test("is checkFields(), which does not throw; objectSchema() says the same in OpenAPI", () => {
    const schema = objectSchema(fields, { minProperties: 2 });
    for (const input of [
      { colour: "red", size: 1 },
      { colour: "red", size: 0 },
      { size: 1, x: 1 },
    ]) {
      expect("values" in checkFields(fields, input)).toBe(Value.Check(schema, input));
    }
    expect(Value.Check(schema, { colour: "red" })).toBe(false);
  });
});

describe("timeField", () => {
  const times = (min: number, max: number) =>
    fc.date({ min: new Date(min), max: new Date(max), noInvalidDate: true });

  test("gives every time that a DATETIME(3) can hold, to the millisecond", () => {
    fc.assert(
      fc.property(times(0, LATEST_MS), (value) =>
        expect(timeField.parse(value.toISOString(), "at")).toEqual({ value }),
      ),
    );
  });

  test("subtracts the offset, whatever it is", () => {
    const day = 86_400_000;
    const offsets = fc.tuple(fc.constantFrom("+", "-"), fc.nat(23), fc.nat(59));
    fc.assert(
      fc.property(times(day, LATEST_MS - day), offsets, (value, [sign, hours, minutes]) => {
        const offsetMs = (sign === "+" ? 1 : -1) * (hours * 60 + minutes) * 60_000;
        const local = new Date(value.getTime() + offsetMs).toISOString().slice(0, -1);
        const [hh, mm] = [hours, minutes].map((part) => String(part).padStart(2, "0"));
        expect(timeField.parse(`${local}${sign}${hh}:${mm}`, "at")).toEqual({ value });
      }),
    );
  });

  test.each([
    ["2029-02-22T22:59:00+09:00", "2029-02-22T13:59:00.000Z"],
    ["2029-02-22t22:59:00z", "2029-02-22T22:59:00.000Z"],
    ["2029-02-22T22:59:00.1Z", "2029-02-22T22:59:00.100Z"],
    ["2029-02-22T22:59:00.12Z", "2029-02-22T22:59:00.120Z"],
    ["2029-02-22T22:59:00-00:00", "2029-02-22T22:59:00.000Z"],
    ["2024-02-29T00:00:00+23:59", "2024-02-28T00:01:00.000Z"],
    ["2000-02-29T00:00:00Z", "2000-02-29T00:00:00.000Z"],
    ["1969-12-31T23:00:00-01:00", "1970-01-01T00:00:00.000Z"],
    ["9999-12-31T23:59:59.999+09:00", "9999-12-31T14:59:59.999Z"],
  ])("takes %s as %s", (text, utc) => {
    expect(timeField.parse(text, "at")).toEqual({ value: new Date(utc) });
  });

  const UNREADABLE = "execute at must be an RFC 3339 time with seconds and offset";
  const NO_DATE = "execute at must be a date that exists";
  const OUT_OF_RANGE = "execute at must be from 1970 to 9999";
  test.each<[string, unknown[]]>([
    [UNREADABLE, ["2029-02-22T22:59:00", "2029-02-22T22:59Z", "2029-02-22", "2029-02-22 22:59:00Z"]],
    [UNREADABLE, ["2029-02-22T22:59:00Z\n", " 2029-02-22T22:59:00Z", "2029-02-22T22:59:00 Z", ""]],
    [UNREADABLE, ["2029-02-22T22:59:00.Z", "2029-02-22T22:59:00.1234Z", "2029-02-22T22:59:00,123Z"]],
    [UNREADABLE, ["2029-02-22T22:59:00+0900", "2029-02-22T22:59:00+09", "2029-02-22T22:59:00+24:00"]],
    [UNREADABLE, ["2029-02-22T22:59:00+09:60", "2029-02-22T22:59:00 09:00", "2029-02-22T22:59:00JST"]],
    [UNREADABLE, ["01/02/2024", "Thu, 22 Feb 2029 22:59:00 GMT", "２029-02-22T22:59:00Z"]],
    [UNREADABLE, ["10000-01-01T00:00:00Z", "+010000-01-01T00:00:00Z", "-000001-01-01T00:00:00Z"]],
    [UNREADABLE, [undefined, null, 1866469140000, {}, ["2029-02-22T22:59:00Z"]]],
    [NO_DATE, ["2024-02-30T00:00:00Z", "2023-02-29T00:00:00Z", "2100-02-29T00:00:00Z"]],
    [NO_DATE, ["2024-00-01T00:00:00Z", "2024-13-01T00:00:00Z", "2024-01-00T00:00:00Z"]],
    [NO_DATE, ["2024-01-01T24:00:00Z", "2024-01-01T00:60:00Z", "2016-12-31T23:59:60Z"]],
    [OUT_OF_RANGE, ["1969-12-31T23:59:59.999Z", "1970-01-01T00:00:00+00:01", "0000-01-01T00:00:00Z"]],
    [OUT_OF_RANGE, ["9999-12-31T23:59:59.999-00:01"]],
  ])("says `%s` of %j", (sentence, values) => {
    for (const value of values) expect([value, sentenceOf(timeField, value)]).toEqual([value, sentence]);
  });

  test("never throws, and never gives a Date that is out of range", () => {
    const likely = fc.stringMatching(/^\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,4})?(Z|[+-]\d\d:\d\d)?$/);
    fc.assert(
      fc.property(fc.oneof(fc.anything(), fc.string(), likely), (value) => {
        const parsed = timeField.parse(value, "at");
        if ("value" in parsed) expect(parsed.value.getTime()).toBeWithin(0, LATEST_MS + 1);
        else expect(parsed.broken.sentence).toStartWith("at must be ");
      }),
      { numRuns: 1_000 },
    );
  });
});

test("idempotencyKeyField takes 1 to 100 of A-Z, a-z, 0-9, _ and -", () => {
  for (const key of ["a", "-", "order-42", "A_z-09", "k".repeat(100)]) {
    expect([key, sentenceOf(idempotencyKeyField, key)]).toEqual([key, undefined]);
  }
  // The program's own keys have a colon: a client must not be able to write one.
  for (const key of ["", "k".repeat(101), "bulk:a:0", "a b", "a\n", "é", 1, null, ["a"]]) {
    expect([key, sentenceOf(idempotencyKeyField, key)]).toEqual([key, "idempotency key is invalid format"]);
  }
});

describe("headerKeyRules()", () => {
  const INVALID = "idempotency key is invalid format";
  const DIFFERS = "idempotency key differs between header and body";

  test.each<[string | undefined, unknown, string[]]>([
    [undefined, undefined, []],
    [undefined, "a", []],
    ["a", undefined, []],
    ["a", "a", []],
    ["a b", undefined, [INVALID]],
    ["", undefined, [INVALID]],
    ["a", "b", [DIFFERS]],
    ["a", "A", [DIFFERS]],
    ["a", null, [DIFFERS]],
    ["1", 1, [DIFFERS]],
    ["a b", "b", [INVALID, DIFFERS]],
    // The body's rule says it already.
    ["a b", "a b", []],
  ])("says of the header %p with the field %p: %j", (header, key, sentences) => {
    const rules = headerKeyRules(header, { idempotency_key: key });
    expect(rules.map(({ sentence }) => sentence)).toEqual(sentences);
  });
});
