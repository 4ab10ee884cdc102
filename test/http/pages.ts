import { expect } from "bun:test";
import type { Send } from "./client.ts";

type Query = Record<string, string | number>;

/** A list whose pages a test reads, e.g. `/users/a/transactions`. */
export interface PagedList {
  send: Send;
  path: string;
}

/** The entries of one page and its `next_cursor`. */
export async function readPage<Entry>({ send, path }: PagedList, query: Query = {}) {
  const search = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) search.set(name, String(value));
  const response = await send(`${path}?${search}`);
  expect(response.status).toBe(200);
  const { next_cursor, ...body } = (await response.json()) as { next_cursor: string | null };
  const [name] = Object.keys(body);
  expect(path).toEndWith(String(name).replace("_", "-"));
  return { entries: Object.values(body).flat() as Entry[], next: next_cursor };
}

/**
 * The entries of all pages, in order. Each page but the last is as full as its limit allows, and no empty page follows the last
 * entry.
 *
 * @param options.limits the limit of each page; one alone counts for all
 */
export async function walkPages<Entry>(
  list: PagedList,
  { limits, ...query }: { limits: readonly number[] } & Record<string, unknown>,
): Promise<Entry[]> {
  const all: Entry[] = [];
  let cursor: Query = {};
  for (let page = 0; page < 500; page++) {
    const limit = limits[page % limits.length] as number;
    const { entries, next } = await readPage<Entry>(list, { ...(query as Query), limit, ...cursor });
    all.push(...entries);
    if (next === null) return all;
    expect(entries).toHaveLength(limit);
    cursor = { cursor: next };
  }
  throw new Error("The pages do not end");
}
