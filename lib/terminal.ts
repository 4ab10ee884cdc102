import { Presets, SingleBar } from "cli-progress";

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
export function openProgress(what: string, total: number): Progress {
  if (!process.stderr.isTTY) return { add() {}, clear() {}, [Symbol.dispose]() {} };
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
export function drawBars(bars: readonly { label: string; value: bigint }[]): string {
  const largest = bars.map(({ value }) => value).toSorted((a, b) => (a < b ? 1 : -1))[0] ?? 1n;
  const width = Math.max(0, ...bars.map(({ label }) => label.length));
  return bars
    .map(({ label, value }) => {
      const eighths = value > 0n ? Number((value * 8n * BigInt(BAR_WIDTH)) / largest) : 0;
      const bar = "█".repeat(Math.floor(eighths / 8)) + (" ▏▎▍▌▋▊▉"[eighths % 8] ?? "").trim();
      return `${label.padEnd(width)} ${bar}${bar && " "}${value}`;
    })
    .join("\n");
}
