/** A source of random numbers that gives the same ones for the same seed. */
export interface Random {
  /** From 0 (inclusive) to 1 (exclusive). */
  (): number;
  /** A whole number from 0 (inclusive) to `limit` (exclusive). */
  below(limit: number): number;
  between(range: readonly [from: number, to: number]): number;
  pick<T>(items: readonly T[]): T;
  shuffle<T>(items: readonly T[]): T[];
}

/** mulberry32, by Tommy Ettinger: https://gist.github.com/tommyettinger/46a874533244883189143505d203312c */
export function randomOf(seed: number): Random {
  let state = seed | 0;
  const next = () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
  const below = (limit: number) => Math.floor(next() * limit);
  return Object.assign(next, {
    below,
    between: ([from, to]: readonly [number, number]) => from + next() * (to - from),
    pick<T>(items: readonly T[]): T {
      if (items.length === 0) throw new Error("Cannot pick from an empty list");
      return items[below(items.length)] as T;
    },
    shuffle<T>(items: readonly T[]): T[] {
      const placed = items.map((item) => ({ item, place: next() }));
      return placed.sort((a, b) => a.place - b.place).map(({ item }) => item);
    },
  });
}
