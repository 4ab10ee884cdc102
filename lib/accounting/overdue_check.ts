import type { Connection, Database } from "../database.ts";
import { LONGEST_RETRY_MS } from "../reservations/claim_repository.ts";
import { grantableAt } from "../schema.ts";
import { type CheckedPage, PAGE, runPage } from "./check.ts";
import type { OverdueReservation } from "./difference.ts";

/** After this time an open reservation is overdue, in milliseconds: longer than a burst of a million takes. */
export const OVERDUE_MS = 300_000;

/** SQL: the columns of an overdue reservation `r`. */
const COLUMNS = "r.id reservation_id, r.user_id, r.status, r.execute_at, r.attempts, r.last_error";

/** A position in a walk over the open reservations. */
export interface OpenPosition {
  scanAt: Date;
  id: string;
}

/** Finds the overdue reservations of a page. A reservation is not late before it was made or last changed. */
export function checkOverdue(
  database: Database,
  { after, leaseMs }: { after: OpenPosition; leaseMs: number },
): Promise<CheckedPage<OpenPosition>> {
  return runPage(database, async ({ select }) => {
    const rows = await select<Omit<OverdueReservation, "kind"> & { scanAt: Date }>(
      `/* check_overdue */ select ${COLUMNS}, r.scan_at scanAt
       from point_reservations r force index (point_reservations_scan_at)
       where r.scan_at >= ? and (r.scan_at > ? or r.id > ?) and r.scan_at <= now(3) + interval ? microsecond
         and ${grantableAt("r.")} <= now(3) - interval ? microsecond
       order by r.scan_at, r.id limit ?`,
      [after.scanAt, after.scanAt, after.id, (leaseMs + LONGEST_RETRY_MS) * 1_000, OVERDUE_MS * 1_000, PAGE],
    );
    const last = rows.at(-1);
    return {
      next: last && rows.length === PAGE ? { scanAt: last.scanAt, id: last.reservation_id } : undefined,
      count: rows.length,
      differences: rows.map(({ scanAt: _, ...row }) => ({ kind: "overdue", ...row })),
    };
  });
}

/** The earliest `scan_at` of an open reservation, as the schedulers know it; null if they do not. */
export async function findOpenFrom(database: Database): Promise<Date | null> {
  const [state] = await database.run(({ select }) =>
    select<{ openFrom: Date | null }>(
      `/* find_open_from */ select open_from openFrom from point_scan_state where id = 1`,
    ),
  );
  return state?.openFrom ?? null;
}

// No index finds a due reservation that a clock ahead of time has set aside: its `scan_at` lies among those of the future. But
// the check of reservations reads all rows anyway.

/** SQL: a due reservation `r` is scanned later than any lease or backoff allows. With `setAsideValues()`. */
export const SET_ASIDE =
  "(r.scan_at > now(3) + interval ? microsecond and r.execute_at <= now(3) - interval ? microsecond)";

export function setAsideValues(leaseMs: number): number[] {
  return [(leaseMs + LONGEST_RETRY_MS) * 1_000, OVERDUE_MS * 1_000];
}

/** The reservations `r` that were set aside. */
export async function findSetAside(
  { select }: Connection,
  { where, values, leaseMs }: { where: string; values: unknown[]; leaseMs: number },
): Promise<OverdueReservation[]> {
  const rows = await select<Omit<OverdueReservation, "kind">>(
    `/* find_set_aside_due */ select ${COLUMNS} from point_reservations r force index (primary)
     where ${where} and ${SET_ASIDE}`,
    [...values, ...setAsideValues(leaseMs)],
  );
  return rows.map((row) => ({ kind: "overdue", ...row }));
}
