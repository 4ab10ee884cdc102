const WIDTH = 50;

/** One bar of a chart. */
export interface Bar {
  label: string;
  value: bigint;
  /** Text after the value. */
  note?: string;
}

/** Draws one bar per line. The largest value has the longest bar; values that are not positive have none. */
export function drawBars(bars: readonly Bar[]): string {
  let largest = 1n;
  for (const { value } of bars) if (value > largest) largest = value;
  const labelWidth = Math.max(0, ...bars.map(({ label }) => label.length));
  return bars
    .map(({ label, value, note = "" }) => {
      const eighths = value > 0n ? Number((value * 8n * BigInt(WIDTH)) / largest) : 0;
      const bar = "█".repeat(Math.floor(eighths / 8)) + (" ▏▎▍▌▋▊▉"[eighths % 8] ?? "").trim();
      return `${label.padEnd(labelWidth)} ${bar}${bar && " "}${value}${note}`;
    })
    .join("\n");
}
