import { aggregate } from "../../lib/accounting/aggregate.ts";
import { reconcile } from "../../lib/accounting/reconcile.ts";
import { createTestDatabase, type TestDatabase } from "../harness/database.ts";
import { analyze, fill } from "./fill.ts";

/** How many entries are new if only those may cost anything. */
const NEW = 10_000;

/** What is shown of one measurement. */
export interface Figure {
  what: string;
  figure: string;
  /** What it is compared with, and as which part of that. */
  limit?: { what: string; ratio: number };
}

async function secondsOf(work: () => Promise<void>): Promise<number> {
  const startedAt = performance.now();
  await work();
  return (performance.now() - startedAt) / 1_000;
}

/** Counts the entries that no total holds yet; fails if one is left out. */
function count({ database }: TestDatabase, entries: number): Promise<number> {
  return secondsOf(async () => {
    const counted = await aggregate(database, { timeZone: "Asia/Tokyo" });
    if (counted !== entries) throw new Error(`Counted ${counted} entries of ${entries}`);
  });
}

/** Reconciles; fails if there is a difference. */
function compare({ database }: TestDatabase, isFull: boolean): Promise<number> {
  return secondsOf(async () => {
    const found = await reconcile(database, { isFull, leaseMs: 15_000 });
    if (found.differences > 0 || found.isFull !== isFull) throw new Error(`Found ${JSON.stringify(found)}`);
  });
}

/**
 * Measures how long it takes to count a whole ledger and to reconcile everything; and the same for a few new entries, compared
 * with an empty ledger with as few of them. There are a tenth as many users as entries.
 */
export async function benchAccounting(options: {
  entries: number;
  progress: (what: string) => void;
}): Promise<Figure[]> {
  const { entries, progress } = options;
  const few = await createTestDatabase();
  const many = await createTestDatabase();
  try {
    const fresh = { count: NEW, users: NEW / 10, prefix: "warm", at: { inMs: 0 }, isDone: true } as const;
    await fill(few, fresh);
    const fewCountS = await count(few, NEW);
    progress(`filling in ${entries} entries`);
    await fill(many, { count: entries, users: entries / 10, prefix: "finished", at: "past", isDone: true });
    await analyze(many);
    progress("aggregating");
    const allCountS = await count(many, entries);
    progress("reconciling");
    const fullS = await compare(many, true);
    await fill(many, fresh);
    const newCountS = await count(many, NEW);
    const newS = await compare(many, false);
    const [all, s, ms] = [
      entries.toLocaleString("en"),
      (seconds: number) => `${seconds.toFixed(1)} s`,
      (seconds: number) => `${(seconds * 1_000).toFixed(0)} ms`,
    ] as const;
    const fewCount = { what: `of none before ${ms(fewCountS)}`, ratio: newCountS / fewCountS };
    return [
      { what: `aggregate ${all} entries`, figure: s(allCountS) },
      { what: `aggregate ${NEW} new ones of them`, figure: ms(newCountS), limit: fewCount },
      { what: `reconcile --full, ${all} entries and reservations`, figure: s(fullS) },
      {
        what: `reconcile, ${NEW} new ones`,
        figure: s(newS),
        limit: { what: `--full ${s(fullS)}`, ratio: newS / fullS },
      },
    ];
  } finally {
    await few.drop();
    await many.drop();
  }
}
