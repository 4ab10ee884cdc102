import { expect, test } from "bun:test";
import { findBalance, findHoldings } from "../../lib/points/balance_queries.ts";
import { MAX_POINT_NUM } from "../../lib/points/point.ts";
import { openTestDatabase } from "../harness/database.ts";
import { insertReservation } from "../harness/fixtures.ts";
import { inOrder } from "../harness/orders.ts";
import { processReservations } from "../harness/pipeline.ts";

// Balances of the past, and the list of entries: user_routes.test.ts. What each query reads: plans.test.ts.

const db = await openTestDatabase();

test.each([0n, 1n, 9_007_199_254_740_993n, MAX_POINT_NUM])(
  "findBalance() keeps all digits of %p",
  async (points) => {
    const userId = `User${points}`.slice(0, 20);
    await db.query("insert into point_root (user_id, point_num) values (?, ?)", [userId, String(points)]);
    const times = { createdAt: expect.any(Date), updatedAt: expect.any(Date) };
    expect(await findBalance(db.database, userId)).toEqual({ userId, pointNum: points, ...times });
    expect(await findBalance(db.database, userId.toLowerCase())).toBeUndefined();
  },
);

test("findHoldings() sees a grant in one of its two sums, never in both or in none", async () => {
  const reservation = await insertReservation(db, { status: "PROCESSING", pointAmount: 70 });
  const [, during] = await inOrder(db, {
    first: (database) => processReservations([[reservation]], { database }),
    heldAt: "upsert_balances",
    second: (database) => findHoldings(database, reservation.userId),
  });
  expect(during).toMatchObject({ pointNum: 0n, reservedPointNum: 70n });
  const after = await findHoldings(db.database, reservation.userId);
  expect(after).toMatchObject({ pointNum: 70n, reservedPointNum: 0n });
});
