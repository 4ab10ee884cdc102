import type { Database } from "../database.ts";
import { type CheckedPage, PAGE, runPage } from "./check.ts";
import type { OverdueReservation } from "./difference.ts";

/** After this time an open reservation is overdue, in milliseconds: longer than a burst of a million takes. */
export const OVERDUE_MS = 300_000;
/** The longest backoff after a failed attempt, in milliseconds: `RETRY` of worker.ts. */
const RETRY_MS = 3_600_000;

/** A position in a walk over the open reservations. */
export interface OpenPosition {
  scanAt: Date;
  id: string;
}

/** Finds the overdue reservations of a page. */
export function checkOverdue(
  database: Database,
  { after, leaseMs }: { after: OpenPosition; leaseMs: number },
): Promise<CheckedPage<OpenPosition>> {
  return runPage(database, async ({ select }) => {
    const overdue = OVERDUE_MS * 1_000;
    const rows = await select<Omit<OverdueReservation, "kind"> & { scanAt: Date }>(
      `/* check_overdue */
       select id reservation_id, user_id, status, execute_at, attempts, last_error, scan_at scanAt
       from point_reservations force index (point_reservations_scan_at)
       where scan_at >= ? and (scan_at > ? or id > ?) and scan_at <= now(3) + interval ? microsecond
         and greatest(execute_at, created_at) <= now(3) - interval ? microsecond
         -- a FAILED reservation that an operator has just retried is not overdue
         and not (attempts = 0 and last_error is not null and status = 'PROCESSING')
         and not (attempts = 0 and status = 'PENDING' and scan_at > now(3) - interval ? microsecond)
       order by scan_at, id limit ?`,
      [after.scanAt, after.scanAt, after.id, (leaseMs + RETRY_MS) * 1_000, overdue, overdue, PAGE],
    );
    const last = rows.at(-1);
    return {
      next: last && rows.length === PAGE ? { scanAt: last.scanAt, id: last.reservation_id } : undefined,
      count: rows.length,
      differences: rows.map(({ scanAt: _, ...row }) => ({ kind: "overdue", ...row })),
    };
  });
}
