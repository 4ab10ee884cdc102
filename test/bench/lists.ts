import type { TestDatabase } from "../harness/database.ts";
import { openPipeline } from "../harness/pipeline.ts";
import { analyze, fillRows } from "./fill.ts";

/** The lists of so few rows show what a page costs by itself; fewer do not fill a page. */
const FEW_ROWS = 1_000;
/** The user with 3 of 10 reservations; the others are of up to 100,000 users. */
const HEAVY = "Heavy";
const LIMIT = 100;
const DEEP_PAGE = 1_000;
/** Requests of which the median is taken, and how long to go on with them, in milliseconds. */
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
const byCreation = (entry: Record<string, string>) => `${entry.created_at} ${entry.transaction_id}`;
const LISTS: List[] = [
  { path: "reserved-points", orderOf: byExecution },
  { path: "reserved-points", orderOf: byExecution, filter: { status: "DONE" } },
  { path: "reserved-points", orderOf: byExecution, filter: { status: "PENDING" } },
  { path: "reserved-points", orderOf: byExecution, filter: { campaign: "summer" } },
  { path: "transactions", orderOf: byCreation, isDescending: true },
];

interface Times {
  firstMs: number;
  /** Of the last full page. */
  deep?: { page: number; ms: number };
}

/** Measures what a user's lists and sums cost among few rows and among many: one line for each. */
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
    const { page, url: deep } = await walk(first, list);
    const [firstMs, ms] = await medianMs([first, deep]);
    const filter = Object.entries(list.filter ?? {}).map(([name, value]) => `, ${name}=${value}`);
    times.set(`${list.path}${filter.join("")}`, { firstMs, deep: { page, ms } });
  }
  const at = encodeURIComponent(new Date(Date.now() - 86_400_000).toISOString());
  const [nowMs, atMs] = await medianMs([`${user}/points`, `${user}/points?at=${at}`]);
  return times.set("points", { firstMs: nowMs }).set("points, at a day ago", { firstMs: atMs });
}

/**
 * Reads page after page: each must be full, match the filter and come after the one before.
 *
 * @returns the last full page, the thousandth at most
 */
async function walk(first: string, { orderOf, isDescending, filter = {} }: List) {
  let full = { page: 0, url: first };
  let last: string | undefined;
  for (let page = 1, url = first; page <= DEEP_PAGE; page++) {
    const { next_cursor, ...lists } = (await getJson(url)) as { next_cursor: string | null };
    const entries = Object.values(lists)[0] as Record<string, string>[];
    // Only the last page may be short.
    if (entries.length !== LIMIT && (next_cursor !== null || page === 1)) {
      throw new Error(`Page ${page} of ${url} has ${entries.length} entries`);
    }
    if (entries.length === LIMIT) full = { page, url };
    for (const entry of entries) {
      const place = orderOf(entry);
      const isAfter = last === undefined || (isDescending ? place < last : place > last);
      const isRight = Object.entries(filter).every(([name, value]) => entry[name] === value);
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

/** The median time of each, in milliseconds. In turns, so that both see the same machine. */
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

/** Of 50. PROCESSING are 20,000 of a million: no more are claimed while workers stand still. */
const SHARES = { DONE: 22, PENDING: 20, PROCESSING: 1, FAILED: 4, CANCELLED: 3 };

/** Reservations of every status, within seven weeks of now, half of them of a campaign. CRC32 mixes them. */
async function fillForLists(test: TestDatabase, rows: number): Promise<void> {
  const statuses = Object.entries(SHARES).flatMap(([status, share]) => Array(share).fill(`'${status}'`));
  const ms = "crc32(concat('time', n))";
  await fillRows(test, {
    count: rows,
    prefix: "due",
    userId: `if(mod(n, 10) < 3, '${HEAVY}', concat('User', mod(n, 99999)))`,
    offset: `1000 * case status when 'PENDING' then 3600000 + ${ms} when 'PROCESSING' then -mod(${ms}, 60000)
      else -${ms} end`,
    status: `elt(1 + mod(crc32(n), 50), ${statuses.join(", ")})`,
    campaign: "if(mod(crc32(concat('campaign', n)), 2) = 0, 'summer', null)",
  });
  await analyze(test);
}
