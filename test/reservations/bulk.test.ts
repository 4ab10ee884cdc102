import { describe, expect, test } from "bun:test";
import { type BulkReservation, newBulkReservation } from "../../lib/reservations/bulk.ts";
import { refusalOf, sentencesOf } from "../harness/refusal.ts";

const ROW = { user_id: "TestUser01", point_amount: 100, execute_at: "2029-02-22T22:59:00+09:00" };
const USER_ID = "user id is invalid format";

function keysOf({ rows }: BulkReservation): (string | undefined)[] {
  return rows.map((row) => ("broken" in row ? undefined : row.idempotencyKey));
}

/** The keys of an `each` bulk of these rows. */
function keys(reservations: unknown[], headerKey?: string) {
  return keysOf(newBulkReservation({ mode: "each", reservations }, headerKey));
}

describe("newBulkReservation()", () => {
  test("gives the reservations in their order, with the clients' own keys", () => {
    const reservations = [
      { ...ROW, idempotency_key: "a" },
      { ...ROW, point_amount: 1, idempotency_key: "b" },
    ];
    expect(newBulkReservation({ mode: "atomic", reservations })).toMatchObject({
      mode: "atomic",
      rows: [
        { userId: "TestUser01", pointAmount: 100, idempotencyKey: "a" },
        { pointAmount: 1, idempotencyKey: "b" },
      ],
    });
  });

  test("makes a key of its own for each row without one: no client can write it, and no two are the same", () => {
    const [first, second, own] = keys([ROW, ROW, { ...ROW, idempotency_key: "own" }]);
    expect(first).toMatch(/^bulk:[0-9a-f]{40}:0$/);
    expect(second).toBe(first?.replace(/0$/, "1"));
    expect(own).toBe("own");
  });

  test("makes the same keys of the same content, however it is written, and others of other content", () => {
    const written = { execute_at: "2029-02-22T13:59:00.000Z", point_amount: 100, user_id: "TestUser01" };
    expect(keys([written])).toEqual(keys([ROW]));
    const others = [
      { ...ROW, point_amount: 1 },
      { ...ROW, campaign: "a" },
      { ...ROW, user_id: "Other" },
    ];
    const made = [ROW, ...others].flatMap((row) => keys([row]));
    made.push(...keys([ROW, { ...ROW, idempotency_key: "a" }]), ...keys([ROW, { ...ROW, user_id: "" }]));
    expect(new Set(made).size).toBe(made.length);
  });

  test("makes the same keys under the same header, whatever the content", () => {
    const other = { ...ROW, point_amount: 1 };
    expect(keys([ROW], "request-1")).toEqual(keys([other], "request-1"));
    expect(keys([ROW], "request-1")).not.toEqual(keys([ROW], "request-2"));
  });

  test("atomic: throws the broken rules of all rows, each with its index", () => {
    const reservations = [ROW, { ...ROW, user_id: "" }, null, [ROW], { ...ROW, point_amount: 0 }];
    expect(refusalOf(() => newBulkReservation({ mode: "atomic", reservations }))).toMatchObject({
      code: "INVALID_INPUT",
      message: "The bulk of reservations breaks a rule",
      brokenRules: [
        {
          sentence: `reservations[1]: ${USER_ID}`,
          explanation: 'reservations[1]: user_id must be 1 to 20 of A-Z, a-z and 0-9: received ""',
        },
        { sentence: "reservations[2]: reservation must be a JSON object" },
        { sentence: "reservations[3]: reservation must be a JSON object" },
        { sentence: "reservations[4]: point amount must be greater than 0" },
      ],
    });
  });

  test("each: gives the broken rules of a row in its place", () => {
    const { rows } = newBulkReservation({ mode: "each", reservations: [{ ...ROW, user_id: "" }, ROW] });
    expect(rows).toMatchObject([{ broken: [{ sentence: USER_ID }] }, { userId: "TestUser01" }]);
  });

  const SIZE = "reservations must be an array of 1 to 10000";
  const MODE = "mode must be atomic or each";
  test.each<[string, unknown, string[]]>([
    ["no object", [ROW], ["body must be a JSON object"]],
    ["no fields", {}, [SIZE, MODE]],
    ["no rows", { mode: "each", reservations: [] }, [SIZE]],
    ["too many rows", { mode: "each", reservations: Array(10_001).fill(ROW) }, [SIZE]],
    ["an object of rows", { mode: "each", reservations: { 0: ROW } }, [SIZE]],
    ["another mode", { mode: "ATOMIC", reservations: [ROW] }, [MODE]],
    ["another field", { mode: "each", reservations: [ROW], key: 1 }, ['unknown field "key"']],
  ])("refuses %s", (_, input, sentences) => {
    expect(sentencesOf(() => newBulkReservation(input))).toEqual(sentences);
  });

  test("refuses a header's key that breaks its rule", () => {
    for (const headerKey of ["", "a b", "a:b", "k".repeat(101)]) {
      expect(sentencesOf(() => keys([ROW], headerKey))).toEqual(["idempotency key is invalid format"]);
    }
  });
});
