import type { Database, Transaction } from "../../lib/database.ts";
import { type TestDatabase, untilRunning } from "./database.ts";
import { nameOf } from "./fault_points.ts";

/**
 * A database whose work stops after a statement of that name, or before its `commit`, and holds its locks until it is told
 * to commit. What else would commit each statement by itself, commits them together here.
 */
function openHeld({ database }: TestDatabase, name: string) {
  const { promise: gate, resolve: commit } = Promise.withResolvers<void>();
  const { promise: reached, resolve: reach } = Promise.withResolvers<void>();
  const transaction: Database["transaction"] = (work, options) =>
    database.transaction(async (transaction) => {
      async function pauseAfter<T>(at: string, work: Promise<T>): Promise<T> {
        const result = await work;
        if (at !== name) return result;
        reach();
        await gate;
        return result;
      }
      const execute: Transaction["execute"] = (sql, values) =>
        pauseAfter(nameOf(sql), transaction.execute(sql, values));
      return pauseAfter("commit", work({ ...transaction, execute }));
    }, options);
  return { database: { ...database, run: transaction, transaction }, reached, commit };
}

export interface Order<A, B> {
  first: (database: Database) => Promise<A>;
  /** The name of the first one's statement after which it stops; `commit` if it stops before that. */
  heldAt: string;
  second: (database: Database) => Promise<B>;
  /** The name of the second one's statement that waits for the first one's locks; without it, the second one ends first. */
  waitsAt?: string | undefined;
}

/** Runs two pieces of work at the same time, in a forced order. */
export async function inOrder<A, B>(
  db: TestDatabase,
  { first, heldAt, second, waitsAt }: Order<A, B>,
): Promise<[A, B]> {
  const held = openHeld(db, heldAt);
  const ofFirst = first(held.database);
  await orItsEnd(held.reached, ofFirst, `The first one ended without ${heldAt}`);
  const ofSecond = second(db.database);
  try {
    if (waitsAt === undefined) await ofSecond;
    else await orItsEnd(untilRunning(db, waitsAt), ofSecond, `The second one did not wait at ${waitsAt}`);
  } finally {
    held.commit();
  }
  return Promise.all([ofFirst, ofSecond]);
}

/** Waits for what must come before some work has ended. */
function orItsEnd(awaited: Promise<void>, work: Promise<unknown>, message: string): Promise<void> {
  return Promise.race([awaited, work.then(() => Promise.reject(new Error(message)))]);
}
