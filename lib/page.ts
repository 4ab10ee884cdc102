import { Type } from "@sinclair/typebox";
import { validate as validateUuid } from "uuid";
import { showValue } from "./errors.ts";
import { amountField, broken, field, LATEST_MS, optional, type Parsed } from "./field.ts";

/** The maximum number of entries in one page. */
const MAX_LIMIT = 1_000;
const DEFAULT_LIMIT = 100;

/** The position where a page ends: the next page starts after the row of this time and id. */
export interface Position {
  time: Date;
  id: string;
}

/** One page of a list. */
export interface Page {
  limit: number;
  after: Position | undefined;
}

const CURSOR = /^[A-Za-z0-9_-]{1,100}$/;

/** The query parameters of a list in pages. */
export const pageFields = {
  limit: optional(
    amountField(
      Type.Integer({
        minimum: 1,
        maximum: MAX_LIMIT,
        default: DEFAULT_LIMIT,
        description: "maximum number of entries in one page",
      }),
      "limit",
    ),
  ),
  cursor: optional(
    field(
      Type.String({
        pattern: CURSOR.source,
        description: "`next_cursor` of the previous page; leave it out for the first page",
      }),
      { parse: parseCursor },
    ),
  ),
};

/** The page that a query asks for. */
export function pageOf({
  limit = DEFAULT_LIMIT,
  cursor,
}: {
  limit: number | undefined;
  cursor: Position | undefined;
}): Page {
  return { limit, after: cursor };
}

/** The cursor of the next page, or null after the last one. `rows` has one more row than `limit` if there is a next page. */
export function nextCursor(rows: readonly Position[], limit: number): string | null {
  const last = rows[limit - 1];
  if (rows.length <= limit || !last) return null;
  return encodeCursor(last);
}

export function encodeCursor({ time, id }: Position): string {
  return Buffer.from(`${time.getTime()}.${id}`).toString("base64url");
}

function parseCursor(value: unknown, place: string): Parsed<Position> {
  const text =
    typeof value === "string" && CURSOR.test(value) ? Buffer.from(value, "base64url").toString("latin1") : "";
  const [, ms, id] = /^(\d{1,15})\.(.{36})$/.exec(text) ?? [];
  if (ms === undefined || Number(ms) > LATEST_MS || !validateUuid(id) || id === undefined) {
    return broken(
      "cursor is invalid format",
      `${place} must be the next_cursor of another page: received ${showValue(value)}`,
    );
  }
  return { value: { time: new Date(Number(ms)), id } };
}
