import { coalesce } from "../coalesce.ts";
import { sleep } from "../loop.ts";
import type { Queue } from "../queue.ts";
import { encodeHint } from "./message.ts";

/**
 * Hints are sent for reservations that are due within this time, in milliseconds: much longer than a scheduler sleeps, since the
 * clock of this host may be wrong.
 */
const HINT_AHEAD_MS = 3_600_000;
/** The shortest time between two hints, in milliseconds. */
const HINT_EVERY_MS = 5;
/** The maximum number of times that one hint replaces. */
const MAX_HINTED = 10_000;

/**
 * Makes the function that sends the schedulers a hint if a reservation is due soon. One hint with the earliest time replaces all
 * hints within a few milliseconds. While RabbitMQ is unavailable hints are lost, and the next scan finds the reservation.
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
