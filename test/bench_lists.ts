import type { TestDatabase } from "./harness.ts";
import { openPipeline } from "./pipeline.ts";

/** What the lists of so few cost is what a page costs by itself; fewer do not fill a page. */
export const FEW_ROWS = 1_000;
/** The user with 3 of 10 reservations; the others are of up to 100,000 users. */
const HEAVY = "Heavy";
const LIMIT = 100;
const DEEP_PAGE = 1_000;
/** Requests of which the median is taken, and when to be content with fewer, in milliseconds. */
const SAMPLES = 101;
const SAMPLES_MS = 10_000;

/** A list of one user: its path, and what orders its entries. */
interface List {
  path: string;
  orderOf: (entry: Record<string, string>) => string;
  isDescending?: boolean;
  filter?: Record<string, string>;
}

const byExecution = (entry: Record<string, string>) => `${entry.add_date} ${entry.reservation_id}`;
const LISTS: List[] = [
  { path: "reserved-points", orderOf: byExecution },
  { path: "reserved-points", orderOf: byExecution, filter: { status: "DONE" } },
  { path: "reserved-points", orderOf: byExecution, filter: { status: "PENDING" } },
  { path: "reserved-points", orderOf: byExecution, filter: { campaign: "summer" } },
  {
    path: "transactions",
    orderOf: (entry) => `${entry.created_at} ${entry.transaction_id}`,
    isDescending: true,
  },
];

interface Times {
  firstMs: number;
  /** Of the last full page. */
  deep?: { page: number; ms: number };
}

/** What a user's lists and sums cost where there are few rows, and where there are many: one line for each. */
export async function benchLists({ rows }: { rows: number }): Promise<Record<string, unknown>[]> {
  const [few, many] = [await measureLists(FEW_ROWS), await measureLists(rows)];
  return Array.from(many, ([what, { firstMs, deep }]) => ({
    what,
    [`ms of ${FEW_ROWS} rows`]: few.get(what)?.firstMs.toFixed(1),
    "ms, page 1": firstMs.toFixed(1),
    ...(deep && {
      "deep page": deep.page.toLocaleString("en"),
      "ms, deep page": deep.ms.toFixed(1),
      ratio: (deep.ms / firstMs).toFixed(2),
    }),
  }));
}

async function measureLists(rows: number): Promise<Map<string, Times>> {
  await using pipeline = await openPipeline();
  await fillForLists(pipeline.test, rows);
  const { url } = await pipeline.start("api");
  const user = `${url}/users/${HEAVY}`;
  const times = new Map<string, Times>();
  for (const list of LISTS) {
    const query = new URLSearchParams({ limit: String(LIMIT), ...list.filter });
    const first = `${user}/${list.path}?${query}`;
    const deep = await walk(first, list);
    const [firstMs, deepMs] = await medianMs([first, deep.url]);
    const filter = Object.entries(list.filter ?? {}).map(([name, value]) => `, ${name}=${value}`);
    times.set(`${list.path}${filter.join("")}`, { firstMs, deep: { page: deep.page, ms: deepMs } });
  }
  const at = encodeURIComponent(new Date(Date.now() - 86_400_000).toISOString());
  const sums = ["points", `points?at=${at}`] as const;
  const [nowMs, atMs] = await medianMs([`${user}/${sums[0]}`, `${user}/${sums[1]}`]);
  return times.set("points", { firstMs: nowMs }).set("points, at a day ago", { firstMs: atMs });
}

/**
 * Turns the pages over one by one: each must be full, of the filter, and after the one before.
 *
 * @returns the last full page, the thousandth at most
 */
async function walk(first: string, { orderOf, isDescending, filter }: List) {
  let full = { page: 0, url: first };
  let last: string | undefined;
  for (let page = 1, url = first; page <= DEEP_PAGE; page++) {
    const answer = await getJson(url);
    const { next_cursor, ...lists } = answer as { next_cursor: string | null };
    const entries = Object.values(lists)[0] as Record<string, string>[];
    // Only the last page may be short.
    if (entries.length !== LIMIT && (next_cursor !== null || page === 1)) {
      throw new Error(`Page ${page} of ${url} has ${entries.length} entries`);
    }
    if (entries.length === LIMIT) full = { page, url };
    for (const entry of entries) {
      const place = orderOf(entry);
      const isAfter = last === undefined || (isDescending ? place < last : place > last);
      const isRight = Object.entries(filter ?? {}).every(([name, value]) => entry[name] === value);
      if (!isAfter || !isRight) throw new Error(`Page ${page} of ${url} has a wrong entry: ${place}`);
      last = place;
    }
    if (next_cursor === null) break;
    url = `${first}&cursor=${next_cursor}`;
  }
  return full;
}

async function getJson(url: string): Promise<unknown> {
  const response = await fetch(url);
  if (response.status !== 200) throw new Error(`${url} was answered with ${response.status}`);
  return response.json();
}

/** The median time of each, in milliseconds; in turns, so that both see the same machine. */
async function medianMs(urls: [string, string]): Promise<[number, number]> {
  const all: [number[], number[]] = [[], []];
  const end = performance.now() + SAMPLES_MS;
  for (let sample = 0; sample < SAMPLES && (sample === 0 || performance.now() < end); sample++) {
    for (const [index, url] of urls.entries()) {
      const startedAt = performance.now();
      await getJson(url);
      all[index]?.push(performance.now() - startedAt);
    }
  }
  return all.map((times) => times.toSorted((a, b) => a - b)[times.length >> 1]) as [number, number];
}

/** Rows of one INSERT … SELECT: what MySQL does within a second or two. */
const FILL_ROWS = 10_000;

/**
 * Reservations of every status, of a month and a half before and after now, half of them of a campaign; the ledger and
 * the balances of what is DONE.
 */
async function fillForLists({ query }: TestDatabase, rows: number): Promise<void> {
  const now = new Date();
  for (let from = 0; from < rows; from += FILL_ROWS) {
    const range = [idOf(from), idOf(Math.min(rows, from + FILL_ROWS))];
    // CRC32 mixes: neighbours by id are neither by time nor by status.
    await query(
      `insert into point_reservations
         (id, user_id, point_amount, execute_at, status, idempotency_key, scan_at, campaign)
       with recursive digits (digit) as (select 0 union all select digit + 1 from digits where digit < 9),
       numbers (n) as (
         select ? + 1000 * a.digit + 100 * b.digit + 10 * c.digit + d.digit from digits a, digits b, digits c, digits d
       ),
       mixed as (
         select n, crc32(concat('time', n)) ms, elt(1 + mod(crc32(n), 50), ${STATUSES}) status from numbers where n < ?
       ),
       timed as (
         select n, status, cast(? as datetime(3)) + interval 1000 * case status
           when 'PENDING' then 3600000 + ms when 'PROCESSING' then -mod(ms, 60000) else -ms end microsecond execute_at
         from mixed
       ),
       named as (select timed.*, concat('${ID_PREFIX}', lpad(lower(hex(n)), 12, '0')) id from timed)
       select id, if(mod(n, 10) < 3, '${HEAVY}', concat('User', mod(n, 99999))), 1 + mod(n, 100), execute_at, status,
         id, if(status in ('PENDING', 'PROCESSING'), execute_at, null), if(mod(crc32(id), 2) = 0, 'summer', null)
       from named`,
      [from, rows, now],
    );
    await query(
      `insert into point_transactions (id, idempotency_key, user_id, point_amount, created_at)
       select concat('f', substring(id, 2)), idempotency_key, user_id, point_amount, execute_at + interval 30000 microsecond
       from point_reservations where id >= ? and id < ? and status = 'DONE'`,
      range,
    );
  }
  await query(
    `insert into point_root (user_id, point_num)
     select user_id, sum(point_amount) from point_transactions group by user_id`,
  );
  for (const table of ["point_reservations", "point_transactions", "point_root"]) {
    await query(`analyze table ${table}`);
  }
}

/** Of 50. PROCESSING are 20,000 of a million: no more are claimed while workers stand still. */
const STATUSES = Object.entries({ DONE: 22, PENDING: 20, PROCESSING: 1, FAILED: 4, CANCELLED: 3 })
  .flatMap(([status, share]) => Array.from({ length: share }, () => `'${status}'`))
  .join(", ");
const ID_PREFIX = "01a20990-0000-7000-8000-";

function idOf(number: number): string {
  return `${ID_PREFIX}${number.toString(16).padStart(12, "0")}`;
}
