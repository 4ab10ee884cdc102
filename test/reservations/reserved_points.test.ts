import { describe, expect, test } from "bun:test";
import { RESERVATION_STATUSES, type ReservationStatus } from "../../lib/schema.ts";
import { openTestDatabase } from "../harness/database.ts";
import { insertReservation } from "../harness/fixtures.ts";
import { appOn } from "../http/client.ts";
import { readPage, walkPages } from "../http/pages.ts";

interface ReservedPoint {
  reservation_id: string;
  point: number;
  status: ReservationStatus;
  add_date: string;
  campaign: string | null;
}

const BASE = Date.parse("2020-01-01T00:00:00.000Z");
const CAMPAIGNS = ["summer", null, "Summer"];

const db = await openTestDatabase();
const { send } = appOn(db.database);
const list = { send, path: "/users/Sixty/reserved-points" };
const sixty = await insertSixty("Sixty");
// Of others, at the same times: one whose name differs in case, and two beside it in the index.
for (const userId of ["sixty", "Sixt", "Sixtyy"]) await insertSixty(userId);

/** 60 reservations of all statuses, four at each time, inserted in mixed order; their ids say nothing of their order. */
async function insertSixty(userId: string): Promise<ReservedPoint[]> {
  const rows = Array.from({ length: 60 }, (_, index): ReservedPoint => {
    const tie = Math.floor(index / 4);
    const status = RESERVATION_STATUSES[(index * 7 + tie) % 5] as ReservationStatus;
    const [add_date, campaign] = [new Date(BASE + tie).toISOString(), CAMPAIGNS[index % 3] ?? null];
    return { reservation_id: crypto.randomUUID(), point: 1 + index, status, add_date, campaign };
  });
  const orderOf = ({ add_date, reservation_id }: ReservedPoint) => add_date + reservation_id;
  for (const { reservation_id: id, point, status, add_date, campaign } of rows.toReversed()) {
    const executeAt = new Date(add_date);
    const content = { userId, pointAmount: point, executeAt, campaign };
    await insertReservation(db, { id, idempotencyKey: id, status, ...content });
  }
  return rows.toSorted((a, b) => (orderOf(a) < orderOf(b) ? -1 : 1));
}

describe("GET /users/:user_id/reserved-points", () => {
  test.each([[[1]], [[4]], [[7]], [[20]], [[59]], [[60]], [[61]], [[1_000]], [[3, 25, 1, 8]]])(
    "in pages of %j gives each reservation once, by execute_at and id",
    async (limits) => {
      expect(await walkPages(list, { limits })).toEqual(sixty);
    },
  );

  test.each(RESERVATION_STATUSES)("?status=%s gives only those", async (status) => {
    const expected = sixty.filter((row) => row.status === status);
    expect(expected.length).toBeGreaterThan(5);
    for (const limit of [1, 3, expected.length, 100]) {
      expect(await walkPages(list, { limits: [limit], status })).toEqual(expected);
    }
    const both = expected.filter(({ campaign }) => campaign === "summer");
    expect(both.length).toBeGreaterThan(1);
    for (const limit of [1, 2, 100]) {
      expect(await walkPages(list, { limits: [limit], status, campaign: "summer" })).toEqual(both);
    }
  });

  test.each(["summer", "Summer", "winter"])(
    "?campaign=%s gives only those; case matters",
    async (campaign) => {
      const expected = sixty.filter((row) => row.campaign === campaign);
      for (const limit of [1, 3, 20, 100]) {
        expect(await walkPages(list, { limits: [limit], campaign })).toEqual(expected);
      }
    },
  );

  test("goes on with another filter from the same position: the cursor holds none", async () => {
    const { next } = await readPage(list, { limit: 25 });
    const { entries } = await readPage(list, { status: "DONE", cursor: next ?? "" });
    expect(entries).toEqual(sixty.slice(25).filter(({ status }) => status === "DONE"));
  });

  test("neither misses nor repeats a reservation whose status changes between two pages", async () => {
    const moving = await insertSixty("Moving");
    const seen: ReservedPoint[] = [];
    let cursor = {};
    for (const status of [...RESERVATION_STATUSES, ...RESERVATION_STATUSES]) {
      const page = await readPage<ReservedPoint>(
        { send, path: "/users/Moving/reserved-points" },
        { limit: 6, ...cursor },
      );
      seen.push(...page.entries);
      cursor = { cursor: page.next };
      const scanAt = status === "PENDING" || status === "PROCESSING" ? new Date(BASE) : null;
      await db.query("update point_reservations set status = ?, scan_at = ? where user_id = 'Moving'", [
        status,
        scanAt,
      ]);
    }
    expect(cursor).toEqual({ cursor: null });
    const idsOf = (rows: ReservedPoint[]) => rows.map(({ reservation_id }) => reservation_id);
    expect(idsOf(seen)).toEqual(idsOf(moving));
  });
});
