import { ExpectedError } from "./errors.ts";

export interface CoalesceOptions<T> {
  /** The largest batch of one call: items, or the sum of their weights. A single item may weigh more. */
  maxBatch: number;
  /** The maximum number (or weight) of waiting items, by default unlimited; more are refused with `OverloadError`. */
  maxWaiting?: number;
  /** The longest wait of an item, in milliseconds, by default unlimited; after it the item is refused with `OverloadError`. */
  maxWaitMs?: number;
  /** The weight of an item, by default 1. */
  weight?: (item: T) => number;
  /** The maximum number of concurrent calls, by default 1. */
  maxCalls?: number;
}

/** A limit on running or waiting work is reached; the item was not processed. */
export class OverloadError extends ExpectedError {
  override readonly name = "OverloadError";
}

/**
 * Makes a function that runs at most `max` pieces of work at once; more are refused with `OverloadError`.
 *
 * @param what names the work, e.g. `bulks`
 */
export function limitConcurrency(max: number, what: string): <T>(work: () => Promise<T>) => Promise<T> {
  let inHand = 0;
  return async (work) => {
    if (inHand >= max) throw new OverloadError(`Cannot take more than ${max} ${what} at once`);
    inHand++;
    try {
      return await work();
    } finally {
      inHand--;
    }
  };
}

/**
 * Collects items while a call is running, and passes them together to the next call: single items at low load, large batches
 * at high load. Items keep their order.
 *
 * @param call gets at least one item and returns one result for each, in the same order; an error rejects all items of the call
 */
export function coalesce<T, R>(
  call: (items: T[]) => Promise<R[]>,
  {
    maxBatch,
    maxWaiting = Infinity,
    maxWaitMs = Infinity,
    weight = () => 1,
    maxCalls = 1,
  }: CoalesceOptions<T>,
): (item: T) => Promise<R> {
  const waiting: {
    item: T;
    since: number;
    resolve: (result: R) => void;
    reject: (error: unknown) => void;
  }[] = [];
  let waitingWeight = 0;
  let calls = 0;

  async function run() {
    calls++;
    // Items that arrive in this turn of the event loop join the batch.
    await Promise.resolve();
    while (waiting.length > 0) {
      refuseExpired();
      const batch = takeBatch();
      if (batch.length === 0) break;
      try {
        const results = await call(batch.map(({ item }) => item));
        if (results.length !== batch.length) {
          throw new Error(
            `A call must return one result per item: received ${results.length} for ${batch.length}`,
          );
        }
        for (const [index, result] of results.entries()) batch[index]?.resolve(result);
      } catch (error) {
        for (const { reject } of batch) reject(error);
      }
    }
    calls--;
  }

  /** Refuses items from the front: these have waited longest. */
  function refuseExpired() {
    const latest = performance.now() - maxWaitMs;
    const alive = waiting.findIndex(({ since }) => since >= latest);
    for (const { item, reject } of waiting.splice(0, alive < 0 ? waiting.length : alive)) {
      waitingWeight -= weight(item);
      reject(new OverloadError(`Cannot process an item that has waited for more than ${maxWaitMs} ms`));
    }
  }

  function takeBatch() {
    let batchWeight = 0;
    let length = 0;
    for (const { item } of waiting) {
      if (length > 0 && batchWeight + weight(item) > maxBatch) break;
      batchWeight += weight(item);
      length++;
    }
    waitingWeight -= batchWeight;
    return waiting.splice(0, length);
  }

  return function add(item) {
    if (waitingWeight + weight(item) > maxWaiting && waiting.length > 0) {
      return Promise.reject(
        new OverloadError(`Cannot wait as ${waitingWeight} already do: at most ${maxWaiting}`),
      );
    }
    const { promise, resolve, reject } = Promise.withResolvers<R>();
    waiting.push({ item, since: performance.now(), resolve, reject });
    waitingWeight += weight(item);
    if (calls < maxCalls) run();
    return promise;
  };
}
