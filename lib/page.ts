import { type Static, Type } from "@sinclair/typebox";
import { validate as validateUuid } from "uuid";
import { showValue } from "./errors.ts";
import { amountRule, type FieldRule, LATEST_MS } from "./input.ts";

/** The most entries of one page. */
const MAX_LIMIT = 1_000;
const DEFAULT_LIMIT = 100;

export const Limit = Type.Integer({
  minimum: 1,
  maximum: MAX_LIMIT,
  default: DEFAULT_LIMIT,
  description: "the most entries of one page",
});
export const Cursor = Type.String({
  pattern: "^[A-Za-z0-9_-]{1,100}$",
  description: "`next_cursor` of the page before; left out for the first page",
});

const CURSOR = new RegExp(Cursor.pattern ?? "");

/** Where a page ends: the next one starts after the row of this time and id. */
export interface Position {
  time: Date;
  id: string;
}

/** Which page of a list. */
export interface Page {
  limit: number;
  after: Position | undefined;
}

export const limitRule = amountRule(Limit, "limit");

export const cursorRule: FieldRule = (value, place) =>
  decodeCursor(value)
    ? undefined
    : {
        sentence: "cursor is invalid format",
        explanation: `${place} must be the next_cursor of another page: received ${showValue(value)}`,
      };

/** What a page's query says, once its rules are checked. */
export function pageOf({
  limit = DEFAULT_LIMIT,
  cursor,
}: {
  limit?: Static<typeof Limit>;
  cursor?: Static<typeof Cursor>;
}): Page {
  return { limit, after: decodeCursor(cursor) };
}

/** The cursor of the page after these rows, or null where they were the last. `rows` holds one more than `limit` if more follow. */
export function nextCursor(rows: readonly Position[], limit: number): string | null {
  const last = rows[limit - 1];
  if (rows.length <= limit || !last) return null;
  return encodeCursor(last);
}

export function encodeCursor({ time, id }: Position): string {
  return Buffer.from(`${time.getTime()}.${id}`).toString("base64url");
}

function decodeCursor(cursor: unknown): Position | undefined {
  if (typeof cursor !== "string" || !CURSOR.test(cursor)) return undefined;
  const [, ms, id] = /^(\d{1,15})\.(.{36})$/.exec(Buffer.from(cursor, "base64url").toString("latin1")) ?? [];
  if (ms === undefined || Number(ms) > LATEST_MS || id === undefined || !validateUuid(id)) return undefined;
  return { time: new Date(Number(ms)), id };
}
