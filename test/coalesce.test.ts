import { describe, expect, test } from "bun:test";
import { type CoalesceOptions, coalesce, OverloadError } from "../lib/coalesce.ts";

interface Call {
  items: number[];
  succeed(): void;
  fail(error: Error): void;
}

/** A coalescer of numbers whose calls stay open until told: each result is its item times ten. */
function openCoalescer(options: Partial<CoalesceOptions<number>> = {}) {
  const calls: Call[] = [];
  const add = coalesce<number, number>(
    (items) => {
      const { promise, resolve, reject } = Promise.withResolvers<number[]>();
      calls.push({ items, succeed: () => resolve(items.map((item) => item * 10)), fail: reject });
      return promise;
    },
    { maxBatch: 100, maxWaiting: 1_000, ...options },
  );
  return { add, calls };
}

/** Lets all that is ready run. */
async function turn() {
  await new Promise((resolve) => setImmediate(resolve));
}

function itemsOf(calls: readonly Call[]) {
  return calls.map(({ items }) => items);
}

describe("coalesce()", () => {
  test("hands over at once what comes alone", async () => {
    const { add, calls } = openCoalescer();
    const result = add(7);
    await turn();
    expect(itemsOf(calls)).toEqual([[7]]);
    calls[0]?.succeed();
    expect(await result).toBe(70);
  });

  test("gathers what comes in one turn of the event loop", async () => {
    const { add, calls } = openCoalescer();
    const results = Promise.all([add(1), add(2), add(3)]);
    await turn();
    expect(itemsOf(calls)).toEqual([[1, 2, 3]]);
    calls[0]?.succeed();
    expect(await results).toEqual([10, 20, 30]);
  });

  test("makes one call at a time and gathers the next one meanwhile, in order", async () => {
    const { add, calls } = openCoalescer();
    const first = add(1);
    await turn();
    const others = Promise.all([add(2), add(3)]);
    await turn();
    const last = add(4);
    await turn();
    expect(itemsOf(calls)).toEqual([[1]]);
    calls[0]?.succeed();
    expect(await first).toBe(10);
    await turn();
    expect(itemsOf(calls)).toEqual([[1], [2, 3, 4]]);
    calls[1]?.succeed();
    expect(await others).toEqual([20, 30]);
    expect(await last).toBe(40);
  });

  test("starts again after it was quiet", async () => {
    const { add, calls } = openCoalescer();
    for (const item of [1, 2]) {
      const result = add(item);
      await turn();
      calls.at(-1)?.succeed();
      expect(await result).toBe(item * 10);
      await turn();
    }
    expect(itemsOf(calls)).toEqual([[1], [2]]);
  });

  test("hands over no more than maxBatch items", async () => {
    const { add, calls } = openCoalescer({ maxBatch: 2 });
    const results = Promise.all([1, 2, 3, 4, 5].map(add));
    for (let index = 0; index < 3; index++) {
      await turn();
      calls[index]?.succeed();
    }
    expect(await results).toEqual([10, 20, 30, 40, 50]);
    expect(itemsOf(calls)).toEqual([[1, 2], [3, 4], [5]]);
  });

  test("hands over no more than maxBatch of weight, one item alone excepted, and skips none", async () => {
    const { add, calls } = openCoalescer({ maxBatch: 5, weight: (item) => item });
    const results = Promise.all([2, 3, 1, 9, 4, 1].map(add));
    for (let index = 0; index < 4; index++) {
      await turn();
      calls[index]?.succeed();
    }
    expect(await results).toEqual([20, 30, 10, 90, 40, 10]);
    expect(itemsOf(calls)).toEqual([[2, 3], [1], [9], [4, 1]]);
  });

  test("has maxCalls calls under way and no more; what waits goes with the first that is free", async () => {
    const { add, calls } = openCoalescer({ maxCalls: 2 });
    const first = add(1);
    await turn();
    const second = add(2);
    await turn();
    const others = Promise.all([3, 4].map(add));
    await turn();
    expect(itemsOf(calls)).toEqual([[1], [2]]);
    calls[1]?.succeed();
    expect(await second).toBe(20);
    await turn();
    expect(itemsOf(calls)).toEqual([[1], [2], [3, 4]]);
    calls[0]?.succeed();
    calls[2]?.succeed();
    expect(await Promise.all([first, others])).toEqual([10, [30, 40]]);
    await turn();
    expect(calls).toHaveLength(3);
  });

  test("rejects only the items of the call that failed", async () => {
    const { add, calls } = openCoalescer({ maxBatch: 2 });
    const results = Promise.allSettled([1, 2, 3, 4].map(add));
    const broken = new Error("broken");
    await turn();
    calls[0]?.fail(broken);
    await turn();
    calls[1]?.succeed();
    expect(await results).toEqual([
      { status: "rejected", reason: broken },
      { status: "rejected", reason: broken },
      { status: "fulfilled", value: 30 },
      { status: "fulfilled", value: 40 },
    ]);
  });

  test("rejects the items of a call that throws before its first await, and goes on", async () => {
    let isBroken = true;
    const add = coalesce<number, number>(
      (items) => {
        if (isBroken) throw new Error("broken");
        return Promise.resolve(items);
      },
      { maxBatch: 10, maxWaiting: 10 },
    );
    await expect(add(1)).rejects.toThrow("broken");
    isBroken = false;
    expect(await add(2)).toBe(2);
  });

  test.each([[[]], [[1]], [[1, 2, 3]]])("never shares out %j to two items", async (results) => {
    const add = coalesce<number, number>(async () => results, { maxBatch: 10, maxWaiting: 10 });
    const settled = await Promise.allSettled([add(1), add(2)]);
    expect(settled.map(({ status }) => status)).toEqual(["rejected", "rejected"]);
  });

  test("refuses, and does not hand over, what waited longer than maxWaitMs", async () => {
    const { add, calls } = openCoalescer({ maxWaitMs: 50 });
    const first = add(1);
    await turn();
    const late = add(2).catch((error) => error);
    await Bun.sleep(60);
    const inTime = add(3);
    calls[0]?.succeed();
    expect(await first).toBe(10);
    expect(await late).toBeInstanceOf(OverloadError);
    await turn();
    calls[1]?.succeed();
    expect(await inTime).toBe(30);
    expect(itemsOf(calls)).toEqual([[1], [3]]);
  });

  test("refuses what is more than maxWaiting, and takes more once a call has taken some along", async () => {
    const { add, calls } = openCoalescer({ maxBatch: 2, maxWaiting: 3 });
    const first = add(1);
    await turn();
    const waiting = [add(2), add(3), add(4)];
    const refused = await add(5).catch((error) => error);
    expect(refused).toBeInstanceOf(OverloadError);
    expect(refused.message).toBe("Cannot wait as 3 already do: at most 3");
    calls[0]?.succeed();
    await first;
    await turn();
    const late = add(6);
    for (const index of [1, 2]) {
      calls[index]?.succeed();
      await turn();
    }
    expect(await Promise.all([...waiting, late])).toEqual([20, 30, 40, 60]);
    expect(itemsOf(calls)).toEqual([[1], [2, 3], [4, 6]]);
  });

  test("counts maxWaiting in weight, and takes one that is too heavy where nothing else waits", async () => {
    const { add, calls } = openCoalescer({ maxBatch: 5, maxWaiting: 5, weight: (item) => item });
    const heavy = add(9);
    expect(await add(1).catch((error) => error)).toBeInstanceOf(OverloadError);
    await turn();
    const light = add(5);
    expect(await add(1).catch((error) => error)).toBeInstanceOf(OverloadError);
    calls[0]?.succeed();
    expect(await heavy).toBe(90);
    await turn();
    calls[1]?.succeed();
    expect(await light).toBe(50);
    expect(itemsOf(calls)).toEqual([[9], [5]]);
  });
});
