import { readFile } from "node:fs/promises";
import type { Tables, Violation } from "./check.ts";
import type { Change, Client } from "./client.ts";
import { rightMsOf } from "./clock_jumps.ts";
import type { Effect } from "./kind.ts";

interface Period {
  /** Milliseconds since 1970. */
  startMs: number;
  endMs: number;
}

/** A fault that struck. */
export interface Struck extends Period, Effect {
  name: string;
  /** The process that it struck; empty if none. */
  node: string;
}

export interface Recovery {
  /** The longest time that a reservation waited for its grant while nothing was broken. */
  slowestMs: number;
  slowestId?: string;
  /**
   * For each fault: how long after its end the last reservation came that was granted before the next fault; and how long after
   * it was due, or asked for, what came of those whom the fault should not have concerned.
   */
  byFault: (Struck & { recoveredMs: number; id?: string })[];
}

/** Measures how soon reservations were granted once nothing was broken, or by a fault that did not concern them. */
export function recoveryOf(
  { rows, entries }: Pick<Tables, "rows" | "entries">,
  { struck, changes }: { struck: readonly Struck[]; changes: readonly Change[] },
): Recovery {
  const rightMs = (time: Date | null) => (time ? rightMsOf(time.getTime(), struck) : 0);
  const grantedAt = new Map(entries.map(({ reservationId, createdAt }) => [reservationId, createdAt]));
  const broken = mergePeriods(struck);
  const recovery: Recovery = {
    slowestMs: 0,
    byFault: struck.map((fault) => ({ ...fault, recoveredMs: 0 })),
  };

  const lastBefore = (ms: number) => recovery.byFault.findLast(({ startMs }) => startMs <= ms);
  const isSpared = ({ held }: Struck, names: string[]) => held && !names.some((name) => held.includes(name));
  function note(fault: Recovery["byFault"][number], id: string, recoveredMs: number) {
    if (recoveredMs > fault.recoveredMs) Object.assign(fault, { recoveredMs, id });
  }

  for (const { id, userId, executeAt, createdAt, changedAt } of rows) {
    // A client that could not reach an API for minutes reserves what was due minutes ago.
    const dueMs = Math.max(executeAt.getTime(), rightMs(createdAt), rightMs(changedAt));
    const granted = grantedAt.get(id);
    if (granted === undefined) continue;
    const doneMs = rightMs(granted);
    const waitedMs = doneMs - dueMs - brokenMsWithin(broken, { startMs: dueMs, endMs: doneMs });
    if (waitedMs > recovery.slowestMs) Object.assign(recovery, { slowestMs: waitedMs, slowestId: id });
    const last = lastBefore(doneMs);
    if (last)
      note(last, id, doneMs - Math.max(dueMs, isSpared(last, [id, userId]) ? last.startMs : last.endMs));
  }
  for (const { label, userId, calledMs, answeredMs = 0 } of changes) {
    // How soon a client tries again after a fault that does concern it is its own affair.
    const last = lastBefore(calledMs);
    if (last && isSpared(last, [userId])) note(last, label, answeredMs - calledMs);
  }
  return recovery;
}

/** The periods in which something was broken, in order and without overlaps. */
function mergePeriods(periods: readonly Period[]): Period[] {
  const merged: Period[] = [];
  for (const { startMs, endMs } of periods.toSorted((a, b) => a.startMs - b.startMs)) {
    const last = merged.at(-1);
    if (last && startMs <= last.endMs) last.endMs = Math.max(last.endMs, endMs);
    else merged.push({ startMs, endMs });
  }
  return merged;
}

function brokenMsWithin(broken: readonly Period[], { startMs, endMs }: Period): number {
  const overlaps = broken.map((one) => Math.min(one.endMs, endMs) - Math.max(one.startMs, startMs));
  return overlaps.reduce((sum, ms) => sum + Math.max(0, ms), 0);
}

/** What a report is made from. */
export interface Evidence {
  tables: Tables;
  struck: readonly Struck[];
  historyFile: string;
  logs: readonly Record<string, unknown>[];
}

/** How often each kind of fault struck; and the slowest recovery from it, if the faults came one at a time. */
export function countKinds({ byFault }: Recovery, isApart: boolean) {
  const faults = Map.groupBy(byFault, ({ name }) => name);
  return Array.from(faults, ([fault, all]) => {
    const slowest = Math.max(...all.map(({ recoveredMs }) => recoveredMs));
    return { fault, times: all.length, ...(isApart && { slowest_recovery_ms: slowest }) };
  });
}

/** What happened, in figures. */
export function figuresOf({ tables, struck, logs }: Evidence, { counts }: Client) {
  const isDeadlock = ({ error }: { error?: unknown }) => /DEADLOCK/.test(JSON.stringify(error ?? ""));
  return {
    faults: struck.length,
    kinds: new Set(struck.map(({ name }) => name)).size,
    reservations: tables.rows.length,
    granted: tables.entries.filter(({ kind }) => kind === "grant").length,
    cancelled: tables.rows.filter(({ status }) => status === "CANCELLED").length,
    ledger_entries: tables.entries.length,
    calls: counts.calls,
    retries: counts.tries - counts.calls,
    deadlocks: logs.filter(isDeadlock).length,
  };
}

const MAX_LINES = 60;
/** An error is logged with its stack. */
const MAX_CHARACTERS = 2_000;
const TIME = /\d{4}-\d\d-\d\dT[\d:.]+Z/g;

/** Gathers all that is known of the first violation: calls and answers, states, ledger, logs and the faults of that time. */
export async function describeFirst(violations: readonly Violation[], evidence: Evidence): Promise<string> {
  const { tables, struck, historyFile, logs } = evidence;
  const first = violations.find(({ names }) => names.length > 0);
  if (!first) return violations.map(({ what }) => what).join("\n");
  const sources: Record<string, string[]> = {
    "Calls and answers": (await readFile(historyFile, "utf8")).split("\n"),
    Reservations: tables.rows.map((row) => JSON.stringify(row)),
    States: tables.witness.map((row) => JSON.stringify(row)),
    Ledger: tables.entries.map((entry) => JSON.stringify(entry)),
    Logs: logs.map((line) => JSON.stringify(line)),
  };
  const names = new Set(first.names);
  const find = (lines: string[] = []) => {
    const isNamed = new RegExp(`"[^"]*\\b(${[...names].join("|")})\\b`);
    return lines.filter((line) => isNamed.test(line));
  };
  // An answer that names the id has the label of the other calls, and a row has the key of its ledger entry.
  const related = /"(?:label|id|reservation_id|idempotencyKey|idempotency_key|request_id)":"([^"]+)"/g;
  const ofOne = find(sources["Calls and answers"]).filter((line) => !/"label":"[^" ]+ /.test(line));
  for (const line of [...ofOne, ...find(sources.Reservations)]) {
    for (const [, name = ""] of line.matchAll(related)) names.add(name);
  }
  const found = Object.entries(sources).map(([title, lines]) => ({ title, lines: find(lines) }));
  const times = found.flatMap(({ lines }) => lines.join().match(TIME) ?? []).map(Date.parse);
  const past = times.filter((time) => time < Date.now());
  const [fromMs, toMs] = [Math.min(...past) - 5_000, Math.max(...past) + 5_000];
  const faults = struck.filter(({ startMs, endMs }) => endMs >= fromMs && startMs <= toMs);
  found.push({
    title: "Faults of that time",
    lines: faults.map(({ name, node, startMs, endMs }) => {
      return `${new Date(startMs).toISOString()} ${name} ${node}, ${endMs - startMs} ms`;
    }),
  });
  const report = [`The first of ${violations.length}: ${first.what} (${first.names.join(", ")})`];
  for (const { title, lines } of found) {
    const shown = lines.slice(0, MAX_LINES).map((line) => `  ${line.slice(0, MAX_CHARACTERS)}`);
    report.push(`\n${title}:`, ...shown);
    if (lines.length > MAX_LINES) report.push(`  … and ${lines.length - MAX_LINES} more`);
  }
  return report.join("\n");
}
