/** An error whose message is sufficient: a log shows it without its stack. */
export class ExpectedError extends Error {
  override readonly name: string = "ExpectedError";
}

/** The rules of the domain that can be broken; `http/error_answer.ts` maps each code to one HTTP status. */
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

/** One broken rule: the sentence for clients, and an explanation with the rule and the value. */
export interface BrokenRule {
  /** Stable sentence, safe to compare with, e.g. `user id is invalid format`. */
  sentence: string;
  /** The field, the rule and the value, e.g. `user_id must be 1 to 20 of A-Z, a-z and 0-9: received "x y"`. */
  explanation: string;
}

/** A broken rule of the domain. Its message and its rules are safe to show to a client. */
export class DomainError extends ExpectedError {
  override readonly name = "DomainError";

  constructor(
    readonly code: DomainErrorCode,
    message: string,
    readonly brokenRules: readonly BrokenRule[] = [],
    /** Facts for programs, by name. */
    readonly facts?: Record<string, unknown>,
  ) {
    super(message);
  }
}

const MAX_SHOWN = 60;

/** A value as an error message shows it: as JSON, cut to 60 characters so that no input can flood a log. */
export function showValue(value: unknown): string {
  if (value === undefined) return "nothing";
  // Never as JSON: for a deeply nested array this would take minutes.
  if (Array.isArray(value)) return `an array of ${value.length}`;
  if (typeof value === "object" && value !== null) return "an object";
  const isCut = typeof value === "string" && value.length > MAX_SHOWN;
  const text = JSON.stringify(isCut ? value.slice(0, MAX_SHOWN) : value) ?? String(value);
  return isCut || text.length > MAX_SHOWN ? `${text.slice(0, MAX_SHOWN)}…` : text;
}

/** The maximum number of broken rules that one error explains. */
const MAX_EXPLAINED = 20;

/** A DomainError in one line: its message, and the first 20 broken rules with their values. */
export function explain({ message, brokenRules }: DomainError): string {
  if (brokenRules.length === 0) return message;
  const shown = brokenRules.slice(0, MAX_EXPLAINED).map(({ explanation }) => explanation);
  const more = brokenRules.length > shown.length ? `; and ${brokenRules.length - shown.length} more` : "";
  return `${message}: ${shown.join("; ")}${more}`;
}

/** The error for something that does not exist. */
export function notFound(sentence: string, explanation: string): DomainError {
  return new DomainError("NOT_FOUND", "Not found", [{ sentence, explanation }]);
}

/** The rule that requests with the same idempotency key must have the same content. */
export const KEY_CONFLICT: BrokenRule = {
  sentence: "idempotency key is used with other content",
  explanation: "requests with the same key must have the same content; nothing was changed",
};

/** The error for an idempotency key that was used with other content. */
export function keyConflict(broken: readonly BrokenRule[] = [KEY_CONFLICT]): DomainError {
  return new DomainError(
    "IDEMPOTENCY_CONFLICT",
    "The idempotency key was used before, with other content",
    broken,
  );
}

/** An error in the form for a log: without its stack if the message is sufficient. */
export function describeError(error: unknown): Record<string, unknown> {
  if (error instanceof ExpectedError) return { name: error.name, message: error.message };
  if (error instanceof Error) return { name: error.name, message: error.message, stack: error.stack };
  return { message: String(error) };
}

/** A number with its noun: `1 day`, `2 days`. */
export function plural(count: number | bigint, one: string, many = `${one}s`): string {
  return `${count} ${BigInt(count) === 1n ? one : many}`;
}
