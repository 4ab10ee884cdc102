/** An error whose message says all that there is to say: a log shows it without its stack. */
export class ForeseenError extends Error {
  override readonly name: string = "ForeseenError";
}

/** What can go wrong by the rules of the domain; `api.ts` maps each code to one HTTP status. */
export type DomainErrorCode =
  | "INVALID_INPUT"
  | "NOT_FOUND"
  | "CONFLICT"
  | "IDEMPOTENCY_CONFLICT"
  | "UNREADABLE_MESSAGE"
  | "INVALID_SETTING"
  | "SCHEMA"
  | "CANNOT_LISTEN";

/** One broken rule: the sentence that clients know, and the same told with the rule and the value. */
export interface BrokenRule {
  /** Stable sentence, safe to compare with, e.g. `user id is invalid format`. */
  sentence: string;
  /** What, which rule and which value, e.g. `user_id must be 1 to 20 of A-Z, a-z and 0-9: received "x y"`. */
  explanation: string;
}

/** A rule of the domain said no. Its message and its rules are safe to show to a client. */
export class DomainError extends ForeseenError {
  override readonly name = "DomainError";

  constructor(
    readonly code: DomainErrorCode,
    message: string,
    readonly brokenRules: readonly BrokenRule[] = [],
    /** What a program may want to know about it, by name. */
    readonly facts?: Record<string, unknown>,
  ) {
    super(message);
  }
}

/** A value as an error message shows it: as JSON, cut to 60 characters so that no input can flood a log. */
export function showValue(value: unknown): string {
  const text = value === undefined ? "nothing" : (JSON.stringify(value) ?? String(value));
  return text.length > 60 ? `${text.slice(0, 60)}…` : text;
}
