import { createHash } from "node:crypto";
import { type Static, Type } from "@sinclair/typebox";
import { type BrokenRule, DomainError, showValue } from "./errors.ts";
import { brokenFieldRules, brokenHeaderKeyRules, refuseBroken, ruleOf } from "./input.ts";
import { newReservation, type Reservation, ReservationCreateInput } from "./reservation.ts";

const MAX_RESERVATIONS = 10_000;

/** The body of `POST /point/reserve/bulk`. */
export const BulkReservationInput = Type.Object(
  {
    reservations: Type.Array(ReservationCreateInput, { minItems: 1, maxItems: MAX_RESERVATIONS }),
    mode: Type.Union([Type.Literal("atomic"), Type.Literal("each")], {
      description:
        "`atomic`: all or none; `each`: every row for itself, with a result for each of them in their order",
    }),
  },
  { additionalProperties: false },
);

const RULES = {
  // The rows have rules of their own.
  reservations: ruleOf(Type.Array(Type.Unknown(), { minItems: 1, maxItems: MAX_RESERVATIONS }), {
    sentence: `reservations must be an array of 1 to ${MAX_RESERVATIONS}`,
    must: `an array of 1 to ${MAX_RESERVATIONS} reservations`,
  }),
  mode: ruleOf(BulkReservationInput.properties.mode, {
    sentence: "mode must be atomic or each",
    must: "atomic or each",
  }),
};

/** One row of a bulk request: a valid reservation, or the rules that it breaks. */
export type BulkRow = Reservation | { broken: readonly BrokenRule[] };

/** Many reservations of one request. */
export interface BulkReservation {
  mode: Static<typeof BulkReservationInput>["mode"];
  rows: BulkRow[];
}

/**
 * Reads many reservations of one request. A row without a key gets one of the request's key and its index, or of what all
 * rows say where the request has no key: sent again, the same request makes the same reservations.
 *
 * @param input the parsed body, of any shape
 * @param headerKey the header `Idempotency-Key`
 * @throws {DomainError} INVALID_INPUT, with one broken rule for each; broken rows throw where the mode is `atomic`, and
 *   are among the rows where it is `each`
 */
export function newBulkReservation(input: unknown, headerKey?: string): BulkReservation {
  const broken = brokenFieldRules(BulkReservationInput, input, RULES);
  refuseBroken([...broken, ...brokenHeaderKeyRules(headerKey, undefined)], "bulk of reservations");
  const { mode, reservations } = input as { mode: BulkReservation["mode"]; reservations: unknown[] };
  const rows = reservations.map(newRow);
  if (mode === "atomic") refuseBroken(rows.flatMap(brokenRulesOfRow), "bulk of reservations");
  const requestKey = headerKey === undefined ? contentOf(rows) : `key ${headerKey}`;
  const digest = createHash("sha256").update(requestKey).digest("hex").slice(0, 40);
  return {
    mode,
    rows: rows.map((row, index) =>
      // No client's own key has a colon.
      "broken" in row || hasKey(row) ? row : { ...row, idempotencyKey: `bulk:${digest}:${index}` },
    ),
  };
}

function newRow(row: unknown): BulkRow {
  if (typeof row !== "object" || row === null || Array.isArray(row)) {
    const explanation = `must be a JSON object: received ${showValue(row)}`;
    return { broken: [{ sentence: "reservation must be a JSON object", explanation }] };
  }
  try {
    return newReservation(row);
  } catch (error) {
    if (!(error instanceof DomainError)) throw error;
    return { broken: error.brokenRules };
  }
}

function hasKey({ id, idempotencyKey }: Reservation): boolean {
  return idempotencyKey !== id;
}

/** What the rows say, in words of our own: the same, however the client has written it. */
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

/** A rule that one row breaks, as the whole request tells it. */
export function atRow(index: number, { sentence, explanation }: BrokenRule): BrokenRule {
  return {
    sentence: `reservations[${index}]: ${sentence}`,
    explanation: `reservations[${index}]: ${explanation}`,
  };
}
