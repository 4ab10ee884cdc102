import { afterAll, expect, test } from "bun:test";
import { FormatRegistry, type TSchema } from "@sinclair/typebox";
import { Value } from "@sinclair/typebox/value";
import { DomainError } from "../../lib/errors.ts";
import { objectSchema } from "../../lib/field.ts";
import { newPointChange, pointChangeFields } from "../../lib/points/point.ts";
import { bulkFields, newBulkReservation } from "../../lib/reservations/bulk.ts";
import {
  newReservation,
  newReservationPatch,
  reservationFields,
  reservationPatchFields,
} from "../../lib/reservations/reservation.ts";

// The schemas are what the description shows; the functions are what decides. Bodies that are valid, and bodies that are wrong
// in one place, must be the same to both. Times: field.test.ts, as their format is stricter than `date-time`.

const before = FormatRegistry.Get("date-time");
FormatRegistry.Set("date-time", () => true);
afterAll(() => (before ? FormatRegistry.Set("date-time", before) : FormatRegistry.Delete("date-time")));

// Values of a field, the first one valid.
const words = ["a", "x".repeat(20), "x".repeat(101), "", "a:b", null, 1, ["a"]];
const amounts = [1, 2_147_483_647, 2_147_483_648, 0, 0.5, "1", null];
const times = ["2029-02-22T22:59:00+09:00", 1, null];
const fields = {
  user_id: words,
  point_amount: amounts,
  execute_at: times,
  idempotency_key: words,
  campaign: words,
};

/** A valid body, each body with one other value, one field less or one that nobody knows, and what is no object. */
function bodiesOf(fields: Record<string, unknown[]>): unknown[] {
  const valid = Object.fromEntries(Object.entries(fields).map(([name, [value]]) => [name, value]));
  const strangers = { status: [1], User_id: [1], "": [1], ["__proto__"]: [1], constructor: [1] };
  const bodies = Object.entries({ ...fields, ...strangers }).flatMap(([name, values]) =>
    [...values, undefined].map((value) => ({ ...valid, [name]: value })),
  );
  // As JSON has them: what is undefined is left out.
  return [...JSON.parse(JSON.stringify(bodies)), {}, [], null, "text", 1, true];
}

const rows = bodiesOf(fields);
const [valid] = rows;
const lists = [[valid], [], null, {}, { length: 1 }, Array(10_000).fill(valid), Array(10_001).fill(valid)];
const bulks = [
  ...bodiesOf({ mode: ["atomic", "each", "Atomic", "", null, ["each"]], reservations: lists }),
  ...rows.map((row) => ({ mode: "atomic", reservations: [valid, row] })),
];

function takes(read: (input: unknown) => unknown, input: unknown): boolean {
  try {
    read(input);
    return true;
  } catch (error) {
    if (error instanceof DomainError && error.code === "INVALID_INPUT") return false;
    throw error;
  }
}

test.each<[string, TSchema, unknown[], (input: unknown) => unknown]>([
  ["newReservation()", objectSchema(reservationFields), rows, (input) => newReservation(input)],
  [
    "newReservationPatch()",
    objectSchema(reservationPatchFields, { minProperties: 1 }),
    bodiesOf({ point_amount: amounts, execute_at: times }),
    newReservationPatch,
  ],
  [
    "newPointChange()",
    objectSchema(pointChangeFields),
    bodiesOf({ user_id: words, point_num: amounts, idempotency_key: words }),
    (input) => newPointChange(input, { kind: "add" }),
  ],
  ["newBulkReservation()", objectSchema(bulkFields), bulks, (input) => newBulkReservation(input)],
])("%s takes what the description's schema takes, and nothing else", (_, schema, inputs, read) => {
  const verdicts = inputs.map((input) => ({ input, isTaken: takes(read, input) }));
  expect(verdicts.filter(({ input, isTaken }) => isTaken !== Value.Check(schema, input))).toEqual([]);
  expect(new Set(verdicts.map(({ isTaken }) => isTaken))).toEqual(new Set([true, false]));
});
