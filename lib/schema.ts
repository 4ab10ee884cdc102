import { sql } from "drizzle-orm";
import { bigint, date, datetime, int, mysqlTable, tinyint, varchar } from "drizzle-orm/mysql-core";
import { ENTRY_KINDS } from "./point.ts";
import { RESERVATION_STATUSES } from "./reservation.ts";

// The tables as `sql/` makes them; the text keys' binary collation, the checks and the defaults stand there.

function text(name: string, length: number) {
  return varchar(name, { length });
}

/** A DATETIME(3) in UTC. */
function time(name: string) {
  return datetime(name, { mode: "date", fsp: 3 });
}

/** Balances: one row a user who ever got points. */
export const pointRoot = mysqlTable("point_root", {
  userId: text("user_id", 20).primaryKey(),
  pointNum: bigint("point_num", { mode: "bigint" }).notNull(),
  createdAt: time("created_at").notNull(),
  updatedAt: time("updated_at").notNull(),
});

/** How lists find reservations: what is neither granted, nor failed, nor cancelled is `OPEN`. */
export const LISTED_AS = ["OPEN", "DONE", "FAILED", "CANCELLED"] as const;

/** Reservations, and when the scheduler must look at each next (`scan_at`). */
export const pointReservations = mysqlTable("point_reservations", {
  id: text("id", 36).primaryKey(),
  userId: text("user_id", 20).notNull(),
  pointAmount: int("point_amount").notNull(),
  executeAt: time("execute_at").notNull(),
  status: varchar("status", { length: 10, enum: RESERVATION_STATUSES }).notNull(),
  idempotencyKey: text("idempotency_key", 100).notNull(),
  scanAt: time("scan_at"),
  attempts: int("attempts").notNull(),
  lastError: text("last_error", 500),
  createdAt: time("created_at").notNull(),
  updatedAt: time("updated_at").notNull(),
  campaign: text("campaign", 64),
  /** What the client reserved at first, where it was patched since. */
  originalPointAmount: int("original_point_amount"),
  originalExecuteAt: time("original_execute_at"),
  /** MySQL derives it from the status. */
  listedAs: varchar("listed_as", { length: 10, enum: LISTED_AS }).generatedAlwaysAs(
    sql`if(status in ('PENDING', 'PROCESSING'), 'OPEN', status)`,
    { mode: "virtual" },
  ),
  /** The same, but null without a campaign. */
  campaignListedAs: varchar("campaign_listed_as", { length: 10, enum: LISTED_AS }).generatedAlwaysAs(
    sql`if(campaign is null, null, if(status in ('PENDING', 'PROCESSING'), 'OPEN', status))`,
    { mode: "virtual" },
  ),
});

/** The ledger: append only. */
export const pointTransactions = mysqlTable("point_transactions", {
  id: text("id", 36).primaryKey(),
  idempotencyKey: text("idempotency_key", 120).notNull(),
  userId: text("user_id", 20).notNull(),
  /** Negative for a subtraction, never 0. */
  pointAmount: int("point_amount").notNull(),
  createdAt: time("created_at").notNull(),
  /** The generation of totals that hold it; 0 until one does. */
  aggregatedIn: int("aggregated_in").notNull(),
});

function whole(name: string) {
  return bigint(name, { mode: "bigint" });
}

/** The one row that says which totals count, and by the days of which time zone. */
export const pointAggregation = mysqlTable("point_aggregation", {
  id: tinyint("id").primaryKey(),
  generation: int("generation").notNull(),
  timeZone: text("time_zone", 64).notNull(),
});

/** What the entries of a day, kind and campaign add up to. */
export const pointDailyTotals = mysqlTable("point_daily_totals", {
  generation: int("generation").notNull(),
  day: date("day", { mode: "string" }).notNull(),
  kind: varchar("kind", { length: 5, enum: ENTRY_KINDS }).notNull(),
  /** Empty where there is none. */
  campaign: text("campaign", 64).notNull(),
  entries: whole("entries").notNull(),
  points: whole("points").notNull(),
  users: whole("users").notNull(),
  lateMsSum: whole("late_ms_sum").notNull(),
  lateMsMax: whole("late_ms_max").notNull(),
  updatedAt: time("updated_at").notNull(),
});

export type BalanceRow = typeof pointRoot.$inferSelect;
export type LedgerRow = typeof pointTransactions.$inferSelect;
export type TotalRow = typeof pointDailyTotals.$inferSelect;
