import { expect, setDefaultTimeout, test } from "bun:test";
import { aggregate } from "../../lib/accounting/aggregate.ts";
import { reconcile } from "../../lib/accounting/reconcile.ts";
import { NEEDED_PACKET } from "../../lib/database_session.ts";
import { changePoints } from "../../lib/points/change_repository.ts";
import { openPace } from "../../lib/reservations/pace.ts";
import { createBulk } from "../../lib/reservations/reservation_repository.ts";
import { claimDue } from "../../lib/reservations/scan_repository.ts";
import { openTestDatabase } from "../harness/database.ts";
import { reservationOf } from "../harness/fixtures.ts";
import { countStatuses, processReservations } from "../harness/pipeline.ts";
import { recordStatements } from "../harness/plans.ts";

setDefaultTimeout(120_000);

const db = await openTestDatabase();

test("the largest statement of any setting fits into the max_allowed_packet that a server must have", async () => {
  // The largest bulk, SCAN_BATCH and WORKER_BATCH; every text as long as it may be.
  const rows = Array.from({ length: 10_000 }, (_, index) =>
    reservationOf({
      userId: `U${index}`.padEnd(20, "x"),
      pointAmount: 2_147_483_647,
      idempotencyKey: `${index}_`.padEnd(100, "-"),
      campaign: "c".repeat(64),
    }),
  );
  const changes = rows.slice(0, 1_000).map(({ userId, idempotencyKey }) => ({
    userId,
    idempotencyKey,
    pointAmount: 1,
    kind: "add" as const,
    reservationId: null,
  }));
  const statements = await recordStatements(db, async (database) => {
    await createBulk(database, rows, { allOrNone: false });
    expect(await claimDue(database, { limit: 10_000, leaseMs: 86_400_000 })).toHaveLength(10_000);
    const messages = Array.from({ length: 5 }, (_, index) => rows.slice(index * 1_000, (index + 1) * 1_000));
    await processReservations(messages, { database, pace: { ...openPace(), stallMs: () => 20_000 } });
    await changePoints(database, changes);
    await aggregate(database, { timeZone: "UTC" });
    await reconcile(database, { isFull: true, leaseMs: 15_000 });
  });
  expect(await countStatuses(db)).toEqual({ DONE: 5_000, PROCESSING: 5_000 });
  const sizes = statements.map(({ name, sql }) => ({ name, bytes: Buffer.byteLength(sql) }));
  const largest = sizes.toSorted((a, b) => b.bytes - a.bytes)[0];
  expect(largest?.bytes).toBeGreaterThan(1_000_000);
  // Twice as large: nobody has to count bytes when a statement changes.
  expect(2 * (largest?.bytes ?? 0)).toBeLessThan(NEEDED_PACKET);
});
