-- Reservations may be patched and belong to a campaign; points may be added and subtracted without a reservation; users
-- and campaigns are listed.
-- Nothing is copied and nobody waits: each ALTER says so, and would be refused otherwise. Each runs only where it has not
-- been done, so that a crash between two of them leaves a file that may run again.

set @statement = if(
  exists (
    select 1 from information_schema.columns
    where table_schema = database() and table_name = 'point_reservations' and column_name = 'campaign'
  ),
  'do 0',
  'alter table point_reservations
     add column campaign varchar(64) character set ascii collate ascii_bin null,
     -- what the client promised first, where it was patched since: the same request again is still a replay
     add column original_point_amount int null,
     add column original_execute_at datetime(3) null,
     algorithm = inplace, lock = none'
);
prepare migration from @statement;
execute migration;
deallocate prepare migration;

-- The status as lists need it. By the status itself, each claim and each grant would move an entry of the index, which
-- costs MySQL a third more for a grant; by these only the end does, and without a campaign nothing moves in its index.
set @statement = if(
  exists (
    select 1 from information_schema.columns
    where table_schema = database() and table_name = 'point_reservations' and column_name = 'listed_as'
  ),
  'do 0',
  'alter table point_reservations
     add column listed_as varchar(10) character set ascii collate ascii_bin
       generated always as (if(status in (''PENDING'', ''PROCESSING''), ''OPEN'', status)) virtual,
     add column campaign_listed_as varchar(10) character set ascii collate ascii_bin
       generated always as
         (if(campaign is null, null, if(status in (''PENDING'', ''PROCESSING''), ''OPEN'', status))) virtual,
     algorithm = inplace, lock = none'
);
prepare migration from @statement;
execute migration;
deallocate prepare migration;

set @statement = if(
  exists (
    select 1 from information_schema.statistics
    where table_schema = database() and table_name = 'point_reservations' and index_name = 'point_reservations_user'
  ),
  'do 0',
  'alter table point_reservations
     -- listReservations(): each list by itself, in the order of execute_at; findHoldings(): the sum still to come
     add key point_reservations_user (user_id, listed_as, execute_at, id, point_amount),
     -- listReservations() of one campaign; cancelCampaign(): what is open, and how many stand where
     add key point_reservations_campaign (campaign, campaign_listed_as, user_id, execute_at, id),
     algorithm = inplace, lock = none'
);
prepare migration from @statement;
execute migration;
deallocate prepare migration;

set @statement = if(
  exists (
    select 1 from information_schema.statistics
    where table_schema = database() and table_name = 'point_transactions' and index_name = 'point_transactions_user'
  ),
  'do 0',
  'alter table point_transactions
     -- a direct change has a longer key than a reservation
     modify idempotency_key varchar(120) character set ascii collate ascii_bin not null,
     -- a subtraction is a negative entry; a check that forbids 0 would copy the table
     drop constraint point_transactions_point_amount_positive,
     -- listTransactions(): newest first; findBalanceAt(): the sum until a time, from the index alone
     add key point_transactions_user (user_id, created_at, id, point_amount),
     algorithm = inplace, lock = none'
);
prepare migration from @statement;
execute migration;
deallocate prepare migration;
