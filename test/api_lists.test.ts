import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import fc from "fast-check";
import { v7 as uuidv7 } from "uuid";
import { encodeCursor } from "../lib/page.ts";
import { RESERVATION_STATUSES, type Reservation, type ReservationStatus } from "../lib/reservation.ts";
import { appOn, expectProblem, post } from "./api_client.ts";
import { createTestDatabase, insertReservation, reservationOf, type TestDatabase } from "./harness.ts";
import { insertReservations, processReservations } from "./pipeline.ts";

let db: TestDatabase;
let app: ReturnType<typeof appOn>;
beforeAll(async () => {
  db = await createTestDatabase();
  app = appOn(db.database);
}, 30_000);
afterAll(() => db?.drop());

let users = 0;
function newUser(): string {
  return `User${++users}`;
}

interface ReservedPoint {
  reservation_id: string;
  point: number;
  status: ReservationStatus;
  add_date: string;
  campaign: string | null;
}

interface Transaction {
  transaction_id: string;
  kind: string;
  point: number;
  reservation_id: string | null;
  campaign: string | null;
  idempotency_key: string;
  created_at: string;
}

interface Entries {
  "reserved-points": ReservedPoint;
  transactions: Transaction;
}

type Query = Record<string, string | number>;

function pathOf(user: string, list: keyof Entries, query: Query = {}): string {
  const search = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) search.set(name, String(value));
  return `/users/${user}/${list}?${search}`;
}

interface Page<Entry> {
  entries: Entry[];
  next: string | null;
}

async function pageOf<List extends keyof Entries>(
  user: string,
  list: List,
  query: Query = {},
): Promise<Page<Entries[List]>> {
  const response = await app.send(pathOf(user, list, query));
  expect(response.status).toBe(200);
  const body = (await response.json()) as Record<string, unknown>;
  const name = list.replace("-", "_");
  expect(Object.keys(body)).toEqual([name, "next_cursor"]);
  return { entries: body[name] as Entries[List][], next: body.next_cursor as string | null };
}

/** All pages in their order; each has as many entries as its limit allows, and none comes after the last entry. */
async function walk<List extends keyof Entries>(
  user: string,
  list: List,
  { limits, query = {} }: { limits: Iterable<number>; query?: Query },
): Promise<Entries[List][]> {
  const all: Entries[List][] = [];
  let position: Query = {};
  for (const limit of limits) {
    const { entries, next }: Page<Entries[List]> = await pageOf(user, list, {
      ...query,
      limit,
      ...position,
    });
    all.push(...entries);
    if (next === null) return all;
    expect(entries).toHaveLength(limit);
    position = { cursor: next };
  }
  throw new Error("There were more pages than limits");
}

/** The same limit for every page; an end, so that a cursor that leads back would be noticed. */
function always(limit: number): number[] {
  return Array(500).fill(limit);
}

const BASE = Date.parse("2020-01-01T00:00:00.000Z");
const CAMPAIGNS = ["summer", null, "Summer"] as const;

/** 60 reservations of all statuses, four at the same millisecond each time, inserted in mixed order; ids are no order. */
async function insertSixty(user: string): Promise<ReservedPoint[]> {
  const rows = Array.from({ length: 60 }, (_, index): ReservedPoint => {
    const tie = Math.floor(index / 4);
    return {
      reservation_id: crypto.randomUUID(),
      point: 1 + index,
      status: RESERVATION_STATUSES[(index * 7 + tie) % 5] as ReservationStatus,
      add_date: new Date(BASE + tie).toISOString(),
      campaign: CAMPAIGNS[index % 3] as string | null,
    };
  });
  for (const row of rows.toSorted((a, b) => (a.reservation_id < b.reservation_id ? -1 : 1))) {
    await insertReservation(db, {
      id: row.reservation_id,
      userId: user,
      pointAmount: row.point,
      executeAt: new Date(row.add_date),
      status: row.status,
      campaign: row.campaign,
      idempotencyKey: row.reservation_id,
    });
  }
  return rows.toSorted((a, b) => (orderOf(a) < orderOf(b) ? -1 : 1));
}

function orderOf({ add_date, reservation_id }: ReservedPoint): string {
  return add_date + reservation_id;
}

describe("GET /users/:user_id/reserved-points", () => {
  const user = "Sixty";
  let sixty: ReservedPoint[];
  beforeAll(async () => {
    sixty = await insertSixty(user);
    // Of others, with the same times: one whose name differs in case, and two beside it in the index.
    for (const other of ["sixty", "Sixt", "Sixtyy"]) {
      for (let tie = 0; tie < 15; tie++) {
        await insertReservation(db, { userId: other, executeAt: new Date(BASE + tie), campaign: "summer" });
      }
    }
  });

  test("lists all statuses by execute_at, then by id, 100 unless told", async () => {
    expect(new Set(sixty.map(({ status }) => status)).size).toBe(5);
    expect(await pageOf(user, "reserved-points")).toEqual({ entries: sixty, next: null });
  });

  test.each([1, 2, 3, 4, 5, 7, 11, 19, 20, 29, 30, 31, 59, 60, 61, 1_000])(
    "in pages of %d gives every reservation exactly once, in order",
    async (limit) => {
      expect(await walk(user, "reserved-points", { limits: always(limit) })).toEqual(sixty);
    },
  );

  test("in pages of any mixture of limits gives every reservation exactly once, in order", async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.integer({ min: 1, max: 25 }), { minLength: 60, maxLength: 60 }),
        async (limits) => {
          expect(await walk(user, "reserved-points", { limits })).toEqual(sixty);
        },
      ),
      { numRuns: 15 },
    );
  });

  test.each([
    [1, 60],
    [20, 3],
    [30, 2],
    [60, 1],
  ])(
    "in pages of %d ends after page %d, the last full one: its next_cursor is null",
    async (limit, pages) => {
      const limits = always(limit).slice(0, pages);
      expect(await walk(user, "reserved-points", { limits })).toHaveLength(60);
    },
  );

  test("gives a next_cursor where one more follows than the page has", async () => {
    const { entries, next } = await pageOf(user, "reserved-points", { limit: 59 });
    expect(entries).toEqual(sixty.slice(0, 59));
    const last = await pageOf(user, "reserved-points", { limit: 59, cursor: next ?? "" });
    expect(last).toEqual({ entries: sixty.slice(59), next: null });
  });

  test.each(RESERVATION_STATUSES)("?status=%s gives those only, in pages of any limit", async (status) => {
    const expected = sixty.filter((row) => row.status === status);
    expect(expected.length).toBeGreaterThan(5);
    for (const limit of [1, 3, expected.length, 100]) {
      expect(await walk(user, "reserved-points", { query: { status }, limits: always(limit) })).toEqual(
        expected,
      );
    }
  });

  test.each(["summer", "Summer"])("?campaign=%s gives those only; case matters", async (campaign) => {
    const expected = sixty.filter((row) => row.campaign === campaign);
    expect(expected).toHaveLength(20);
    for (const limit of [1, 3, 4, 20, 100]) {
      expect(await walk(user, "reserved-points", { query: { campaign }, limits: always(limit) })).toEqual(
        expected,
      );
    }
  });

  test.each(RESERVATION_STATUSES)("?campaign=summer&status=%s gives what is both", async (status) => {
    const expected = sixty.filter((row) => row.campaign === "summer" && row.status === status);
    expect(expected.length).toBeGreaterThan(1);
    for (const limit of [1, 2, 100]) {
      const query = { campaign: "summer", status };
      const walked = await walk(user, "reserved-points", { query, limits: always(limit) });
      expect(walked).toEqual(expected);
    }
  });

  test("goes on with another filter from the same position, as the cursor holds no filter", async () => {
    const { next } = await pageOf(user, "reserved-points", { limit: 25 });
    const { entries } = await pageOf(user, "reserved-points", { status: "DONE", cursor: next ?? "" });
    expect(entries).toEqual(sixty.slice(25).filter(({ status }) => status === "DONE"));
  });

  test.each(["summer-2030", "none"])(
    "is empty for the campaign %s, of which there is none",
    async (campaign) => {
      expect(await pageOf(user, "reserved-points", { campaign })).toEqual({ entries: [], next: null });
    },
  );

  test("is empty for an unknown user, also after a cursor", async () => {
    const cursor = encodeCursor({ time: new Date(BASE), id: uuidv7() });
    for (const query of [{}, { cursor }, { status: "PENDING" }, { campaign: "summer" }] as Query[]) {
      expect(await pageOf("Nobody", "reserved-points", query)).toEqual({ entries: [], next: null });
    }
  });

  test("after the last position that there is, is empty", async () => {
    const cursor = encodeCursor({
      time: new Date("9999-12-31T23:59:59.999Z"),
      id: "ffffffff-ffff-ffff-ffff-ffffffffffff",
    });
    expect(await pageOf(user, "reserved-points", { cursor })).toEqual({ entries: [], next: null });
  });

  test("neither misses nor repeats a reservation whose status changes between two pages", async () => {
    const moving = newUser();
    const rows = await insertSixty(moving);
    const seen: string[] = [];
    let isOver = false;
    let position: Query = {};
    for (const status of [...RESERVATION_STATUSES, ...RESERVATION_STATUSES]) {
      const { entries, next }: Page<ReservedPoint> = await pageOf(moving, "reserved-points", {
        limit: 6,
        ...position,
      });
      seen.push(...entries.map(({ reservation_id }) => reservation_id));
      isOver = next === null;
      position = { cursor: next ?? "" };
      const scanAt = status === "PENDING" || status === "PROCESSING" ? new Date(BASE) : null;
      await db.query("update point_reservations set status = ?, scan_at = ? where user_id = ?", [
        status,
        scanAt,
        moving,
      ]);
    }
    expect(isOver).toBe(true);
    expect(seen).toEqual(rows.map(({ reservation_id }) => reservation_id));
  });

  test("never misses or repeats one that changes its status just then", async () => {
    const busy = newUser();
    const { id } = await insertReservation(db, { userId: busy });
    let isOver = false;
    const changing = (async () => {
      for (let turn = 0; !isOver; turn++) {
        const status = turn % 2 ? "PENDING" : "PROCESSING";
        await db.query("update point_reservations set status = ? where id = ?", [status, id]);
      }
    })();
    try {
      const statuses = new Set<string>();
      for (let turn = 0; turn < 2_000 && (turn < 200 || statuses.size < 2); turn++) {
        const { entries } = await pageOf(busy, "reserved-points");
        expect(entries.map(({ reservation_id }) => reservation_id)).toEqual([id]);
        for (const { status } of entries) statuses.add(status);
      }
      expect(statuses).toEqual(new Set(["PENDING", "PROCESSING"]));
    } finally {
      isOver = true;
      await changing;
    }
  }, 30_000);

  test("gives 1,000 in one page where they are asked for, and no more", async () => {
    const many = newUser();
    const reservations = Array.from({ length: 1_001 }, (_, index) =>
      reservationOf({ userId: many, executeAt: new Date(BASE + index) }),
    );
    await insertReservations(db, { reservations });
    const ids = reservations.map(({ id }) => id);
    const { entries, next } = await pageOf(many, "reserved-points", { limit: 1_000 });
    expect(entries.map(({ reservation_id }) => reservation_id)).toEqual(ids.slice(0, 1_000));
    const last = await pageOf(many, "reserved-points", { limit: 1_000, cursor: next ?? "" });
    expect(last.entries.map(({ reservation_id }) => reservation_id)).toEqual(ids.slice(1_000));
    expect(last.next).toBeNull();
    expect((await pageOf(many, "reserved-points")).entries).toHaveLength(100);
  });

  test.each([
    ["status=OPEN", "status must be PENDING, PROCESSING, DONE, FAILED or CANCELLED"],
    ["status=pending", "status must be PENDING, PROCESSING, DONE, FAILED or CANCELLED"],
    ["status=", "status must be PENDING, PROCESSING, DONE, FAILED or CANCELLED"],
    ["campaign=", "campaign is invalid format"],
    ["campaign=a%20b", "campaign is invalid format"],
    [`campaign=${"x".repeat(65)}`, "campaign is invalid format"],
    ["status=DONE&status=DONE", "a parameter is given twice"],
  ])("answers 400 to ?%s", async (query, sentence) => {
    await expectProblem(await app.send(`/users/${user}/reserved-points?${query}`), 400, [sentence]);
  });

  test("answers 400 with all broken rules at once", async () => {
    const path = `/users/${user}/reserved-points?offset=2&cursor=2&limit=0&campaign=!&status=x`;
    await expectProblem(await app.send(path), 400, [
      "status must be PENDING, PROCESSING, DONE, FAILED or CANCELLED",
      "campaign is invalid format",
      "limit must be greater than 0",
      "cursor is invalid format",
      'unknown field "offset"',
    ]);
  });
});

describe("GET /users/:user_id/transactions", () => {
  async function change(verb: "add" | "sub", user: string, points: number, key?: string) {
    const body = { user_id: user, point_num: points, ...(key && { idempotency_key: key }) };
    expect((await app.send(`/point/${verb}`, { ...post(body), method: "PUT" })).status).toBe(200);
  }

  async function grant(fields: Partial<Reservation>): Promise<Reservation> {
    const reservation = await insertReservation(db, { status: "PROCESSING", ...fields });
    expect(await processReservations([[reservation]], db)).toEqual(["ack"]);
    return reservation;
  }

  test("tells grants with their reservation and campaign, additions and subtractions with the client's key", async () => {
    const user = newUser();
    const first = await grant({
      userId: user,
      pointAmount: 70,
      campaign: "summer",
      idempotencyKey: "order-1",
    });
    await change("add", user, 30, "gift-1");
    const second = await grant({ userId: user, pointAmount: 5 });
    await change("sub", user, 20, "order-1");
    await change("add", user, 1);
    const { entries, next } = await pageOf(user, "transactions");
    expect(next).toBeNull();
    const common = {
      transaction_id: expect.any(String),
      created_at: expect.stringMatching(/^\d{4}-.*\.\d{3}Z$/),
    };
    const direct = { ...common, reservation_id: null, campaign: null };
    expect(entries).toEqual([
      { ...direct, kind: "add", point: 1, idempotency_key: expect.stringMatching(/^[0-9a-f-]{36}$/) },
      // A direct key that is also a reservation's: it is another one.
      { ...direct, kind: "sub", point: -20, idempotency_key: "order-1" },
      {
        ...common,
        ...{ kind: "grant", point: 5, campaign: null },
        ...{ reservation_id: second.id, idempotency_key: second.id },
      },
      { ...direct, kind: "add", point: 30, idempotency_key: "gift-1" },
      {
        ...common,
        ...{ kind: "grant", point: 70, campaign: "summer" },
        ...{ reservation_id: first.id, idempotency_key: "order-1" },
      },
    ]);
    const story = (await (await app.send(`/point/reservations/${first.id}`)).json()) as Record<
      string,
      unknown
    >;
    expect([story.transaction_id, story.granted_at]).toEqual([
      entries[4]?.transaction_id,
      entries[4]?.created_at,
    ]);
  });

  test("names the client's key of a replay as well: an entry is there once", async () => {
    const user = newUser();
    for (let time = 0; time < 3; time++) await change("add", user, 5, "again");
    expect((await pageOf(user, "transactions")).entries).toHaveLength(1);
  });

  test("does not take a reservation of another user or amount, that met the entry's key, for where it came from", async () => {
    const user = newUser();
    await insertReservation(db, { userId: user, status: "FAILED", idempotencyKey: "met-1", pointAmount: 8 });
    await insertReservation(db, {
      userId: newUser(),
      status: "FAILED",
      idempotencyKey: "met-2",
      pointAmount: 7,
    });
    for (const key of ["met-1", "met-2"]) {
      const entry = { id: uuidv7(), idempotency_key: key, user_id: user, point_amount: 7 };
      await db.query("insert into point_transactions set ?", [entry]);
    }
    const { entries } = await pageOf(user, "transactions");
    // A reservation's key all the same: no direct change has one like it.
    expect(entries.map(({ kind, reservation_id }) => [kind, reservation_id])).toEqual([
      ["grant", null],
      ["grant", null],
    ]);
  });

  describe("of many entries", () => {
    const user = "Ledger";
    let newestFirst: string[];
    beforeAll(async () => {
      // Four at the same millisecond each time; ids are no order.
      const rows = Array.from({ length: 60 }, (_, index) => ({
        id: crypto.randomUUID(),
        at: new Date(BASE + Math.floor(index / 4)),
      }));
      await db.query(
        "insert into point_transactions (id, idempotency_key, user_id, point_amount, created_at) values ?",
        [rows.map(({ id, at }, index) => [id, `direct:${id}`, user, index % 2 ? 5 : -5, at])],
      );
      for (const other of ["ledger", "Ledge", "Ledgerr"]) {
        await db.query("insert into point_transactions set ?", [
          {
            id: uuidv7(),
            idempotency_key: uuidv7(),
            user_id: other,
            point_amount: 1,
            created_at: new Date(BASE),
          },
        ]);
      }
      const orderOf = ({ id, at }: { id: string; at: Date }) => at.toISOString() + id;
      newestFirst = rows.toSorted((a, b) => (orderOf(a) > orderOf(b) ? -1 : 1)).map(({ id }) => id);
    });
    const idsOf = (entries: Transaction[]) => entries.map(({ transaction_id }) => transaction_id);

    test.each([1, 2, 3, 4, 5, 7, 19, 20, 30, 59, 60, 61, 1_000])(
      "in pages of %d gives every entry exactly once, newest first",
      async (limit) => {
        expect(idsOf(await walk(user, "transactions", { limits: always(limit) }))).toEqual(newestFirst);
      },
    );

    test.each([
      [1, 60],
      [20, 3],
      [60, 1],
    ])("in pages of %d ends after page %d, the last full one", async (limit, pages) => {
      expect(await walk(user, "transactions", { limits: always(limit).slice(0, pages) })).toHaveLength(60);
    });

    test("goes on where it was, whatever is added meanwhile", async () => {
      const { entries, next } = await pageOf(user, "transactions", { limit: 30 });
      await db.query("insert into point_transactions set ?", [
        {
          id: uuidv7(),
          idempotency_key: uuidv7(),
          user_id: user,
          point_amount: 1,
          created_at: new Date(BASE + 99),
        },
      ]);
      const rest = await pageOf(user, "transactions", { limit: 1_000, cursor: next ?? "" });
      expect(idsOf([...entries, ...rest.entries])).toEqual(newestFirst);
      await db.query("delete from point_transactions where user_id = ? and created_at = ?", [
        user,
        new Date(BASE + 99),
      ]);
    });

    test("gives 100 unless told", async () => {
      const many = newUser();
      await db.query("insert into point_transactions (id, idempotency_key, user_id, point_amount) values ?", [
        Array.from({ length: 101 }, () => [uuidv7(), uuidv7(), many, 1]),
      ]);
      const { entries, next } = await pageOf(many, "transactions");
      expect(entries).toHaveLength(100);
      expect(next).not.toBeNull();
    });
  });

  test("is empty for an unknown user, also for one who has points to come only", async () => {
    const user = newUser();
    await insertReservation(db, { userId: user });
    expect(await pageOf(user, "transactions")).toEqual({ entries: [], next: null });
    expect(await pageOf("Nobody", "transactions")).toEqual({ entries: [], next: null });
  });

  test.each([
    ["status=DONE", 'unknown field "status"'],
    ["campaign=summer", 'unknown field "campaign"'],
  ])("answers 400 to ?%s, a filter that only reservations have", async (query, sentence) => {
    await expectProblem(await app.send(`/users/Nobody/transactions?${query}`), 400, [sentence]);
  });
});

describe.each(["reserved-points", "transactions"] as const)("GET /users/:user_id/%s", (list) => {
  test.each([["x".repeat(21)], ["a%20b"], ["%zz"], ["a_b"]])("answers 400 to the user id %s", async (id) => {
    await expectProblem(await app.send(`/users/${id}/${list}`), 400, ["user id is invalid format"]);
  });

  test.each([
    ["0", "limit must be greater than 0"],
    ["000", "limit must be greater than 0"],
    ["1001", "limit must be at most 1000"],
    ["999999999999999", "limit must be at most 1000"],
    ["9999999999999999999", "limit must be an integer"],
    ["", "limit must be an integer"],
    ["x", "limit must be an integer"],
    ["-1", "limit must be an integer"],
    ["+1", "limit must be an integer"],
    ["1.5", "limit must be an integer"],
    ["1e2", "limit must be an integer"],
    ["0x10", "limit must be an integer"],
    [" 5", "limit must be an integer"],
    ["5\n", "limit must be an integer"],
    ["٣", "limit must be an integer"],
    ["null", "limit must be an integer"],
  ])("answers 400 to the limit %j", async (limit, sentence) => {
    await expectProblem(await app.send(pathOf("Nobody", list, { limit })), 400, [sentence]);
  });

  test.each([["1"], ["1000"], ["007"]])("takes the limit %s", async (limit) => {
    expect((await app.send(pathOf("Nobody", list, { limit }))).status).toBe(200);
  });

  test.each([
    [""],
    ["2"],
    ["null"],
    ["[object Object]"],
    [uuidv7()],
    [Buffer.from(uuidv7()).toString("base64url")],
    [Buffer.from(`1866469140000.${"x".repeat(36)}`).toString("base64url")],
    [Buffer.from(`253402300800000.${uuidv7()}`).toString("base64url")],
    [Buffer.from(`-1.${uuidv7()}`).toString("base64url")],
    [`${encodeCursor({ time: new Date(BASE), id: uuidv7() })}=`],
    [`${encodeCursor({ time: new Date(BASE), id: uuidv7() })} `],
    ["A".repeat(101)],
    ["\0"],
    ["' or 1=1 -- "],
    ["日本"],
  ])("answers 400 to the cursor %j", async (cursor) => {
    await expectProblem(await app.send(pathOf("Nobody", list, { cursor })), 400, [
      "cursor is invalid format",
    ]);
  });

  test("answers 400 to any cursor that is none, never anything else", async () => {
    const texts = fc.oneof(
      fc.string({ unit: "binary" }),
      fc.stringMatching(/^[\w-]{1,100}$/),
      fc.base64String(),
    );
    await fc.assert(
      fc.asyncProperty(texts, async (cursor) => {
        const response = await app.send(pathOf("Nobody", list, { cursor }));
        await expectProblem(response, 400, ["cursor is invalid format"]);
      }),
      { numRuns: 200 },
    );
  });

  test.each([["limit=1&limit=1"], ["limit=1&limit=2"], ["cursor=a&limit=1&cursor=b"], ["x=1&x=1"]])(
    "answers 400 to a parameter that comes twice: ?%s",
    async (query) => {
      await expectProblem(await app.send(`/users/Nobody/${list}?${query}`), 400, [
        "a parameter is given twice",
      ]);
    },
  );

  test.each(["offset", "page", "LIMIT", "at", "user_id", "constructor", "__proto__"])(
    "answers 400 to the unknown parameter %s",
    async (name) => {
      await expectProblem(await app.send(`/users/Nobody/${list}?${name}=1`), 400, [
        `unknown field "${name}"`,
      ]);
    },
  );
});
