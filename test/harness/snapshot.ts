import { openDatabase } from "../../lib/database.ts";
import type { TestDatabase } from "./database.ts";
import { insertReservations, reservationOf } from "./fixtures.ts";

/** Longer than any test: the connection does nothing. */
const HELD_S = 3_600;

/**
 * A snapshot of the whole database as of now, as a backup takes one: until it is closed, MySQL keeps every version of every row
 * and every entry of an index that somebody could still need.
 */
export async function openSnapshot({ url }: TestDatabase): Promise<AsyncDisposable> {
  const database = openDatabase(url, { connections: 1, workMs: HELD_S * 1_000 });
  const { promise: released, resolve: release } = Promise.withResolvers<void>();
  const { promise: isOpen, resolve: opened, reject } = Promise.withResolvers<void>();
  const held = database.run(async ({ execute }) => {
    await execute(`set wait_timeout = ${HELD_S}`);
    await execute("set session transaction isolation level repeatable read");
    await execute("start transaction with consistent snapshot");
    opened();
    await released;
    await execute("rollback");
  });
  held.catch(reject);
  await isOpen;
  return {
    async [Symbol.asyncDispose]() {
      release();
      await held;
      await database.close();
    },
  };
}

/** How many pages the server looks at meanwhile, for whomever: at least those of the work. */
export async function countPages({ query }: TestDatabase, work: () => Promise<unknown>): Promise<number> {
  const count = async () => {
    const [row] = await query<{ Value: string }>(
      "show global status like 'Innodb_buffer_pool_read_requests'",
    );
    return Number(row?.Value);
  };
  const before = await count();
  await work();
  return (await count()) - before;
}

/** So many reservations, each of them moved so often, leave entries on more than 80 pages of the index. */
const [RESERVATIONS, MOVES] = [4_000, 6];

/** Makes and ends reservations: while a snapshot is open, each leaves an entry in the index wherever its `scan_at` was. */
export async function leaveEntries(db: TestDatabase, scanAt: Date): Promise<void> {
  const reservations = Array.from({ length: RESERVATIONS }, () => reservationOf({ executeAt: scanAt }));
  await insertReservations(db, { reservations });
  const ofThese = "where execute_at = ? and scan_at is not null";
  for (let move = 1; move < MOVES; move++) {
    await db.query(`update point_reservations set scan_at = scan_at + interval 1000 microsecond ${ofThese}`, [
      scanAt,
    ]);
  }
  await db.query(`update point_reservations set status = 'DONE', scan_at = null ${ofThese}`, [scanAt]);
}
