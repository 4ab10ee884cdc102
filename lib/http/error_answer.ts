import type { Logger } from "pino";
import { v7 as uuidv7 } from "uuid";
import { OverloadError } from "../coalesce.ts";
import { DatabaseError } from "../database_errors.ts";
import { DomainError, type DomainErrorCode, describeError, explain } from "../errors.ts";
import { perSecond } from "../log.ts";
import { HttpError, problem } from "./problem.ts";

/** A code that is missing here does not concern clients: 500. */
const STATUS: Partial<Record<DomainErrorCode, number>> = {
  INVALID_INPUT: 400,
  NOT_FOUND: 404,
  CONFLICT: 409,
  IDEMPOTENCY_CONFLICT: 422,
};

/** How many unexpected errors of one kind the log has within a second, each with its request id; more are counted. */
const MAX_UNEXPECTED = 10;

/** The answer to anything that a route throws. Only errors of the domain show their text. */
export function answerError(error: unknown, logger: Logger): Response {
  if (error instanceof HttpError) {
    return problem(error.status, error.message, { errors: [error.sentence], headers: error.headers });
  }
  const status = error instanceof DomainError && STATUS[error.code];
  if (error instanceof DomainError && status) {
    const errors = error.brokenRules.map(({ sentence }) => sentence);
    return problem(status, explain(error), { errors, facts: error.facts });
  }
  const requestId = uuidv7();
  const isBusy =
    error instanceof OverloadError ||
    (error instanceof DatabaseError && (error.isOutage || error.isContended));
  const fields = { requestId, error: describeError(error) };
  if (isBusy) {
    perSecond(logger).warn(fields, "request failed");
    return problem(
      503,
      "The service cannot answer now; send the same request with the same idempotency key again",
      {
        errors: ["service is unavailable"],
        headers: { "x-request-id": requestId, "retry-after": "1" },
        requestId,
      },
    );
  }
  perSecond(logger).error(fields, "request failed", MAX_UNEXPECTED);
  return problem(500, "Unexpected error; the log has the details under this request id", {
    errors: ["internal error"],
    headers: { "x-request-id": requestId },
    requestId,
  });
}
