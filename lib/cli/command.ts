import { Command, InvalidArgumentError } from "commander";
import { DomainError, ExpectedError, explain } from "../errors.ts";
import type { Field } from "../field.ts";

/** The exit code for wrong options or arguments. */
const WRONG_WORDS = 2;

/** The command line of `bun run NAME`. `--help` exits with 0, wrong options or arguments with 2. */
export function newCommand(name: string, description: string): Command {
  return new Command(`bun run ${name}`)
    .description(description)
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

export interface RunOptions<Options> {
  /** The action of the command, for the message `Cannot …: reason`. */
  what: string;
  /** The exit code if it fails; 1 by default. */
  failed?: number;
  /** Runs the command, and resolves to the exit code. */
  run: (options: Options) => Promise<number>;
}

/** Parses the options of a command, runs it, and exits with its exit code. */
export async function runCommand<Options>(
  command: Command,
  { what, failed = 1, run }: RunOptions<Options>,
): Promise<never> {
  const options = command.parse().opts() as Options;
  try {
    process.exit(await run(options));
  } catch (error) {
    if (error instanceof DomainError) {
      if (error.code === "INVALID_INPUT") command.error(`error: ${explain(error)}`);
      console.error(explain(error));
    } else if (error instanceof ExpectedError) {
      console.error(`Cannot ${what}: ${error.message}`);
    } else if ((error as { code?: unknown }).code !== "EPIPE") {
      // EPIPE: the reader of the output has closed it, e.g. `| head`.
      console.error(error);
    }
    process.exit(failed);
  }
}
