import type { TotalRow } from "../schema.ts";

/** The columns of a daily total, in output order. */
export const TOTAL_COLUMNS = [
  "day",
  "kind",
  "campaign",
  "entries",
  "points",
  "users",
  "late_ms_mean",
  "late_ms_max",
] as const;

/** A daily total in its output form. */
export function dailyTotalOf(row: TotalRow) {
  const isGrant = row.kind === "grant" && row.entries > 0n;
  return {
    day: row.day,
    kind: row.kind,
    campaign: row.campaign === "" ? null : row.campaign,
    entries: Number(row.entries),
    points: row.points,
    users: Number(row.users),
    late_ms_mean: isGrant ? Number(row.lateMsSum / row.entries) : null,
    late_ms_max: isGrant ? Number(row.lateMsMax) : null,
  };
}
export type DailyTotal = ReturnType<typeof dailyTotalOf>;
