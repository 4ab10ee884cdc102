import type { Connection, Database, Transaction } from "../../lib/database.ts";
import { type TestDatabase, untilRunning } from "./database.ts";
import { nameOf } from "./fault_points.ts";

/**
 * A database whose transactions stop after a statement of that name, or before their `commit`, and hold their locks until they
 * are told to commit.
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
  return { database: { ...database, transaction }, reached, commit };
}

/** A database that tells when it sends a statement of that name. */
export function openWatched(
  { run, transaction, close }: Database,
  name: string,
): { database: Database; sent: Promise<void> } {
  const { promise: sent, resolve } = Promise.withResolvers<void>();
  function see(sent: string) {
    if (sent === name) resolve();
  }
  function watch<C extends Connection>(connection: C): C {
    const { drizzle, execute, select } = connection;
    return {
      ...connection,
      drizzle(name: string) {
        see(name);
        return drizzle(name);
      },
      execute(sql: string, values?: unknown[]) {
        see(nameOf(sql));
        return execute(sql, values);
      },
      select<Row extends object>(sql: string, values?: unknown[]) {
        see(nameOf(sql));
        return select<Row>(sql, values);
      },
    };
  }
  const database: Database = {
    run: (work, options) => run((connection) => work(watch(connection)), options),
    transaction: (work, options) => transaction((opened) => work(watch(opened)), options),
    close,
  };
  return { database, sent };
}

export interface Order<A, B> {
  first: (database: Database) => Promise<A>;
  /** The name of the first one's statement after which it stops; `commit` if it stops before that. */
  heldAt: string;
  second: (database: Database) => Promise<B>;
  /** The name of the second one's statement that waits for the first one's locks. */
  waitsAt?: string | undefined;
  /** The name of a statement that the second one sends if it finds something locked; without both, it ends first. */
  findsBusyBy?: string | undefined;
}

/** Runs two pieces of work at the same time, in a forced order. */
export async function inOrder<A, B>(
  db: TestDatabase,
  { first, heldAt, second, waitsAt, findsBusyBy }: Order<A, B>,
): Promise<[A, B]> {
  const held = openHeld(db, heldAt);
  const ofFirst = first(held.database);
  await orItsEnd(held.reached, ofFirst, `The first one ended without ${heldAt}`);
  const watched = openWatched(db.database, findsBusyBy ?? "");
  const ofSecond = second(watched.database);
  try {
    if (waitsAt)
      await orItsEnd(untilRunning(db, waitsAt), ofSecond, `The second one did not wait at ${waitsAt}`);
    else if (findsBusyBy) await orItsEnd(watched.sent, ofSecond, "The second one found nothing locked");
    else await ofSecond;
  } finally {
    held.commit();
  }
  return Promise.all([ofFirst, ofSecond]);
}

/** Waits for what must come before some work has ended. */
function orItsEnd(awaited: Promise<void>, work: Promise<unknown>, message: string): Promise<void> {
  return Promise.race([awaited, work.then(() => Promise.reject(new Error(message)))]);
}
