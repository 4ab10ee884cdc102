import { v7 as uuidv7 } from "uuid";
import type { Database } from "../database.ts";

// One scheduler at a time does the accounting: the one that holds the turn. MySQL's clock may jump, so each scheduler measures
// by a clock of its own how long it has seen the same counters.

/** If a holder gives no sign of life for this long, another scheduler takes the turn, in milliseconds. */
const HOLD_MS = 60_000;

/** The turn to do the accounting, as one scheduler sees it. */
export interface Turns {
  /**
   * Takes the turn if the accounting is due: no run has finished for the interval, or the last one did not finish, or totals were
   * voided since. The first call cannot know when a run last finished, so it is due then. Does not take it from a holder that is
   * alive.
   *
   * @returns undefined if it was not taken
   */
  take(): Promise<Turn | undefined>;
}

/** A turn that was taken. After another scheduler has taken it, both methods do nothing. */
export interface Turn {
  /** Shows that the holder is alive. */
  keep(): Promise<void>;
  /**
   * Gives the turn back.
   *
   * @param options.isFinished true: the next run is due after the interval; false: at once
   */
  end(options: { isFinished: boolean }): Promise<void>;
}

interface Row {
  heldBy: string | null;
  beats: number | string;
  runs: number | string;
  isWanted: 0 | 1;
}

/**
 * @param options.intervalMs the time from one run to the next
 * @param options.now a clock in milliseconds that never jumps
 */
export function openTurns(
  database: Database,
  { intervalMs, now = () => performance.now() }: { intervalMs: number; now?: () => number },
): Turns {
  // What the last call saw, and since when.
  let finished: { runs: string; sinceMs: number } | undefined;
  let holder: { sign: string; sinceMs: number } | undefined;

  return {
    async take() {
      const [row] = await database.run(({ select }) =>
        select<Row>(
          `/* find_turn */ select held_by heldBy, beats, runs, is_wanted isWanted
           from point_aggregation_turns where id = 1`,
        ),
      );
      if (!row) throw new Error("point_aggregation_turns has lost its row");
      const nowMs = now();
      const runs = String(row.runs);
      const sign = `${row.heldBy} ${row.beats}`;
      if (runs !== finished?.runs) finished = { runs, sinceMs: finished ? nowMs : -Infinity };
      if (sign !== holder?.sign) holder = { sign, sinceMs: nowMs };
      const isDue =
        row.heldBy === null
          ? row.isWanted === 1 || nowMs - finished.sinceMs >= intervalMs
          : nowMs - holder.sinceMs >= HOLD_MS;
      return isDue ? takeTurn(database, row) : undefined;
    },
  };
}

/** Takes the turn if its row is as it was seen. */
async function takeTurn(database: Database, { heldBy, beats }: Row): Promise<Turn | undefined> {
  const turn = uuidv7();
  const { affectedRows } = await database.run(({ execute }) =>
    execute(
      `/* take_turn */ update point_aggregation_turns set held_by = ?, beats = beats + 1, is_wanted = 0
       where id = 1 and held_by <=> ? and beats = ?`,
      [turn, heldBy, beats],
    ),
  );
  if (affectedRows !== 1) return undefined;
  async function change(name: string, assignments: string) {
    await database.run(({ execute }) =>
      execute(
        `/* ${name} */ update point_aggregation_turns set beats = beats + 1${assignments}
         where id = 1 and held_by = ?`,
        [turn],
      ),
    );
  }
  return {
    keep: () => change("keep_turn", ""),
    end: ({ isFinished }) =>
      change(
        "end_turn",
        `, held_by = null, ${isFinished ? "runs = runs + 1, finished_at = now(3)" : "is_wanted = 1"}`,
      ),
  };
}
