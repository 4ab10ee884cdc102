import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { FormatRegistry, type TSchema } from "@sinclair/typebox";
import { Value } from "@sinclair/typebox/value";
import fc from "fast-check";
import { BulkReservationInput, newBulkReservation } from "../lib/bulk.ts";
import { DomainError } from "../lib/errors.ts";
import { IdempotencyKey, parseTime } from "../lib/input.ts";
import { MAX_POINT_AMOUNT, newPointChange, PointChangeInput, parseUserId, UserId } from "../lib/point.ts";
import {
  Campaign,
  newReservation,
  newReservationPatch,
  parseCampaign,
  ReservationCreateInput,
  ReservationPatchInput,
} from "../lib/reservation.ts";

// The schemas are what the description shows; the functions are what decides. Random values, valid and nearly valid,
// must be the same to both. A failure prints its seed and path: `{ numRuns: 2_000, seed, path }` is the same again.

const RUNS = { numRuns: 2_000 };

// TypeBox knows no format by itself. Ours is stricter than the description's `date-time`, whose own words say how; what
// it takes is compared with those words further down.
const before = FormatRegistry.Get("date-time");
beforeAll(() => FormatRegistry.Set("date-time", (value) => parseTime(value, "time") instanceof Date));
afterAll(() => (before ? FormatRegistry.Set("date-time", before) : FormatRegistry.Delete("date-time")));

/** Nearly always something valid, else something that is nearly so. */
function mostly<T>(valid: fc.Arbitrary<T>, ...nearly: fc.Arbitrary<unknown>[]): fc.Arbitrary<unknown> {
  return fc.oneof({ weight: 12 * nearly.length, arbitrary: valid }, ...nearly);
}

/** Words of one alphabet: some as long as they may be, some longer, some with a letter of another alphabet. */
function wordOf(alphabet: string, maxLength: number): fc.Arbitrary<unknown> {
  const word = (min: number, max: number) => fc.stringMatching(new RegExp(`^[${alphabet}]{${min},${max}}$`));
  const strange = fc.constantFrom("\n", "\r", " ", "-", "_", ":", ".", "é", "Ａ", "\0", "٣", "\u2028", "😀");
  return mostly(
    fc.oneof(word(1, 3), word(maxLength - 1, maxLength)),
    word(maxLength + 1, maxLength + 3),
    fc.tuple(word(0, 3), strange, word(0, 3)).map((parts) => parts.join("")),
    fc.constantFrom("", null, 1, true, ["a"], { a: 1 }),
  );
}

const amount = mostly(
  fc.oneof(fc.integer({ min: 1, max: 1_000 }), fc.constantFrom(1, MAX_POINT_AMOUNT, MAX_POINT_AMOUNT - 1)),
  fc.constantFrom(0, -0, -1, 0.5, 1.5, MAX_POINT_AMOUNT + 1, MAX_POINT_AMOUNT + 0.5, 2 ** 53, 1e300),
  fc.constantFrom("1", "", null, false, [1], {}),
);

function digits(length: number, min: number, max: number): fc.Arbitrary<string> {
  return fc.integer({ min, max }).map((number) => String(number).padStart(length, "0"));
}

/** Parts of a time, each of which may be just outside of what it may be. */
const time = fc
  .tuple(
    mostly(digits(4, 1970, 9999), digits(4, 0, 10_000), fc.constantFrom("1969", "1970", "9999")),
    mostly(digits(2, 1, 12), digits(2, 0, 13)).map((month) => `-${month}`),
    mostly(digits(2, 1, 28), digits(2, 0, 32)).map((day) => `-${day}`),
    mostly(fc.constant("T"), fc.constantFrom("t", " ", "_", "")),
    mostly(digits(2, 0, 23), digits(2, 0, 25)),
    mostly(
      digits(2, 0, 59).map((minutes) => `:${minutes}`),
      digits(2, 0, 61).map((minutes) => `:${minutes}`),
    ),
    mostly(
      digits(2, 0, 59).map((seconds) => `:${seconds}`),
      fc.constantFrom("", ":60", ":6", ":059"),
    ),
    mostly(fc.constantFrom("", ".1", ".25", ".999"), fc.constantFrom(".", ".1234", ",5", ".999999999")),
    mostly(
      fc.constantFrom("Z", "+09:00", "-23:59"),
      fc.constantFrom("z", "", "+0900", "+24:00", "-01:60", "−01:00", "Z\n"),
    ),
  )
  .map((parts) => parts.join(""));

/** A few that stand at an edge. */
const edge = fc.constantFrom(
  ...[
    "1970-01-01T00:00:00Z",
    "1970-01-01T00:00:00+00:01",
    "1969-12-31T23:59:59-00:01",
    "1969-12-31T23:59:59.999Z",
  ],
  ...[
    "9999-12-31T23:59:59.999Z",
    "9999-12-31T23:59:59.999-00:01",
    "2096-02-29T00:00:00Z",
    "2100-02-29T00:00:00Z",
  ],
  ...[
    "2029-04-31T00:00:00Z",
    "2029-02-22T24:00:00Z",
    "2029-02-22",
    "+02029-02-22T00:00:00Z",
    "0000-01-01T00:00:00Z",
  ],
);
const moment = fc.oneof({ weight: 9, arbitrary: time }, edge);

/** Objects with these fields, seldom without a required one or with one that nobody knows; seldom something else. */
function objectOf(
  required: Record<string, fc.Arbitrary<unknown>>,
  optional: Record<string, fc.Arbitrary<unknown>>,
) {
  const fields = Object.entries({ ...required, ...optional }).map(([name, value]) => {
    const entry = value.map((value) => [[name, value]]);
    const weight = name in required ? 30 : 1;
    return fc.oneof({ weight, arbitrary: entry }, fc.constant([]));
  });
  const names = [
    "status",
    "User_id",
    "user_id ",
    "",
    "__proto__",
    "constructor",
    "toString",
    "hasOwnProperty",
  ];
  const stranger = fc.tuple(fc.constantFrom(...names), fc.jsonValue()).map((entry) => [entry]);
  const strangers = fc.oneof({ weight: 30, arbitrary: fc.constant([]) }, stranger);
  // By entries: a field called __proto__ is one of its own, as it is in JSON.
  const object = fc.tuple(...fields, strangers).map((entries) => Object.fromEntries(entries.flat()));
  // Nothing but what JSON can say ever arrives.
  return fc
    .oneof({ weight: 30, arbitrary: object }, fc.jsonValue())
    .map((value) => JSON.parse(JSON.stringify(value)));
}

const userId = wordOf("A-Za-z0-9", 20);
const key = wordOf("A-Za-z0-9_-", 100);
const campaign = wordOf("A-Za-z0-9_-", 64);
const reservation = objectOf(
  { user_id: userId, point_amount: amount, execute_at: moment },
  { idempotency_key: key, campaign },
);
const bulk = objectOf(
  {
    mode: mostly(fc.constantFrom("atomic", "each"), fc.constantFrom("Atomic", "all", "", null, ["each"])),
    reservations: mostly(
      fc.array(reservation, { minLength: 1, maxLength: 4 }),
      fc.constantFrom<unknown>([], null, {}, "", { length: 1 }, [[]], [null]),
    ),
  },
  {},
);

/** Whether a function takes an input; nothing but a sentence for each broken rule may refuse it. */
function takes(read: () => unknown): boolean {
  try {
    read();
    return true;
  } catch (error) {
    if (!(error instanceof DomainError)) throw error;
    expect(error.code).toBe("INVALID_INPUT");
    expect(error.brokenRules.length).toBeGreaterThan(0);
    for (const { sentence, explanation } of error.brokenRules) {
      expect(sentence).toMatch(/\w/);
      expect(explanation).toMatch(/\w/);
    }
    return false;
  }
}

/** Checks that a function takes what the schema takes, and that there was enough of both kinds. */
function expectAgreement<T>(schema: TSchema, inputs: fc.Arbitrary<T>, isTaken: (input: T) => boolean) {
  const counts = { taken: 0, refused: 0 };
  fc.assert(
    fc.property(inputs, (input) => {
      const verdict = isTaken(input);
      expect(verdict).toBe(Value.Check(schema, input));
      counts[verdict ? "taken" : "refused"]++;
    }),
    RUNS,
  );
  expect(Math.min(counts.taken, counts.refused)).toBeGreaterThan(RUNS.numRuns / 40);
}

describe("what is taken is what the description's schema takes:", () => {
  test("newReservation() and ReservationCreateInput", () => {
    expectAgreement(ReservationCreateInput, reservation, (input) => takes(() => newReservation(input)));
  });

  test("newReservation() with a header and IdempotencyKey", () => {
    const body = { user_id: "Ann", point_amount: 1, execute_at: "2029-02-22T22:59:00+09:00" };
    const header = key.filter((value) => typeof value === "string");
    expectAgreement(IdempotencyKey, header, (value) => takes(() => newReservation(body, value)));
  });

  test("newReservationPatch() and ReservationPatchInput", () => {
    const patch = objectOf({}, { point_amount: amount, execute_at: moment });
    expectAgreement(ReservationPatchInput, patch, (input) => takes(() => newReservationPatch(input)));
  });

  test("newPointChange() and PointChangeInput", () => {
    const change = objectOf({ user_id: userId, point_num: amount }, { idempotency_key: key });
    expectAgreement(PointChangeInput, change, (input) => takes(() => newPointChange(input, { sign: 1 })));
  });

  test("newBulkReservation() and BulkReservationInput, where a row that is refused alone is refused too", () => {
    expectAgreement(BulkReservationInput, bulk, (input) => {
      let isWhole = true;
      const isTaken = takes(() => {
        const { mode, rows } = newBulkReservation(input);
        isWhole = rows.every((row) => !("broken" in row));
        // All or none.
        expect(isWhole || mode === "each").toBe(true);
      });
      return isTaken && isWhole;
    });
  });

  test("newBulkReservation() and BulkReservationInput, of as many rows as there may be and one more", () => {
    const row = {
      user_id: "Ann",
      point_amount: 1,
      execute_at: "2029-02-22T22:59:00+09:00",
      idempotency_key: "k",
    };
    for (const length of [10_000, 10_001]) {
      const input = { mode: "each", reservations: Array(length).fill(row) };
      expect(takes(() => newBulkReservation(input))).toBe(length === 10_000);
      expect(Value.Check(BulkReservationInput, input)).toBe(length === 10_000);
    }
  });

  test("parseUserId() and UserId, parseCampaign() and Campaign", () => {
    expectAgreement(UserId, userId, (value) => takes(() => parseUserId(value)));
    expectAgreement(Campaign, campaign, (value) => takes(() => parseCampaign(value)));
  });

  test("in newBulkReservation(), a row and the same reservation alone", () => {
    fc.assert(
      fc.property(fc.array(reservation, { minLength: 1, maxLength: 4 }), (reservations) => {
        const { rows } = newBulkReservation({ mode: "each", reservations });
        expect(rows.map((row) => !("broken" in row))).toEqual(
          reservations.map((row) => takes(() => newReservation(row))),
        );
      }),
      RUNS,
    );
  });
});

describe("parseTime()", () => {
  // RFC 3339, section 5.6, without the space that it lets others agree on.
  const RFC_3339 =
    /^\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])T(?:[01]\d|2[0-3]):[0-5]\d:(?:[0-5]\d|60)(?:\.\d+)?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)$/i;

  /** The moment that a time means by what the description says of it, or NaN. */
  function momentOf(text: string): number {
    const isDay = new Date(`${text.slice(0, 10)}T00:00:00Z`).toJSON()?.slice(0, 10) === text.slice(0, 10);
    if (!RFC_3339.test(text) || !isDay || /:60|\.\d{4}/.test(text)) return Number.NaN;
    const ms = Date.parse(text.toUpperCase());
    return ms >= Date.UTC(1970) && ms < Date.UTC(10_000) ? ms : Number.NaN;
  }

  test("takes exactly the times that the description describes, and reads them as the moments they are", () => {
    const counts = { taken: 0, refused: 0 };
    fc.assert(
      fc.property(moment, (text) => {
        const parsed = parseTime(text, "execute_at");
        expect(parsed instanceof Date ? parsed.getTime() : Number.NaN).toBe(momentOf(text));
        counts[parsed instanceof Date ? "taken" : "refused"]++;
      }),
      { numRuns: 5 * RUNS.numRuns },
    );
    expect(Math.min(counts.taken, counts.refused)).toBeGreaterThan(RUNS.numRuns);
  });
});
