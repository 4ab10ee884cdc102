import { ExpectedError } from "./errors.ts";

export interface CoalesceOptions<T> {
  /** The most that one call carries: items, or the sum of their weights. A single item may weigh more. */
  maxBatch: number;
  /** The most that wait for a call, without a limit by default; more are refused with `OverloadError`. */
  maxWaiting?: number;
  /** The longest wait for a call, in milliseconds; an item that has waited longer is refused with `OverloadError`. */
  maxWaitMs?: number;
  /** The weight of an item, by default 1. */
  weight?: (item: T) => number;
  /** The most calls at once, by default 1. */
  maxCalls?: number;
}

/** A limit on work in hand or waiting is reached; nothing was done with the item. */
export class OverloadError extends ExpectedError {
  override readonly name = "OverloadError";
}

/**
 * Makes a function that runs work, at most `max` pieces at once; more are refused with `OverloadError`.
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
 * Gathers items while a call is under way, and hands them over together in the next call: one at a time when it is quiet, in
 * large batches under load. Items keep their order.
 *
 * @param call gets at least one item and returns one result for each, in the same order. An error rejects every item of the call.
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
          throw new Error(`Cannot share out ${results.length} results to ${batch.length} items`);
        }
        for (const [index, result] of results.entries()) batch[index]?.resolve(result);
      } catch (error) {
        for (const { reject } of batch) reject(error);
      }
    }
    calls--;
  }

  /** Refuses from the front: those items have waited longest. */
  function refuseExpired() {
    const latest = performance.now() - maxWaitMs;
    const alive = waiting.findIndex(({ since }) => since >= latest);
    for (const { item, reject } of waiting.splice(0, alive < 0 ? waiting.length : alive)) {
      waitingWeight -= weight(item);
      reject(new OverloadError(`Cannot be handed over within ${maxWaitMs} ms`));
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
