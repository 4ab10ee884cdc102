// Ids and times of the examples. The name of an id gives the state of its reservation.

export const PENDING_ID = "01a20990-e435-753e-b29b-6ac429ed0c37";
export const PROCESSING_ID = "01a20990-e436-7a01-9c55-1f0c6e1b7d02";
export const DONE_ID = "01a20990-e437-7c44-8a3e-94b5f7a2c603";
export const FAILED_ID = "01a20990-e438-7e19-b7d0-2c8e5d3f9a04";
export const CANCELLED_ID = "01a20990-e439-71b2-a6f4-7d9c0b8e1505";
export const UNKNOWN_ID = "01a20990-e43a-7000-8000-000000000000";
/** The ledger entry of the reservation that is DONE. */
export const TRANSACTION_ID = "01a20990-f00d-7b3a-8e21-5a6c4d2e1f06";

export const FUTURE = "2029-02-22T13:59:00.000Z";
export const PAST = "2026-01-31T15:00:00.000Z";
/** When points were subtracted. */
export const SUBTRACTED = "2026-01-31T16:00:00.000Z";
/** When the examples that change a reservation are sent. */
export const NOW = "2026-02-01T00:00:00.000Z";

/** The content of a reservation. */
export const RESERVATION = {
  user_id: "TestUser01",
  point_amount: 100,
  execute_at: "2029-02-22T22:59:00+09:00",
};
