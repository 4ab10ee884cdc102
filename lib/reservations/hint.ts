import { coalesce } from "../coalesce.ts";
import { sleep } from "../loop.ts";
import type { Queue } from "../queue.ts";
import { encodeHint } from "./message.ts";

/**
 * Schedulers are told of reservations that are due within this time, in milliseconds: far longer than they ever sleep, since
 * the clock of this host may be wrong.
 */
const HINT_AHEAD_MS = 3_600_000;
/** The shortest time between two hints, in milliseconds. */
const HINT_EVERY_MS = 5;
/** The most times that one hint stands for. */
const MAX_HINTED = 10_000;

/**
 * Makes the function that tells the schedulers when a reservation is due soon. One hint stands for all that come within a few
 * milliseconds; while RabbitMQ is away it is lost, and the next scan finds the reservation.
 */
export function hintThrough(queue: Pick<Queue, "hint">): (executeAt: Date) => void {
  const tell = coalesce(
    async (times: number[]) => {
      queue.hint(encodeHint(new Date(Math.min(...times))));
      await sleep(HINT_EVERY_MS);
      return times;
    },
    { maxBatch: MAX_HINTED },
  );
  return (executeAt) => {
    if (executeAt.getTime() < Date.now() + HINT_AHEAD_MS) tell(executeAt.getTime());
  };
}
