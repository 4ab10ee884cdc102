import { v7 as uuidv7 } from "uuid";
import type { Database } from "../database.ts";

// One scheduler at a time does the accounting: the one that holds the turn.

/** How long a turn lasts if its holder does not renew it, in milliseconds. */
const HOLD_MS = 60_000;

/**
 * Takes the turn if the accounting is due and no other scheduler holds the turn, by one conditional UPDATE.
 *
 * @param options.intervalMs the time from one run to the next
 * @returns the id of the turn; undefined if it was not taken
 */
export async function takeTurn(
  database: Database,
  { intervalMs }: { intervalMs: number },
): Promise<string | undefined> {
  const turn = uuidv7();
  const { affectedRows } = await database.run(({ execute }) =>
    execute(
      `/* take_turn */ update point_aggregation_turns
       set held_by = ?, held_until = now(3) + interval ? microsecond
       where id = 1 and held_until <= now(3)
         and (finished_at is null or finished_at <= now(3) - interval ? microsecond)`,
      [turn, HOLD_MS * 1_000, intervalMs * 1_000],
    ),
  );
  return affectedRows === 1 ? turn : undefined;
}

/** Renews the turn for another minute. */
export async function keepTurn(database: Database, turn: string): Promise<void> {
  await database.run(({ execute }) =>
    execute(
      `/* keep_turn */ update point_aggregation_turns set held_until = now(3) + interval ? microsecond
       where id = 1 and held_by = ?`,
      [HOLD_MS * 1_000, turn],
    ),
  );
}

/**
 * Gives the turn back.
 *
 * @param options.isFinished true: the next turn is due after the interval; false: at once
 */
export async function endTurn(
  database: Database,
  turn: string,
  { isFinished }: { isFinished: boolean },
): Promise<void> {
  const finished = isFinished ? ", finished_at = now(3)" : "";
  await database.run(({ execute }) =>
    execute(
      `/* end_turn */ update point_aggregation_turns set held_by = null, held_until = now(3)${finished}
       where id = 1 and held_by = ?`,
      [turn],
    ),
  );
}
