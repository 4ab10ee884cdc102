import { expect, test } from "bun:test";
import { command, killAt, openCrashing } from "../harness/fault_points.ts";
import { insertReservations, reservationOf } from "../harness/fixtures.ts";
import { until } from "../harness/harness.ts";
import { countStatuses, expectAllDoneOnce, untilDone } from "../harness/pipeline.ts";

const { pipeline, proxies, runner } = await openCrashing("scheduler", {
  LEASE_MS: "1000",
  PUBLISH_CHUNK: "1",
});
await pipeline.start("worker");
let count = 0;

// A claim that finds everything locked commits too: only the COMMIT behind the UPDATE is that of a claim.
const COMMIT = () => command("commit", { after: "mark_processing" });
const publish = (nth: number) => command("basic.publish", { nth });

test.each([
  ["select │ claim (fault 9)", () => command("mark_processing"), "unsent", "PENDING", 0],
  ["claim │ COMMIT (fault 9)", () => command("mark_processing"), "answered", "PENDING", 0],
  ["before COMMIT (fault 9)", COMMIT, "unsent", "PENDING", 0],
  ["COMMIT │ publish (fault 9)", COMMIT, "answered", "PROCESSING", 0],
  ["before the publish is sent (fault 9)", () => publish(1), "unsent", "PROCESSING", 0],
  ["first of three messages │ second (fault 9)", () => publish(2), "unsent", "PROCESSING", 1],
  ["second of three messages │ third (fault 9)", () => publish(3), "unsent", "PROCESSING", 2],
  ["publish │ confirm (fault 11)", () => publish(3), "answered", "PROCESSING", 3],
] as const)(
  "scheduler.ts killed at %s: another one brings all that is due",
  async (_, point, moment, status, arrived) => {
    const { test } = pipeline;
    const struck = killAt(proxies, { command: point(), moment, service: await runner() });
    const reservations = ["One", "Two", "One"].map((userId) => reservationOf({ userId }));
    await insertReservations(test, { reservations });
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
);
