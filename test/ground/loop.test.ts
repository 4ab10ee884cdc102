import { describe, expect, test } from "bun:test";
import { backoffMs, openAlarm, retry, runLoop, sleep, withDeadline } from "../../lib/loop.ts";

/** Longer than any test may take: only an abort, or the alarm, ends such a sleep. */
const AGES_MS = 600_000;
const { signal } = new AbortController();

/** How long something takes, in milliseconds; a timer may be early by a fraction of one. */
async function timeOf(work: Promise<unknown>): Promise<number> {
  const startedAt = performance.now();
  await work;
  return performance.now() - startedAt + 1;
}

test.each([
  [1, 100, 200],
  [2, 200, 400],
  [3, 400, 800],
  [4, 500, 1_000],
  [2_000, 500, 1_000],
])("backoffMs() after attempt %d is anywhere from %d to %d ms", (attempt, least, most) => {
  const waits = Array.from({ length: 2_000 }, () => backoffMs(attempt, { baseMs: 200, maxMs: 1_000 }));
  const [min, max] = [Math.min(...waits), Math.max(...waits)];
  expect([min >= least, max <= most, waits.every(Number.isInteger)]).toEqual([true, true, true]);
  // Those that failed together do not come back together.
  expect(max - min).toBeGreaterThan((most - least) * 0.8);
});

test("sleep() waits as long as told, and ends without an error if the signal is aborted before or meanwhile", async () => {
  expect(await timeOf(sleep(30))).toBeGreaterThanOrEqual(30);
  const stop = new AbortController();
  const slept = sleep(AGES_MS, stop.signal);
  stop.abort();
  await slept;
  await sleep(AGES_MS, AbortSignal.abort());
});

describe("withDeadline()", () => {
  const late = () => new Error("late");

  test("gives the result, or the error, that comes in time", async () => {
    expect(await withDeadline(Promise.resolve(42), AGES_MS, late)).toBe(42);
    await expect(withDeadline(Promise.reject(new Error("own")), AGES_MS, late)).rejects.toThrow("own");
  });

  test("rejects with late() after the deadline; an error that comes later is not unhandled", async () => {
    const unhandled: unknown[] = [];
    const listener = (error: unknown) => unhandled.push(error);
    process.on("unhandledRejection", listener);
    const { promise, reject } = Promise.withResolvers<number>();
    await expect(withDeadline(promise, 10, late)).rejects.toThrow("late");
    reject(new Error("too late"));
    await new Promise((resolve) => setImmediate(resolve));
    process.off("unhandledRejection", listener);
    expect(unhandled).toEqual([]);
  });
});

describe("retry()", () => {
  test("gives the first success, and tells of each failure with the wait that follows it", async () => {
    const failures: string[] = [];
    const waits: number[] = [];
    async function attempt() {
      if (failures.length < 3) throw new Error(`failure ${failures.length + 1}`);
      return "done";
    }
    const onFailure = (error: unknown, retryInMs: number) => {
      failures.push((error as Error).message);
      waits.push(retryInMs);
    };
    const tookMs = await timeOf(retry(attempt, { signal, baseMs: 20, maxMs: 40, onFailure }));
    expect(failures).toEqual(["failure 1", "failure 2", "failure 3"]);
    expect(waits.map((ms, index) => ms >= (index === 0 ? 10 : 20) && ms <= (index === 0 ? 20 : 40))).toEqual(
      Array(3).fill(true),
    );
    expect(tookMs + 2).toBeGreaterThanOrEqual(waits.reduce((sum, ms) => sum + ms));
    expect(await retry(attempt, { signal, onFailure })).toBe("done");
  });

  test("does not try if the signal was aborted before, and gives up during a wait", async () => {
    const stop = new AbortController();
    let attempts = 0;
    const attempt = () => Promise.reject(new Error(`away, ${++attempts}`));
    const options = { signal: stop.signal, baseMs: AGES_MS, maxMs: AGES_MS, onFailure: () => stop.abort() };
    expect(await retry(attempt, options)).toBeUndefined();
    expect(await retry(attempt, options)).toBeUndefined();
    expect(attempts).toBe(1);
  });

  test("ends with what onFailure() throws: no retry can mend it", async () => {
    let attempts = 0;
    const onFailure = (error: unknown) => {
      throw error;
    };
    const work = retry(() => Promise.reject(new Error(`for good, ${++attempts}`)), { signal, onFailure });
    await expect(work).rejects.toThrow("for good, 1");
    expect(attempts).toBe(1);
  });
});

describe("runLoop()", () => {
  test("runs the step again and again, and sleeps as long as it says", async () => {
    const stop = new AbortController();
    const [returns, sleeps]: [number[], number[]] = [[0, 500, 0], []];
    async function step() {
      if (returns.length === 0) stop.abort();
      return returns.shift() ?? AGES_MS;
    }
    const alarm = { sleep: async (ms: number) => void sleeps.push(ms) };
    await runLoop(step, { signal: stop.signal, alarm, onFailure() {} });
    expect(sleeps).toEqual([500, AGES_MS]);
  });

  test("finishes the step that runs, and begins no other", async () => {
    const stop = new AbortController();
    const gate = Promise.withResolvers<void>();
    const seen: string[] = [];
    async function step() {
      seen.push("begin");
      await gate.promise;
      seen.push("end");
      return 0;
    }
    const loop = runLoop(step, { signal: stop.signal, onFailure() {} });
    stop.abort();
    gate.resolve();
    await loop;
    expect(seen).toEqual(["begin", "end"]);
  });

  test("ends its sleep if the signal is aborted", async () => {
    const stop = new AbortController();
    let steps = 0;
    async function step() {
      steps++;
      setTimeout(() => stop.abort(), 5);
      return AGES_MS;
    }
    await runLoop(step, { signal: stop.signal, onFailure() {} });
    expect(steps).toBe(1);
  });

  test("goes on after a step that throws, and starts its backoff anew after one that does not", async () => {
    const stop = new AbortController();
    const outcomes = ["away", "away", "away", "there", "away", "there"];
    const waits: number[] = [];
    async function step() {
      const outcome = outcomes.shift();
      if (outcomes.length === 0) stop.abort();
      if (outcome === "away") throw new Error("away");
      return 0;
    }
    const onFailure = (_: unknown, retryInMs: number) => waits.push(retryInMs);
    await runLoop(step, { signal: stop.signal, baseMs: 8, maxMs: 1_000, onFailure });
    expect([outcomes.length, waits.length]).toEqual([0, 4]);
    // After the third failure in a row at least half of 32 ms, after the first one again at most 8 ms.
    expect(waits[2]).toBeGreaterThanOrEqual(16);
    expect(waits[3]).toBeLessThanOrEqual(8);
  });
});

describe("openAlarm()", () => {
  test("sleeps as long as told if nobody wakes it, also after clear()", async () => {
    const alarm = openAlarm();
    alarm.wakeIn(0);
    alarm.clear();
    expect(await timeOf(alarm.sleep(40, signal))).toBeGreaterThanOrEqual(40);
  });

  test("wakes at the soonest of the times that it is told", async () => {
    const alarm = openAlarm();
    const sleeping = timeOf(alarm.sleep(AGES_MS, signal));
    for (const ms of [AGES_MS / 2, 40, AGES_MS / 3]) alarm.wakeIn(ms);
    expect(await sleeping).toBeGreaterThanOrEqual(40);
  });

  test("wakes a sleep that begins later, and does not make one longer", async () => {
    const alarm = openAlarm();
    alarm.wakeIn(20);
    expect(await timeOf(alarm.sleep(AGES_MS, signal))).toBeGreaterThanOrEqual(20);
    await alarm.sleep(AGES_MS, signal);
    alarm.clear();
    alarm.wakeIn(AGES_MS);
    await alarm.sleep(5, signal);
  });

  test("ends its sleep if the signal is aborted, before or meanwhile", async () => {
    const stop = new AbortController();
    const sleeping = openAlarm().sleep(AGES_MS, stop.signal);
    stop.abort();
    await sleeping;
    await openAlarm().sleep(AGES_MS, stop.signal);
  });
});
