import { describe, expect, test } from "bun:test";
import { MAX_POINT_NUM } from "../lib/point.ts";
import { compareSums } from "../lib/point_repository.ts";
import type { ReservationStatus } from "../lib/reservation.ts";
import { insertReservation, type RunningService, type TestDatabase, until } from "./harness.ts";
import { countStatuses, openPipeline, type Pipeline } from "./pipeline.ts";

/** What these tests look at in any answer. */
interface Answer {
  status: number;
  body: {
    status?: ReservationStatus | number;
    reservation_status?: ReservationStatus;
    granted_at?: string | null;
    transaction_id?: string | null;
    results?: { reservation_id: string }[];
  };
}

/** Asks as a client does: again where the answer is 503. */
async function ask(url: string, method: string, body?: unknown): Promise<Answer> {
  const json = { headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  for (let tries = 0; tries < 100; tries++) {
    const response = await fetch(url, { method, ...(body !== undefined && json) });
    const answer = { status: response.status, body: (await response.json()) as Answer["body"] };
    if (response.status !== 503) return answer;
    await Bun.sleep(50);
  }
  throw new Error(`${method} ${url} was answered with 503 a hundred times`);
}

interface Due {
  id: string;
  url: string;
  /** By `Date.now()`. */
  dueMs: number;
}

/** Reserves so many in one request, of 17 users unless told, due evenly spread from a moment on. */
async function reserveMany(
  { url }: RunningService,
  options: {
    count: number;
    inMs: number;
    spreadMs: number;
    userOf?: (index: number) => string;
    campaignOf?: (index: number) => string;
  },
): Promise<Due[]> {
  const { count, inMs, spreadMs, userOf = (index) => `User${index % 17}`, campaignOf } = options;
  const startsAt = Date.now() + inMs;
  const rows = Array.from({ length: count }, (_, index) => {
    const dueMs = Math.round(startsAt + (index / count) * spreadMs);
    const request = {
      user_id: userOf(index),
      point_amount: 1 + (index % 5),
      execute_at: new Date(dueMs).toISOString(),
      idempotency_key: crypto.randomUUID(),
      ...(campaignOf && { campaign: campaignOf(index) }),
    };
    return { dueMs, request };
  });
  const reservations = rows.map(({ request }) => request);
  const answer = await ask(`${url}/point/reserve/bulk`, "POST", { mode: "atomic", reservations });
  expect(answer.status).toBe(201);
  const ids = (answer.body.results ?? []).map(({ reservation_id }) => reservation_id);
  return rows.map(({ dueMs }, index) => {
    const id = ids[index] as string;
    return { id, url: `${url}/point/reservations/${id}`, dueMs };
  });
}

/**
 * Moments at which either side may win, however fast the machine is: a little later after each request that came before
 * the other side, a little earlier after each that came too late.
 *
 * @param options.fromMs where to begin, in milliseconds after a reservation's time
 * @param options.aroundMs how far a moment may be from that, at random
 */
function aim({ fromMs, aroundMs }: { fromMs: number; aroundMs: number }) {
  let centreMs = fromMs;
  return {
    async sleepUntil(dueMs: number) {
      await Bun.sleep(dueMs - AIM_LEAD_MS - Date.now());
      // Again: by now others may have come too early or too late, on a busy machine by far.
      await Bun.sleep(dueMs + centreMs + (2 * Math.random() - 1) * aroundMs - Date.now());
    },
    learn(cameFirst: boolean) {
      centreMs += cameFirst ? AIM_STEP_MS : -AIM_STEP_MS;
    },
  };
}
const AIM_STEP_MS = 3;
/** How long before its time the moment of a request is chosen, in milliseconds. */
const AIM_LEAD_MS = 500;

/** Where a reservation stands in the end, and the ledger entry of its key. */
interface End {
  id: string;
  status: ReservationStatus;
  transactionId: string | null;
  grantedAt: Date | null;
}

async function untilOver({ query }: TestDatabase): Promise<void> {
  await until(
    "all are over",
    async () => {
      const [open] = await query("select 1 from point_reservations where scan_at is not null limit 1");
      return open === undefined;
    },
    60_000,
  );
}

/** What is DONE has the one ledger entry of its user and amount, nothing else has any, and all sums agree. */
async function expectFair({ query, database }: TestDatabase): Promise<Map<string, End>> {
  const ends = await query<End & { isRight: number }>(
    `select r.id, r.status, t.id transactionId, t.created_at grantedAt,
       (r.status = 'DONE') = (t.id is not null)
       and (t.id is null or (t.user_id = r.user_id and t.point_amount = r.point_amount)) isRight
     from point_reservations r left join point_transactions t on t.idempotency_key = r.idempotency_key`,
  );
  expect(ends.filter(({ isRight }) => !isRight)).toEqual([]);
  // A key has one entry at most: as many entries as there are DONE leaves none for anything else.
  const [ledger] = await query<{ entries: number }>("select count(*) entries from point_transactions");
  const endsById = new Map(ends.map((end) => [end.id, end]));
  expect(Number(ledger?.entries)).toBe(countOf(endsById, "DONE"));
  expect(await compareSums(database)).toMatchObject({ agree: true, early: 0 });
  return endsById;
}

/** What became of a DELETE, in the words in which the table says where the reservation stands. */
function verdictOf({ status, body }: Answer): Pick<End, "status" | "transactionId" | "grantedAt"> {
  if (status === 200)
    return { status: body.status as ReservationStatus, transactionId: null, grantedAt: null };
  if (status !== 409) throw new Error(`Cancelling was answered with ${status}: ${JSON.stringify(body)}`);
  return {
    status: body.reservation_status as ReservationStatus,
    transactionId: body.transaction_id ?? null,
    grantedAt: body.granted_at ? new Date(body.granted_at) : null,
  };
}

/** Each answer to a DELETE says what the table says in the end. */
function expectTrue(answers: ReadonlyMap<string, Answer>, ends: ReadonlyMap<string, End>): void {
  const verdicts = [...answers].map(([id, answer]) => ({ id, ...verdictOf(answer) }));
  const table = [...answers.keys()].map((id) => {
    const { status, transactionId, grantedAt } = ends.get(id) as End;
    return { id, status, transactionId, grantedAt };
  });
  expect(verdicts).toEqual(table);
}

function countOf(ends: ReadonlyMap<string, End>, status: ReservationStatus): number {
  return [...ends.values()].filter((end) => end.status === status).length;
}

/** How many reservations the workers found over when their message came: they were cancelled while PROCESSING. */
function countOver(workers: readonly RunningService[]): number {
  return workers
    .flatMap((worker) => worker.log())
    .reduce((sum, { msg, over }) => sum + (msg === "processed" ? Number(over ?? 0) : 0), 0);
}

/** The whole program: two apis, a scheduler and two workers, ready. */
async function startAll(pipeline: Pipeline, env: Record<string, string> = {}) {
  const apis = [await pipeline.start("api"), await pipeline.start("api")] as const;
  const scheduler = await pipeline.start("scheduler", env);
  const workers = [await pipeline.start("worker", env), await pipeline.start("worker", env)];
  for (const { url } of [...apis, scheduler, ...workers]) {
    await until("ready", async () => (await fetch(`${url}/ready`)).status === 200);
  }
  return { apis, api: apis[0], workers };
}

/** Chunks and batches so small that granting a thousand takes about as long as cancelling them. */
const SMALL = { PUBLISH_CHUNK: "10", WORKER_BATCH: "10", WORKER_PREFETCH: "5" };

/**
 * Reserves so many that are due, and lets all of them come into the queue of workers that stand still. However fast the
 * machine is, some come too late to be granted by the first, as long as the second keeps its messages.
 */
async function reserveForStopped(
  { test }: Pipeline,
  { api, workers }: { api: RunningService; workers: readonly RunningService[] },
  options: { count: number; campaignOf?: (index: number) => string; userOf?: (index: number) => string },
) {
  for (const { pid } of workers) process.kill(pid, "SIGSTOP");
  const all = await reserveMany(api, { inMs: 0, spreadMs: 0, ...options });
  await until("all are claimed", async () => (await countStatuses(test)).PROCESSING === options.count);
  const wake = (index: number) => process.kill(workers[index]?.pid as number, "SIGCONT");
  return {
    all,
    /** The first worker goes on; resolves when it has granted some. */
    async wakeFirst() {
      wake(0);
      await until("the first is DONE", async () => (await countStatuses(test)).DONE);
    },
    wakeSecond: () => wake(1),
  };
}

function shuffled<T>(items: readonly T[]): T[] {
  return items
    .map((item) => ({ item, place: Math.random() }))
    .toSorted((a, b) => a.place - b.place)
    .map(({ item }) => item);
}

describe("DELETE of a reservation against its grant", () => {
  test("at a random moment around it, 1,000 times: CANCELLED without points or DONE with them, as the answer says (fault 20)", async () => {
    await using pipeline = await openPipeline();
    const { api, workers } = await startAll(pipeline);
    const all = await reserveMany(api, { count: 1_000, inMs: 1_500, spreadMs: 8_000 });
    const answers = new Map<string, Answer>();
    const moment = aim({ fromMs: 50, aroundMs: 100 });
    await Promise.all(
      all.map(async ({ id, url, dueMs }) => {
        await moment.sleepUntil(dueMs);
        const answer = await ask(url, "DELETE");
        moment.learn(answer.status === 200);
        answers.set(id, answer);
      }),
    );
    await untilOver(pipeline.test);
    const ends = await expectFair(pipeline.test);
    expectTrue(answers, ends);
    expect(countOf(ends, "CANCELLED")).toBeGreaterThan(50);
    expect(countOf(ends, "DONE")).toBeGreaterThan(50);
    await until("a worker says that it found some over", () => countOver(workers) > 0);
  }, 90_000);

  test.each([
    ["granted together", { isFaulty: false, clients: 1_000 }],
    // Which takes longer, and so must the cancellations.
    ["granted one by one, as one of each batch is at fault", { isFaulty: true, clients: 4 }],
  ])(
    "for all of 1,000 that are PROCESSING, when workers wake that have slept on their messages: %s",
    async (_, { isFaulty, clients }) => {
      await using pipeline = await openPipeline();
      const running = await startAll(pipeline, SMALL);
      // No points fit into this balance any more: a grant of this user's fails its batch.
      const full = { user_id: "Full", point_num: MAX_POINT_NUM };
      if (isFaulty) await pipeline.test.query("insert into point_root set ?", [full]);
      const { all, wakeFirst, wakeSecond } = await reserveForStopped(pipeline, running, {
        count: 1_000,
        userOf: (index) => (isFaulty && index % 10 === 9 ? "Full" : `User${index % 17}`),
      });
      await wakeFirst();
      const answers = new Map<string, Answer>();
      const waiting = shuffled(all).values();
      async function client() {
        for (const { id, url } of waiting) answers.set(id, await ask(url, "DELETE"));
      }
      await Promise.all(Array.from({ length: clients }, client));
      wakeSecond();
      await untilOver(pipeline.test);
      // It came from no ledger entry, and nothing came to it.
      if (isFaulty) await pipeline.test.query("delete from point_root where user_id = 'Full'");
      const ends = await expectFair(pipeline.test);
      expectTrue(answers, ends);
      expect(countOf(ends, "CANCELLED")).toBeGreaterThan(0);
      expect(countOf(ends, "DONE")).toBeGreaterThan(0);
      expect(countOf(ends, "FAILED") > 0).toBe(isFaulty);
      await until("a worker says that it found some over", () => countOver(running.workers) > 0);
    },
    90_000,
  );

  test("by two clients at the same moment, 200 times: both get the same answer, and it is true", async () => {
    await using pipeline = await openPipeline();
    const { api, apis } = await startAll(pipeline);
    const all = await reserveMany(api, { count: 200, inMs: 1_500, spreadMs: 3_000 });
    const answers = apis.map(() => new Map<string, Answer>());
    const moment = aim({ fromMs: 30, aroundMs: 40 });
    await Promise.all(
      all.map(async ({ id, dueMs }) => {
        await moment.sleepUntil(dueMs);
        await Promise.all(
          apis.map(async ({ url }, client) => {
            const answer = await ask(`${url}/point/reservations/${id}`, "DELETE");
            moment.learn(answer.status === 200);
            answers[client]?.set(id, answer);
          }),
        );
      }),
    );
    await untilOver(pipeline.test);
    const ends = await expectFair(pipeline.test);
    for (const one of answers) expectTrue(one, ends);
    expect(countOf(ends, "CANCELLED")).toBeGreaterThan(10);
    expect(countOf(ends, "DONE")).toBeGreaterThan(10);
  }, 60_000);
});

test("PATCH of a reservation against its claim, 200 times: either it comes later with the new amount, or now with the old one", async () => {
  await using pipeline = await openPipeline();
  const { api } = await startAll(pipeline);
  const all = await reserveMany(api, { count: 200, inMs: 1_500, spreadMs: 3_000 });
  const later = new Date(Date.now() + 3_600_000).toISOString();
  const patched: Due[] = [];
  const refused: Due[] = [];
  const moment = aim({ fromMs: 0, aroundMs: 40 });
  await Promise.all(
    all.map(async (due) => {
      await moment.sleepUntil(due.dueMs);
      const { status, body } = await ask(due.url, "PATCH", { execute_at: later, point_amount: 1_000 });
      moment.learn(status === 200);
      if (status === 200) {
        patched.push(due);
        expect(body.status).toBe("PENDING");
      } else {
        refused.push(due);
        expect(status).toBe(409);
        expect(["PROCESSING", "DONE"]).toContain(body.reservation_status as string);
      }
    }),
  );
  expect(patched.length).toBeGreaterThan(10);
  expect(refused.length).toBeGreaterThan(10);
  await until(
    "what was not patched is DONE",
    async () => (await countStatuses(pipeline.test)).DONE === refused.length,
  );
  expect(await countStatuses(pipeline.test)).toEqual({ PENDING: patched.length, DONE: refused.length });

  const now = new Date().toISOString();
  for (const { url } of patched) expect((await ask(url, "PATCH", { execute_at: now })).status).toBe(200);
  await untilOver(pipeline.test);
  await expectFair(pipeline.test);
  const amounts = await pipeline.test.query<{ isNew: number; entries: number; largest: number }>(
    `select r.id in (?) isNew, count(*) entries, max(t.point_amount) largest, min(t.point_amount) smallest
     from point_reservations r join point_transactions t on t.idempotency_key = r.idempotency_key
     group by isNew order by isNew`,
    [patched.map(({ id }) => id)],
  );
  expect(amounts).toEqual([
    { isNew: 0, entries: refused.length, largest: 5, smallest: 1 },
    { isNew: 1, entries: patched.length, largest: 1_000, smallest: 1_000 },
  ] as never);
}, 60_000);

test("retry of a FAILED reservation by two clients and DELETE of it, 200 times: one retry counts, and it ends once", async () => {
  await using pipeline = await openPipeline();
  const { apis } = await startAll(pipeline);
  const ids: string[] = [];
  for (let at = 0; at < 200; at++) {
    const { id } = await insertReservation(pipeline.test, { status: "FAILED", userId: `User${at % 17}` });
    ids.push(id);
  }
  const cancelled: string[] = [];
  const moment = aim({ fromMs: 60, aroundMs: 60 });
  await Promise.all(
    ids.map(async (id, index) => {
      await Bun.sleep(15 * index);
      const [first, second] = apis.map(({ url }) => `${url}/point/reservations/${id}`) as [string, string];
      const retrying = [ask(`${first}/retry`, "POST"), ask(`${second}/retry`, "POST")];
      // One in ten right after the retry, long before the grant: however the others fall, some are cancelled.
      const comes = index % 10 === 0 ? Promise.race(retrying) : moment.sleepUntil(Date.now());
      const [deletion, ...retries] = await Promise.all([comes.then(() => ask(first, "DELETE")), ...retrying]);
      expect(retries.map(({ status }) => status).toSorted()).toEqual([200, 409]);
      const late = retries.find(({ status }) => status === 409);
      expect(late?.body.reservation_status).not.toBe("FAILED");
      if (deletion.status === 200) {
        cancelled.push(id);
      } else {
        const { status } = verdictOf(deletion);
        // Before the retry, or after the grant: what is aimed at lies between them.
        moment.learn(status !== "DONE");
      }
    }),
  );
  await untilOver(pipeline.test);
  const ends = await expectFair(pipeline.test);
  const isCancelled = [...ends.values()].filter(({ status }) => status === "CANCELLED").map(({ id }) => id);
  expect(isCancelled.toSorted()).toEqual(cancelled.toSorted());
  expect(countOf(ends, "DONE")).toBe(200 - cancelled.length);
  expect(cancelled.length).toBeGreaterThan(0);
  expect(cancelled.length).toBeLessThan(200);
}, 60_000);

/** How the reservations of each campaign have ended, in the words of the answer. */
async function countsByCampaign({ query }: TestDatabase) {
  const rows = await query<{
    campaign: string;
    cancelled: number;
    granted: number;
    failed: number;
    open: number;
  }>(
    `select campaign, cast(sum(status = 'CANCELLED') as signed) cancelled,
       cast(sum(status = 'DONE') as signed) granted, cast(sum(status = 'FAILED') as signed) failed,
       cast(sum(scan_at is not null) as signed) open
     from point_reservations group by campaign`,
  );
  return new Map(rows.map((row) => [row.campaign, row]));
}

function cancelCampaign({ url }: RunningService, campaign: string): Promise<Answer> {
  return ask(`${url}/point/campaigns/${campaign}/cancel`, "POST");
}

describe("cancelling a campaign against its grants", () => {
  test("of 8 campaigns of 100, by two clients at once: both get the counts that the table has in the end", async () => {
    await using pipeline = await openPipeline();
    const { api, apis } = await startAll(pipeline);
    const spreadMs = 4_000;
    const campaigns = Array.from({ length: 8 }, (_, index) => `campaign-${index}`);
    const all = await reserveMany(api, {
      ...{ count: 800, inMs: 1_500, spreadMs },
      campaignOf: (index) => campaigns[index % 8] as string,
    });
    const startsAt = all[0]?.dueMs ?? Number.NaN;
    const answers = await Promise.all(
      campaigns.map(async (campaign, index) => {
        await Bun.sleep(startsAt + ((index + 0.5) / 8) * spreadMs - Date.now());
        return Promise.all(apis.map((one) => cancelCampaign(one, campaign)));
      }),
    );
    await untilOver(pipeline.test);
    const ends = await expectFair(pipeline.test);
    const table = await countsByCampaign(pipeline.test);
    for (const [index, campaign] of campaigns.entries()) {
      const counts = { status: 200, body: table.get(campaign) };
      expect(answers[index]).toEqual([counts, counts] as never);
      expect(await cancelCampaign(api, campaign)).toEqual(counts as never);
    }
    expect(countOf(ends, "CANCELLED")).toBeGreaterThan(0);
    expect(countOf(ends, "DONE")).toBeGreaterThan(0);
  }, 60_000);

  test("of 1,000 that are PROCESSING, while workers grant them: no points of what it counts as cancelled", async () => {
    await using pipeline = await openPipeline();
    const running = await startAll(pipeline, SMALL);
    const options = { count: 1_000, campaignOf: () => "summer" };
    const { wakeFirst, wakeSecond } = await reserveForStopped(pipeline, running, options);
    await wakeFirst();
    const answer = await cancelCampaign(running.api, "summer");
    wakeSecond();
    await untilOver(pipeline.test);
    const ends = await expectFair(pipeline.test);
    const [cancelled, granted] = [countOf(ends, "CANCELLED"), countOf(ends, "DONE")];
    expect(answer).toEqual({
      status: 200,
      body: { campaign: "summer", cancelled, granted, failed: 0, open: 0 },
    } as never);
    expect(cancelled).toBeGreaterThan(0);
    expect(granted).toBeGreaterThan(0);
  }, 60_000);
});
