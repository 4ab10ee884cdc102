import type { Database } from "../database.ts";
import { LONGEST_RETRY_MS } from "./claim_repository.ts";
import { BEGINNING, isBefore, type ScanPosition } from "./scan_repository.ts";

/** The longest time that a claim may hold: the maximum of `LEASE_MS`. */
const LONGEST_LEASE_MS = 86_400_000;
/** How many reservations one statement reads and changes. */
const PAGE = 1_000;

/** What all schedulers know together. */
export interface ScanState {
  /** How far MySQL's clock was ahead of what it shows now, in milliseconds: more than 0 if it went back. */
  wasAheadMs: number;
  /** No open reservation was before it; undefined if that is unknown. */
  openFrom: ScanPosition | undefined;
}

export function findScanState(database: Database): Promise<ScanState> {
  return database.run(async ({ select }) => {
    const [row] = await select<{ wasAheadMs: number | string | null; openFrom: Date | null }>(
      `/* find_scan_state */ select timestampdiff(microsecond, now(3), clock_at) / 1000 wasAheadMs, open_from openFrom
       from point_scan_state where id = 1`,
    );
    return {
      wasAheadMs: Math.max(0, Number(row?.wasAheadMs ?? 0)),
      openFrom: row?.openFrom ? { scanAt: row.openFrom, id: "" } : undefined,
    };
  });
}

/**
 * Stores the clock and the scan position. Once the clock is known to have gone back, `open_from` is null until `restartClock()`: new
 * reservations may be before it.
 *
 * @param options.clockWas what the clock showed before it went back
 */
export function saveScanState(
  database: Database,
  { openFrom, clockWas }: { openFrom: ScanPosition; clockWas: Date | undefined },
): Promise<void> {
  const known = isBefore(BEGINNING, openFrom) ? openFrom.scanAt : null;
  return database.run(async ({ execute }) => {
    await execute(
      `/* save_scan_state */ update point_scan_state set
         clock_at = greatest(now(3), coalesce(clock_at, now(3)), coalesce(?, now(3))),
         open_from = if(clock_at > now(3) + interval 1 second or ? > now(3), null, ?)
       where id = 1`,
      [clockWas ?? null, known, known],
    );
  });
}

/** Accepts the present clock as right. */
export function restartClock(database: Database): Promise<void> {
  return database.run(async ({ execute }) => {
    await execute("/* restart_clock */ update point_scan_state set clock_at = now(3) where id = 1");
  });
}

// Further ahead than the reservation's own time and any wait that the program makes.
const IS_SET_ASIDE = `scan_at > greatest(execute_at, now(3) + interval
  case when status = 'PROCESSING' then ? when attempts > 0 then ${LONGEST_RETRY_MS * 1_000} else 0 end microsecond)`;

/**
 * Brings back the reservations that a wrong clock has set aside: a claim whose lease ends far ahead, a retry that is due far
 * ahead, or a reservation that was due at once. Those that are to wait stay as they are. Walks over what is due ahead page by
 * page; after a crash, the next call does the rest.
 *
 * @param options.leaseMs how long the claims of this scheduler hold
 * @param options.wasAheadMs how far the clock was ahead, in milliseconds
 * @returns how many it has brought back
 */
export async function releaseSetAside(
  database: Database,
  { leaseMs, wasAheadMs }: { leaseMs: number; wasAheadMs: number },
): Promise<number> {
  const leaseUs = leaseMs * 1_000;
  const withinUs = (wasAheadMs + LONGEST_LEASE_MS) * 1_000;
  let released = 0;
  let after = BEGINNING;
  for (;;) {
    const page = await database.run(({ select }) =>
      select<ScanPosition & { isSetAside: 0 | 1 }>(
        `/* find_set_aside */ select scan_at scanAt, id, ${IS_SET_ASIDE} isSetAside
         from point_reservations force index (point_reservations_scan_at)
         where (scan_at > ? or (scan_at = ? and id > ?))
           and scan_at > now(3) and scan_at <= now(3) + interval ? microsecond
         order by scan_at, id limit ?`,
        [leaseUs, after.scanAt, after.scanAt, after.id, withinUs, PAGE],
      ),
    );
    const ids = page.filter(({ isSetAside }) => isSetAside === 1).map(({ id }) => id);
    if (ids.length > 0) {
      const { affectedRows } = await database.run(({ execute }) =>
        execute(
          `/* release_set_aside */ update point_reservations
           set scan_at = greatest(execute_at, now(3) + interval if(status = 'PROCESSING', ?, 0) microsecond)
           where id in (?) and status in ('PENDING', 'PROCESSING') and ${IS_SET_ASIDE}`,
          // In the order in which the grant locks the rows.
          [leaseUs, ids.toSorted(), leaseUs],
        ),
      );
      released += affectedRows;
    }
    const last = page.at(-1);
    if (!last || page.length < PAGE) return released;
    after = last;
  }
}
