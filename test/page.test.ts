import { describe, expect, test } from "bun:test";
import { Value } from "@sinclair/typebox/value";
import fc from "fast-check";
import { v4 as uuidv4, v7 as uuidv7 } from "uuid";
import { Cursor, cursorRule, encodeCursor, Limit, limitRule, nextCursor, pageOf } from "../lib/page.ts";

const ID = "01890a5d-ac96-774b-bcce-b302099a8057";
const LATEST_MS = Date.UTC(9999, 11, 31, 23, 59, 59, 999);

const positions = fc.record({
  time: fc.date({ min: new Date(0), max: new Date(LATEST_MS), noInvalidDate: true }),
  id: fc.oneof(fc.uuid(), fc.constant(uuidv7()), fc.constant(uuidv4())),
});

/** A cursor that says this, whether it may or not. */
function cursorOf(text: string): string {
  return Buffer.from(text, "latin1").toString("base64url");
}

describe("limitRule", () => {
  test.each([[1], [100], [1_000]])("takes %p", (limit) => {
    expect(limitRule(limit, "limit")).toBeUndefined();
    expect(Value.Check(Limit, limit)).toBe(true);
  });

  test.each<[unknown, string]>([
    [0, "limit must be greater than 0"],
    [-1, "limit must be greater than 0"],
    [1_001, "limit must be at most 1000"],
    [1.5, "limit must be an integer"],
    ["10", "limit must be an integer"],
    ["x", "limit must be an integer"],
  ])("refuses %p: %s", (limit, sentence) => {
    expect(limitRule(limit, "limit")?.sentence).toBe(sentence);
    expect(Value.Check(Limit, limit)).toBe(false);
  });
});

describe("encodeCursor()", () => {
  test("gives what cursorRule takes and pageOf() reads back, whatever the time and the id", () => {
    fc.assert(
      fc.property(positions, (position) => {
        const cursor = encodeCursor(position);
        expect(cursorRule(cursor, "cursor")).toBeUndefined();
        expect(Value.Check(Cursor, cursor)).toBe(true);
        expect(pageOf({ cursor }).after).toEqual(position);
      }),
    );
  });

  test("needs no escape in a URL", () => {
    fc.assert(
      fc.property(positions, (position) => {
        const cursor = encodeCursor(position);
        expect(encodeURIComponent(cursor)).toBe(cursor);
      }),
    );
  });

  test.each([[0], [LATEST_MS]])("takes the time %d, the first or the last that there is", (ms) => {
    const position = { time: new Date(ms), id: ID };
    expect(pageOf({ cursor: encodeCursor(position) }).after).toEqual(position);
  });
});

describe("cursorRule", () => {
  test.each<[string, unknown]>([
    ["nothing", undefined],
    ["null", null],
    ["a number", 2],
    ["an object", {}],
    ["an array of a cursor", [encodeCursor({ time: new Date(0), id: ID })]],
    ["an empty text", ""],
    ["a page's number", "2"],
    ["a bare id", ID],
    ["a bare id, encoded", cursorOf(ID)],
    ["a bare time", cursorOf("1866469140000")],
    ["a position that is not encoded", `1866469140000.${ID}`],
    ["a time that is negative", cursorOf(`-1.${ID}`)],
    ["a time with a fraction", cursorOf(`1.5.${ID}`)],
    ["a time after the last one", cursorOf(`${LATEST_MS + 1}.${ID}`)],
    ["a time of 16 digits", cursorOf(`1866469140000000.${ID}`)],
    ["an exponent", cursorOf(`1e3.${ID}`)],
    ["no time", cursorOf(`.${ID}`)],
    ["an id that is no UUID", cursorOf(`1866469140000.${"x".repeat(36)}`)],
    ["an id of blanks", cursorOf(`1866469140000.${" ".repeat(36)}`)],
    ["an id that is cut", cursorOf(`1866469140000.${ID.slice(1)}`)],
    ["an id that is too long", cursorOf(`1866469140000.${ID}0`)],
    ["a line end after the id", cursorOf(`1866469140000.${ID}\n`)],
    ["a quote", cursorOf(`1866469140000.' or 1=1 or id > '${ID.slice(22)}`)],
    ["bytes beyond ASCII", cursorOf(`1866469140000.${"\xff".repeat(36)}`)],
    ["padding", `${encodeCursor({ time: new Date(0), id: ID })}=`],
    ["a blank in front", ` ${encodeCursor({ time: new Date(0), id: ID })}`],
    ["a line end", `${encodeCursor({ time: new Date(0), id: ID })}\n`],
    ["a text of 101 characters", "A".repeat(101)],
    ["a text of a million characters", "A".repeat(1_000_000)],
    ["letters of another alphabet", "日本語"],
    ["half a character", "\ud800"],
  ])("refuses %s, and says so in few words", (_, cursor) => {
    const broken = cursorRule(cursor, "cursor");
    expect(broken?.sentence).toBe("cursor is invalid format");
    expect(broken?.explanation).toStartWith("cursor must be the next_cursor of another page: received ");
    expect(broken?.explanation.length).toBeLessThan(150);
  });

  test("refuses anything at all that encodeCursor() did not make, and never throws", () => {
    const anything = fc.oneof(
      fc.string({ unit: "binary" }),
      fc.base64String(),
      fc.stringMatching(/^[\w-]{1,100}$/),
      fc.tuple(fc.integer(), fc.uuid()).map(([ms, id]) => `${ms}.${id}`),
      fc.anything(),
    );
    fc.assert(
      fc.property(anything, (cursor) => {
        expect(cursorRule(cursor, "cursor")?.sentence).toBe("cursor is invalid format");
      }),
    );
  });

  test("of a cursor that is cut or changed never throws, and what it takes is a position", () => {
    const damaged = fc
      .tuple(positions, fc.nat(80), fc.string({ unit: "binary", maxLength: 3 }), fc.nat(3))
      .map(([position, at, text, cut]) => {
        const cursor = encodeCursor(position);
        return cursor.slice(0, at) + text + cursor.slice(at + cut);
      });
    fc.assert(
      fc.property(damaged, (cursor) => {
        if (cursorRule(cursor, "cursor")) return;
        const { after } = pageOf({ cursor });
        expect(after?.id).toMatch(/^[0-9a-f-]{36}$/i);
        expect(after?.time.getTime()).toBeWithin(0, LATEST_MS + 1);
      }),
      { numRuns: 1_000 },
    );
  });
});

describe("pageOf()", () => {
  test("gives the first page of 100 where the query says nothing", () => {
    expect(pageOf({})).toEqual({ limit: 100, after: undefined });
  });

  test("gives the limit that the query says", () => {
    expect(pageOf({ limit: 7 }).limit).toBe(7);
  });
});

describe("nextCursor()", () => {
  const rows = Array.from({ length: 5 }, (_, index) => ({ time: new Date(index), id: uuidv7() }));

  test.each([[1], [2], [4]])(
    "gives the position of row %d, the last of the page, where more follow",
    (limit) => {
      const cursor = nextCursor(rows.slice(0, limit + 1), limit);
      expect(pageOf({ cursor: cursor ?? "" }).after).toEqual(rows[limit - 1]);
    },
  );

  test.each([[0], [1], [4], [5]])(
    "gives null after the last of %d rows, also where they fill the page",
    (count) => {
      expect(nextCursor(rows.slice(0, count), 5)).toBeNull();
    },
  );
});
