-- The ledger is added up by day, and compared with balances, reservations and these totals.
-- Nothing is copied and nobody waits: each ALTER says so, and would be refused otherwise. Each statement may run again.

create table if not exists point_aggregation (
  id tinyint not null default 1,
  -- the totals that count: those of other generations are of another time zone, or were to be made anew
  generation int not null default 1,
  -- whose days the totals are of; empty until something is counted
  time_zone varchar(64) character set ascii collate ascii_bin not null default '',
  primary key (id),
  constraint point_aggregation_one_row check (id = 1)
) engine = InnoDB default character set ascii collate ascii_bin;

insert into point_aggregation (id) values (1) on duplicate key update id = id;

-- Whose turn it is to keep the books. Apart from the row above, which is locked for as long as a day is set back.
create table if not exists point_aggregation_turns (
  id tinyint not null default 1,
  -- one scheduler at a time: until then it is the turn of this one
  held_by char(36) character set ascii collate ascii_bin null,
  held_until datetime(3) not null default '1970-01-01 00:00:00.000',
  finished_at datetime(3) null,
  -- when all that was there had been counted
  aggregated_at datetime(3) null,
  primary key (id),
  constraint point_aggregation_turns_one_row check (id = 1)
) engine = InnoDB default character set ascii collate ascii_bin;

insert into point_aggregation_turns (id) values (1) on duplicate key update id = id;

create table if not exists point_daily_totals (
  generation int not null,
  day date not null,
  kind varchar(5) character set ascii collate ascii_bin not null,
  -- empty where there is none
  campaign varchar(64) character set ascii collate ascii_bin not null,
  entries bigint not null default 0,
  points bigint not null default 0,
  users bigint not null default 0,
  -- of grants; 0 for the others
  late_ms_sum bigint not null default 0,
  late_ms_max bigint not null default 0,
  updated_at datetime(3) not null default current_timestamp(3) on update current_timestamp(3),
  -- countEntries(): one row to add to; findTotals(): days in their order
  primary key (generation, day, kind, campaign),
  constraint point_daily_totals_kind_known check (kind in ('grant', 'add', 'sub')),
  constraint point_daily_totals_entries_not_negative check (entries >= 0 and users >= 0)
) engine = InnoDB default character set ascii collate ascii_bin;

create table if not exists point_daily_users (
  generation int not null,
  day date not null,
  kind varchar(5) character set ascii collate ascii_bin not null,
  campaign varchar(64) character set ascii collate ascii_bin not null,
  user_id varchar(20) character set ascii collate ascii_bin not null,
  -- countEntries(): whom a total has counted already
  primary key (generation, day, kind, campaign, user_id)
) engine = InnoDB default character set ascii collate ascii_bin;

create table if not exists point_reconciliations (
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
  -- findBooksState(): how the last run ended
  key point_reconciliations_finished (finished_at)
) engine = InnoDB default character set ascii collate ascii_bin;

create table if not exists point_repairs (
  id char(36) character set ascii collate ascii_bin not null,
  user_id varchar(20) character set ascii collate ascii_bin not null,
  -- null where there was no balance
  point_num_before bigint null,
  point_num_after bigint not null,
  repaired_by varchar(200) character set utf8mb4 not null,
  repaired_at datetime(3) not null default current_timestamp(3),
  primary key (id),
  -- "who has changed my balance?"
  key point_repairs_user (user_id, repaired_at)
) engine = InnoDB default character set ascii collate ascii_bin;

-- The generation whose totals hold the entry; 0: none. A default, so that whoever adds an entry, also a process of the version
-- before, adds one that is still to be counted, however late it commits and whatever its time.
set @statement = if(
  exists (
    select 1 from information_schema.columns
    where table_schema = database() and table_name = 'point_transactions' and column_name = 'aggregated_in'
  ),
  'do 0',
  'alter table point_transactions add column aggregated_in int not null default 0, algorithm = instant'
);
prepare migration from @statement;
execute migration;
deallocate prepare migration;

set @statement = if(
  exists (
    select 1 from information_schema.statistics
    where table_schema = database() and table_name = 'point_transactions'
      and index_name = 'point_transactions_aggregated'
  ),
  'do 0',
  'alter table point_transactions
     -- countEntries(): what no total holds yet; checkDay(): what the totals of a day hold; checkRecentEntries()
     add key point_transactions_aggregated (aggregated_in, created_at),
     algorithm = inplace, lock = none'
);
prepare migration from @statement;
execute migration;
deallocate prepare migration;
