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
  -- when the scheduler must process the row next: first execute_at, while PROCESSING the end of the lease,
  -- after a failure the time of the next attempt, null once the reservation is over
  scan_at datetime(3) null,
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
  -- claimDue(), findNextScan(): due reservations, in order; without it a claim would lock every candidate row
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
  -- countEntries(): uncounted entries; checkDay(): the entries that the totals of a day count; checkRecentEntries()
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

-- The scheduler that has the turn to do the accounting. Not in the row above, which is locked while a day is reset.
create table point_aggregation_turns (
  id tinyint not null default 1,
  -- one scheduler at a time; it holds the turn until held_until
  held_by char(36) character set ascii collate ascii_bin null,
  held_until datetime(3) not null default '1970-01-01 00:00:00.000',
  finished_at datetime(3) null,
  -- when an aggregation last counted all entries
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
  -- for grants; 0 for other kinds
  late_ms_sum bigint not null default 0,
  late_ms_max bigint not null default 0,
  updated_at datetime(3) not null default current_timestamp(3) on update current_timestamp(3),
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

create table point_reconciliations (
  id char(36) character set ascii collate ascii_bin not null,
  started_at datetime(3) not null,
  finished_at datetime(3) not null default current_timestamp(3),
  is_full tinyint not null,
  users bigint not null,
  reservations bigint not null,
  entries bigint not null,
  days bigint not null,
  differences bigint not null,
  primary key (id),
  -- findAccountingState(): the result of the last run
  key point_reconciliations_finished (finished_at)
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
