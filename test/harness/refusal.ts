import { DomainError } from "../../lib/errors.ts";
import type { Field } from "../../lib/field.ts";

/** The DomainError that some work must throw. */
export function refusalOf(work: () => unknown): DomainError {
  try {
    work();
  } catch (error) {
    if (error instanceof DomainError) return error;
    throw error;
  }
  throw new Error("It was not refused");
}

/** The sentences of the rules that some work must find broken. */
export function sentencesOf(work: () => unknown): string[] {
  const { code, brokenRules } = refusalOf(work);
  if (code !== "INVALID_INPUT") throw new Error(`It was refused with ${code}`);
  return brokenRules.map(({ sentence }) => sentence);
}

/** What a field makes of a value: the sentence that refuses it, or undefined. */
export function sentenceOf({ parse }: Field, value: unknown, place = "execute_at"): string | undefined {
  const parsed = parse(value, place);
  return "broken" in parsed ? parsed.broken.sentence : undefined;
}
