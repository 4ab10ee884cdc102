import { ForeseenError } from "./errors.ts";

export interface CoalesceOptions<T> {
  /** The most that one call may carry: items, or the sum of their weights. One item alone may weigh more. */
  maxBatch: number;
  /** The most that may wait for a call; one more is refused with `OverloadError`. No limit unless told. */
  maxWaiting?: number;
  /** The longest wait for a call, in milliseconds; who waited longer is refused with `OverloadError` and not handed over. */
  maxWaitMs?: number;
  /** What an item counts, 1 unless told. */
  weight?: (item: T) => number;
  /** The most calls at once, 1 unless told. */
  maxCalls?: number;
}

/** More waits than may wait; nothing was done with the item. */
export class OverloadError extends ForeseenError {
  override readonly name = "OverloadError";
}

/**
 * Makes a gate: of the work that is handed to it, at most `max` is in hand at once; more is refused with `OverloadError`.
 *
 * @param what names it, e.g. `bulks`
 */
export function atMost(max: number, what: string): <T>(work: () => Promise<T>) => Promise<T> {
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
 * Gathers items while a call is under way, and hands them over together in the next call: alone where it is quiet, in
 * large batches under load. Items are handed over in their order.
 *
 * @param call gets at least one item; returns one result for each, in the same order. What it throws rejects every item of that call.
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
    // Let all that arrives in this turn of the event loop come along.
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

  /** Those in front wait longest. */
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
