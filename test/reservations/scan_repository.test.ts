import { beforeEach, describe, expect, test } from "bun:test";
import type { Database } from "../../lib/database.ts";
import { lockReservations } from "../../lib/reservations/claim_repository.ts";
import {
  BEGINNING,
  claimDue,
  findNextScan,
  isBefore,
  type ScanPosition,
} from "../../lib/reservations/scan_repository.ts";
import { RESERVATION_STATUSES } from "../../lib/schema.ts";
import { emptyTables, openTestDatabase } from "../harness/database.ts";
import { insertReservation, type RowFields } from "../harness/fixtures.ts";
import { openFrozen } from "../harness/frozen.ts";
import { until } from "../harness/harness.ts";
import { inOrder } from "../harness/orders.ts";
import { countPages, leaveEntries, openSnapshot } from "../harness/snapshot.ts";
import { aroundMidday, idsOf, midday } from "./midday.ts";

const db = await openTestDatabase();
beforeEach(() => emptyTables(db));
const { detailsOf, insertDueAt, insertMany } = aroundMidday(db);

const LEASE = { limit: 1_000, leaseMs: 60_000 };
const SOON = { withinMs: 10_000, limit: 1_000 };

describe("claimDue()", () => {
  test("gives what is due as PROCESSING, with its lateness, and not what is due a millisecond later (fault 6)", async () => {
    const late = await insertDueAt(-1_500, { campaign: "summer" });
    const now = await insertDueAt(0);
    const { id: future } = await insertDueAt(1);
    await using frozen = await openFrozen(db, midday());
    expect(await claimDue(frozen, LEASE)).toEqual([
      { ...late, scanAt: midday(-1_500), lateMs: 1_500 },
      { ...now, scanAt: midday(), lateMs: 0 },
    ]);
    const claimed = { status: "PROCESSING", scanAt: midday(60_000), attempts: 0 } as const;
    expect(await detailsOf(late.id, "status", "scanAt", "attempts")).toEqual(claimed);
    expect(await detailsOf(future, "status", "scanAt")).toEqual({ status: "PENDING", scanAt: midday(1) });
  });

  test("takes in the order of scan_at, then of id, up to the limit", async () => {
    const tied = [await insertDueAt(-5), await insertDueAt(-5), await insertDueAt(-5)];
    const oldest = await insertDueAt(-7, { scanAt: midday(-6) });
    const last = await insertDueAt(-9, { scanAt: midday(-1) });
    await using frozen = await openFrozen(db, midday());
    const order: string[] = [];
    for (const limit of [2, 2, 2]) order.push(...idsOf(await claimDue(frozen, { ...LEASE, limit })));
    expect(order).toEqual([oldest.id, ...idsOf(tied).toSorted(), last.id]);
    expect(await claimDue(frozen, LEASE)).toEqual([]);
  });

  test("gives a claim's rows again once its lease has ended, and not before", async () => {
    const over = await insertDueAt(-2_000);
    const open = await insertDueAt(-1_000);
    await using frozen = await openFrozen(db, midday());
    expect(idsOf(await claimDue(frozen, { limit: 1, leaseMs: 5_000 }))).toEqual([over.id]);
    expect(idsOf(await claimDue(frozen, { limit: 1, leaseMs: 5_001 }))).toEqual([open.id]);
    expect(await claimDue(frozen, LEASE)).toEqual([]);
    await using later = await openFrozen(db, midday(5_000));
    expect(idsOf(await claimDue(later, LEASE))).toEqual([over.id]);
    expect(await detailsOf(open.id, "scanAt")).toEqual({ scanAt: midday(5_001) });
  });

  test("leaves rows that another scheduler holds, and takes those behind them (fault 10)", async () => {
    const [first, second, third, ...others] = (await insertMany(5)) as [string, string, string];
    await db.database.transaction(async (transaction) => {
      await lockReservations(transaction, [first, third]);
      expect(idsOf(await claimDue(db.database, LEASE))).toEqual([second, ...others]);
    });
    expect(idsOf(await claimDue(db.database, LEASE))).toEqual([first, third]);
  });

  test("locks only what it takes: a claim beside one that is open gets the next rows (fault 18)", async () => {
    const ids = await insertMany(1_000);
    await db.query("analyze table point_reservations");
    // So many of so many that MariaDB would rather read, and lock, the whole table.
    const claim = (database: Database) => claimDue(database, { ...LEASE, limit: 400 });
    const parts = await inOrder(db, { first: claim, heldAt: "mark_processing", second: claim });
    expect(parts.map(idsOf)).toEqual([ids.slice(0, 400), ids.slice(400, 800)]);
    expect(idsOf(await claimDue(db.database, LEASE))).toEqual(ids.slice(800));
  });

  test("never takes a reservation that is over (fault 17)", async () => {
    for (const status of ["DONE", "FAILED", "CANCELLED"] as const) await insertReservation(db, { status });
    expect(await claimDue(db.database, LEASE)).toEqual([]);
  });

  test.each(RESERVATION_STATUSES)(
    "can rely on the table: scan_at of %s is null if, and only if, it is over",
    async (status) => {
      const isOpen = status === "PENDING" || status === "PROCESSING";
      const wrong = insertReservation(db, { status, scanAt: isOpen ? null : midday() });
      await expect(wrong).rejects.toThrow("MySQL failed with");
      await insertReservation(db, { status });
    },
  );
});

describe("claimDue() from a position", () => {
  test("takes that position and what comes after it, in the order of scan_at and id, and nothing before it", async () => {
    const early = await insertDueAt(-2);
    const tied = [await insertDueAt(-1), await insertDueAt(-1), await insertDueAt(-1)];
    const late = await insertDueAt(0);
    const [first, second, third] = idsOf(tied).toSorted();
    await using frozen = await openFrozen(db, midday());
    const from = { scanAt: midday(-1), id: second ?? "" };
    expect(idsOf(await claimDue(frozen, { ...LEASE, from }))).toEqual([second ?? "", third ?? "", late.id]);
    const left = { ...LEASE, from: { scanAt: midday(-2), id: "" } };
    expect(idsOf(await claimDue(frozen, left))).toEqual([early.id, first ?? ""]);
  });

  test("leaves nothing out if each claim starts at the end of the one before", async () => {
    await insertMany(20);
    await db.query("update point_reservations set scan_at = now(3) - interval 1 second where crc32(id) % 2");
    const claimed: string[] = [];
    let from: ScanPosition = BEGINNING;
    for (let count = 0; count < 7; count++) {
      const part = await claimDue(db.database, { ...LEASE, limit: 3, from });
      claimed.push(...idsOf(part));
      from = part.at(-1) ?? from;
    }
    expect(new Set(claimed).size).toBe(20);
  });
});

test("claimDue() of as many as are due does not look at the leases that lie ahead, long over in a snapshot (fault 42)", async () => {
  await using _ = await openSnapshot(db);
  await leaveEntries(db, new Date(Date.now() + 60_000));
  async function pagesOf(limit: number) {
    await insertReservation(db);
    // As the scheduler does: before it there may be entries of earlier tests, which the snapshot keeps as well.
    const { first: from = BEGINNING } = await findNextScan(db.database, SOON);
    return countPages(db, async () => {
      expect(await claimDue(db.database, { ...LEASE, from, limit })).toHaveLength(1);
    });
  }
  expect(await pagesOf(2)).toBeGreaterThan(80);
  // Other work on the server counts as well, so some try must show few.
  await until("it looks at few pages", async () => (await pagesOf(1)) < 80);
});

describe("claimDue() counts how late it is", () => {
  async function lateMsOf(fields: RowFields, columns: Record<string, unknown> = {}) {
    const { id } = await insertDueAt(-5_000, fields);
    const all = { created_at: midday(-9_000), ...columns };
    await db.query("update point_reservations set ? where id = ?", [all, id]);
    await using frozen = await openFrozen(db, midday());
    const [claimed] = await claimDue(frozen, LEASE);
    return claimed?.lateMs;
  }

  test("from execute_at, or from when it was reserved or changed, if that was later", async () => {
    expect(await lateMsOf({})).toBe(5_000);
    expect(await lateMsOf({}, { created_at: midday(-3_000) })).toBe(3_000);
    expect(await lateMsOf({}, { changed_at: midday(-2_000) })).toBe(2_000);
  });

  test("also after a lost claim, but after a failure from the time of the next try", async () => {
    expect(await lateMsOf({ status: "PROCESSING", scanAt: midday(-10) })).toBe(5_000);
    expect(await lateMsOf({ scanAt: midday(-10) }, { attempts: 1 })).toBe(10);
  });
});

describe("findNextScan()", () => {
  test("gives the clock, and nothing if nothing waits", async () => {
    await insertReservation(db, { status: "DONE" });
    await using frozen = await openFrozen(db, midday());
    const before = performance.now();
    const { clock, ...next } = await findNextScan(frozen, SOON);
    expect(next).toEqual({ first: undefined, inMs: 10_000, due: 0 });
    expect(clock.nowMs).toBe(midday().getTime());
    expect(clock.sentAtMs).toBeWithin(before, clock.receivedAtMs);
    expect(clock.receivedAtMs).toBeWithin(clock.sentAtMs, performance.now());
  });

  test.each([1_500, 1, 0, -1, -2_500])("gives %d ms to the row that is next", async (offsetMs) => {
    const { id } = await insertDueAt(offsetMs);
    await insertDueAt(offsetMs + 1);
    await insertDueAt(-10_000, { status: "PROCESSING", scanAt: midday(86_400_000) });
    await using frozen = await openFrozen(db, midday());
    expect(await findNextScan(frozen, SOON)).toMatchObject({ first: { id }, inMs: offsetMs });
  });

  test("looks only from a position on, and only so far ahead", async () => {
    const tied = [await insertDueAt(100), await insertDueAt(100)];
    const [first = "", second = ""] = idsOf(tied).toSorted();
    await using frozen = await openFrozen(db, midday());
    const find = async (from: ScanPosition, withinMs: number) =>
      (await findNextScan(frozen, { from, withinMs, limit: 9 })).first;
    expect(await find(BEGINNING, 100)).toEqual({ scanAt: midday(100), id: first });
    expect(await find({ scanAt: midday(100), id: second }, 100)).toEqual({ scanAt: midday(100), id: second });
    expect(await find({ scanAt: midday(101), id: "" }, 100)).toBeUndefined();
    expect(await find(BEGINNING, 99)).toBeUndefined();
  });

  test("counts what is due, up to the limit, also what another scheduler holds", async () => {
    const ids = await insertMany(5);
    await insertReservation(db, { executeAt: new Date(Date.now() + 5_000) });
    const dueOf = async (limit: number, from = BEGINNING) =>
      (await findNextScan(db.database, { ...SOON, from, limit })).due;
    await db.database.transaction(async (transaction) => {
      await lockReservations(transaction, ids.slice(0, 2));
      expect([await dueOf(9), await dueOf(3)]).toEqual([5, 3]);
    });
    const [claimed] = await claimDue(db.database, { ...LEASE, limit: 1 });
    expect(await dueOf(9, claimed)).toBe(4);
  });
});

test("isBefore() orders positions by scan_at, then by id, as the index does", () => {
  const at = (offsetMs: number, id = "") => ({ scanAt: midday(offsetMs), id });
  const ordered = [BEGINNING, at(0), at(0, "0a"), at(0, "0b"), at(1), at(1, "0a")];
  for (const [index, a] of ordered.entries()) {
    for (const [other, b] of ordered.entries()) expect(isBefore(a, b)).toBe(index < other);
  }
});
