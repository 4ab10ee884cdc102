import { describe, expect, test } from "bun:test";
import { backoffMs, openAlarm, retry, runLoop, sleep, withDeadline } from "../lib/loop.ts";

/** Far longer than any test may take: only an abort ends such a sleep in time. */
const AGES_MS = 60_000;

function samples(attempt: number, limits: { baseMs: number; maxMs: number }) {
  return Array.from({ length: 2_000 }, () => backoffMs(attempt, limits));
}

describe("backoffMs()", () => {
  test.each([
    [1, 100, 200],
    [2, 200, 400],
    [3, 400, 800],
    [4, 500, 1_000],
    [5, 500, 1_000],
    [31, 500, 1_000],
    [2_000, 500, 1_000],
  ])("after attempt %d lies between %d and %d ms", (attempt, least, most) => {
    const waits = samples(attempt, { baseMs: 200, maxMs: 1_000 });
    expect(Math.min(...waits)).toBeGreaterThanOrEqual(least);
    expect(Math.max(...waits)).toBeLessThanOrEqual(most);
    expect(waits.every(Number.isInteger)).toBe(true);
  });

  test("spreads: those who failed together do not come back together", () => {
    const waits = samples(1, { baseMs: 1_000, maxMs: 1_000 });
    expect(Math.min(...waits)).toBeLessThan(600);
    expect(Math.max(...waits)).toBeGreaterThan(900);
    expect(new Set(waits).size).toBeGreaterThan(100);
  });
});

describe("sleep()", () => {
  test("waits as long as told", async () => {
    const startedAt = performance.now();
    await sleep(30);
    expect(performance.now() - startedAt).toBeGreaterThanOrEqual(29);
  });

  test("ends when the signal is aborted, without an error", async () => {
    const stop = new AbortController();
    const slept = sleep(AGES_MS, stop.signal);
    stop.abort();
    expect(await slept).toBeUndefined();
  });

  test("does not begin where the signal was aborted before", async () => {
    expect(await sleep(AGES_MS, AbortSignal.abort())).toBeUndefined();
  });
});

describe("withDeadline()", () => {
  const late = () => new Error("late");

  test("gives the result that comes in time", async () => {
    expect(await withDeadline(Promise.resolve(42), AGES_MS, late)).toBe(42);
  });

  test("gives the error that comes in time", async () => {
    await expect(withDeadline(Promise.reject(new Error("own")), AGES_MS, late)).rejects.toThrow("own");
  });

  test("rejects with late() after the deadline", async () => {
    const { promise, resolve } = Promise.withResolvers<number>();
    await expect(withDeadline(promise, 10, late)).rejects.toThrow("late");
    resolve(1);
  });

  test("leaves no unhandled rejection where the error comes too late", async () => {
    const unhandled: unknown[] = [];
    const listener = (error: unknown) => unhandled.push(error);
    process.on("unhandledRejection", listener);
    const { promise, reject } = Promise.withResolvers<number>();
    await expect(withDeadline(promise, 10, late)).rejects.toThrow("late");
    reject(new Error("too late"));
    await Bun.sleep(10);
    process.off("unhandledRejection", listener);
    expect(unhandled).toEqual([]);
  });
});

describe("retry()", () => {
  const { signal } = new AbortController();

  test("gives the first success, and tells each failure with the wait before the next try", async () => {
    const failures: [string, number][] = [];
    let attempts = 0;
    const result = await retry(
      async () => {
        if (++attempts < 4) throw new Error(`failure ${attempts}`);
        return "done";
      },
      {
        signal,
        baseMs: 4,
        maxMs: 8,
        onFailure: (error, retryInMs) => failures.push([(error as Error).message, retryInMs]),
      },
    );
    expect(result).toBe("done");
    expect(failures.map(([message]) => message)).toEqual(["failure 1", "failure 2", "failure 3"]);
    const waits = failures.map(([, retryInMs]) => retryInMs);
    expect(waits[0]).toBeWithin(2, 5);
    expect(waits[1]).toBeWithin(4, 9);
    expect(waits[2]).toBeWithin(4, 9);
  });

  test("really waits between two tries", async () => {
    const startedAt = performance.now();
    let waitedMs = 0;
    let attempts = 0;
    await retry(
      async () => {
        if (++attempts === 1) throw new Error("once");
      },
      {
        signal,
        baseMs: 40,
        onFailure: (_, retryInMs) => {
          waitedMs = retryInMs;
        },
      },
    );
    expect(waitedMs).toBeGreaterThanOrEqual(20);
    expect(performance.now() - startedAt).toBeGreaterThanOrEqual(waitedMs - 1);
  });

  test("does not try where the signal was aborted before", async () => {
    let attempts = 0;
    const result = await retry(async () => ++attempts, { signal: AbortSignal.abort(), onFailure() {} });
    expect(result).toBeUndefined();
    expect(attempts).toBe(0);
  });

  test("gives up during a wait when the signal is aborted", async () => {
    const stop = new AbortController();
    let attempts = 0;
    const result = await retry(
      () => {
        attempts++;
        return Promise.reject(new Error("away"));
      },
      { signal: stop.signal, baseMs: AGES_MS, maxMs: AGES_MS, onFailure: () => stop.abort() },
    );
    expect(result).toBeUndefined();
    expect(attempts).toBe(1);
  });

  test("ends with what onFailure() throws: no retry can mend it", async () => {
    let attempts = 0;
    const work = retry(
      () => {
        attempts++;
        return Promise.reject(new Error("for good"));
      },
      {
        signal,
        onFailure: (error) => {
          throw error;
        },
      },
    );
    await expect(work).rejects.toThrow("for good");
    expect(attempts).toBe(1);
  });
});

describe("runLoop()", () => {
  test("runs the step again and again, and sleeps as long as it says", async () => {
    const stop = new AbortController();
    const startedAt: number[] = [];
    await runLoop(
      async () => {
        startedAt.push(performance.now());
        if (startedAt.length === 3) stop.abort();
        return startedAt.length === 1 ? 0 : 500;
      },
      { signal: stop.signal, onFailure() {} },
    );
    const [first = 0, second = 0, third = 0] = startedAt;
    expect(startedAt).toHaveLength(3);
    expect(second - first).toBeLessThan(500);
    expect(third - second).toBeGreaterThanOrEqual(499);
  });

  test("finishes the step under way, then begins no other", async () => {
    const stop = new AbortController();
    const { promise: gate, resolve: open } = Promise.withResolvers<void>();
    const seen: string[] = [];
    const loop = runLoop(
      async () => {
        seen.push("begin");
        await gate;
        seen.push("end");
        return 0;
      },
      { signal: stop.signal, onFailure() {} },
    );
    stop.abort();
    open();
    await loop;
    expect(seen).toEqual(["begin", "end"]);
  });

  test("ends its sleep when the signal is aborted", async () => {
    const stop = new AbortController();
    let steps = 0;
    const loop = runLoop(
      async () => {
        steps++;
        setTimeout(() => stop.abort(), 5);
        return AGES_MS;
      },
      { signal: stop.signal, onFailure() {} },
    );
    await loop;
    expect(steps).toBe(1);
  });

  test("goes on after a step that throws, and starts its backoff anew after one that does not", async () => {
    const stop = new AbortController();
    const waits: number[] = [];
    let steps = 0;
    await runLoop(
      async () => {
        steps++;
        if (steps === 6) stop.abort();
        if ([1, 2, 3, 5].includes(steps)) throw new Error("away");
        return 0;
      },
      {
        signal: stop.signal,
        baseMs: 8,
        maxMs: 1_000,
        onFailure: (_, retryInMs) => waits.push(retryInMs),
      },
    );
    expect(steps).toBe(6);
    expect(waits).toHaveLength(4);
    // After the third failure in a row at least half of 32 ms, after the first one again at most 8 ms.
    expect(waits[2]).toBeGreaterThanOrEqual(16);
    expect(waits[3]).toBeLessThanOrEqual(8);
  });
});

describe("openAlarm()", () => {
  const { signal } = new AbortController();

  async function timeOf(sleeping: Promise<void>): Promise<number> {
    const startedAt = performance.now();
    await sleeping;
    return performance.now() - startedAt;
  }

  test("sleeps as long as told where nobody wakes it", async () => {
    expect(await timeOf(openAlarm().sleep(40, signal))).toBeGreaterThanOrEqual(39);
  });

  test("wakes who sleeps at the time that is told, the soonest of several", async () => {
    const alarm = openAlarm();
    const sleeping = timeOf(alarm.sleep(AGES_MS, signal));
    alarm.wakeIn(AGES_MS / 2);
    alarm.wakeIn(40);
    alarm.wakeIn(AGES_MS / 3);
    expect(await sleeping).toBeGreaterThanOrEqual(39);
  });

  test("wakes also who only comes to sleep then, but not who slept less", async () => {
    const alarm = openAlarm();
    alarm.wakeIn(20);
    expect(await timeOf(alarm.sleep(AGES_MS, signal))).toBeGreaterThanOrEqual(19);
    await timeOf(alarm.sleep(AGES_MS, signal));
    alarm.clear();
    alarm.wakeIn(AGES_MS);
    await alarm.sleep(5, signal);
  });

  test("forgets what was said before clear()", async () => {
    const alarm = openAlarm();
    alarm.wakeIn(0);
    alarm.clear();
    expect(await timeOf(alarm.sleep(40, signal))).toBeGreaterThanOrEqual(39);
  });

  test("ends its sleep when the signal is aborted, also one that was before", async () => {
    const stop = new AbortController();
    const sleeping = openAlarm().sleep(AGES_MS, stop.signal);
    stop.abort();
    await sleeping;
    await openAlarm().sleep(AGES_MS, stop.signal);
  });
});
