import type { Database } from "../../lib/database.ts";
import { type TestDatabase, untilRunning } from "./database.ts";
import { nameOf } from "./fault_points.ts";

/**
 * A database whose work stops after a statement of that name, and holds its locks until it is told to commit. What else
 * would commit each statement by itself, commits them together here.
 */
function openHeld({ database }: TestDatabase, name: string) {
  const { promise: gate, resolve: commit } = Promise.withResolvers<void>();
  const { promise: reached, resolve: reach } = Promise.withResolvers<void>();
  const transaction: Database["transaction"] = (work, options) =>
    database.transaction((transaction) => {
      async function execute(sql: string, values?: unknown[]) {
        const result = await transaction.execute(sql, values);
        if (nameOf(sql) !== name) return result;
        reach();
        await gate;
        return result;
      }
      return work({ ...transaction, execute });
    }, options);
  return { database: { ...database, run: transaction, transaction }, reached, commit };
}

export interface Order<A, B> {
  first: (database: Database) => Promise<A>;
  /** The name of the first one's statement after which it stops, before its COMMIT. */
  heldAt: string;
  second: (database: Database) => Promise<B>;
  /** The name of the second one's statement that waits for the first one's locks; without it, the second one ends first. */
  waitsAt?: string;
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
