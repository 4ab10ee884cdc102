import { describe, expect, test } from "bun:test";
import { Value } from "@sinclair/typebox/value";
import { validate, version } from "uuid";
import {
  campaignField,
  checkReservation,
  newReservation,
  newReservationPatch,
  parseCampaign,
  parseReservationId,
  statusField,
} from "../../lib/reservations/reservation.ts";
import { refusalOf, sentenceOf, sentencesOf } from "../harness/refusal.ts";

const VALID = { user_id: "TestUser01", point_amount: 100, execute_at: "2029-02-22T22:59:00+09:00" };

describe("newReservation()", () => {
  test("makes a reservation of what a client sent", () => {
    const reservation = newReservation({ ...VALID, idempotency_key: "order-42", campaign: "spring" });
    expect(reservation).toEqual({
      id: reservation.id,
      userId: "TestUser01",
      pointAmount: 100,
      executeAt: new Date("2029-02-22T13:59:00.000Z"),
      idempotencyKey: "order-42",
      campaign: "spring",
    });
    expect(newReservation(VALID).campaign).toBeNull();
  });

  test("makes an id that is a UUID v7, each one after the one before", () => {
    const ids = Array.from({ length: 1_000 }, () => newReservation(VALID).id);
    expect(ids.every((id) => validate(id) && version(id) === 7)).toBe(true);
    expect(ids.toSorted()).toEqual(ids);
    expect(new Set(ids).size).toBe(1_000);
  });

  test("takes the key of the header, or the id if the client gives none", () => {
    expect(newReservation(VALID, "order-42").idempotencyKey).toBe("order-42");
    const { id, idempotencyKey } = newReservation(VALID);
    expect(idempotencyKey).toBe(id);
  });

  test("throws all broken rules at once, in the order of the fields", () => {
    const input = { extra: 1, campaign: "a b", idempotency_key: "?", execute_at: "soon", point_amount: 0 };
    const { code, message, brokenRules } = refusalOf(() => newReservation(input, "order-42"));
    expect([code, message]).toEqual(["INVALID_INPUT", "The reservation breaks a rule"]);
    expect(brokenRules.map(({ sentence }) => sentence)).toEqual([
      "user id is invalid format",
      "point amount must be greater than 0",
      "execute at must be an RFC 3339 time with seconds and offset",
      "idempotency key is invalid format",
      "campaign is invalid format",
      'unknown field "extra"',
      "idempotency key differs between header and body",
    ]);
  });

  test("is checkReservation(), which gives broken rules and does not throw", () => {
    expect(checkReservation(VALID)).toMatchObject({ userId: "TestUser01", campaign: null });
    expect(checkReservation({ ...VALID, user_id: "" })).toMatchObject({
      broken: [{ sentence: "user id is invalid format" }],
    });
  });
});

describe("newReservationPatch()", () => {
  test("gives the new values, and undefined for what stays", () => {
    const executeAt = new Date("2029-02-22T13:59:00.000Z");
    expect(newReservationPatch({ execute_at: VALID.execute_at })).toEqual({
      executeAt,
      pointAmount: undefined,
    });
    expect(newReservationPatch({ point_amount: 7 })).toEqual({ executeAt: undefined, pointAmount: 7 });
  });

  test.each<[unknown, string[]]>([
    [{}, ["execute at or point amount is required"]],
    [{ point_amount: null }, ["point amount must be an integer"]],
    [{ point_amount: 1, user_id: "a" }, ['unknown field "user_id"']],
    [
      { point_amount: 0, execute_at: "soon" },
      ["execute at must be an RFC 3339 time with seconds and offset", "point amount must be greater than 0"],
    ],
    [null, ["body must be a JSON object"]],
  ])("refuses %j: %j", (input, sentences) => {
    expect(sentencesOf(() => newReservationPatch(input))).toEqual(sentences);
  });
});

test("parseReservationId() reads a UUID in lower case, as ids are stored, and refuses all else", () => {
  const id = "01890a5d-ac96-774b-bcce-b302099a8057";
  expect([parseReservationId(id), parseReservationId(id.toUpperCase())]).toEqual([id, id]);
  const wrong = [
    "",
    "1",
    id.slice(1),
    `${id}0`,
    `{${id}}`,
    `${id}\n`,
    id.replaceAll("-", ""),
    `g${id.slice(1)}`,
  ];
  for (const value of wrong) {
    expect(sentencesOf(() => parseReservationId(value))).toEqual(["reservation id is invalid format"]);
  }
});

test("parseCampaign() takes 1 to 64 of A-Z, a-z, 0-9, _ and -, and so does the schema of campaignField", () => {
  for (const value of ["a", "-", "summer_2029-B", "c".repeat(64)]) {
    expect(parseCampaign(value)).toBe(value);
    expect(Value.Check(campaignField.schema, value)).toBe(true);
  }
  for (const value of ["", "c".repeat(65), "a b", "a\n", "é", 1, null]) {
    expect(sentencesOf(() => parseCampaign(value))).toEqual(["campaign is invalid format"]);
    expect(Value.Check(campaignField.schema, value)).toBe(false);
  }
});

test("statusField takes the five states and no other", () => {
  const values = ["PENDING", "PROCESSING", "DONE", "FAILED", "CANCELLED", "OPEN", "done", 1];
  expect(values.filter((value) => sentenceOf(statusField, value))).toEqual(["OPEN", "done", 1]);
});
