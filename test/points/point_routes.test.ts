import { describe, expect, test } from "bun:test";
import { openTestDatabase } from "../harness/database.ts";
import { insertReservation, reservationOf } from "../harness/fixtures.ts";
import { uniqueName, until } from "../harness/harness.ts";
import { processReservations } from "../harness/pipeline.ts";
import { appOn, bodyOf, expectProblem, json, post, type Send } from "../http/client.ts";

const db = await openTestDatabase();
const app = appOn(db.database);

const MAX_BIGINT = 9_223_372_036_854_775_807n;
const CONFLICT = "idempotency key is used with other content";
const TOO_FEW = "points must be greater than 0";
const TOO_MANY = "points must be at most 9223372036854775807";

let users = 0;
function newUser(): string {
  return `User${++users}`;
}

type Verb = "add" | "sub";
interface Change {
  user: string;
  points: number;
  key?: string;
}

function change(verb: Verb, { user, points, key }: Change, send = app.send): Promise<Response> {
  const body = { user_id: user, point_num: points, ...(key && { idempotency_key: key }) };
  return send(`/point/${verb}`, json("PUT", body));
}

/** What came of a change: its status, and why it was refused or whether it is a replay. */
async function outcomeOf(answer: Response | Promise<Response>) {
  const response = await answer;
  const { errors } = (await response.json()) as { errors?: string[] };
  return [response.status, errors?.[0] ?? response.headers.get("idempotent-replayed")];
}

function setBalance(user: string, points: bigint) {
  return db.query("insert into point_root (user_id, point_num) values (?, ?)", [user, points.toString()]);
}

/** A user's balance, and the ledger's amounts in order. */
async function stateOf(user: string) {
  const [balance] = await db.query<{ points: string }>(
    "select cast(point_num as char) points from point_root where user_id = ?",
    [user],
  );
  const ledger = await db.query<{ points: number }>(
    "select point_amount points from point_transactions where user_id = ? order by id",
    [user],
  );
  return { balance: balance?.points, ledger: ledger.map(({ points }) => points) };
}

describe("PUT /point/add and PUT /point/sub", () => {
  test("answer in the original's words, once for each key, and refuse what the balance cannot bear", async () => {
    const user = newUser();
    const [gift, spent] = [
      { user, points: 100, key: uniqueName("key") },
      { user, points: 70, key: uniqueName("key") },
    ];
    for (const replayed of [null, "true"]) {
      for (const [verb, fields, message] of [
        ["add", gift, "point updated"],
        ["sub", spent, "point subtracted"],
      ] as const) {
        const response = await change(verb, fields);
        expect([response.status, response.headers.get("idempotent-replayed")]).toEqual([200, replayed]);
        expect(await response.json()).toEqual({ messages: [message] });
      }
    }
    const { detail } = await expectProblem(await change("sub", { user, points: 31 }), 400, [TOO_FEW]);
    expect(detail).toContain(user);
    await expectProblem(await change("add", { ...gift, points: 101 }), 422, [CONFLICT]);
    expect(await stateOf(user)).toEqual({ balance: "30", ledger: [100, -70] });
  });

  test.each(["before", "after"])(
    "share no keys with reservations: both count if the addition comes %s the grant",
    async (order) => {
      const user = newUser();
      const key = uniqueName("key");
      const body = bodyOf({ user_id: user, idempotency_key: key, execute_at: "2026-01-01T00:00:00Z" });
      expect((await app.send("/point/reserve", post(body))).status).toBe(201);
      await db.query("update point_reservations set status = 'PROCESSING' where idempotency_key = ?", [key]);
      const details = async () =>
        (await app.send(`/point/reservations?idempotency_key=${key}`)).json() as Promise<
          Record<string, string>
        >;
      const add = () => outcomeOf(change("add", { user, points: 100, key }));
      if (order === "before") expect(await add()).toEqual([200, null]);
      const { reservation_id: id = "", status, granted_at } = await details();
      expect([status, granted_at]).toEqual(["PROCESSING", null as never]);
      const reservation = reservationOf({ id, userId: user, idempotencyKey: key });
      expect(await processReservations([[reservation]], db)).toEqual(["ack"]);
      if (order === "after") expect(await add()).toEqual([200, null]);
      expect(await details()).toMatchObject({ status: "DONE", granted_at: expect.any(String) });
      expect(await stateOf(user)).toEqual({ balance: "200", ledger: [100, 100] });
      expect(await add()).toEqual([200, "true"]);
      expect(await outcomeOf(app.send("/point/reserve", post(body)))).toEqual([201, "true"]);
    },
  );
});

describe("PUT /point/add and PUT /point/sub under load:", () => {
  test("what is refused affects only itself, also if all go in one transaction", async () => {
    const [rich, poor, full, taken] = [newUser(), newUser(), newUser(), newUser()];
    const key = uniqueName("key");
    await setBalance(rich, 100n);
    await setBalance(poor, 5n);
    await setBalance(full, MAX_BIGINT);
    await change("add", { user: taken, points: 3, key });
    const { promise: gate, resolve: open } = Promise.withResolvers<void>();
    let batches = 0;
    const counting = appOn({
      ...db.database,
      async transaction(work, options) {
        // The first is held up: those that come meanwhile gather.
        if (++batches === 1) await gate;
        return db.database.transaction(work, options);
      },
    });
    let read = 0;
    /** Sends a body that counts when it is read: only then does its change wait for the batch. */
    const send: Send = (path, { body, ...init } = {}) => {
      function pull(controller: ReadableStreamDefaultController<Uint8Array>) {
        controller.enqueue(Buffer.from(String(body)));
        controller.close();
        read++;
      }
      return counting.send(path, { ...init, body: new ReadableStream({ pull }, { highWaterMark: 0 }) });
    };
    const first = change("add", { user: rich, points: 1 }, send);
    await until("the first is under way", () => batches === 1);
    const changes: [Verb, Change, number, string | null][] = [
      ["sub", { user: poor, points: 6 }, 400, TOO_FEW],
      ["sub", { user: "Nobody", points: 1 }, 400, "user not found"],
      ["add", { user: full, points: 1 }, 400, TOO_MANY],
      ["add", { user: taken, points: 4, key }, 422, CONFLICT],
      ["add", { user: taken, points: 3, key }, 200, "true"],
      ["sub", { user: poor, points: 5 }, 200, null],
      ["sub", { user: rich, points: 100 }, 200, null],
      ["sub", { user: full, points: 1 }, 200, null],
      ["add", { user: "Somebody", points: 1 }, 200, null],
    ];
    const answers = changes.map(([verb, fields]) => change(verb, fields, send));
    await until("all bodies are read", () => read === 1 + answers.length);
    open();
    const outcomes = await Promise.all(answers.map(outcomeOf));
    expect(outcomes).toEqual(changes.map(([, , status, reason]) => [status, reason]));
    expect(await outcomeOf(first)).toEqual([200, null]);
    // The others once more, when it is known that some of their users have no balance.
    expect(batches).toBe(3);
    expect(await Promise.all([rich, poor, full, taken, "Nobody", "Somebody"].map(stateOf))).toEqual([
      { balance: "1", ledger: [1, -100] },
      { balance: "0", ledger: [-5] },
      { balance: String(MAX_BIGINT - 1n), ledger: [-1] },
      { balance: "3", ledger: [3] },
      { balance: undefined, ledger: [] },
      { balance: "1", ledger: [1] },
    ]);
  });

  test("a balance that somebody holds delays its own changes only", async () => {
    const [held, free, stranger] = [newUser(), newUser(), newUser()];
    for (const user of [held, free]) await setBalance(user, 10n);
    let waiting: Promise<Response>[] = [];
    await db.database.transaction(async ({ select }) => {
      await select("select point_num from point_root where user_id = ? for update", [held]);
      waiting = [4, 7].map((points) => change("sub", { user: held, points }));
      // Also those that come after them, and those of users without a balance.
      for (let round = 0; round < 3; round++) {
        expect((await change("sub", { user: free, points: 1 })).status).toBe(200);
        expect((await change("add", { user: stranger, points: 1 })).status).toBe(200);
      }
      expect(await Promise.race([...waiting, "nobody"])).toBe("nobody");
    });
    // Either may be first.
    const statuses = (await Promise.all(waiting)).map(({ status }) => status);
    expect(statuses.toSorted()).toEqual([200, 400]);
    const points = statuses[0] === 200 ? 4 : 7;
    expect(await stateOf(held)).toEqual({ balance: String(10 - points), ledger: [-points] });
  });
});

describe("GET /point/confirm", () => {
  test.each(["0", "9223372036854775807"])("tells a balance of %s in the original's words", async (points) => {
    const user = newUser();
    await setBalance(user, BigInt(points));
    const response = await app.send(`/point/confirm?user_id=${user}`);
    expect(response.status).toBe(200);
    expect(await response.json()).toEqual({ messages: [`userID: ${user}`, `pointNum: ${points}`] });
  });

  test("refuses a user without a balance in the original's words; case matters", async () => {
    const known = newUser();
    await setBalance(known, 1n);
    const { userId } = await insertReservation(db, { userId: newUser() });
    for (const user of [known.toUpperCase(), userId]) {
      await expectProblem(await app.send(`/point/confirm?user_id=${user}`), 400, ["user not found"]);
    }
  });
});
