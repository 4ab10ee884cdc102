import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { compareSums } from "../lib/point_repository.ts";
import { cancelReservation } from "../lib/reservation_repository.ts";
import {
  after,
  BEGIN,
  COMMIT,
  killAt,
  LOCK,
  nth,
  openProxies,
  type Proxies,
  PUBLISH,
  relay,
  stopAt,
  UPDATE,
} from "./fault_points.ts";
import { type RunningService, reservationOf, until } from "./harness.ts";
import {
  countStatuses,
  expectAllDoneOnce,
  insertReservations,
  openPipeline,
  type Pipeline,
  untilDone,
} from "./pipeline.ts";
import type { Moment } from "./proxy.ts";

function threeReservations() {
  return ["One", "Two", "One"].map((userId) => reservationOf({ userId }));
}

describe("scheduler.ts killed in the middle of a scan: another scheduler brings all that is due", () => {
  let pipeline: Pipeline;
  let proxies: Proxies;
  let runner: () => Promise<RunningService>;
  let count = 0;

  beforeAll(async () => {
    pipeline = await openPipeline();
    proxies = await openProxies(pipeline);
    runner = relay(() =>
      pipeline.start("scheduler", { ...proxies.env, LEASE_MS: "1000", PUBLISH_CHUNK: "1" }),
    );
    await pipeline.start("worker");
  }, 30_000);
  afterAll(async () => {
    await pipeline[Symbol.asyncDispose]();
    await proxies[Symbol.asyncDispose]();
  }, 30_000);

  // A scan that finds nothing ends with a COMMIT too: only that after the UPDATE is the claim's.
  test.each<[string, RegExp, Moment, "PENDING" | "PROCESSING", 0 | 1 | 2 | 3]>([
    ["select │ claim (fault 9)", UPDATE, "unsent", "PENDING", 0],
    ["claim │ COMMIT (fault 9)", UPDATE, "answered", "PENDING", 0],
    ["before COMMIT (fault 9)", after(UPDATE, COMMIT), "unsent", "PENDING", 0],
    ["COMMIT │ publish (fault 9)", after(UPDATE, COMMIT), "answered", "PROCESSING", 0],
    ["before the publish is sent (fault 9)", PUBLISH, "unsent", "PROCESSING", 0],
    ["first of three messages │ second (fault 9)", nth(PUBLISH, 2), "unsent", "PROCESSING", 1],
    ["second of three messages │ third (fault 9)", nth(PUBLISH, 3), "unsent", "PROCESSING", 2],
    ["publish │ confirm (fault 11)", nth(PUBLISH, 3), "answered", "PROCESSING", 3],
  ])(
    "%s",
    async (_, command, moment, status, arrived) => {
      const { test } = pipeline;
      const service = await runner();
      const struck = killAt(proxies, { command, moment, service });
      await insertReservations(test, { reservations: threeReservations() });
      await struck();
      const open = await until("what has arrived is DONE", async () => {
        const { DONE = 0, ...others } = await countStatuses(test);
        return DONE === count + arrived && others;
      });
      expect(open).toEqual(arrived === 3 ? {} : { [status]: 3 - arrived });
      const [lease] = await test.query<{ ends: Date | null }>(
        "select max(scan_at) ends from point_reservations",
      );

      await runner();
      count += 3;
      await untilDone(test, { count });
      await expectAllDoneOnce(test, count);
      const [last] = await test.query<{ at: Date }>("select max(created_at) at from point_transactions");
      if (status === "PROCESSING" && arrived < 3) {
        // Only the end of the lease, no clean-up of anybody's, brought the rest again.
        expect(last?.at.getTime()).toBeGreaterThanOrEqual(lease?.ends?.getTime() ?? Number.NaN);
      }
    },
    30_000,
  );
});

/** Waits until leases that a stopped process has taken, or rows that it holds, have been due for a while. */
function untilLeasesEnded({ test }: Pipeline): Promise<unknown> {
  return until("the leases have ended", async () => {
    const [row] = await test.query<{ ended: number }>(
      "select coalesce(max(scan_at) < now(3) - interval 300000 microsecond, 1) ended from point_reservations",
    );
    return row?.ended === 1;
  });
}

/** What a worker says that it has granted, and that it has found over, in all its messages so far. */
function processedBy(worker: RunningService) {
  const lines = worker.log().filter(({ msg }) => msg === "processed");
  const sumOf = (figure: "messages" | "granted" | "over") =>
    lines.reduce((sum, line) => sum + Number(line[figure] ?? 0), 0);
  return { messages: sumOf("messages"), granted: sumOf("granted"), over: sumOf("over") };
}

describe("scheduler.ts stopped past its lease, then resumed", () => {
  test("publishes what is over by then, and changes nothing of it: granted or cancelled (fault 16)", async () => {
    await using pipeline = await openPipeline();
    await using proxies = await openProxies(pipeline);
    const { test } = pipeline;
    const stale = await pipeline.start("scheduler", { ...proxies.env, LEASE_MS: "1000" });
    const stopped = stopAt(proxies.mysql, { command: after(UPDATE, COMMIT), service: stale });
    const reservations = threeReservations();
    await insertReservations(test, { reservations });
    await stopped;
    await until("claimed", async () => (await countStatuses(test)).PROCESSING === 3);
    expect(await cancelReservation(test.database, reservations[0]?.id ?? "")).toBe(true);
    const worker = await pipeline.start("worker");
    await pipeline.start("scheduler");
    const ended = { CANCELLED: 1, DONE: 2 };
    await until("the others are granted", async () => (await countStatuses(test)).DONE === 2);
    await until("the worker says so", () => processedBy(worker).granted === 2);
    expect(processedBy(worker).over).toBe(0);

    process.kill(stale.pid, "SIGCONT");
    await until("the stale message comes", () => processedBy(worker).over > 0);
    expect(processedBy(worker)).toMatchObject({ granted: 2, over: 3 });
    expect(await countStatuses(test)).toEqual(ended);
    expect(await compareSums(test.database)).toMatchObject({ ledger: 200n, agree: true });
  }, 60_000);

  test("goes on where it still holds the rows that it was about to claim: all are granted once (fault 16)", async () => {
    await using pipeline = await openPipeline();
    await using proxies = await openProxies(pipeline);
    const { test } = pipeline;
    const stale = await pipeline.start("scheduler", { ...proxies.env, LEASE_MS: "1000" });
    const stopped = stopAt(proxies.mysql, { command: UPDATE, service: stale });
    await insertReservations(test, { reservations: threeReservations() });
    await stopped;
    const worker = await pipeline.start("worker");
    await pipeline.start("scheduler");
    // When this one is granted, the lease would have ended.
    const later = reservationOf({ executeAt: new Date(Date.now() + 1_200) });
    await insertReservations(test, { reservations: [later] });
    await until("it is granted", async () => (await countStatuses(test)).DONE === 1);
    expect(await countStatuses(test)).toEqual({ DONE: 1, PENDING: 3 });

    process.kill(stale.pid, "SIGCONT");
    await untilDone(test, { count: 4 });
    await until("it says that it has granted all", () => processedBy(worker).granted === 4);
    await expectAllDoneOnce(test, 4);
  }, 60_000);
});

describe("worker.ts stopped past the lease of what it has in hand, then resumed, grants once:", () => {
  test.each<[string, RegExp, "nothing" | "locks" | "all"]>([
    ["stopped before it has locked the rows (fault 17)", BEGIN, "nothing"],
    ["stopped while it holds the rows (fault 17)", LOCK, "locks"],
    ["stopped before it knows of its COMMIT (fault 17)", COMMIT, "all"],
  ])(
    "%s",
    async (_, command, has) => {
      await using pipeline = await openPipeline();
      await using proxies = await openProxies(pipeline);
      const { test } = pipeline;
      const sleeper = await pipeline.start("worker", proxies.env);
      await until("it consumes", () => sleeper.log().some(({ msg }) => msg === "consuming"));
      const stopped = stopAt(proxies.mysql, { command, service: sleeper });
      await pipeline.start("scheduler", { LEASE_MS: "1000" });
      await insertReservations(test, { reservations: threeReservations() });
      await stopped;
      const other = await pipeline.start("worker");
      if (has === "locks") await untilLeasesEnded(pipeline);
      else await untilDone(test, { count: 3 });
      expect(await countStatuses(test)).toEqual(has === "locks" ? { PROCESSING: 3 } : { DONE: 3 });
      if (has === "nothing") await until("the other has granted", () => processedBy(other).granted === 3);
      else expect(processedBy(other).granted).toBe(0);

      process.kill(sleeper.pid, "SIGCONT");
      await until("it goes on", () => processedBy(sleeper).messages > 0);
      // The scheduler may have sent it the same again before the other worker was there: nothing, or all but the first, is granted.
      const granted = has === "nothing" ? 0 : 3;
      const { messages, ...outcome } = processedBy(sleeper);
      expect(outcome).toEqual({ granted, over: 3 * messages - granted });
      await untilDone(test, { count: 3 });
      await expectAllDoneOnce(test, 3);
    },
    60_000,
  );
});
