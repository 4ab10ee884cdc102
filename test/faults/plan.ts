import type { Kind } from "./kind.ts";
import { KINDS } from "./kinds.ts";
import type { Random } from "./random.ts";
import { NODES } from "./world.ts";

/** A fault that is planned. */
export interface Planned {
  kind: string;
  /** Milliseconds after the beginning. */
  atMs: number;
  lastsMs: number;
  /** The place of the struck node among all of them; 0 if it strikes none. */
  node: number;
  /** Of the random numbers that the fault itself uses. */
  seed: number;
}

/** What a plan of faults depends on, besides its random numbers. */
export interface PlanOptions {
  seconds: number;
  kinds: readonly string[];
  leaseMs: number;
}

/** The mean time between two faults, in milliseconds. */
const EVERY_MS = 1_300;

/**
 * Plans faults at random moments, several at once. The same seed makes the same plan. The kinds are drawn from a bag that
 * holds each as often as it weighs, so that every kind comes before any comes too often.
 */
export function planFaults(random: Random, { seconds, kinds, leaseMs }: PlanOptions): Planned[] {
  const endMs = seconds * 1_000;
  const planned: Planned[] = [];
  /** Until when each thing is taken. */
  const taken = new Map<string, number>();
  let bag: string[] = [];
  for (let atMs = EVERY_MS; atMs < endMs - 500; atMs += random.between([0.3, 1.7]) * EVERY_MS) {
    if (bag.length === 0) {
      bag = random.shuffle(kinds.flatMap((name) => Array<string>(kindOf(name).weight ?? 2).fill(name)));
    }
    const name = bag.pop() ?? "";
    const kind = kindOf(name);
    const lastsMs = Math.min(random.between(lastsOf(kind, leaseMs)), endMs - atMs);
    const seed = random.below(2 ** 31);
    const keyOf = (node: number) => (kind.entries ? `${node} ${kind.takes}` : kind.takes);
    const free = nodesOf(kind).filter((node) => (taken.get(keyOf(node)) ?? 0) <= atMs);
    if (free.length === 0) continue;
    const node = random.pick(free);
    taken.set(keyOf(node), atMs + lastsMs + restMsOf(kind));
    planned.push({ kind: name, atMs, lastsMs, node, seed });
  }
  return planned;
}

/** Plans faults one after the other, each kind in its turn, with time to recover from each before the next one. */
export function planApart(random: Random, { seconds, kinds, leaseMs }: PlanOptions): Planned[] {
  const planned: Planned[] = [];
  const order = random.shuffle(kinds);
  for (let atMs = 2_000, turn = 0; turn < order.length || atMs < seconds * 1_000; turn++) {
    const name = order[turn % order.length] ?? "";
    const kind = kindOf(name);
    const lastsMs = random.between(lastsOf(kind, leaseMs));
    planned.push({
      kind: name,
      atMs,
      lastsMs,
      node: random.pick(nodesOf(kind)),
      seed: random.below(2 ** 31),
    });
    atMs += lastsMs + restMsOf(kind) + leaseMs + 3_000;
  }
  return planned;
}

/** The kind of that name. */
export function kindOf(name: string): Kind {
  const kind = KINDS[name];
  if (!kind) throw new Error(`Unknown kind of fault: ${name}`);
  return kind;
}

function nodesOf({ entries }: Kind): number[] {
  if (!entries) return [0];
  return NODES.flatMap((entry, place) => (entries.includes(entry) ? [place] : []));
}

function lastsOf({ lasts }: Kind, leaseMs: number): readonly [number, number] {
  return lasts === "lease" ? [leaseMs + 500, leaseMs + 2_500] : lasts;
}

/** How long a server or a process takes to start, in milliseconds. */
function restMsOf({ takes }: Kind): number {
  return { MySQL: 6_000, RabbitMQ: 15_000, process: 3_000 }[takes as string] ?? 100;
}
