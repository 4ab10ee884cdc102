import { describe, expect, test } from "bun:test";
import { Value } from "@sinclair/typebox/value";
import fc from "fast-check";
import { v7 as uuidv7 } from "uuid";
import { LATEST_MS } from "../../lib/field.ts";
import { encodeCursor, nextCursor, pageFields, pageOf } from "../../lib/page.ts";
import { sentenceOf } from "../harness/refusal.ts";

const { limit: limitField, cursor: cursorField } = pageFields;
const ID = "01890a5d-ac96-774b-bcce-b302099a8057";
const POSITION = { time: new Date(1_866_469_140_000), id: ID };

const positions = fc.record({
  time: fc.date({ min: new Date(0), max: new Date(LATEST_MS), noInvalidDate: true }),
  id: fc.uuid(),
});

/** A cursor that says this, whether it may or not. */
function cursorOf(text: string): string {
  return Buffer.from(text, "latin1").toString("base64url");
}

test.each<[unknown, string | undefined]>([
  [undefined, undefined],
  [1, undefined],
  [1_000, undefined],
  [0, "limit must be greater than 0"],
  [1_001, "limit must be at most 1000"],
  [1.5, "limit must be an integer"],
  ["10", "limit must be an integer"],
])("pageFields.limit says of %p: %p", (value, sentence) => {
  expect(sentenceOf(limitField, value)).toBe(sentence as string);
  if (value !== undefined) expect(Value.Check(limitField.schema, value)).toBe(sentence === undefined);
});

test("encodeCursor() gives what pageFields.cursor reads back, without a character that a URL escapes", () => {
  const first = { time: new Date(0), id: ID };
  fc.assert(
    fc.property(positions, (position) => {
      const cursor = encodeCursor(position);
      expect(cursorField.parse(cursor, "cursor")).toEqual({ value: position });
      expect(Value.Check(cursorField.schema, cursor)).toBe(true);
      expect(encodeURIComponent(cursor)).toBe(cursor);
    }),
    { examples: [[first], [{ ...first, time: new Date(LATEST_MS) }]] },
  );
});

describe("pageFields.cursor", () => {
  test("may be left out", () => {
    expect(cursorField.parse(undefined, "cursor")).toEqual({ value: undefined });
  });

  test.each<[string, unknown]>([
    ["null", null],
    ["an array of a cursor", [encodeCursor(POSITION)]],
    ["a bare id", cursorOf(ID)],
    ["a position that is not encoded", `1866469140000.${ID}`],
    ["a negative time", cursorOf(`-1.${ID}`)],
    ["a time with a fraction", cursorOf(`1.5.${ID}`)],
    ["a time after the last one", cursorOf(`${LATEST_MS + 1}.${ID}`)],
    ["a time of 16 digits", cursorOf(`1866469140000000.${ID}`)],
    ["an id that is not a UUID", cursorOf(`1866469140000.${"x".repeat(36)}`)],
    ["an id that is too long", cursorOf(`1866469140000.${ID}0`)],
    ["a quote", cursorOf(`1866469140000.' or 1=1 or id > '${ID.slice(22)}`)],
    ["bytes beyond ASCII", cursorOf(`1866469140000.${"\xff".repeat(36)}`)],
    ["padding", `${encodeCursor(POSITION)}=`],
    ["a line end", `${encodeCursor(POSITION)}\n`],
    ["a text of a million characters", "A".repeat(1_000_000)],
    ["half a character", "\ud800"],
  ])("refuses %s in a short sentence", (_, cursor) => {
    const parsed = cursorField.parse(cursor, "cursor");
    if (!("broken" in parsed)) return expect.unreachable();
    expect(parsed.broken.sentence).toBe("cursor is invalid format");
    expect(parsed.broken.explanation).toStartWith(
      "cursor must be the next_cursor of another page: received ",
    );
    expect(parsed.broken.explanation.length).toBeLessThan(150);
  });

  test("never throws, and takes nothing but a position, however a cursor is cut or changed", () => {
    const damaged = fc
      .tuple(positions, fc.nat(80), fc.string({ unit: "binary", maxLength: 3 }), fc.nat(3))
      .map(([position, at, text, cut]) => {
        const cursor = encodeCursor(position);
        return cursor.slice(0, at) + text + cursor.slice(at + cut);
      });
    fc.assert(
      fc.property(fc.oneof(damaged, fc.anything(), fc.base64String()), (cursor) => {
        const parsed = cursorField.parse(cursor, "cursor");
        if ("broken" in parsed || parsed.value === undefined) return;
        expect(parsed.value.id).toMatch(/^[0-9a-f-]{36}$/i);
        expect(parsed.value.time.getTime()).toBeWithin(0, LATEST_MS + 1);
      }),
      { numRuns: 1_000 },
    );
  });
});

test("pageOf() gives the first page of 100 unless the query says otherwise", () => {
  expect(pageOf({ limit: undefined, cursor: undefined })).toEqual({ limit: 100, after: undefined });
  expect(pageOf({ limit: 7, cursor: POSITION })).toEqual({ limit: 7, after: POSITION });
});

describe("nextCursor()", () => {
  const rows = Array.from({ length: 5 }, (_, index) => ({ time: new Date(index), id: uuidv7() }));

  test.each([1, 2, 4])("gives the position of row %d, the last of the page, if more follow", (limit) => {
    const cursor = nextCursor(rows.slice(0, limit + 1), limit);
    expect(cursorField.parse(cursor, "cursor")).toEqual({ value: rows[limit - 1] });
  });

  test.each([0, 1, 5])("gives null after the last of %d rows, also if they fill the page", (count) => {
    expect(nextCursor(rows.slice(0, count), 5)).toBeNull();
  });
});
