import { beforeEach, describe, expect, test } from "bun:test";
import { compareSums } from "../../lib/dev/compare_sums.ts";
import { changePoints } from "../../lib/points/change_repository.ts";
import { MAX_POINT_NUM, newPointChange } from "../../lib/points/point.ts";
import type { Reservation } from "../../lib/reservations/reservation.ts";
import { emptyTables, openTestDatabase } from "../harness/database.ts";
import { insertReservation } from "../harness/fixtures.ts";
import { processReservations } from "../harness/pipeline.ts";
import { recordStatements } from "../harness/plans.ts";

// The proofs, the fault run and the demo rely on it: what it does not see, they do not see.

const db = await openTestDatabase();
beforeEach(() => emptyTables(db));

const NOTHING = { reservations: 0n, direct: 0n, ledger: 0n, balances: 0n };
const AGREE = { balanceMismatches: 0, reservationMismatches: 0, early: 0, agree: true };

/** Reserves and grants as the program does. */
async function grant(fields: Partial<Reservation> = {}): Promise<Reservation> {
  const reservation = await insertReservation(db, { ...fields, status: "PROCESSING" });
  expect(await processReservations([[reservation]], db)).toEqual(["ack"]);
  return reservation;
}

function change(
  kind: "add" | "sub",
  fields: { user_id: string; point_num: number; idempotency_key?: string },
) {
  return changePoints(db.database, [newPointChange(fields, { kind })]);
}

describe("compareSums()", () => {
  test("agrees on nothing at all", async () => {
    expect(await compareSums(db.database)).toEqual({ ...NOTHING, ...AGREE });
  });

  test("agrees on grants and direct changes, also if a key is both; leaves out what is not granted", async () => {
    const { executeAt } = await grant({ userId: "a", pointAmount: 100, idempotencyKey: "key" });
    // A grant at the very millisecond is not early.
    await db.query("update point_transactions set created_at = ?", [executeAt]);
    await grant({ userId: "a", pointAmount: 2_147_483_647 });
    await grant({ userId: "A", pointAmount: 3 });
    for (const status of ["PENDING", "PROCESSING", "FAILED", "CANCELLED"] as const) {
      await insertReservation(db, { userId: "a", status });
    }
    await change("add", { user_id: "a", point_num: 100, idempotency_key: "key" });
    await change("sub", { user_id: "a", point_num: 150 });
    await change("sub", { user_id: "nobody", point_num: 1 });
    const ledger = 2_147_483_700n;
    expect(await compareSums(db.database)).toEqual({
      reservations: ledger + 50n,
      direct: -50n,
      ledger,
      balances: ledger,
      ...AGREE,
    });
  });

  // Each difference alone: one that hides behind another one would go unseen. `b` is a user, and the key of its grant.
  const OF_B = "where idempotency_key = 'b'";
  test.each<[string, string[], object]>([
    [
      "a balance that is off by one",
      ["update point_root set point_num = point_num + 1 where user_id = 'a'"],
      { balances: 271n, balanceMismatches: 1 },
    ],
    [
      "two balances that are off by one against each other",
      ["update point_root set point_num = point_num + if(user_id = 'a', 1, -1)"],
      { balanceMismatches: 2 },
    ],
    [
      "a balance that is gone",
      ["delete from point_root where user_id = 'b'"],
      { balances: 70n, balanceMismatches: 1 },
    ],
    [
      "balances of nobody in the ledger, beyond a BIGINT",
      [`insert into point_root (user_id, point_num) values ('c', ${MAX_POINT_NUM}), ('d', ${MAX_POINT_NUM})`],
      { balances: 270n + 2n * MAX_POINT_NUM, balanceMismatches: 2 },
    ],
    [
      "a grant that is gone",
      [`delete from point_transactions ${OF_B}`],
      { ledger: 70n, balanceMismatches: 1, reservationMismatches: 1 },
    ],
    [
      "a direct change that is gone",
      ["delete from point_transactions where kind = 'sub'"],
      { direct: 0n, ledger: 300n, balanceMismatches: 1 },
    ],
    [
      "a direct change that is in no balance",
      ["update point_transactions set point_amount = -35 where kind = 'sub'"],
      { direct: -35n, ledger: 265n, balanceMismatches: 1 },
    ],
    [
      "a grant that passes for a direct change",
      [`update point_transactions set kind = 'add', reservation_id = null ${OF_B}`],
      { direct: 170n, reservationMismatches: 1 },
    ],
    [
      "a grant without a reservation",
      [
        `insert into point_transactions (id, idempotency_key, user_id, point_amount, kind, reservation_id)
         values (uuid(), 'c', 'a', 7, 'grant', uuid())`,
        "update point_root set point_num = point_num + 7 where user_id = 'a'",
      ],
      { ledger: 277n, balances: 277n },
    ],
    [
      "DONE without a grant",
      [
        `insert into point_reservations (id, user_id, point_amount, execute_at, status, idempotency_key)
         values (uuid(), 'a', 100, now(3), 'DONE', 'c')`,
      ],
      { reservations: 400n, reservationMismatches: 1 },
    ],
    ...["PENDING", "PROCESSING", "FAILED", "CANCELLED"].map((status): [string, string[], object] => [
      `a grant of one that is ${status}`,
      [
        `update point_reservations set status = '${status}',
           scan_at = ${status.startsWith("P") ? "execute_at" : "null"} ${OF_B}`,
      ],
      { reservations: 100n, reservationMismatches: 1 },
    ]),
    [
      "a grant with another amount",
      [
        `update point_transactions set point_amount = 201 ${OF_B}`,
        "update point_root set point_num = 201 where user_id = 'b'",
      ],
      { ledger: 271n, balances: 271n, reservationMismatches: 1 },
    ],
    [
      "a grant to another user",
      [
        `update point_transactions set user_id = 'a' ${OF_B}`,
        "delete from point_root where user_id = 'b'",
        "update point_root set point_num = 270",
      ],
      { reservationMismatches: 1 },
    ],
    [
      "a grant of another reservation",
      [`update point_transactions set reservation_id = uuid() ${OF_B}`],
      { reservationMismatches: 1 },
    ],
    [
      "a grant one millisecond early",
      [
        `update point_transactions join point_reservations using (idempotency_key)
         set point_transactions.created_at = execute_at - interval 1000 microsecond ${OF_B}`,
      ],
      { early: 1 },
    ],
  ])("catches %s", async (_, plant, difference) => {
    await grant({ userId: "a", pointAmount: 100 });
    await grant({ userId: "b", pointAmount: 200, idempotencyKey: "b" });
    await change("sub", { user_id: "a", point_num: 30 });
    const right = { reservations: 300n, direct: -30n, ledger: 270n, balances: 270n, ...AGREE };
    expect(await compareSums(db.database)).toEqual(right);
    for (const sql of plant) await db.query(sql);
    expect(await compareSums(db.database)).toEqual({ ...right, ...difference, agree: false });
  });

  test("is one statement, hence sees one moment: grants meanwhile are no difference", async () => {
    const statements = await recordStatements(db, (database) => compareSums(database));
    expect(statements.map(({ name }) => name)).toEqual(["compare_sums"]);
  });
});
