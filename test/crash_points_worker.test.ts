import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { v7 as uuidv7 } from "uuid";
import { compareSums } from "../lib/point_repository.ts";
import type { Queue } from "../lib/queue.ts";
import type { Reservation } from "../lib/reservation.ts";
import {
  ACK,
  BEGIN,
  COMMIT,
  INSERT_BALANCE,
  INSERT_LEDGER,
  killAt,
  LOCK,
  nth,
  openProxies,
  type Proxies,
  relay,
  seen,
  statementsOf,
} from "./fault_points.ts";
import { type RunningService, reservationOf, until } from "./harness.ts";
import { insertReservations, openPipeline, type Pipeline, publishReservations } from "./pipeline.ts";
import type { Moment } from "./proxy.ts";

const FIND = /^select [\s\S]* from `point_transactions`/;
const DONE = /^update point_reservations set status = 'DONE'/;
const FAIL = /^update `point_reservations` set `status` = 'FAILED'/;
const RETRY = /^update `point_reservations` set `status` = 'PENDING'/;
const STATEMENTS = {
  ...{ BEGIN, LOCK, FIND, DONE, FAIL, RETRY, COMMIT },
  ...{ LEDGER: INSERT_LEDGER, BALANCE: INSERT_BALANCE },
};
/** Whose ledger entries MySQL refuses: a failure of the row's own. */
const CURSED = "Cursed";
const MAX_POINTS = 9_223_372_036_854_775_807n;

let pipeline: Pipeline;
let proxies: Proxies;
let queue: Queue;
let runner: () => Promise<RunningService>;

beforeAll(async () => {
  pipeline = await openPipeline();
  await pipeline.test.query("alter table point_transactions add constraint not_cursed check (user_id <> ?)", [
    CURSED,
  ]);
  proxies = await openProxies(pipeline);
  queue = await pipeline.openQueue();
  runner = relay(async () => {
    const worker = await pipeline.start("worker", proxies.env);
    await until("it consumes", () => worker.log().some(({ msg }) => msg === "consuming"));
    return worker;
  });
}, 30_000);
afterAll(async () => {
  await pipeline[Symbol.asyncDispose]();
  await proxies[Symbol.asyncDispose]();
}, 30_000);

let users = 0;
function reservationsOf(count: number): Reservation[] {
  return Array.from({ length: count }, () => reservationOf({ userId: `User${++users}` }));
}

interface Stand {
  status: string;
  attempts: number;
  /** Ledger entries of the reservation's key and user, and what the user has. */
  entries: number;
  points: number;
}

/** How each of some reservations stands. */
async function standOf(reservations: readonly Reservation[]): Promise<Stand[]> {
  type Row = Stand & { id: string };
  const rows = await pipeline.test.query<Row>(
    `select id, status, attempts,
       (select count(*) from point_transactions t
         where t.idempotency_key = r.idempotency_key and t.user_id = r.user_id) entries,
       coalesce((select point_num from point_root b where b.user_id = r.user_id), 0) points
     from point_reservations r where id in (?)`,
    [reservations.map(({ id }) => id)],
  );
  return reservations.map(({ id }) => {
    const { status, attempts, entries, points } = rows.find((row) => row.id === id) ?? ({} as Row);
    return { status, attempts, entries: Number(entries), points: Number(points) };
  });
}

const WAITS: Stand = { status: "PROCESSING", attempts: 0, entries: 0, points: 0 };
const GRANTED: Stand = { status: "DONE", attempts: 0, entries: 1, points: 100 };

async function untilStand(reservations: readonly Reservation[], expected: readonly Stand[]): Promise<void> {
  let stand: Stand[] = [];
  const isOver = () => stand.every(({ status }) => status !== "PROCESSING");
  await until("all are over", async () => {
    stand = await standOf(reservations);
    return isOver();
  });
  expect(stand).toEqual([...expected]);
}

interface Kill {
  command: RegExp;
  moment?: Moment;
  /** How they stand after the kill, and in the end. */
  after: readonly Stand[];
  end: readonly Stand[];
}

/**
 * Sends reservations to a worker in one message, kills it at a command, and lets the next one have what comes again.
 *
 * @returns what the next worker says that it has processed
 */
async function killAndGoOn(
  reservations: readonly Reservation[],
  { command, moment = "answered", after, end }: Kill,
) {
  const struck = killAt(proxies, { command, moment, service: await runner() });
  await publishReservations(queue, { reservations, chunk: reservations.length });
  await struck();
  expect(await standOf(reservations)).toEqual([...after]);
  // An ack that was sent brings nothing again.
  const acked = moment === "sent" ? undefined : seen(proxies.amqp, ACK);
  const next = await runner();
  await acked;
  await untilStand(reservations, end);
  expect(await queue.depth()).toBe(0);
  const processed = () => next.log().find(({ msg }) => msg === "processed");
  // Its log comes a moment after its COMMIT.
  return acked ? until("it says what it has processed", processed) : processed();
}

async function expectAgreement() {
  const sums = await compareSums(pipeline.test.database);
  expect(sums).toMatchObject({ usersApart: 0, reservationsApart: 0, early: 0, agree: true });
}

describe("worker.ts killed in the middle of a grant: the next worker grants once", () => {
  type Line = [string, RegExp, Moment, "nothing" | "all"];
  const lines: Line[] = [
    ["before BEGIN (fault 37)", BEGIN, "unsent", "nothing"],
    ["BEGIN │ lock rows (fault 37)", BEGIN, "answered", "nothing"],
    ["lock rows │ DONE (fault 37)", LOCK, "answered", "nothing"],
    ["before DONE (fault 37)", DONE, "unsent", "nothing"],
    ["DONE │ ledger (fault 21)", DONE, "answered", "nothing"],
    ["before the ledger has its entries (fault 21)", INSERT_LEDGER, "unsent", "nothing"],
    ["ledger │ balance (fault 21)", INSERT_LEDGER, "answered", "nothing"],
    ["before the balances are raised (fault 21)", INSERT_BALANCE, "unsent", "nothing"],
    ["balance │ COMMIT (fault 21)", INSERT_BALANCE, "answered", "nothing"],
    ["before COMMIT (fault 21)", COMMIT, "unsent", "nothing"],
    ["COMMIT │ ack (fault 24)", COMMIT, "answered", "all"],
    ["before the ack is sent (fault 24)", ACK, "unsent", "all"],
    ["after the ack (fault 24)", ACK, "sent", "all"],
  ];

  test.each(lines)(
    "%s",
    async (_, command, moment, committed) => {
      const reservations = reservationsOf(3);
      await insertReservations(pipeline.test, { reservations, status: "PROCESSING" });
      const granted = Array(3).fill(GRANTED);
      const after = committed === "all" ? granted : Array(3).fill(WAITS);
      const processed = await killAndGoOn(reservations, { command, moment, after, end: granted });
      const outcome = { messages: 1, [committed === "all" ? "over" : "granted"]: 3 };
      if (moment === "sent") expect(processed).toBeUndefined();
      else expect(processed).toMatchObject(outcome);
      await expectAgreement();
    },
    30_000,
  );

  test("these are all of its statements", async () => {
    const reservations = reservationsOf(3);
    await insertReservations(pipeline.test, { reservations, status: "PROCESSING" });
    await runner();
    const sent = await statementsOf(proxies.mysql, STATEMENTS, async () => {
      await publishReservations(queue, { reservations, chunk: 3 });
      await untilStand(reservations, Array(3).fill(GRANTED));
    });
    expect(sent).toEqual(["BEGIN 1", "LOCK 1", "DONE 1", "LEDGER 1", "BALANCE 1", "COMMIT 1"]);
    for (const name of sent.map((statement) => statement.split(" ")[0])) {
      const [, command] = Object.entries(STATEMENTS).find(([key]) => key === name) ?? [];
      expect(lines.some(([, killed, moment]) => killed === command && moment === "answered")).toBe(true);
    }
  }, 30_000);
});

type Name = keyof typeof STATEMENTS;

/** What is at fault with a row, how it ends, and how the test takes its state away again. */
interface Case {
  prepare: (reservation: Reservation) => Promise<unknown>;
  end: Stand;
  clean: (reservation: Reservation) => Promise<unknown>;
}

const query = (sql: string, values: unknown[]) => pipeline.test.query(sql, values);
const insertEntry = ({ idempotencyKey, userId }: Reservation, amount: number) =>
  query("insert into point_transactions (id, idempotency_key, user_id, point_amount) values (?, ?, ?, ?)", [
    ...[uuidv7(), idempotencyKey, userId, amount],
  ]);
const insertBalance = ({ userId }: Reservation, points: bigint) =>
  query("insert into point_root (user_id, point_num) values (?, ?)", [userId, String(points)]);
const deletePoints = async ({ userId }: Reservation) => {
  await query("delete from point_transactions where user_id = ?", [userId]);
  await query("delete from point_root where user_id = ?", [userId]);
};

const FULL: Case = {
  prepare: (reservation) => insertBalance(reservation, MAX_POINTS),
  end: { status: "FAILED", attempts: 1, entries: 0, points: Number(MAX_POINTS) },
  clean: deletePoints,
};
const OTHER_CONTENT: Case = {
  async prepare(reservation) {
    await insertEntry(reservation, 99);
    await insertBalance(reservation, 99n);
  },
  end: { status: "FAILED", attempts: 1, entries: 1, points: 99 },
  clean: deletePoints,
};
const SAME_CONTENT: Case = {
  async prepare(reservation) {
    await insertEntry(reservation, 100);
    await insertBalance(reservation, 100n);
  },
  end: GRANTED,
  clean: async () => {},
};
const curse = ({ id }: Reservation, attempts: number) =>
  query("update point_reservations set user_id = ?, attempts = ? where id = ?", [CURSED, attempts, id]);
const TRIED: Case = {
  prepare: (reservation) => curse(reservation, 0),
  end: { status: "PENDING", attempts: 1, entries: 0, points: 0 },
  clean: async () => {},
};
const GIVEN_UP: Case = {
  prepare: (reservation) => curse(reservation, 9),
  end: { status: "FAILED", attempts: 10, entries: 0, points: 0 },
  clean: async () => {},
};

describe("worker.ts killed while it grants one by one, since the second of three is at fault: the next worker goes on", () => {
  /** At the answer to the n-th statement of this name: how many of the three are over then. */
  type Line = [string, Name | "ACK", number, 0 | 1 | 2 | 3];
  const lines: Line[] = [
    ["all three: BEGIN │ lock (fault 37)", "BEGIN", 1, 0],
    ["all three: lock │ DONE (fault 37)", "LOCK", 1, 0],
    ["all three: DONE │ ledger (fault 21)", "DONE", 1, 0],
    ["all three: ledger │ balance (fault 21)", "LEDGER", 1, 0],
    ["all three: balance refused │ one by one (fault 29)", "BALANCE", 1, 0],
    ["the first: BEGIN │ lock (fault 37)", "BEGIN", 2, 0],
    ["the first: lock │ look in the ledger (fault 37)", "LOCK", 2, 0],
    ["the first: look in the ledger │ DONE (fault 37)", "FIND", 1, 0],
    ["the first: DONE │ ledger (fault 21)", "DONE", 2, 0],
    ["the first: ledger │ balance (fault 21)", "LEDGER", 2, 0],
    ["the first: balance │ COMMIT (fault 21)", "BALANCE", 2, 0],
    ["the first: COMMIT │ the second (fault 24)", "COMMIT", 1, 1],
    ["at fault: BEGIN │ lock (fault 37)", "BEGIN", 3, 1],
    ["at fault: lock │ look in the ledger (fault 37)", "LOCK", 3, 1],
    ["at fault: look in the ledger │ DONE (fault 37)", "FIND", 2, 1],
    ["at fault: DONE │ ledger (fault 21)", "DONE", 3, 1],
    ["at fault: ledger │ balance (fault 21)", "LEDGER", 3, 1],
    ["at fault: balance refused │ the reason (fault 29)", "BALANCE", 3, 1],
    ["its reason: BEGIN │ lock (fault 29)", "BEGIN", 4, 1],
    ["its reason: lock │ FAILED (fault 29)", "LOCK", 4, 1],
    ["its reason: FAILED │ COMMIT (fault 29)", "FAIL", 1, 1],
    ["its reason: COMMIT │ the third (fault 29)", "COMMIT", 2, 2],
    ["the third: BEGIN │ lock (fault 37)", "BEGIN", 5, 2],
    ["the third: lock │ look in the ledger (fault 37)", "LOCK", 5, 2],
    ["the third: look in the ledger │ DONE (fault 37)", "FIND", 3, 2],
    ["the third: DONE │ ledger (fault 21)", "DONE", 4, 2],
    ["the third: ledger │ balance (fault 21)", "LEDGER", 4, 2],
    ["the third: balance │ COMMIT (fault 21)", "BALANCE", 4, 2],
    ["the third: COMMIT │ ack (fault 24)", "COMMIT", 3, 3],
    ["before the ack is sent (fault 24)", "ACK", 1, 3],
  ];

  async function insertThree() {
    const reservations = reservationsOf(3);
    await insertReservations(pipeline.test, { reservations, status: "PROCESSING" });
    const faulty = reservations[1] as Reservation;
    await FULL.prepare(faulty);
    return { reservations, faulty };
  }
  const end = [GRANTED, FULL.end, GRANTED];
  const before = [WAITS, { ...FULL.end, status: "PROCESSING", attempts: 0 }, WAITS];

  test.each(lines)(
    "%s",
    async (_, name, n, over) => {
      const { reservations, faulty } = await insertThree();
      const command = name === "ACK" ? ACK : nth(STATEMENTS[name], n);
      const moment = name === "ACK" ? "unsent" : "answered";
      const after = [...end.slice(0, over), ...before.slice(over)];
      const processed = await killAndGoOn(reservations, { command, moment, after, end });
      expect(processed).toMatchObject({ messages: 1, ...(over > 0 && { over }) });
      await FULL.clean(faulty);
      await expectAgreement();
    },
    30_000,
  );

  test("these are all of its statements", async () => {
    const { reservations, faulty } = await insertThree();
    await runner();
    const sent = await statementsOf(proxies.mysql, STATEMENTS, async () => {
      await publishReservations(queue, { reservations, chunk: 3 });
      await untilStand(reservations, end);
    });
    expect([...sent, "ACK 1"]).toEqual(lines.map(([, name, n]) => `${name} ${n}`));
    await FULL.clean(faulty);
  }, 30_000);
});

describe("worker.ts killed while it grants a row at fault: the next worker comes to the same end", () => {
  test.each<[string, Case, Name, number, "nothing" | "all"]>([
    ["other content: look in the ledger │ FAILED (fault 28)", OTHER_CONTENT, "FIND", 1, "nothing"],
    ["other content: FAILED │ COMMIT (fault 28)", OTHER_CONTENT, "FAIL", 1, "nothing"],
    ["other content: COMMIT │ ack (fault 28)", OTHER_CONTENT, "COMMIT", 1, "all"],
    ["same content: look in the ledger │ DONE (fault 24)", SAME_CONTENT, "FIND", 1, "nothing"],
    ["same content: DONE │ COMMIT (fault 24)", SAME_CONTENT, "DONE", 2, "nothing"],
    ["same content: COMMIT │ ack (fault 24)", SAME_CONTENT, "COMMIT", 1, "all"],
    ["to be tried again: ledger refused │ the attempt (fault 30)", TRIED, "LEDGER", 2, "nothing"],
    ["to be tried again: lock │ PENDING (fault 30)", TRIED, "LOCK", 3, "nothing"],
    ["to be tried again: PENDING │ COMMIT (fault 30)", TRIED, "RETRY", 1, "nothing"],
    ["to be tried again: COMMIT │ ack (fault 30)", TRIED, "COMMIT", 1, "all"],
    ["the last attempt: FAILED │ COMMIT (fault 30)", GIVEN_UP, "FAIL", 1, "nothing"],
    ["the last attempt: COMMIT │ ack (fault 30)", GIVEN_UP, "COMMIT", 1, "all"],
  ])(
    "%s",
    async (_, { prepare, end, clean }, name, n, committed) => {
      const reservations = reservationsOf(1);
      await insertReservations(pipeline.test, { reservations, status: "PROCESSING" });
      const faulty = reservations[0] as Reservation;
      await prepare(faulty);
      const [before] = await standOf(reservations);
      const after = [committed === "all" ? end : (before as Stand)];
      await killAndGoOn(reservations, { command: nth(STATEMENTS[name], n), after, end: [end] });
      await clean(faulty);
      await expectAgreement();
    },
    30_000,
  );
});
