import { beforeEach, expect, test } from "bun:test";
import { type Database, openDatabase } from "../../lib/database.ts";
import { findBalance } from "../../lib/points/balance_queries.ts";
import type { Reservation } from "../../lib/reservations/reservation.ts";
import { findReservation } from "../../lib/reservations/reservation_queries.ts";
import {
  cancelCampaign,
  cancelReservation,
  patchReservation,
  retryReservation,
} from "../../lib/reservations/reservation_repository.ts";
import { claimDue } from "../../lib/reservations/scan_repository.ts";
import type { ReservationStatus } from "../../lib/schema.ts";
import { emptyTables, openTestDatabase, untilRunning } from "../harness/database.ts";
import { insertReservation } from "../harness/fixtures.ts";
import { inOrder, openWatched } from "../harness/orders.ts";
import { expectAgreement, processReservations } from "../harness/pipeline.ts";

// Two who want to change the same reservation at the same moment: either may come first, and the other one finds what the
// first one has left.

const db = await openTestDatabase();
beforeEach(() => emptyTables(db));

type Verb = "claim" | "grant" | "cancel" | "patch" | "retry" | "campaign's cancel";

interface Actor {
  run: (database: Database, reservation: Reservation) => Promise<unknown>;
  /** The statement after which it has locked, or changed, what the other one wants. */
  changesAt: string;
  /** The statement that waits for the other one's locks, or that it sends if it finds them; a claim skips what is locked. */
  waitsAt?: string;
  findsBusyBy?: string;
}

const PATCH = { executeAt: new Date("2029-02-22T13:59:00.000Z"), pointAmount: 7 };
const IN_TIME = { untilMs: Number.POSITIVE_INFINITY };
const ACTORS: Record<Verb, Actor> = {
  claim: {
    run: async (database) => (await claimDue(database, { limit: 10, leaseMs: 60_000 })).length,
    changesAt: "mark_processing",
  },
  grant: {
    run: (database, reservation) => processReservations([[reservation]], { database }),
    changesAt: "upsert_balances",
    waitsAt: "lock_reservations",
  },
  cancel: {
    run: (database, { id }) => cancelReservation(database, id),
    changesAt: "cancel_reservation",
    findsBusyBy: "is_held",
  },
  patch: {
    run: (database, { id }) => patchReservation(database, id, PATCH),
    changesAt: "patch_reservation",
    findsBusyBy: "is_held",
  },
  retry: {
    run: (database, { id }) => retryReservation(database, id),
    changesAt: "retry_reservation",
    findsBusyBy: "is_held",
  },
  "campaign's cancel": {
    run: (database) => cancelCampaign(database, "summer", IN_TIME),
    changesAt: "cancel_reservations",
    findsBusyBy: "count_campaign",
  },
};

const DONE = { isDone: true };
const REFUSED = { isDone: false };
const CANCELLED = { cancelled: 1, granted: 0, failed: 0, open: 0 };
const GRANTED = { cancelled: 0, granted: 1, failed: 0, open: 0 };

test.each<[first: Verb, status: ReservationStatus, second: Verb, end: ReservationStatus, ofSecond: unknown]>([
  ["grant", "PROCESSING", "cancel", "DONE", REFUSED],
  ["cancel", "PROCESSING", "grant", "CANCELLED", ["ack"]],
  ["grant", "PROCESSING", "campaign's cancel", "DONE", GRANTED],
  ["campaign's cancel", "PROCESSING", "grant", "CANCELLED", ["ack"]],
  ["grant", "PROCESSING", "patch", "DONE", REFUSED],
  ["grant", "PROCESSING", "grant", "DONE", ["ack"]],
  ["claim", "PENDING", "cancel", "CANCELLED", DONE],
  ["cancel", "PENDING", "claim", "CANCELLED", 0],
  ["claim", "PENDING", "patch", "PROCESSING", REFUSED],
  ["patch", "PENDING", "claim", "PENDING", 0],
  ["claim", "PENDING", "campaign's cancel", "CANCELLED", CANCELLED],
  ["campaign's cancel", "PENDING", "claim", "CANCELLED", 0],
  ["cancel", "PENDING", "cancel", "CANCELLED", DONE],
  ["cancel", "PENDING", "patch", "CANCELLED", REFUSED],
  ["patch", "PENDING", "cancel", "CANCELLED", DONE],
  ["patch", "PENDING", "patch", "PENDING", DONE],
  ["patch", "PENDING", "campaign's cancel", "CANCELLED", CANCELLED],
  ["campaign's cancel", "PENDING", "patch", "CANCELLED", REFUSED],
  ["campaign's cancel", "PENDING", "cancel", "CANCELLED", DONE],
  ["campaign's cancel", "PENDING", "campaign's cancel", "CANCELLED", CANCELLED],
  ["retry", "FAILED", "retry", "PENDING", REFUSED],
  ["retry", "FAILED", "cancel", "CANCELLED", DONE],
  ["retry", "FAILED", "patch", "PENDING", DONE],
  ["retry", "FAILED", "claim", "PENDING", 0],
])(
  "a %s of a %s reservation before a %s: it ends %s (fault 20)",
  async (first, status, second, end, ofSecond) => {
    const reservation = await insertReservation(db, { status, campaign: "summer" });
    const { run, waitsAt, findsBusyBy } = ACTORS[second];
    const [, found] = await inOrder(db, {
      first: (database) => ACTORS[first].run(database, reservation),
      heldAt: ACTORS[first].changesAt,
      second: (database) => run(database, reservation),
      waitsAt,
      findsBusyBy,
    });
    const details = await findReservation(db.database, reservation.id);
    expect(details?.status).toBe(end);
    const isTransition = ofSecond === DONE || ofSecond === REFUSED;
    expect(found).toEqual(isTransition ? { ...ofSecond, details } : ofSecond);
    // What was reserved first is kept, also by the second of two patches.
    const isPatched = first === "patch" || (second === "patch" && ofSecond === DONE);
    const { pointAmount, executeAt } = reservation;
    const original = { originalPointAmount: pointAmount, originalExecuteAt: executeAt };
    const none = { originalPointAmount: null, originalExecuteAt: null };
    const expected = isPatched ? { ...PATCH, ...original } : { pointAmount, executeAt, ...none };
    expect(details).toEqual({ ...details, ...expected } as never);
    expect((await findBalance(db.database, reservation.userId))?.pointNum).toBe(
      end === "DONE" ? 100n : undefined,
    );
    await expectAgreement(db);
  },
);

test("cancelReservation() waits for a grant that is rolled back, and cancels (fault 20)", async () => {
  const { id } = await insertReservation(db, { status: "PROCESSING" });
  const { cancelled } = await db.database.transaction(async ({ execute, select }) => {
    await select("select id from point_reservations where id = ? for update", [id]);
    const watched = openWatched(db.database, "is_held");
    const cancelled = cancelReservation(watched.database, id);
    await watched.sent;
    await execute("rollback");
    return { cancelled };
  });
  expect(await cancelled).toMatchObject({ isDone: true, details: { status: "CANCELLED" } });
});

test("cancelReservation() holds the row that it refuses until it has said why", async () => {
  const { id } = await insertReservation(db, { status: "FAILED" });
  const details = await findReservation(db.database, id);
  const [cancelled, retried] = await inOrder(db, {
    first: (database) => cancelReservation(database, id),
    heldAt: "commit",
    second: (database) => retryReservation(database, id),
    findsBusyBy: "is_held",
  });
  expect(cancelled).toEqual({ isDone: false, details } as never);
  expect(retried).toMatchObject({ isDone: true, details: { status: "PENDING" } });
});

test("cancelCampaign() waits for nobody: a grant that waits for one of its rows does not deadlock with it", async () => {
  const insert = () => insertReservation(db, { campaign: "summer", status: "PROCESSING" });
  const rows = [await insert(), await insert(), await insert()];
  const retries: string[] = [];
  const another = openDatabase(db.url, { onRetry: ({ kind }) => retries.push(kind) });
  const { both } = await db.database.transaction(async ({ select }) => {
    await select("select id from point_reservations where id = ? for update", [rows[1]?.id]);
    const messages = rows.toReversed().map((one) => [one]);
    const granting = processReservations(messages, { database: another });
    await untilRunning(db, "lock_reservations");
    const watched = openWatched(another, "count_campaign");
    const both = [granting, cancelCampaign(watched.database, "summer", IN_TIME)];
    await watched.sent;
    return { both };
  });
  await Promise.all(both).finally(() => another.close());
  expect(retries).toEqual([]);
  await expectAgreement(db);
});
