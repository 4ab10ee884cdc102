import { v7 as uuidv7 } from "uuid";
import type { Database } from "../database.ts";
import { DatabaseError } from "../database_errors.ts";
import { ExpectedError } from "../errors.ts";
import { withDeadline } from "../loop.ts";

/** The longest time for a trial, in milliseconds: shorter than the usual timeouts of probes. */
const TRIAL_MS = 2_000;

/** A write that changes no row, but needs the same rights and locks of tables as those that do. */
export interface TrialStatement {
  /** What it writes to, in words that are safe for clients. */
  to: string;
  sql: string;
}

/**
 * Makes a function that tries whether MySQL takes the writes of this process now: all statements, and a row that is inserted
 * and deleted again, in one transaction. That row makes the COMMIT a real one, which a full disk or a cluster without a
 * majority refuses, or delays; nobody else ever waits for it. If a trial does not end within 2 s, the next call waits for the
 * same one.
 *
 * The function throws an ExpectedError whose message is safe for clients.
 */
export function openTrial(database: Database, statements: readonly TrialStatement[]): () => Promise<void> {
  let place = "";
  let running: Promise<void> | undefined;

  async function attempt(): Promise<void> {
    place = "";
    try {
      // The begin and the commit have names: a server's log tells them from those of the work.
      await database.run(
        async ({ execute }) => {
          await execute("/* try_begin */ start transaction");
          for (const { to, sql } of statements) {
            place = `, at a write to ${to}`;
            await execute(sql);
          }
          place = ", at a write of a row";
          const id = uuidv7();
          await execute("/* try_insert */ insert into point_trials (id) values (?)", [id]);
          await execute("/* try_delete */ delete from point_trials where id = ?", [id]);
          place = ", at a commit";
          await execute("/* try_commit */ commit");
        },
        { workMs: TRIAL_MS },
      );
    } catch (error) {
      throw error instanceof DatabaseError ? new ExpectedError(`${error.reason}${place}`) : error;
    }
  }

  return async () => {
    running ??= attempt().finally(() => {
      running = undefined;
    });
    const late = () => new ExpectedError(`MySQL did not answer within ${TRIAL_MS} ms${place}`);
    await withDeadline(running, TRIAL_MS, late);
  };
}
