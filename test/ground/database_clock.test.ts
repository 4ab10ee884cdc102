import { describe, expect, test } from "bun:test";
import { describeJump, type Jump, openDatabaseClock } from "../../lib/database_clock.ts";

const DAY_MS = 86_400_000;
/** A time of MySQL's clock when `performance.now()` was 0. */
const BASE = Date.parse("2029-02-22T12:00:00.000Z");

/** A clock, and the jumps that it has told of. */
function openClock() {
  const jumps: Jump[] = [];
  const clock = openDatabaseClock((jump) => jumps.push(jump));
  return {
    jumps,
    clock,
    /** MySQL's clock is off by that much in an answer that took from … to. */
    read(offMs: number, [sentAtMs, receivedAtMs]: [number, number]) {
      clock.read({ nowMs: BASE + (sentAtMs + receivedAtMs) / 2 + offMs, sentAtMs, receivedAtMs });
    },
  };
}

describe("openDatabaseClock() tells once of a clock that", () => {
  test.each([DAY_MS, -DAY_MS, 1_003, -1_003])("jumps by %d ms", (byMs) => {
    const { read, jumps } = openClock();
    read(0, [1_000, 1_002]);
    read(0, [2_000, 2_002]);
    expect(jumps).toEqual([]);
    read(byMs, [3_000, 3_002]);
    read(byMs, [4_000, 4_002]);
    expect(jumps).toEqual([{ byMs, wouldShowMs: BASE + 3_001 }]);
  });

  test("goes ahead and comes back", () => {
    const { read, jumps } = openClock();
    read(0, [0, 1]);
    read(DAY_MS, [10_000, 10_001]);
    read(0, [20_000, 20_001]);
    expect(jumps.map(({ byMs }) => byMs)).toEqual([DAY_MS, -DAY_MS]);
  });
});

describe("openDatabaseClock() takes for no jump", () => {
  test("a step or a drift of less than a second", () => {
    const { read, jumps } = openClock();
    for (let n = 0; n < 20; n++) read(n * 900, [n * 10_000, n * 10_000 + 2]);
    expect(jumps).toEqual([]);
  });

  test("an answer that was slow on the way there or back", () => {
    const { clock, jumps } = openClock();
    for (const [sentAtMs, receivedAtMs, atMs] of [
      [0, 1, 0],
      [1_000, 1_900, 1_900],
      [2_000, 2_900, 2_000],
      [3_000, 60_000, 60_000],
      [61_000, 90_000, 61_000],
      [90_000, 90_001, 90_000],
    ] as const) {
      clock.read({ nowMs: BASE + atMs, sentAtMs, receivedAtMs });
    }
    expect(jumps).toEqual([]);
  });
});

test("openDatabaseClock() notices after a slow answer what has jumped before it", () => {
  const { read, jumps } = openClock();
  read(0, [0, 1]);
  read(-DAY_MS, [1_000, 9_000]);
  expect(jumps).toEqual([]);
  read(-DAY_MS, [10_000, 10_001]);
  expect(jumps).toHaveLength(1);
});

test("openDatabaseClock() tells how long until MySQL's clock shows a time, also after a jump", () => {
  const { clock } = openClock();
  expect(clock.msUntil(new Date())).toBe(0);
  for (const nowMs of [BASE, BASE - DAY_MS]) {
    const atMs = performance.now();
    clock.read({ nowMs, sentAtMs: atMs, receivedAtMs: atMs });
    const leftMs = clock.msUntil(new Date(nowMs + 60_000));
    expect(leftMs).toBeWithin(60_000 - (performance.now() - atMs) - 1, 60_001);
  }
});

test("describeJump() says how far, and in which direction", () => {
  expect(describeJump(-DAY_MS)).toBe("MySQL's clock went back by 86,400,000 ms");
  expect(describeJump(1_500)).toBe("MySQL's clock went ahead by 1,500 ms");
});
