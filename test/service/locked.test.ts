import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { type Database, openDatabase, type Transaction } from "../../lib/database.ts";
import { findBalance } from "../../lib/points/balance_queries.ts";
import { decodeMessage, encodeMessage } from "../../lib/reservations/message.ts";
import type { Reservation } from "../../lib/reservations/reservation.ts";
import { findReservation } from "../../lib/reservations/reservation_queries.ts";
import { createReservations } from "../../lib/reservations/reservation_repository.ts";
import { claimDue } from "../../lib/reservations/scan_repository.ts";
import { openGranter } from "../../worker.ts";
import { emptyTables, openTestDatabase } from "../harness/database.ts";
import { insertReservation, insertReservations, reservationOf } from "../harness/fixtures.ts";
import { silent, until } from "../harness/harness.ts";
import { expectAgreement, processReservations } from "../harness/pipeline.ts";
import { appOn, bodyOf, json, post } from "../http/client.ts";

// Somebody holds a row for as long as they like: all others are served meanwhile, and what waits is served soon after.

/** Whose ledger entries MySQL refuses: a failure of the row's own. */
const CURSED = "Cursed";

const db = await openTestDatabase();
await db.query(`alter table point_transactions add constraint not_cursed check (user_id <> '${CURSED}')`);
beforeEach(() => emptyTables(db));

let users = 0;
function newUser(): string {
  return `User${++users}`;
}

/** A claimed reservation of a user of its own, 100 points, due. */
function insertClaimed(fields: Partial<Reservation> = {}): Promise<Reservation> {
  return insertReservation(db, { userId: newUser(), status: "PROCESSING", ...fields });
}

function setBalances(userIds: readonly string[]) {
  return db.query("insert into point_root (user_id, point_num) values ?", [userIds.map((id) => [id, 10])]);
}

async function statusOf({ id }: Reservation) {
  return (await findReservation(db.database, id))?.status;
}

async function areDone(reservations: readonly Reservation[]): Promise<boolean> {
  const rows = await db.query(
    "select id from point_reservations where id in (?) and status = 'DONE' and attempts = 0",
    [reservations.map(({ id }) => id)],
  );
  return rows.length === reservations.length;
}

async function pointsOf(userId: string): Promise<bigint | undefined> {
  return (await findBalance(db.database, userId))?.pointNum;
}

/** A worker in this process, which ends with the test. */
function openWorker({ maxAttempts = 10, batch = 1_000 } = {}) {
  const stop = new AbortController();
  const options = { database: db.database, logger: silent, maxAttempts, batch, signal: stop.signal };
  const grantMessage = openGranter(options);
  return {
    grant: (...reservations: Reservation[]) => grantMessage(decodeMessage(encodeMessage(reservations))),
    stop: () => stop.abort(),
    [Symbol.dispose]: () => stop.abort(),
  };
}

/** What somebody may hold that the grant of a reservation needs. */
const HELD: Record<string, (holder: Transaction, reservation: Reservation) => Promise<unknown>> = {
  "a locked balance": (holder, { userId }) =>
    holder.select("select * from point_root where user_id = ? for update", [userId]),
  "a held reservation": (holder, { id }) =>
    holder.select("select * from point_reservations where id = ? for update", [id]),
  "a balance that is being created": (holder, { userId }) =>
    holder.execute("insert into point_root (user_id, point_num) values (?, 10)", [userId]),
};

describe("a worker beside", () => {
  afterEach(() => expectAgreementBut10());

  test.each(Object.keys(HELD))(
    "%s grants all others, and this one when it is released, without an attempt (fault 43)",
    async (what) => {
      using worker = openWorker();
      const [held, next] = [await insertClaimed(), await insertClaimed()];
      const again = await insertClaimed({ userId: held.userId });
      const others = [await insertClaimed(), await insertClaimed()];
      const isCreated = what === "a balance that is being created";
      if (!isCreated) await setBalances([held.userId]);
      await setBalances([others[0]?.userId ?? ""]);
      await db.database.transaction(async (holder) => {
        await HELD[what]?.(holder, held);
        expect(await worker.grant(held, ...others)).toBe("ack");
        await until("the others are granted", () => areDone(others));
        // Also now that it knows of it, in a message of its own or beside others.
        expect(await Promise.all([worker.grant(again), worker.grant(held, next)])).toEqual(["ack", "ack"]);
        await until("the others are granted", () => areDone([next]));
        expect(await statusOf(held)).toBe("PROCESSING");
      });
      await until("the rest is granted", () => areDone([held, again]));
      expect(await pointsOf(held.userId)).toBe(210n);
    },
  );

  test("hundreds of locked balances grants all others, and these when they are released (fault 43)", async () => {
    using worker = openWorker({ batch: 200 });
    const locked = Array.from({ length: 300 }, () => newUser());
    await setBalances(locked);
    const held = [...locked, ...locked].map((userId) => reservationOf({ userId }));
    const others = Array.from({ length: 600 }, () => reservationOf({ userId: newUser() }));
    await insertReservations(db, { reservations: [...held, ...others], status: "PROCESSING" });
    await db.database.transaction(async ({ select }) => {
      await select("select * from point_root where user_id in (?) for update", [locked]);
      const messages = held.map((one, index) => worker.grant(one, others[index] as Reservation));
      expect(new Set(await Promise.all(messages))).toEqual(new Set(["ack"]));
      await until("the others are granted", () => areDone(others));
    });
    await until("the rest is granted", () => areDone(held));
  });

  test("a locked balance grants around it also if a row of the batch is invalid", async () => {
    using worker = openWorker({ maxAttempts: 1 });
    const [held, cursed, other] = [
      await insertClaimed(),
      await insertClaimed({ userId: CURSED }),
      await insertClaimed(),
    ];
    await setBalances([held.userId]);
    await db.database.transaction(async (holder) => {
      await HELD["a locked balance"]?.(holder, held);
      expect(await worker.grant(held, cursed, other)).toBe("ack");
      await until("the others are granted", () => areDone([other]));
      expect([await statusOf(cursed), await statusOf(held)]).toEqual(["FAILED", "PROCESSING"]);
    });
    await until("the rest is granted", () => areDone([held]));
  });

  test("a place where somebody lets no balance be created grants all others", async () => {
    using worker = openWorker();
    const held = await insertClaimed();
    const others = [await insertClaimed({ userId: "A" }), await insertClaimed({ userId: "z" })];
    await setBalances(["A", "z"]);
    await db.database.run(async ({ execute, select }) => {
      await execute("set session transaction isolation level repeatable read");
      await execute("begin");
      await select("select * from point_root where user_id = ? for update", [held.userId]);
      expect(await worker.grant(held, ...others)).toBe("ack");
      await until("the others are granted", () => areDone(others));
      expect(await statusOf(held)).toBe("PROCESSING");
      await execute("rollback");
      await execute("set session transaction isolation level read committed");
    });
    await until("the rest is granted", () => areDone([held]));
  });

  test("a locked balance leaves what waits to its lease when it ends", async () => {
    const worker = openWorker();
    const held = await insertClaimed();
    await setBalances([held.userId]);
    await db.database.transaction(async (holder) => {
      await HELD["a locked balance"]?.(holder, held);
      expect(await worker.grant(held)).toBe("ack");
      worker.stop();
    });
    await db.query("update point_reservations set scan_at = now(3)");
    const claimed = await claimDue(db.database, { limit: 10, leaseMs: 60_000 });
    expect(await processReservations([claimed], db)).toEqual(["ack"]);
    expect(await areDone([held])).toBe(true);
  });
});

/** All agrees but the 10 points that each balance is created with. */
async function expectAgreementBut10(): Promise<void> {
  await db.query(
    `insert into point_transactions (id, idempotency_key, user_id, point_amount, kind)
     select uuid(), uuid(), b.user_id, 10, 'add' from point_root b
     where b.point_num = 10 + (select coalesce(sum(point_amount), 0) from point_transactions t where t.user_id = b.user_id)`,
  );
  await expectAgreement(db);
}

describe("the API with two connections", () => {
  async function withApp(
    work: (send: ReturnType<typeof appOn>["send"], database: Database) => Promise<void>,
  ) {
    const database = openDatabase(db.url, { connections: 2 });
    await work(appOn(database).send, database).finally(() => database.close());
  }

  /** Sends requests that need what somebody holds, and others beside them, which are answered first. */
  async function expectOthersFirst(
    hold: (holder: Transaction) => Promise<unknown>,
    sends: (send: ReturnType<typeof appOn>["send"]) => {
      held: Promise<Response>[];
      other: () => Promise<Response>;
    },
  ): Promise<Response[]> {
    let answers: Response[] = [];
    await withApp(async (send) => {
      const { held } = await db.database.transaction(async (holder) => {
        await hold(holder);
        const { held, other } = sends(send);
        for (let round = 0; round < 5; round++) expect((await other()).status).toBeOneOf([200, 201]);
        expect(await Promise.race([...held, "nobody"])).toBe("nobody");
        return { held };
      });
      answers = await Promise.all(held);
    });
    return answers;
  }

  test.each(["a locked balance", "a balance that is being created"])(
    "changes the points of all others beside %s, and of this user when it is released",
    async (what) => {
      const [held, other] = [reservationOf({ userId: newUser() }), newUser()];
      if (what === "a locked balance") await setBalances([held.userId]);
      await setBalances([other]);
      const change = (user_id: string, point_num: number) =>
        json("PUT", { user_id, point_num, idempotency_key: crypto.randomUUID() });
      const answers = await expectOthersFirst(
        async (holder) => HELD[what]?.(holder, held),
        (send) => ({
          held: Array.from({ length: 6 }, () => send("/point/add", change(held.userId, 2))),
          other: () => send("/point/sub", change(other, 1)),
        }),
      );
      expect(answers.map(({ status }) => status)).toEqual(Array(6).fill(200));
      expect([await pointsOf(held.userId), await pointsOf(other)]).toEqual([22n, 5n]);
    },
  );

  test("cancels, patches and retries all others beside a held reservation, and this one when it is released", async () => {
    const [held, other] = [await insertReservation(db), await insertReservation(db)];
    const at = (id: string) => `/point/reservations/${id}`;
    const answers = await expectOthersFirst(
      (holder) => HELD["a held reservation"]?.(holder, held) as Promise<unknown>,
      (send) => ({
        held: Array.from({ length: 4 }, () => send(at(held.id), json("PATCH", { point_amount: 7 }))),
        other: () => send(at(other.id), json("PATCH", { point_amount: 8 })),
      }),
    );
    expect(answers.map(({ status }) => status)).toEqual(Array(4).fill(200));
    expect(await findReservation(db.database, held.id)).toMatchObject({ pointAmount: 7 });
  });

  test("answers the replay of a held reservation, and reserves all others", async () => {
    const key = crypto.randomUUID();
    const body = bodyOf({ idempotency_key: key });
    await withApp(async (send) => {
      const first = await send("/point/reserve", post(body));
      const { reservation_id: id } = (await first.json()) as { reservation_id: string };
      await db.database.transaction(async (holder) => {
        await HELD["a held reservation"]?.(holder, { ...reservationOf(), id });
        const requests = [body, bodyOf(), { ...body, point_amount: 7 }, bodyOf()];
        const answers = await Promise.all(requests.map((one) => send("/point/reserve", post(one))));
        expect(answers.map(({ status }) => status)).toEqual([201, 201, 422, 201]);
        expect(await answers[0]?.json()).toMatchObject({ reservation_id: id });
        for (const mode of ["each", "all"]) {
          const bulk = post({ mode: mode === "all" ? "atomic" : "each", reservations: [body, bodyOf()] });
          expect((await send("/point/reserve/bulk", bulk)).status).toBe(mode === "all" ? 201 : 200);
        }
      });
    });
  });

  test("lets only a request wait whose key another one has inserted and not committed", async () => {
    const key = crypto.randomUUID();
    const begun = reservationOf({ idempotencyKey: key });
    const { userId: user_id, pointAmount: point_amount } = begun;
    const body = { user_id, point_amount, execute_at: begun.executeAt.toISOString(), idempotency_key: key };
    const answers = await expectOthersFirst(
      (holder) => createReservations(holder, [begun]),
      (send) => ({
        held: [send("/point/reserve", post(body))],
        other: () => send("/point/reserve", post(bodyOf())),
      }),
    );
    expect(answers[0]?.headers.get("idempotent-replayed")).toBe("true");
    expect(await answers[0]?.json()).toMatchObject({ reservation_id: begun.id });
  });

  test("cancels all of a campaign but a held reservation, and this one when it is released", async () => {
    const rows = Array.from({ length: 3 }, () => reservationOf({ campaign: "summer" }));
    await insertReservations(db, { reservations: rows });
    await withApp(async (send) => {
      const { cancelling } = await db.database.transaction(async (holder) => {
        await HELD["a held reservation"]?.(holder, rows[0] as Reservation);
        const cancelling = send("/point/campaigns/summer/cancel", { method: "POST" });
        const isCancelled = async (row?: Reservation) => row && (await statusOf(row)) === "CANCELLED";
        await until(
          "the others are cancelled",
          async () => (await isCancelled(rows[1])) && isCancelled(rows[2]),
        );
        return { cancelling };
      });
      const answer = await cancelling;
      expect(await answer.json()).toMatchObject({ cancelled: 3, open: 0 });
    });
  });
});
