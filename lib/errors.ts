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
  | "TIME_ZONE"
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

const MAX_SHOWN = 60;

/** A value as an error message shows it: as JSON, cut to 60 characters so that no input can flood a log. */
export function showValue(value: unknown): string {
  if (value === undefined) return "nothing";
  // Never as JSON: whoever nests them deep enough would have us at work for minutes.
  if (Array.isArray(value)) return `an array of ${value.length}`;
  if (typeof value === "object" && value !== null) return "an object";
  const isCut = typeof value === "string" && value.length > MAX_SHOWN;
  const text = JSON.stringify(isCut ? value.slice(0, MAX_SHOWN) : value) ?? String(value);
  return isCut || text.length > MAX_SHOWN ? `${text.slice(0, MAX_SHOWN)}…` : text;
}

/** The most broken rules that one error explains. */
const MAX_EXPLAINED = 20;

/** A DomainError in one line: its message, and the first 20 broken rules with their values. */
export function explain({ message, brokenRules }: DomainError): string {
  if (brokenRules.length === 0) return message;
  const shown = brokenRules.slice(0, MAX_EXPLAINED).map(({ explanation }) => explanation);
  const more = brokenRules.length > shown.length ? `; and ${brokenRules.length - shown.length} more` : "";
  return `${message}: ${shown.join("; ")}${more}`;
}
