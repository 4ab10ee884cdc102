-- Reservations may be patched and belong to a campaign; points may be added and subtracted without a reservation; users
-- and campaigns are listed.
-- One ALTER for each table, which MySQL does wholly or not at all, and only where it has not been done: a crash between
-- the two leaves a file that may run again.

set @statement = if(
  exists (
    select 1 from information_schema.columns
    where table_schema = database() and table_name = 'point_reservations' and column_name = 'campaign'
  ),
  'do 0',
  'alter table point_reservations
     -- keys made for the rows of a bulk request are longer than a client''s own
     modify idempotency_key varchar(120) character set ascii collate ascii_bin not null,
     add column campaign varchar(64) character set ascii collate ascii_bin null,
     -- what the client promised first, where it was patched since: the same request again is still a replay
     add column original_point_amount int null,
     add column original_execute_at datetime(3) null,
     -- the status as lists need it: by the status itself, each claim and each grant would move an entry of the index,
     -- which costs MySQL a third more for a grant; by this column only the end does
     add column listed_as varchar(10) character set ascii collate ascii_bin
       generated always as (if(status in (''PENDING'', ''PROCESSING''), ''OPEN'', status)) stored,
     -- listReservations(): each of them by itself, in the order of execute_at; findHoldings(): the sum still to come
     add key point_reservations_user (user_id, listed_as, execute_at, id, point_amount),
     -- listReservations() of one campaign; cancelCampaign(): its reservations, page by page
     add key point_reservations_campaign (campaign, user_id, execute_at, id)'
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
     modify idempotency_key varchar(120) character set ascii collate ascii_bin not null,
     -- a subtraction is a negative entry
     drop constraint point_transactions_point_amount_positive,
     add constraint point_transactions_point_amount_not_zero check (point_amount <> 0),
     -- listTransactions(): newest first; findBalanceAt(): the sum until a time, from the index alone
     add key point_transactions_user (user_id, created_at, id, point_amount)'
);
prepare migration from @statement;
execute migration;
deallocate prepare migration;
