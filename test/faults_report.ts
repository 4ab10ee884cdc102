import { createReadStream } from "node:fs";
import { createInterface } from "node:readline";
import type { Tables, Violation } from "./faults_check.ts";

/** A fault that struck; times in milliseconds since 1970. */
export interface Struck {
  name: string;
  where: string;
  startMs: number;
  endMs: number;
}

export interface Recovery {
  /** The longest of the times that reservations have waited for their grant while nothing was broken. */
  slowestMs: number;
  slowestId: string | undefined;
  /** Each fault, and how long after its end the last one came of what was granted before the next fault. */
  byFault: (Struck & { recoveredMs?: number; id?: string })[];
}

export function recoveryOf(
  { rows, entries }: Pick<Tables, "rows" | "entries">,
  struck: readonly Struck[],
): Recovery {
  const grantedAt = new Map(entries.map(({ key, createdAt }) => [key, createdAt.getTime()]));
  const broken = mergeTimes(struck);
  let slowestMs = 0;
  let slowestId: string | undefined;
  const byFault: Recovery["byFault"] = struck.map((fault) => ({ ...fault }));
  for (const { id, key, executeAt, createdAt } of rows) {
    // A client that could not reach an api for minutes reserves what was due minutes ago.
    const dueMs = Math.max(executeAt.getTime(), createdAt.getTime());
    const doneMs = grantedAt.get(key);
    if (doneMs === undefined) continue;
    const waitedMs = doneMs - dueMs - brokenWithin(broken, dueMs, doneMs);
    if (waitedMs > slowestMs) [slowestMs, slowestId] = [waitedMs, id];
    const last = byFault.findLast(({ startMs }) => startMs <= doneMs);
    const recoveredMs = last && doneMs - Math.max(dueMs, last.endMs);
    if (last && recoveredMs !== undefined && recoveredMs > (last.recoveredMs ?? 0))
      Object.assign(last, { recoveredMs, id });
  }
  return { slowestMs, slowestId, byFault };
}

type Times = { startMs: number; endMs: number };

/** The times in which something was broken, without overlaps, in their order. */
function mergeTimes(struck: readonly Times[]): Times[] {
  const merged: Times[] = [];
  for (const { startMs, endMs } of struck.toSorted((a, b) => a.startMs - b.startMs)) {
    const last = merged.at(-1);
    if (last && startMs <= last.endMs) last.endMs = Math.max(last.endMs, endMs);
    else merged.push({ startMs, endMs });
  }
  return merged;
}

function brokenWithin(broken: readonly Times[], fromMs: number, toMs: number): number {
  let sumMs = 0;
  for (const { startMs, endMs } of broken) {
    if (startMs > toMs) break;
    sumMs += Math.max(0, Math.min(endMs, toMs) - Math.max(startMs, fromMs));
  }
  return sumMs;
}

const MAX_LINES = 60;
const MAX_CHARACTERS = 500;
/** An error is logged with its stack. */
const MAX_LOGGED = 2_000;

/** All that is known of the first thing that is wrong: calls and answers, states, ledger, and the faults of that time. */
export async function tellStory(
  violations: readonly Violation[],
  options: {
    tables: Tables;
    struck: readonly Struck[];
    historyFile: string;
    logs: readonly Record<string, unknown>[];
  },
): Promise<string> {
  const { tables, struck, historyFile, logs } = options;
  const first = violations.find(({ names }) => names.length > 0);
  if (!first) return violations.map(({ what }) => what).join("\n");
  const names = new Set(first.names.filter(Boolean));
  const history: { labels: string[]; line: string }[] = [];
  for await (const line of createInterface({ input: createReadStream(historyFile) })) {
    history.push({ labels: (JSON.parse(line) as { label: string }).label.split(" "), line });
  }
  // An answer that names the id or the key tells the label, under which the other calls are.
  for (const { labels, line } of history) {
    if (labels.length === 1 && [...names].some((name) => name.length > 20 && line.includes(name))) {
      for (const label of labels) names.add(label);
    }
  }
  const calls = history
    .filter(({ labels }) => labels.some((label) => names.has(label)))
    .map(({ line }) => line.slice(0, MAX_CHARACTERS));
  const rows = tables.rows.filter(({ id, key, userId }) => [id, key, userId].some((name) => names.has(name)));
  const ids = new Set(rows.map(({ id }) => id).concat(...names));
  const keys = new Set(rows.map(({ key }) => key).concat(...names));
  const entries = tables.entries.filter(({ key, id }) => keys.has(key) || names.has(id));
  const times = [
    ...calls.map((line) => Date.parse(/"at":"([^"]+)"/.exec(line)?.[1] ?? "")),
    ...rows.map(({ executeAt }) => executeAt.getTime()),
    ...entries.map(({ createdAt }) => createdAt.getTime()),
  ].filter((time) => time < Date.now());
  const [fromMs, toMs] = [Math.min(...times) - 5_000, Math.max(...times) + 5_000];
  const requests = calls.flatMap((line) => /"request_id":"([^"]+)"/.exec(line)?.[1] ?? []);
  const parts = {
    "Calls and answers": calls,
    Reservations: rows.map((row) => JSON.stringify(row)),
    States: tables.witness.filter(({ id }) => ids.has(id)).map((row) => JSON.stringify(row)),
    Ledger: entries.map((entry) => JSON.stringify(entry)),
    Logs: logs
      .map((line) => JSON.stringify(line))
      .filter((line) => [...ids, ...requests].some((name) => name.length > 20 && line.includes(name)))
      .map((line) => line.slice(0, MAX_LOGGED)),
    "Faults of that time": struck
      .filter(({ startMs, endMs }) => endMs >= fromMs && startMs <= toMs)
      .map(
        ({ name, where, startMs, endMs }) =>
          `${new Date(startMs).toISOString()} ${name} ${where}, ${endMs - startMs} ms`,
      ),
  };
  return [
    `The first of ${violations.length}: ${first.what} (${first.names.join(", ")})`,
    ...Object.entries(parts).flatMap(([title, lines]) => [
      `\n${title}:`,
      ...lines.slice(0, MAX_LINES).map((line) => `  ${line}`),
      ...(lines.length > MAX_LINES ? [`  … and ${lines.length - MAX_LINES} more`] : []),
    ]),
  ].join("\n");
}
