import { type Database, openDatabase } from "../../lib/database.ts";
import type { TestDatabase } from "./database.ts";

/**
 * A database whose clock stands still: only so can a test be exact to the millisecond.
 *
 * @param time with whole or half seconds: MySQL takes a floating-point number
 */
export async function openFrozen({ url }: TestDatabase, time: Date): Promise<Database & AsyncDisposable> {
  // The clock is the session's.
  const database = openDatabase(url, { connections: 1 });
  await database.run(({ execute }) => execute(`set timestamp = ${time.getTime() / 1_000}`));
  return Object.assign(database, { [Symbol.asyncDispose]: () => database.close() });
}
