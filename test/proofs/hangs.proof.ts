import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { cancelReservation } from "../../lib/reservations/reservation_repository.ts";
import { command, openProxies, stopAt } from "../harness/fault_points.ts";
import { insertReservations, reservationOf } from "../harness/fixtures.ts";
import { until } from "../harness/harness.ts";
import {
  countStatuses,
  expectAgreement,
  expectAllDoneOnce,
  openPipeline,
  type Pipeline,
  publishReservations,
  untilDone,
} from "../harness/pipeline.ts";
import { type RunningService, untilLogged } from "../harness/processes.ts";
import { startProxy } from "../harness/proxy.ts";

// Processes that hang, as SIGSTOP makes them, for longer than a lease, and then go on; and one whose MySQL hangs.

setDefaultTimeout(60_000);

const LEASE = { LEASE_MS: "1000" };

async function insertThree({ test }: Pipeline) {
  const reservations = ["One", "Two", "One"].map((userId) => reservationOf({ userId }));
  await insertReservations(test, { reservations });
  return reservations;
}

/** Waits until leases that a stopped process has taken, or rows that it holds, have been due for a while. */
function untilLeasesEnded({ test }: Pipeline): Promise<unknown> {
  return until("the leases have ended", async () => {
    const [row] = await test.query<{ ended: number }>(
      "select coalesce(max(scan_at) < now(3) - interval 300000 microsecond, 1) ended from point_reservations",
    );
    return row?.ended === 1;
  });
}

/** The sums of what a worker has logged about its messages. */
function processedBy({ log }: RunningService) {
  const sums = { messages: 0, granted: 0, over: 0 };
  for (const line of log().filter(({ msg }) => msg === "processed")) {
    for (const figure of ["messages", "granted", "over"] as const) sums[figure] += Number(line[figure] ?? 0);
  }
  return sums;
}

describe("scheduler.ts stopped past its lease, then resumed", () => {
  test("publishes what is over by then, and changes nothing of it: granted or cancelled (fault 16)", async () => {
    await using pipeline = await openPipeline();
    await using proxies = await openProxies(pipeline.test);
    const { test } = pipeline;
    const stale = await pipeline.start("scheduler", { ...proxies.env, ...LEASE });
    const commit = command("commit", { after: "mark_processing" });
    const stopped = stopAt(proxies.mysql, { command: commit, service: stale });
    const [first] = await insertThree(pipeline);
    await stopped;
    await until("claimed", async () => (await countStatuses(test)).PROCESSING === 3);
    expect(await cancelReservation(test.database, first?.id ?? "")).toMatchObject({ isDone: true });
    const worker = await pipeline.start("worker");
    await pipeline.start("scheduler");
    await until("the worker has granted the others", () => processedBy(worker).granted === 2);
    expect(processedBy(worker).over).toBe(0);

    process.kill(stale.pid, "SIGCONT");
    await until("the stale message comes", () => processedBy(worker).over > 0);
    expect(processedBy(worker)).toMatchObject({ granted: 2, over: 3 });
    expect(await countStatuses(test)).toEqual({ CANCELLED: 1, DONE: 2 });
    expect(await expectAgreement(test)).toMatchObject({ ledger: 200n });
  });

  test("goes on if it still holds the rows that it was about to claim: all are granted once (fault 16)", async () => {
    await using pipeline = await openPipeline();
    await using proxies = await openProxies(pipeline.test);
    const { test } = pipeline;
    const stale = await pipeline.start("scheduler", { ...proxies.env, ...LEASE });
    const stopped = stopAt(proxies.mysql, { command: command("mark_processing"), service: stale });
    await insertThree(pipeline);
    await stopped;
    await pipeline.start("worker");
    await pipeline.start("scheduler");
    // When this one is granted, the lease would have ended.
    const later = reservationOf({ executeAt: new Date(Date.now() + 1_200) });
    await insertReservations(test, { reservations: [later] });
    await untilDone(test, { count: 1 });
    expect(await countStatuses(test)).toEqual({ DONE: 1, PENDING: 3 });

    process.kill(stale.pid, "SIGCONT");
    await untilDone(test, { count: 4 });
    await expectAllDoneOnce(test, 4);
  });
});

test.each([
  ["before it has locked the rows", "begin", "nothing"],
  ["while it holds the rows", "lock_reservations", "locks"],
  ["before it knows of its COMMIT", "commit", "all"],
] as const)(
  "worker.ts stopped past the lease of what it has in hand, %s, then resumed, grants once (fault 17)",
  async (_, statement, has) => {
    await using pipeline = await openPipeline();
    await using proxies = await openProxies(pipeline.test);
    const { test } = pipeline;
    const sleeper = await pipeline.start("worker", proxies.env);
    await untilLogged(sleeper, "consuming");
    const stopped = stopAt(proxies.mysql, { command: command(statement), service: sleeper });
    await pipeline.start("scheduler", LEASE);
    await insertThree(pipeline);
    await stopped;
    const other = await pipeline.start("worker");
    if (has === "locks") await untilLeasesEnded(pipeline);
    else await untilDone(test, { count: 3 });
    expect(await countStatuses(test)).toEqual(has === "locks" ? { PROCESSING: 3 } : { DONE: 3 });
    if (has === "nothing") await until("the other has granted", () => processedBy(other).granted === 3);
    else expect(processedBy(other).granted).toBe(0);

    process.kill(sleeper.pid, "SIGCONT");
    await until("it goes on", () => processedBy(sleeper).messages > 0);
    // Its time for the batch is over: it ends its session, and looks at the rows again. Either worker may be the first to do so.
    await untilDone(test, { count: 3 });
    await expectAllDoneOnce(test, 3);
  },
);

test("worker.ts exits 0 within 10 s of SIGTERM while MySQL does not answer, and at once at a second signal", async () => {
  await using pipeline = await openPipeline();
  await using proxy = await startProxy(pipeline.test.url);
  const env = { DATABASE_URL: proxy.url, WORKER_BATCH: "1", PUBLISH_CHUNK: "10" };
  const [patient, hasty] = [await pipeline.start("worker", env), await pipeline.start("worker", env)];
  for (const worker of [patient, hasty]) await untilLogged(worker, "consuming");
  const queue = await pipeline.openQueue();
  const reservations = [reservationOf(), reservationOf()];
  await insertReservations(pipeline.test, { reservations, status: "PROCESSING" });
  proxy.hold();
  await publishReservations(queue, { reservations });
  await until("both messages are in hand", async () => (await queue.depth()) === 0);
  const startedAt = performance.now();
  const ended = patient.kill("SIGTERM");
  hasty.kill("SIGTERM");
  await untilLogged(hasty, "stopping");
  expect(await hasty.kill("SIGTERM")).toBe(143);
  expect(patient.log().at(-1)).toMatchObject({ msg: "stopping" });
  expect(await ended).toBe(0);
  expect(performance.now() - startedAt).toBeLessThan(10_000);
  await pipeline.start("worker");
  await untilDone(pipeline.test, { count: 2 });
  await expectAllDoneOnce(pipeline.test, 2);
});
