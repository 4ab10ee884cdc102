/** A progress bar, on a terminal only. */
export interface Progress extends Disposable {
  add(count: number): void;
  /** Removes the bar before a line of output; the next `add()` shows it again. */
  clear(): void;
}

/**
 * Opens a progress bar.
 *
 * @param what the noun after the numbers, e.g. `entries`
 * @param total the estimated total
 */
export async function openProgress(what: string, total: number): Promise<Progress> {
  if (!process.stderr.isTTY) return { add() {}, clear() {}, [Symbol.dispose]() {} };
  const { Presets, SingleBar } = await import("cli-progress");
  let done = 0;
  let most = total;
  const bar = new SingleBar(
    {
      format: `{bar} {percentage}% | {value}/{total} ${what} | {duration_formatted}`,
      stream: process.stderr,
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
