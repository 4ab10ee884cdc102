// What each process writes, as statements that change no row: no id is empty. They need the same rights as the real ones, and
// wait for the same locks on tables, but never for a lock on a row. `lib/service/trial.ts` runs them.

const CREATE = {
  to: "reservations",
  sql: `/* try_create */ insert into point_reservations
      (id, user_id, point_amount, execute_at, scan_at, idempotency_key)
    select id, user_id, point_amount, execute_at, scan_at, idempotency_key from point_reservations where id = ''`,
};
const CLAIM = {
  to: "reservations",
  sql: "/* try_claim */ select id from point_reservations where id = '' for update skip locked",
};
const CHANGE = {
  to: "reservations",
  sql: "/* try_change */ update point_reservations set status = 'DONE', scan_at = null where id = ''",
};
const SCAN_STATE = {
  to: "the state of the scans",
  sql: "/* try_scan_state */ update point_scan_state set open_from = null where id = 0",
};
const ENTRY = {
  to: "the ledger",
  sql: `/* try_entry */ insert into point_transactions
      (id, idempotency_key, user_id, point_amount, kind, reservation_id)
    select id, idempotency_key, user_id, point_amount, kind, reservation_id from point_transactions where id = ''`,
};
const BALANCE = {
  to: "balances",
  sql: `/* try_balance */ insert into point_root (user_id, point_num)
    select user_id, point_num from point_root existing where user_id = ''
    on duplicate key update point_num = values(point_num)`,
};

/** The writes of the API: reservations, their changes, and changes of balances. */
export const API_TRIAL = [CREATE, CHANGE, ENTRY, BALANCE];
/** The writes of a scan. */
export const SCAN_TRIAL = [CLAIM, CHANGE, SCAN_STATE];
/** The writes of a grant. */
export const GRANT_TRIAL = [CLAIM, CHANGE, ENTRY, BALANCE];
