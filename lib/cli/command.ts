import { writeSync } from "node:fs";
import { Command, InvalidArgumentError } from "commander";
import { DomainError, ExpectedError, explain } from "../errors.ts";
import type { Field } from "../field.ts";

/** The exit code of a command that ran, and whose answer is no: what it checks is not so. */
export const ANSWER_IS_NO = 1;
/** The exit code for wrong options or arguments. */
const WRONG_WORDS = 2;
/** The exit code of a command that could not run, or not to its end: a server is away, a setting is wrong, anything unforeseen. */
export const COULD_NOT_RUN = 3;

/**
 * The command line of `bun run NAME`. `--help` exits with 0, wrong options or arguments with 2.
 *
 * @param no what exit code 1 means; without it the command has no answer, and no such code
 */
export function newCommand(name: string, description: string, { no }: { no?: string } = {}): Command {
  const codes = ["0 if done", no && `1 ${no}`, "2 for wrong options", "3 if it could not run"];
  return new Command(`bun run ${name}`)
    .description(description)
    .addHelpText("after", `\nExit codes: ${codes.filter(Boolean).join(", ")}.`)
    .configureOutput({ writeOut: write })
    .showHelpAfterError()
    .exitOverride(({ exitCode }) => process.exit(exitCode === 0 ? 0 : WRONG_WORDS));
}

/** Makes the parser of an option from a field. `flag` names the option in the error, e.g. `--from`. */
export function parserOf<T>({ parse }: Field<T>, flag: string): (text: string) => T {
  return (text) => {
    const parsed = parse(text, flag);
    if ("broken" in parsed) throw new InvalidArgumentError(parsed.broken.explanation);
    return parsed.value;
  };
}

/** Parses the text of an option as a whole number from 1. */
export function wholeUpTo(max: number): (text: string) => number {
  return (text) => {
    if (/^\d+$/.test(text) && Number(text) >= 1 && Number(text) <= max) return Number(text);
    throw new InvalidArgumentError(`It must be a whole number from 1 to ${max}.`);
  };
}

export interface RunOptions<Options> {
  /** The action of the command, for the message `Cannot …: reason`. */
  what: string;
  /** Runs the command, and resolves to the exit code: 0, or `ANSWER_IS_NO`. */
  run: (options: Options) => Promise<number>;
}

/** Parses the options of a command, runs it, and exits with its exit code; with 3 if it could not run. */
export async function runCommand<Options>(
  command: Command,
  { what, run }: RunOptions<Options>,
): Promise<never> {
  // Otherwise an error that nobody awaits would end the process with 1, which is an answer.
  process.on("uncaughtException", (error) => end(error, what));
  process.on("unhandledRejection", (error) => end(error, what));
  const options = command.parse().opts() as Options;
  try {
    process.exit(await run(options));
  } catch (error) {
    if (error instanceof DomainError && error.code === "INVALID_INPUT") {
      command.error(`error: ${explain(error)}`);
    }
    return end(error, what);
  }
}

function end(error: unknown, what: string): never {
  if (error instanceof DomainError) console.error(explain(error));
  else if (error instanceof ExpectedError) console.error(`Cannot ${what}: ${error.message}`);
  else if (!(error instanceof ReaderGone)) console.error(error);
  process.exit(COULD_NOT_RUN);
}

/** The reader of the output has closed it, e.g. `| head`. */
class ReaderGone extends Error {}

/** The wait for a reader that is slow, in milliseconds. */
const FULL_PIPE_MS = 5;

/**
 * Writes text to stdout as it is. Returns when it is written: `console.log()` would ignore a full disk.
 *
 * @throws {ExpectedError} if the output cannot be written
 */
export function write(text: string): void {
  const bytes = Buffer.from(text);
  for (let at = 0; at < bytes.length; ) {
    try {
      at += writeSync(process.stdout.fd, bytes, at);
    } catch (error) {
      const { code, message } = error as NodeJS.ErrnoException;
      // Another process may have made the pipe non-blocking.
      if (code === "EAGAIN") Bun.sleepSync(FULL_PIPE_MS);
      else if (code === "EPIPE") throw new ReaderGone();
      else throw new ExpectedError(`the output cannot be written: ${message}`);
    }
  }
}

/** Writes a line to stdout, as `write()`. */
export function print(line: string): void {
  write(`${line}\n`);
}
