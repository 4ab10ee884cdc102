-- Balances, reservations, the ledger, daily totals and the runs that check them.
-- Text keys are ASCII with a binary collation: with the default collation `User1` and `user1` would be one account.
-- Times are DATETIME(3) in UTC: a TIMESTAMP without fraction rounds, so a grant could be early, and it ends in 2038.

create table point_root (
  user_id varchar(20) character set ascii collate ascii_bin not null,
  point_num bigint not null,
  created_at datetime(3) not null default current_timestamp(3),
  updated_at datetime(3) not null default current_timestamp(3) on update current_timestamp(3),
  -- addPointsIdempotent(): the upsert of a balance; findBalance(): the balance of a user
  primary key (user_id),
  constraint point_root_user_id_filled check (user_id <> ''),
  constraint point_root_point_num_not_negative check (point_num >= 0)
) engine = InnoDB default character set ascii collate ascii_bin;

create table point_reservations (
  id char(36) character set ascii collate ascii_bin not null,
  user_id varchar(20) character set ascii collate ascii_bin not null,
  point_amount int not null,
  execute_at datetime(3) not null,
  status varchar(10) character set ascii collate ascii_bin not null default 'PENDING',
  idempotency_key varchar(100) character set ascii collate ascii_bin not null,
  campaign varchar(64) character set ascii collate ascii_bin null,
  -- the original values, if the reservation was patched: the original request sent again is still a replay
  original_point_amount int null,
  original_execute_at datetime(3) null,
  -- when a client or an operator last changed it; null: never. A grant cannot be late before that
  changed_at datetime(3) null,
  -- when the scheduler must process the row next: first execute_at, while PROCESSING the end of the lease,
  -- after a failure the time of the next attempt, null once the reservation is over; never set to a time in the past:
  -- scans start from the oldest one that is open
  scan_at datetime(3) null
    default (if(status in ('PENDING', 'PROCESSING'), greatest(execute_at, now(3)), null)),
  attempts int not null default 0,
  last_error varchar(500) character set utf8mb4 null,
  created_at datetime(3) not null default current_timestamp(3),
  updated_at datetime(3) not null default current_timestamp(3) on update current_timestamp(3),
  -- The status for lists. With the status itself in their indexes, each claim and each grant would move an index entry,
  -- which made a grant a third slower on MySQL. With these columns only the end of a reservation moves one; without a
  -- campaign, nothing moves in the index of campaigns.
  listed_as varchar(10) character set ascii collate ascii_bin
    generated always as (if(status in ('PENDING', 'PROCESSING'), 'OPEN', status)) virtual,
  campaign_listed_as varchar(10) character set ascii collate ascii_bin
    generated always as
      (if(campaign is null, null, if(status in ('PENDING', 'PROCESSING'), 'OPEN', status))) virtual,
  -- lockReservations(), markDone(), findReservation(), listTransactions(): rows by their ids
  primary key (id),
  -- createReservations(): the second request with a key finds the first; the index decides, not a SELECT before it
  unique key point_reservations_idempotency_key (idempotency_key),
  -- claimDue(), findNextScan(), findOldestOpen(): open reservations, in order; without it a claim would lock every
  -- candidate row
  key point_reservations_scan_at (scan_at, id),
  -- listReservations(): each list in the order of execute_at; findHoldings(): the sum of open reservations
  key point_reservations_user (user_id, listed_as, execute_at, id, point_amount),
  -- listReservations() of a campaign; cancelCampaign(): open reservations, and the number in each state
  key point_reservations_campaign (campaign, campaign_listed_as, user_id, execute_at, id),
  constraint point_reservations_user_id_filled check (user_id <> ''),
  constraint point_reservations_point_amount_positive check (point_amount > 0),
  constraint point_reservations_attempts_not_negative check (attempts >= 0),
  constraint point_reservations_status_known
    check (status in ('PENDING', 'PROCESSING', 'DONE', 'FAILED', 'CANCELLED')),
  -- an open reservation is always scanned again, one that is over never
  constraint point_reservations_scan_at_until_over
    check ((scan_at is not null) = (status in ('PENDING', 'PROCESSING')))
) engine = InnoDB default character set ascii collate ascii_bin;

-- What the schedulers know about the scans; each of them writes it every 10 s.
create table point_scan_state (
  id tinyint not null default 1,
  -- the greatest time of MySQL's clock that a scheduler has seen: if it is ahead of now(3), the clock went back
  clock_at datetime(3) null,
  -- no open reservation has an earlier scan_at: a scheduler that starts, and the check for overdue reservations, need not
  -- look at what lies before it; null if that is unknown
  open_from datetime(3) null,
  primary key (id),
  constraint point_scan_state_one_row check (id = 1)
) engine = InnoDB default character set ascii collate ascii_bin;

insert into point_scan_state (id) values (1) on duplicate key update id = id;

create table point_transactions (
  id char(36) character set ascii collate ascii_bin not null,
  idempotency_key varchar(100) character set ascii collate ascii_bin not null,
  user_id varchar(20) character set ascii collate ascii_bin not null,
  -- negative if points are subtracted
  point_amount int not null,
  kind varchar(7) character set ascii collate ascii_bin not null,
  -- the reservation that was granted; null for a direct change
  reservation_id char(36) character set ascii collate ascii_bin null,
  created_at datetime(3) not null default current_timestamp(3),
  -- The generation of the totals that count the entry; 0 if none does. The default is 0: a new entry will be counted,
  -- however late it commits and whatever its time.
  aggregated_in int not null default 0,
  -- additions and subtractions share their keys; the keys of grants are separate
  is_grant tinyint generated always as (if(kind = 'grant', 1, 0)) virtual,
  primary key (id),
  -- addPointsIdempotent(): a second grant of a key fails; findReservation(): the grant of a reservation
  unique key point_transactions_idempotency_key (idempotency_key, is_grant),
  -- listTransactions(): newest first; findBalanceAt(): the sum up to a time, from the index alone
  key point_transactions_user (user_id, created_at, id, point_amount),
  -- countEntries(), checkUncounted(): uncounted entries; checkDay(): the entries that the totals of a day count
  key point_transactions_aggregated (aggregated_in, created_at),
  constraint point_transactions_user_id_filled check (user_id <> ''),
  constraint point_transactions_kind_known check (kind in ('grant', 'add', 'sub')),
  constraint point_transactions_reservation_id_of_grant check ((kind = 'grant') = (reservation_id is not null)),
  constraint point_transactions_point_amount_signed
    check (point_amount <> 0 and (point_amount < 0) = (kind = 'sub'))
) engine = InnoDB default character set ascii collate ascii_bin;

create table point_aggregation (
  id tinyint not null default 1,
  -- the generation of the valid totals; those of other generations were voided by `bun run aggregate --rebuild`
  generation int not null default 1,
  -- the time zone of the days of the totals; empty before the first aggregation
  time_zone varchar(64) character set ascii collate ascii_bin not null default '',
  primary key (id),
  constraint point_aggregation_one_row check (id = 1)
) engine = InnoDB default character set ascii collate ascii_bin;

insert into point_aggregation (id) values (1) on duplicate key update id = id;

-- The scheduler that has the turn to do the accounting. Not in the row above, which is locked while a day is reset. Each
-- scheduler decides by a clock of its own how long it has seen the same numbers: MySQL's clock may jump.
create table point_aggregation_turns (
  id tinyint not null default 1,
  -- the turn; null if no scheduler has it
  held_by char(36) character set ascii collate ascii_bin null,
  -- counts the signs of life: if neither it nor held_by changes for a minute, the holder is dead
  beats bigint not null default 0,
  -- counts the finished runs: if it does not change for the interval, the next run is due
  runs bigint not null default 0,
  -- 1: due at once, since a run did not finish, or totals were voided
  is_wanted tinyint not null default 0,
  -- for people, by MySQL's clock: when the last run finished, and when an aggregation last counted all entries
  finished_at datetime(3) null,
  aggregated_at datetime(3) null,
  primary key (id),
  constraint point_aggregation_turns_one_row check (id = 1)
) engine = InnoDB default character set ascii collate ascii_bin;

insert into point_aggregation_turns (id) values (1) on duplicate key update id = id;

create table point_daily_totals (
  generation int not null,
  day date not null,
  kind varchar(7) character set ascii collate ascii_bin not null,
  -- empty if there is no campaign
  campaign varchar(64) character set ascii collate ascii_bin not null,
  entries bigint not null default 0,
  points bigint not null default 0,
  users bigint not null default 0,
  -- for grants; 0 for other kinds. The sum is exact whatever the clocks say
  late_ms_sum decimal(38,0) not null default 0,
  late_ms_max bigint not null default 0,
  -- countEntries(): the row to add to; findTotals(): the days in order
  primary key (generation, day, kind, campaign),
  constraint point_daily_totals_kind_known check (kind in ('grant', 'add', 'sub')),
  constraint point_daily_totals_entries_not_negative check (entries >= 0 and users >= 0)
) engine = InnoDB default character set ascii collate ascii_bin;

create table point_daily_users (
  generation int not null,
  day date not null,
  kind varchar(7) character set ascii collate ascii_bin not null,
  campaign varchar(64) character set ascii collate ascii_bin not null,
  user_id varchar(20) character set ascii collate ascii_bin not null,
  -- countEntries(): the users that a total has already counted
  primary key (generation, day, kind, campaign, user_id)
) engine = InnoDB default character set ascii collate ascii_bin;

-- What the counted entries add up to, for reconciliations: they look only at what differs from it. Kept in the transaction
-- that counts the entries.
create table point_user_totals (
  generation int not null,
  user_id varchar(20) character set ascii collate ascii_bin not null,
  points bigint not null,
  -- addToSums(): the row to add to; checkBalances(): the users of a page
  primary key (generation, user_id)
) engine = InnoDB default character set ascii collate ascii_bin;

-- The same for grants, by the first characters of the ids of their reservations: the reservations of about 4 s.
create table point_reservation_totals (
  generation int not null,
  id_prefix varchar(10) character set ascii collate ascii_bin not null,
  entries bigint not null,
  -- XOR of 64 bits of a hash of each grant: equal to that of the DONE reservations if each has its entry
  fingerprint bigint unsigned not null,
  -- addToSums(): the row to add to; checkReservations(): the reservations of a page
  primary key (generation, id_prefix)
) engine = InnoDB default character set ascii collate ascii_bin;

-- Entries that did not fit their reservation when they were counted. Reconciliations delete those that do.
create table point_suspects (
  transaction_id char(36) character set ascii collate ascii_bin not null,
  -- checkSuspects(): page by page
  primary key (transaction_id)
) engine = InnoDB default character set ascii collate ascii_bin;

-- The days whose totals a reconciliation has found right, and a fingerprint of these totals.
create table point_checked_days (
  generation int not null,
  day date not null,
  fingerprint bigint unsigned not null,
  -- listDays(): the days that have not changed
  primary key (generation, day)
) engine = InnoDB default character set ascii collate ascii_bin;

create table point_reconciliations (
  -- counts up: clocks may jump, so the last reconciliation is the one with the greatest number
  number bigint not null,
  -- for people, by MySQL's clock
  started_at datetime(3) not null,
  finished_at datetime(3) not null default current_timestamp(3),
  is_full tinyint not null,
  users bigint not null,
  reservations bigint not null,
  entries bigint not null,
  days bigint not null,
  differences bigint not null,
  -- findAccountingState(): the result of the last run
  primary key (number),
  -- mustBeFull(): the result of the last full run
  key point_reconciliations_full (is_full, number)
) engine = InnoDB default character set ascii collate ascii_bin;

create table point_repairs (
  id char(36) character set ascii collate ascii_bin not null,
  user_id varchar(20) character set ascii collate ascii_bin not null,
  -- null if there was no balance
  point_num_before bigint null,
  point_num_after bigint not null,
  repaired_by varchar(200) character set utf8mb4 not null,
  repaired_at datetime(3) not null default current_timestamp(3),
  primary key (id),
  -- for operators: the repairs of a user
  key point_repairs_user (user_id, repaired_at)
) engine = InnoDB default character set ascii collate ascii_bin;

-- For /ready: a row that is inserted and deleted in one transaction, so that its COMMIT is a real one. Always empty.
create table point_trials (
  id char(36) character set ascii collate ascii_bin not null,
  primary key (id)
) engine = InnoDB default character set ascii collate ascii_bin;
