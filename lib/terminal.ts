import { DomainError, explain, ForeseenError } from "./errors.ts";

export interface Command<Wanted> {
  /** What it does, for `Cannot …: reason`. */
  what: string;
  usage: string;
  /** Reads the words of the command line; what it throws is shown with the usage. */
  read: (words: string[]) => Wanted;
  /** Resolves to the exit code. */
  run: (wanted: Wanted) => Promise<number>;
  /** The exit code where it could not be done. */
  failed: number;
}

/** Runs a command and ends the process: with its exit code, with 2 where its words are wrong. */
export async function runCommand<Wanted>({
  what,
  usage,
  read,
  run,
  failed,
}: Command<Wanted>): Promise<never> {
  const words = Bun.argv.slice(2);
  if (words.includes("--help")) {
    console.log(usage);
    process.exit(0);
  }
  let wanted: Wanted;
  try {
    wanted = read(words);
  } catch (error) {
    console.error(`${error instanceof DomainError ? explain(error) : (error as Error).message}\n${usage}`);
    process.exit(2);
  }
  try {
    process.exit(await run(wanted));
  } catch (error) {
    // Whoever read what it prints has gone.
    if ((error as { code?: unknown }).code === "EPIPE") process.exit(failed);
    if (!(error instanceof ForeseenError)) throw error;
    console.error(error instanceof DomainError ? explain(error) : `Cannot ${what}: ${error.message}`);
    process.exit(failed);
  }
}

/** Shows how far a command has come; nothing where nobody looks at a terminal. */
export interface Progress extends Disposable {
  add(count: number): void;
  /** Makes room for a line that is printed now; the next `add()` shows it again. */
  clear(): void;
}

/**
 * @param what what is counted, e.g. `entries`
 * @param total how many there are, as far as anybody knows
 */
export async function openProgress(what: string, total: number): Promise<Progress> {
  if (!process.stderr.isTTY) return { add() {}, clear() {}, [Symbol.dispose]() {} };
  // Only here: it would add 30 ms to the start of the scheduler, which shows nothing.
  const { Presets, SingleBar } = await import("cli-progress");
  let done = 0;
  let most = total;
  const bar = new SingleBar(
    {
      format: `{bar} {percentage}% | {value}/{total} ${what} | {duration_formatted}`,
      stream: process.stderr,
      // What is printed meanwhile must not stand in the middle of it.
      clearOnComplete: true,
      hideCursor: null,
    },
    Presets.shades_classic,
  );
  bar.start(Math.max(1, total), 0);
  return {
    add(count) {
      done += count;
      if (done > most) {
        most = done;
        bar.setTotal(most);
      }
      bar.update(done);
    },
    clear: () => process.stderr.write("\r\x1b[K"),
    [Symbol.dispose]: () => bar.stop(),
  };
}

const BAR_WIDTH = 50;

/** A bar for each value, the longest for the largest; negative ones have none. */
export function drawBars(bars: readonly { label: string; value: bigint; note?: string }[]): string {
  const largest = bars.map(({ value }) => value).toSorted((a, b) => (a < b ? 1 : -1))[0] ?? 1n;
  const width = Math.max(0, ...bars.map(({ label }) => label.length));
  return bars
    .map(({ label, value, note = "" }) => {
      const eighths = value > 0n ? Number((value * 8n * BigInt(BAR_WIDTH)) / largest) : 0;
      const bar = "█".repeat(Math.floor(eighths / 8)) + (" ▏▎▍▌▋▊▉"[eighths % 8] ?? "").trim();
      return `${label.padEnd(width)} ${bar}${bar && " "}${value}${note}`;
    })
    .join("\n");
}
