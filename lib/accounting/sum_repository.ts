import type { Transaction } from "../database.ts";

// What the counted entries add up to: their points by user, and a fingerprint of the grants by reservation. A reconciliation
// compares balances and DONE reservations with these sums, and looks at the ledger only if they differ. The sums do not depend
// on any clock: whatever changed a row, and whenever, the two sides differ.

/** The number of first characters of a reservation's id that the fingerprints are grouped by: with UUIDs v7, about 4 s. */
export const ID_PREFIX = 10;

/**
 * SQL: 64 bits of a hash of some columns. Not a CRC: the XOR of CRCs does not change if two rows swap a value. Not MD5 or SHA-1:
 * MySQL 9.7 has neither.
 */
export function hashOf(...columns: string[]): string {
  return `cast(conv(left(sha2(concat_ws(' ', ${columns.join(", ")}), 256), 16), 16, 10) as unsigned)`;
}

/** SQL: the hash of a grant in the ledger. */
const ENTRY_HASH = hashOf("reservation_id", "user_id", "point_amount", "idempotency_key");
/** SQL: the hash of a reservation; equal to that of its grant. */
export const RESERVATION_HASH = hashOf("id", "user_id", "point_amount", "idempotency_key");

export interface SumOptions {
  /** SQL: the index and the condition that find the entries. */
  index: string;
  where: string;
  values: unknown[];
  /** Subtracts the entries, which were added before. */
  isSubtracted?: boolean;
}

/** Adds entries to the sums of a generation. The transaction must be the one that marks the entries, and has locked them. */
export async function addToSums(
  { execute }: Transaction,
  generation: number,
  { index, where, values, isSubtracted = false }: SumOptions,
): Promise<void> {
  const sign = isSubtracted ? "-" : "";
  const from = `from point_transactions force index (${index}) where ${where}`;
  // In the order of the keys: two transactions that lock sums in different orders would deadlock.
  await execute(
    `/* add_to_user_totals */ insert into point_user_totals (generation, user_id, points)
     select ?, user_id, ${sign}sum(point_amount) ${from} group by user_id order by user_id
     on duplicate key update points = points + values(points)`,
    [generation, ...values],
  );
  await execute(
    `/* add_to_reservation_totals */ insert into point_reservation_totals (generation, id_prefix, entries, fingerprint)
     select ?, left(reservation_id, ${ID_PREFIX}) prefix, ${sign}count(*), bit_xor(${ENTRY_HASH})
     ${from} and kind = 'grant' group by prefix order by prefix
     on duplicate key update entries = entries + values(entries), fingerprint = fingerprint ^ values(fingerprint)`,
    [generation, ...values],
  );
}

/** Records entries that do not fit their reservations. */
export async function addSuspects({ execute }: Transaction, ids: readonly string[]): Promise<void> {
  if (ids.length === 0) return;
  await execute(
    `/* add_suspects */ insert into point_suspects (transaction_id) values ?
     on duplicate key update transaction_id = values(transaction_id)`,
    [ids.toSorted().map((id) => [id])],
  );
}
