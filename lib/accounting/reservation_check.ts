import type { Connection, Database } from "../database.ts";
import { AFTER_ALL, type CheckedPage, PAGE, runPage, WALK_PAGE } from "./check.ts";
import type { Difference } from "./difference.ts";
import { findOrphanEntries, findReservationMismatches, GRANTS } from "./mismatch_queries.ts";
import { findSetAside, SET_ASIDE, setAsideValues } from "./overdue_check.ts";
import { ID_PREFIX, RESERVATION_HASH } from "./sum_repository.ts";

interface CheckOptions {
  after: string;
  /** False: compares only reservations whose fingerprint differs from that of the counted grants. */
  isFull: boolean;
  leaseMs: number;
}

/** Compares each DONE reservation of a page with its ledger entry, and finds open ones that were set aside. */
export function checkReservations(database: Database, options: CheckOptions): Promise<CheckedPage<string>> {
  const { after, isFull, leaseMs } = options;
  return runPage(database, async (connection) => {
    const limit = isFull ? PAGE : WALK_PAGE;
    const [page] = await connection.select<{ last: string | null; walked: number }>(
      `/* page_of_reservations */ select max(id) last, count(*) walked
       from (select id from point_reservations where id > ? order by id limit ?) page`,
      [after, limit],
    );
    if (!page?.last) return { next: undefined, count: 0, differences: [] };
    const isLast = page.walked < limit;
    if (isFull) {
      const range = { where: "r.id > ? and r.id <= ?", values: [after, page.last] };
      const differences: Difference[] = [
        ...(await findReservationMismatches(connection, range)),
        ...(await findSetAside(connection, { ...range, leaseMs })),
      ];
      return { next: isLast ? undefined : page.last, count: page.walked, differences };
    }
    // A page ends where a prefix ends.
    const upTo = isLast ? AFTER_ALL : page.last.slice(0, ID_PREFIX) + AFTER_ALL;
    return {
      next: isLast ? undefined : upTo,
      ...(await compareFingerprints(connection, { after, upTo, leaseMs })),
    };
  });
}

async function compareFingerprints(
  connection: Connection,
  { after, upTo, leaseMs }: { after: string; upTo: string; leaseMs: number },
): Promise<Omit<CheckedPage<string>, "next">> {
  type Row = { prefix: string; walked: number; isChanged: 0 | 1; aside: number | string };
  const found = await connection.select<Row>(
    `/* find_changed_reservations */ select * from (
       select done.prefix, done.walked, done.aside,
         done.entries <> coalesce(counted.entries, 0)
           or (done.entries > 0 and done.fingerprint <> counted.fingerprint) isChanged
       from (
         select left(r.id, ${ID_PREFIX}) prefix, count(*) walked, sum(r.status = 'DONE') entries,
           bit_xor(if(r.status = 'DONE', ${RESERVATION_HASH}, null)) fingerprint, sum(coalesce(${SET_ASIDE}, 0)) aside
         from point_reservations r force index (primary) where r.id > ? and r.id <= ? group by prefix
       ) done
       left join point_reservation_totals counted on counted.id_prefix = done.prefix
         and counted.generation = (select generation from point_aggregation where id = 1)
     ) prefixes where isChanged or aside > 0`,
    [...setAsideValues(leaseMs), after, upTo],
  );
  const changed = found.filter(({ isChanged }) => isChanged);
  const count = changed.reduce((sum, { walked }) => sum + walked, 0);
  const range = { where: "r.id > ? and r.id <= ?", values: [after, upTo] };
  const differences: Difference[] = [];
  if (changed.length > 0) {
    const some = {
      where: `${range.where} and left(r.id, ${ID_PREFIX}) in (?)`,
      values: [...range.values, changed.map(({ prefix }) => prefix)],
    };
    differences.push(...(await findReservationMismatches(connection, some)));
    // A reservation that is no longer DONE: its entry was right when it was counted.
    differences.push(...(await findOrphanEntries(connection, { from: GRANTS, ...some })));
  }
  if (found.some(({ aside }) => Number(aside) > 0)) {
    differences.push(...(await findSetAside(connection, { ...range, leaseMs })));
  }
  return { count, differences };
}
