import { createHash } from "node:crypto";
import { Type } from "@sinclair/typebox";
import { type BrokenRule, showValue } from "../errors.ts";
import { broken, field, headerKeyRules, invalidInput, objectSchema, parseFields } from "../field.ts";
import { checkReservation, type Reservation, reservationFields } from "./reservation.ts";

const MAX_RESERVATIONS = 10_000;
const WHAT = "bulk of reservations";

/** The fields of `POST /point/reserve/bulk`. */
export const bulkFields = {
  reservations: field(
    Type.Array(objectSchema(reservationFields), { minItems: 1, maxItems: MAX_RESERVATIONS }),
    {
      // Each row is checked separately.
      parse: (value, place) =>
        Array.isArray(value) && value.length >= 1 && value.length <= MAX_RESERVATIONS
          ? { value: value as unknown[] }
          : broken(
              `reservations must be an array of 1 to ${MAX_RESERVATIONS}`,
              `${place} must be an array of 1 to ${MAX_RESERVATIONS} reservations: received ${showValue(value)}`,
            ),
    },
  ),
  mode: field(
    Type.Union([Type.Literal("atomic"), Type.Literal("each")], {
      description: "`atomic`: all or none; `each`: each row by itself, with one result per row, in order",
    }),
    { sentence: "mode must be atomic or each", must: "atomic or each" },
  ),
};

/** One row of a bulk request: a valid reservation, or the rules that it breaks. */
export type BulkRow = Reservation | { broken: readonly BrokenRule[] };

/** The reservations of one bulk request. */
export interface BulkReservation {
  mode: "atomic" | "each";
  rows: BulkRow[];
}

/**
 * Parses a bulk request. A row without a key gets one from the request's key and its index or, if the request has no key, from
 * the content of all rows and its index: the same request sent again makes the same reservations.
 *
 * @param input the parsed body, of any shape
 * @param headerKey the header `Idempotency-Key`
 * @throws {DomainError} INVALID_INPUT, with every broken rule. Broken rows throw if the mode is `atomic`; they are in the result if
 *   it is `each`
 */
export function newBulkReservation(input: unknown, headerKey?: string): BulkReservation {
  const { mode, reservations } = parseFields(bulkFields, input, {
    what: WHAT,
    more: headerKeyRules(headerKey, undefined),
  });
  const rows = reservations.map(newRow);
  const brokenRules = mode === "atomic" ? rows.flatMap(brokenRulesOfRow) : [];
  if (brokenRules.length > 0) throw invalidInput(WHAT, brokenRules);
  const requestKey = headerKey === undefined ? contentOf(rows) : `key ${headerKey}`;
  const digest = createHash("sha256").update(requestKey).digest("hex").slice(0, 40);
  return {
    mode,
    rows: rows.map((row, index) =>
      // No client's key has a colon.
      "broken" in row || hasKey(row) ? row : { ...row, idempotencyKey: `bulk:${digest}:${index}` },
    ),
  };
}

function newRow(row: unknown): BulkRow {
  if (typeof row === "object" && row !== null && !Array.isArray(row)) return checkReservation(row);
  const explanation = `must be a JSON object: received ${showValue(row)}`;
  return { broken: [{ sentence: "reservation must be a JSON object", explanation }] };
}

function hasKey({ id, idempotencyKey }: Reservation): boolean {
  return idempotencyKey !== id;
}

/** The content of the rows in a canonical form, independent of how the client has written it. */
function contentOf(rows: readonly BulkRow[]): string {
  return JSON.stringify(
    rows.map((row) => {
      if ("broken" in row) return null;
      const { userId, pointAmount, executeAt, campaign } = row;
      return [userId, pointAmount, executeAt.getTime(), campaign, hasKey(row) ? row.idempotencyKey : null];
    }),
  );
}

/** The rules that a row breaks, each with the row's index. */
function brokenRulesOfRow(row: BulkRow, index: number): BrokenRule[] {
  return "broken" in row ? row.broken.map((rule) => atRow(index, rule)) : [];
}

/** A rule that one row breaks, with the row's index. */
export function atRow(index: number, { sentence, explanation }: BrokenRule): BrokenRule {
  return {
    sentence: `reservations[${index}]: ${sentence}`,
    explanation: `reservations[${index}]: ${explanation}`,
  };
}
