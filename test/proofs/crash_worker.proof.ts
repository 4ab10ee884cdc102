import { beforeEach, describe, expect, test } from "bun:test";
import type { Reservation } from "../../lib/reservations/reservation.ts";
import { emptyTables } from "../harness/database.ts";
import {
  command,
  type KillPoint,
  killAt,
  killPoints,
  openCrashing,
  seen,
  statementsOf,
} from "../harness/fault_points.ts";
import { insertReservations, reservationOf } from "../harness/fixtures.ts";
import { until } from "../harness/harness.ts";
import { insertEntries } from "../harness/ledger.ts";
import { publishReservations } from "../harness/pipeline.ts";
import { untilLogged } from "../harness/processes.ts";

/** Whose ledger entries MySQL refuses: a failure of the row's own. */
const CURSED = "Cursed";
const MAX_POINTS = 9_223_372_036_854_775_807n;

const { pipeline, proxies, runner } = await openCrashing("worker");
const queue = await pipeline.openQueue();
const { query } = pipeline.test;
await query(`alter table point_transactions add constraint not_cursed check (user_id <> '${CURSED}')`);
beforeEach(() => emptyTables(pipeline.test));

async function consuming() {
  const worker = await runner();
  await untilLogged(worker, "consuming");
  return worker;
}

/** What a reservation is, its ledger entries, and what its user has. */
interface State {
  status: string;
  attempts: number;
  entries: number;
  points: number;
}

/** All of them, in the order of their ids. */
async function readStates(): Promise<State[]> {
  const rows = await query<State>(
    `select status, attempts,
       (select count(*) from point_transactions t where t.idempotency_key = r.idempotency_key) entries,
       coalesce((select point_num from point_root b where b.user_id = r.user_id), 0) points
     from point_reservations r order by id`,
  );
  return rows.map((row) => ({ ...row, points: Number(row.points) }));
}

const CLAIMED: State = { status: "PROCESSING", attempts: 0, entries: 0, points: 0 };
const GRANTED: State = { status: "DONE", attempts: 0, entries: 1, points: 100 };
const FULL: State = { ...CLAIMED, points: Number(MAX_POINTS) };
const FAILED = { status: "FAILED", attempts: 1 };

function setBalance({ userId }: Reservation, points: bigint) {
  return query("insert into point_root (user_id, point_num) values (?, ?)", [userId, String(points)]);
}

function insertEntry(reservation: Reservation, pointAmount: number) {
  return insertEntries(pipeline.test, [{ ...reservation, pointAmount, reservation }]);
}

function curse({ id }: Reservation, attempts: number) {
  return query("update point_reservations set user_id = ?, attempts = ? where id = ?", [
    CURSED,
    attempts,
    id,
  ]);
}

const TOGETHER = "begin lock_reservations mark_done insert_ledger_entries";
/** One alone whose user has a balance, and one whose user has none. */
const ALONE = "begin lock_free mark_done insert_ledger_entries";
const ALONE_NEW = `begin lock_free commit read_uncommitted find_taken_balances ${TOGETHER}`;
const LOOK = "rollback begin lock_free find_grant_entry";

/** One message that a worker gets. */
interface Case {
  /** Puts something at fault with one of its reservations. */
  prepare?: (reservation: Reservation) => Promise<unknown>;
  /** The states of its reservations: before, and after each COMMIT. */
  states: State[][];
  /** All of its statements, as `killPoints` takes them. */
  work: string;
}

const CASES: Record<string, Case> = {
  "three together (fault 21)": {
    states: [Array(3).fill(CLAIMED), Array(3).fill(GRANTED)],
    work: `${TOGETHER} upsert_balances commit!`,
  },
  "three one by one, as the balance of the second is full (fault 29)": {
    prepare: (reservation) => setBalance(reservation, MAX_POINTS),
    states: [
      [CLAIMED, FULL, CLAIMED],
      [GRANTED, FULL, CLAIMED],
      [GRANTED, { ...FULL, ...FAILED }, CLAIMED],
      [GRANTED, { ...FULL, ...FAILED }, GRANTED],
    ],
    work: [
      `${TOGETHER} upsert_balances rollback`,
      `${ALONE_NEW} upsert_balances commit!`,
      `${ALONE} upsert_balances ${LOOK} mark_failed commit!`,
      `${ALONE_NEW} upsert_balances commit!`,
    ].join(" "),
  },
  "one whose key the ledger has with other content (fault 28)": {
    async prepare(reservation) {
      await insertEntry(reservation, 99);
      await setBalance(reservation, 99n);
    },
    states: [[{ ...CLAIMED, entries: 1, points: 99 }], [{ ...CLAIMED, ...FAILED, entries: 1, points: 99 }]],
    work: `${TOGETHER} rollback ${ALONE} ${LOOK} mark_failed commit!`,
  },
  "one that the ledger has with the same content (fault 24)": {
    async prepare(reservation) {
      await insertEntry(reservation, 100);
      await setBalance(reservation, 100n);
    },
    states: [[{ ...CLAIMED, entries: 1, points: 100 }], [GRANTED]],
    work: `${TOGETHER} rollback ${ALONE} ${LOOK} mark_done commit!`,
  },
  "one that fails by itself, to be tried again (fault 30)": {
    prepare: (reservation) => curse(reservation, 0),
    states: [[CLAIMED], [{ ...CLAIMED, status: "PENDING", attempts: 1 }]],
    work: `${TOGETHER} rollback ${ALONE_NEW} ${LOOK} schedule_retry commit!`,
  },
  "one that fails by itself, the last time (fault 30)": {
    prepare: (reservation) => curse(reservation, 9),
    states: [[{ ...CLAIMED, attempts: 9 }], [{ ...CLAIMED, status: "FAILED", attempts: 10 }]],
    work: `${TOGETHER} rollback ${ALONE_NEW} ${LOOK} mark_failed commit!`,
  },
};

describe.each(Object.entries(CASES))(
  "worker.ts killed while it grants %s",
  (_, { prepare, states, work }) => {
    const [before = [], end = []] = [states[0], states.at(-1)];
    const ack = { statement: "basic.ack", nth: 1, state: end };
    const points: KillPoint<State[]>[] = [
      ...killPoints(work, states),
      { ...ack, moment: "unsent" },
      { ...ack, moment: "sent" },
    ];

    async function insertCase() {
      const reservations = before.map((_, index) => reservationOf({ userId: `User${index}` }));
      await insertReservations(pipeline.test, { reservations, status: "PROCESSING" });
      const faulty = reservations[reservations.length >> 1];
      if (faulty) await prepare?.(faulty);
      expect(await readStates()).toEqual(before);
      return reservations;
    }

    test.each(points)(
      "$statement $nth $moment: the next one comes to the same end",
      async ({ statement, nth, moment, state }) => {
        const reservations = await insertCase();
        const service = await consuming();
        const struck = killAt(proxies, { command: command(statement, { nth }), moment, service });
        await publishReservations(queue, { reservations, chunk: reservations.length });
        await struck();
        expect(await readStates()).toEqual(state);
        // An ack that was sent brings nothing again.
        const acked = moment === "sent" ? undefined : seen(proxies.amqp, command("basic.ack"));
        const next = await consuming();
        await acked;
        await until("none is PROCESSING", async () =>
          (await readStates()).every(({ status }) => status !== "PROCESSING"),
        );
        expect(await readStates()).toEqual(end);
        expect(await queue.depth()).toBe(0);
        if (!acked) return expect(next.log().map(({ msg }) => msg)).not.toContain("processed");
        const { messages, granted = 0, over = 0 } = await untilLogged(next, "processed");
        const count = (states: State[], ...statuses: string[]) =>
          states.filter(({ status }) => statuses.includes(status)).length;
        expect({ messages, granted, over }).toEqual({
          messages: 1,
          granted: count(end, "DONE") - count(state, "DONE"),
          over: count(state, "DONE", "FAILED"),
        });
      },
    );

    test("these are all of its statements", async () => {
      const reservations = await insertCase();
      await consuming();
      const acked = seen(proxies.amqp, command("basic.ack"));
      const sent = await statementsOf(proxies.mysql, async () => {
        await publishReservations(queue, { reservations, chunk: reservations.length });
        await acked;
      });
      expect(await readStates()).toEqual(end);
      expect(sent).toBe(work.replaceAll("!", ""));
    });
  },
);
