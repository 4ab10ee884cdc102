import { sql } from "drizzle-orm";
import {
  bigint,
  char,
  date,
  datetime,
  decimal,
  int,
  mysqlTable,
  tinyint,
  varchar,
} from "drizzle-orm/mysql-core";

// The tables of `sql/`, which also defines the binary collation of the text keys, the checks and the defaults.

/** The states of a reservation. */
export const RESERVATION_STATUSES = ["PENDING", "PROCESSING", "DONE", "FAILED", "CANCELLED"] as const;
export type ReservationStatus = (typeof RESERVATION_STATUSES)[number];

/** The states that lists use: `OPEN` is PENDING or PROCESSING. */
export const LISTED_AS = ["OPEN", "DONE", "FAILED", "CANCELLED"] as const;

/** The origin of a ledger entry: the grant of a reservation, or a direct change. */
export const ENTRY_KINDS = ["grant", "add", "sub"] as const;
export type EntryKind = (typeof ENTRY_KINDS)[number];

/** A DATETIME(3) in UTC. */
function time(name: string) {
  return datetime(name, { mode: "date", fsp: 3 });
}

function text(name: string, length: number) {
  return varchar(name, { length });
}

function whole(name: string) {
  return bigint(name, { mode: "bigint" });
}

/** Balances: one row per user who has ever received points. */
export const pointRoot = mysqlTable("point_root", {
  userId: text("user_id", 20).primaryKey(),
  pointNum: whole("point_num").notNull(),
  createdAt: time("created_at").notNull(),
  updatedAt: time("updated_at").notNull(),
});

/**
 * SQL: when a reservation could first be granted: at its time, but not before it was made or last changed. Lateness counts from it.
 *
 * @param table e.g. `r.`
 */
export function grantableAt(table = ""): string {
  return `greatest(${table}execute_at, ${table}created_at, coalesce(${table}changed_at, ${table}created_at))`;
}

/** Reservations, and when the scheduler must process each one next (`scan_at`). */
export const pointReservations = mysqlTable("point_reservations", {
  id: char("id", { length: 36 }).primaryKey(),
  userId: text("user_id", 20).notNull(),
  pointAmount: int("point_amount").notNull(),
  executeAt: time("execute_at").notNull(),
  status: varchar("status", { length: 10, enum: RESERVATION_STATUSES }).notNull(),
  idempotencyKey: text("idempotency_key", 100).notNull(),
  campaign: text("campaign", 64),
  /** The original values, if the reservation was patched. */
  originalPointAmount: int("original_point_amount"),
  originalExecuteAt: time("original_execute_at"),
  /** When a client or an operator last changed it; null: never. */
  changedAt: time("changed_at"),
  scanAt: time("scan_at"),
  attempts: int("attempts").notNull(),
  lastError: text("last_error", 500),
  createdAt: time("created_at").notNull(),
  updatedAt: time("updated_at").notNull(),
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

/** One row: the greatest time that MySQL's clock has shown, and the time before which no reservation is open. */
export const pointScanState = mysqlTable("point_scan_state", {
  id: tinyint("id").primaryKey(),
  clockAt: time("clock_at"),
  openFrom: time("open_from"),
});

/** The ledger: append only. */
export const pointTransactions = mysqlTable("point_transactions", {
  id: char("id", { length: 36 }).primaryKey(),
  idempotencyKey: text("idempotency_key", 100).notNull(),
  userId: text("user_id", 20).notNull(),
  /** Negative for a subtraction, never 0. */
  pointAmount: int("point_amount").notNull(),
  kind: varchar("kind", { length: 7, enum: ENTRY_KINDS }).notNull(),
  /** The reservation that was granted; null for a direct change. */
  reservationId: char("reservation_id", { length: 36 }),
  createdAt: time("created_at").notNull(),
  /** The generation of the totals that count the entry; 0 if none does. */
  aggregatedIn: int("aggregated_in").notNull(),
  /** Part of the key: a grant and a direct change may have the same `idempotency_key`. */
  isGrant: tinyint("is_grant").generatedAlwaysAs(sql`if(kind = 'grant', 1, 0)`, { mode: "virtual" }),
});

/** One row: the generation of the valid totals, and the time zone of their days. */
export const pointAggregation = mysqlTable("point_aggregation", {
  id: tinyint("id").primaryKey(),
  generation: int("generation").notNull(),
  timeZone: text("time_zone", 64).notNull(),
});

/** The sums of the entries of a day, kind and campaign. */
export const pointDailyTotals = mysqlTable("point_daily_totals", {
  generation: int("generation").notNull(),
  day: date("day", { mode: "string" }).notNull(),
  kind: varchar("kind", { length: 7, enum: ENTRY_KINDS }).notNull(),
  /** Empty if there is none. */
  campaign: text("campaign", 64).notNull(),
  entries: whole("entries").notNull(),
  points: whole("points").notNull(),
  users: whole("users").notNull(),
  lateMsSum: decimal("late_ms_sum", { precision: 38, scale: 0, mode: "bigint" }).notNull(),
  lateMsMax: whole("late_ms_max").notNull(),
});

export type BalanceRow = typeof pointRoot.$inferSelect;
export type ReservationRow = typeof pointReservations.$inferSelect;
export type LedgerRow = typeof pointTransactions.$inferSelect;
export type TotalRow = typeof pointDailyTotals.$inferSelect;
