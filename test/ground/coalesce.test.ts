import { describe, expect, test } from "bun:test";
import { type CoalesceOptions, coalesce, limitConcurrency, OverloadError } from "../../lib/coalesce.ts";

/** A coalescer of numbers whose calls stay open until told: each result is its item times ten. */
function openCoalescer(options: Partial<CoalesceOptions<number>> = {}) {
  const calls: { items: number[]; succeed(): void; fail(error: Error): void }[] = [];
  const add = coalesce<number, number>(
    (items) => {
      const { promise, resolve, reject } = Promise.withResolvers<number[]>();
      calls.push({ items, succeed: () => resolve(items.map((item) => item * 10)), fail: reject });
      return promise;
    },
    { maxBatch: 100, maxWaiting: 1_000, ...options },
  );
  /** Lets calls succeed one after the other. */
  async function succeed(...indexes: number[]) {
    for (const index of indexes) {
      await turn();
      calls[index]?.succeed();
    }
    await turn();
  }
  return { add, calls, succeed, batches: () => calls.map(({ items }) => items) };
}

/** Lets all that is ready run. */
function turn() {
  return new Promise((resolve) => setImmediate(resolve));
}

describe("coalesce()", () => {
  test("hands over together what comes in one turn of the event loop, and starts again after it was quiet", async () => {
    const { add, succeed, batches } = openCoalescer();
    for (const [call, items] of [[7], [1, 2, 3]].entries()) {
      const results = Promise.all(items.map(add));
      await succeed(call);
      expect(await results).toEqual(items.map((item) => item * 10));
    }
    expect(batches()).toEqual([[7], [1, 2, 3]]);
  });

  test("makes one call at a time and gathers the next one meanwhile, in order", async () => {
    const { add, succeed, batches } = openCoalescer();
    const results = [add(1)];
    await turn();
    results.push(add(2), add(3));
    await turn();
    results.push(add(4));
    await turn();
    expect(batches()).toEqual([[1]]);
    await succeed(0);
    expect(batches()).toEqual([[1], [2, 3, 4]]);
    await succeed(1);
    expect(await Promise.all(results)).toEqual([10, 20, 30, 40]);
  });

  test("hands over at most maxBatch items", async () => {
    const { add, succeed, batches } = openCoalescer({ maxBatch: 2 });
    [1, 2, 3].map(add);
    await succeed(0);
    expect(batches()).toEqual([[1, 2], [3]]);
  });

  test("hands over at most maxBatch of weight, except for one item alone, and skips none", async () => {
    const { add, succeed, batches } = openCoalescer({ maxBatch: 5, weight: (item) => item });
    const results = Promise.all([2, 3, 1, 9, 4, 1].map(add));
    await succeed(0, 1, 2, 3);
    expect(await results).toEqual([20, 30, 10, 90, 40, 10]);
    expect(batches()).toEqual([[2, 3], [1], [9], [4, 1]]);
  });

  test("makes maxCalls calls at once; what waits goes with the first that is free", async () => {
    const { add, succeed, batches } = openCoalescer({ maxCalls: 2 });
    const results = [add(1)];
    await turn();
    results.push(add(2));
    await turn();
    results.push(add(3), add(4));
    await turn();
    expect(batches()).toEqual([[1], [2]]);
    await succeed(1);
    expect(batches()).toEqual([[1], [2], [3, 4]]);
    await succeed(0, 2);
    expect(await Promise.all(results)).toEqual([10, 20, 30, 40]);
    expect(batches()).toHaveLength(3);
  });

  test("rejects only the items of the call that fails", async () => {
    const { add, calls, succeed } = openCoalescer({ maxBatch: 2 });
    const results = Promise.allSettled([1, 2, 3, 4].map(add));
    const reason = new Error("broken");
    await turn();
    calls[0]?.fail(reason);
    await succeed(1);
    expect(await results).toEqual([
      { status: "rejected", reason },
      { status: "rejected", reason },
      { status: "fulfilled", value: 30 },
      { status: "fulfilled", value: 40 },
    ]);
  });

  test("rejects the items of a call that throws at once, and goes on", async () => {
    let isBroken = true;
    const add = coalesce<number, number>(
      (items) => {
        if (isBroken) throw new Error("broken");
        return Promise.resolve(items);
      },
      { maxBatch: 10 },
    );
    await expect(add(1)).rejects.toThrow("broken");
    isBroken = false;
    expect(await add(2)).toBe(2);
  });

  test.each([[[]], [[1]], [[1, 2, 3]]])("never shares out %j to two items", async (results) => {
    const add = coalesce<number, number>(async () => results, { maxBatch: 10 });
    const settled = await Promise.allSettled([add(1), add(2)]);
    expect(settled.map(({ status }) => status)).toEqual(["rejected", "rejected"]);
  });

  test("refuses, and does not hand over, what waited longer than maxWaitMs", async () => {
    const { add, succeed, batches } = openCoalescer({ maxWaitMs: 500 });
    const first = add(1);
    await turn();
    const late = add(2).catch((error) => error);
    await Bun.sleep(501);
    const inTime = add(3);
    await succeed(0, 1);
    expect(await Promise.all([first, inTime])).toEqual([10, 30]);
    expect(await late).toBeInstanceOf(OverloadError);
    expect(batches()).toEqual([[1], [3]]);
  });

  test("refuses what is more than maxWaiting, and takes more once a call has taken some along", async () => {
    const { add, succeed, batches } = openCoalescer({ maxBatch: 2, maxWaiting: 3 });
    const results = [add(1)];
    await turn();
    results.push(add(2), add(3), add(4));
    const refused = await add(5).catch((error) => error);
    expect(refused).toBeInstanceOf(OverloadError);
    expect(refused.message).toBe("Cannot wait as 3 already do: at most 3");
    await succeed(0);
    results.push(add(6));
    await succeed(1, 2);
    expect(await Promise.all(results)).toEqual([10, 20, 30, 40, 60]);
    expect(batches()).toEqual([[1], [2, 3], [4, 6]]);
  });

  test("counts maxWaiting in weight, and takes one that is too heavy if nothing else waits", async () => {
    const { add, succeed, batches } = openCoalescer({ maxBatch: 5, maxWaiting: 5, weight: (item) => item });
    const heavy = add(9);
    expect(await add(1).catch((error) => error)).toBeInstanceOf(OverloadError);
    await turn();
    const light = add(5);
    expect(await add(1).catch((error) => error)).toBeInstanceOf(OverloadError);
    await succeed(0, 1);
    expect(await Promise.all([heavy, light])).toEqual([90, 50]);
    expect(batches()).toEqual([[9], [5]]);
  });
});

test("limitConcurrency() refuses more work than max at once, and gives a place back whatever becomes of the work", async () => {
  const limit = limitConcurrency(2, "bulks");
  const gates = [Promise.withResolvers<number>(), Promise.withResolvers<number>()];
  const [first, second] = gates.map(({ promise }) => limit(() => promise));
  const refused = await limit(async () => expect.unreachable()).catch((error) => error);
  expect(refused).toBeInstanceOf(OverloadError);
  expect(refused.message).toBe("Cannot take more than 2 bulks at once");
  gates[0]?.reject(new Error("broken"));
  await expect(first as Promise<number>).rejects.toThrow("broken");
  expect(await limit(async () => 3)).toBe(3);
  gates[1]?.resolve(2);
  expect(await second).toBe(2);
});
