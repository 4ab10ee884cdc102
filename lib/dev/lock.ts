/** A lock on this machine that ends with its process. */
import { Database } from "bun:sqlite";
import { setTimeout as sleep } from "node:timers/promises";

/** Options for {@link withLock}. */
export interface LockOptions {
  /** Called once, with `waiting`, if another process holds the lock. */
  say: (line: string) => void;
  waiting: string;
  signal?: AbortSignal | undefined;
  /** Default 5 minutes: a first start may download images or packages. */
  deadlineMs?: number;
}

/**
 * Runs `work` while holding the lock on `file`, which is created if necessary.
 *
 * The lock is SQLite's write lock on an empty database: the kernel releases it when the holder ends, so a killed
 * holder leaves nothing to clean up. It is polled, since SQLite's own busy timeout would block the event loop.
 */
export async function withLock<T>(file: string, work: () => Promise<T>, options: LockOptions): Promise<T> {
  const deadlineMs = options.deadlineMs ?? 5 * 60_000;
  const giveUpAt = Date.now() + deadlineMs;
  const database = new Database(file, { create: true });
  let said = false;
  try {
    while (!takeLock(database)) {
      options.signal?.throwIfAborted();
      if (Date.now() > giveUpAt) {
        throw new Error(
          `Another run has held the lock for more than ${Math.round(deadlineMs / 1000)} s: ${file}`,
        );
      }
      if (!said) options.say(options.waiting);
      said = true;
      await sleep(100);
    }
    return await work();
  } finally {
    database.close();
  }
}

function takeLock(database: Database): boolean {
  try {
    database.run("begin exclusive");
    return true;
  } catch (error) {
    if (error instanceof Error && "code" in error && String(error.code).startsWith("SQLITE_BUSY"))
      return false;
    throw error;
  }
}
