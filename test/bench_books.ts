import { aggregate } from "../lib/aggregate.ts";
import { reconcile } from "../lib/reconcile.ts";
import { fill } from "./bench_fill.ts";
import { createTestDatabase, type TestDatabase } from "./harness.ts";

/** How many entries are new, where only those should cost anything. */
const NEW = 10_000;
const OPTIONS = { timeZone: "Asia/Tokyo" };

interface Figure {
  what: string;
  figure: string;
  /** What stands beside it, and this as a part of that. */
  beside?: string;
  ratio: number;
}

async function secondsOf(work: () => Promise<unknown>): Promise<number> {
  const startedAt = performance.now();
  await work();
  return (performance.now() - startedAt) / 1_000;
}

/** Counts, or compares; fails where something is left out or amiss. */
async function count({ database }: TestDatabase, entries: number): Promise<number> {
  return secondsOf(async () => {
    const counted = await aggregate(database, OPTIONS);
    if (counted !== entries) throw new Error(`Counted ${counted} entries of ${entries}`);
  });
}

async function compare({ database }: TestDatabase, isFull: boolean): Promise<number> {
  return secondsOf(async () => {
    const found = await reconcile(database, { isFull, leaseMs: 15_000 });
    if (found.differences > 0 || found.isFull !== isFull) throw new Error(`Found ${JSON.stringify(found)}`);
  });
}

/**
 * Counts a whole ledger, then compares all of the books; and the same for a few new entries, beside an empty ledger with as few
 * of them. A tenth as many users as entries.
 */
export async function benchBooks({
  entries,
  progress,
}: {
  entries: number;
  progress: (what: string) => void;
}): Promise<Figure[]> {
  const few = await createTestDatabase();
  const many = await createTestDatabase();
  try {
    const fresh = { count: NEW, users: NEW / 10, prefix: "warm", at: { inMs: 0 }, isDone: true } as const;
    await fill(few, fresh);
    const fewCountS = await count(few, NEW);
    progress(`filling in ${entries} entries`);
    await fill(many, { count: entries, users: entries / 10, prefix: "finished", at: "past", isDone: true });
    const tables = ["point_reservations", "point_transactions", "point_root"];
    for (const table of tables) {
      await many.database.run(({ select }) => select(`analyze table ${table}`), { workMs: 600_000 });
    }
    progress("counting");
    const allCountS = await count(many, entries);
    progress("comparing");
    const fullS = await compare(many, true);
    // A day goes by: what was counted just now would be compared again.
    await many.query("update point_daily_totals set updated_at = now(3) - interval 1 day");
    await fill(many, fresh);
    const newCountS = await count(many, NEW);
    const newS = await compare(many, false);
    const shown = entries.toLocaleString("en");
    return [
      { what: `aggregate ${shown} entries`, figure: `${allCountS.toFixed(1)} s`, ratio: 1 },
      {
        ...{ what: `aggregate ${NEW} new ones of them`, figure: `${(newCountS * 1_000).toFixed(0)} ms` },
        ...{ beside: `of none before ${(fewCountS * 1_000).toFixed(0)} ms`, ratio: newCountS / fewCountS },
      },
      {
        what: `reconcile --full, ${shown} entries and reservations`,
        figure: `${fullS.toFixed(1)} s`,
        ratio: 1,
      },
      {
        ...{ what: `reconcile, ${NEW} new ones`, figure: `${newS.toFixed(1)} s` },
        ...{ beside: `--full ${fullS.toFixed(1)} s`, ratio: newS / fullS },
      },
    ];
  } finally {
    await few.drop();
    await many.drop();
  }
}
