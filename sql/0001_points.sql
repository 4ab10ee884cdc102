-- Reservations become points: balances, reservations, ledger.
-- Text keys are ASCII with a binary collation: with the default one `User1` and `user1` would be one account.
-- Times are DATETIME(3) in UTC: a TIMESTAMP rounds milliseconds away, so a grant could come early, and ends in 2038.
-- Every statement may run again: a crash in the middle of this file leaves some of them done.

create table if not exists point_root (
  user_id varchar(20) character set ascii collate ascii_bin not null,
  point_num bigint not null,
  created_at datetime(3) not null default current_timestamp(3),
  updated_at datetime(3) not null default current_timestamp(3) on update current_timestamp(3),
  -- addPointsIdempotent(): the upsert of a balance; findBalance(): what a user has
  primary key (user_id),
  constraint point_root_user_id_filled check (user_id <> ''),
  constraint point_root_point_num_not_negative check (point_num >= 0)
) engine = InnoDB default character set ascii collate ascii_bin;

create table if not exists point_reservations (
  id char(36) character set ascii collate ascii_bin not null,
  user_id varchar(20) character set ascii collate ascii_bin not null,
  point_amount int not null,
  execute_at datetime(3) not null,
  status varchar(10) character set ascii collate ascii_bin not null default 'PENDING',
  idempotency_key varchar(100) character set ascii collate ascii_bin not null,
  -- when the scheduler must look at the row next: execute_at at first, the end of the lease while PROCESSING,
  -- the time of the next try after a failure, null once the reservation is over
  scan_at datetime(3) null,
  attempts int not null default 0,
  last_error varchar(500) character set utf8mb4 null,
  created_at datetime(3) not null default current_timestamp(3),
  updated_at datetime(3) not null default current_timestamp(3) on update current_timestamp(3),
  -- lockReservations(), markDone(), findReservation(): rows by their ids
  primary key (id),
  -- createReservations(): the second request with one key finds the first; the index decides, not a SELECT before it
  unique key point_reservations_idempotency_key (idempotency_key),
  -- claimDue(), msUntilNextScan(): what is due, in order; without it a claim would lock every candidate row
  key point_reservations_scan_at (scan_at, id),
  constraint point_reservations_user_id_filled check (user_id <> ''),
  constraint point_reservations_point_amount_positive check (point_amount > 0),
  constraint point_reservations_attempts_not_negative check (attempts >= 0),
  constraint point_reservations_status_known
    check (status in ('PENDING', 'PROCESSING', 'DONE', 'FAILED', 'CANCELLED')),
  -- a reservation that is not over is always looked at again, one that is over never
  constraint point_reservations_scan_at_until_over
    check ((scan_at is not null) = (status in ('PENDING', 'PROCESSING')))
) engine = InnoDB default character set ascii collate ascii_bin;

create table if not exists point_transactions (
  id char(36) character set ascii collate ascii_bin not null,
  idempotency_key varchar(100) character set ascii collate ascii_bin not null,
  user_id varchar(20) character set ascii collate ascii_bin not null,
  point_amount int not null,
  created_at datetime(3) not null default current_timestamp(3),
  primary key (id),
  -- addPointsIdempotent(): the second grant of one key fails; findReservation(): when a reservation was granted
  unique key point_transactions_idempotency_key (idempotency_key),
  constraint point_transactions_user_id_filled check (user_id <> ''),
  constraint point_transactions_point_amount_positive check (point_amount > 0)
) engine = InnoDB default character set ascii collate ascii_bin;
