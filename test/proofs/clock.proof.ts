import { expect, setDefaultTimeout, test } from "bun:test";
import { encodeHint } from "../../lib/reservations/message.ts";
import { openDatabaseClock } from "../faults/database_clock.ts";
import { insertReservation } from "../harness/fixtures.ts";
import { until } from "../harness/harness.ts";
import { countStatuses, expectAllDoneOnce, openPipeline, untilDone } from "../harness/pipeline.ts";
import { untilReady } from "../harness/processes.ts";
import { openChannel } from "../harness/queue.ts";
import { openRestartable } from "../harness/restartable.ts";

setDefaultTimeout(300_000);

const DAY_MS = 86_400_000;

test("MySQL's clock goes a day ahead and back: the schedulers say so, and grant what was claimed and lost meanwhile (fault 40)", async () => {
  await using given = await openRestartable();
  const { databaseUrl, amqpUrl, servers } = given;
  await using clock = await openDatabaseClock(servers[0], { url: databaseUrl, say() {} });
  await using pipeline = await openPipeline({ databaseUrl, amqpUrl });
  const { test } = pipeline;
  // It sleeps for long: only the sweeps see the clock.
  const settings = { LEASE_MS: "2000", SCAN_INTERVAL_MS: "3600000" };
  const schedulers = [
    await pipeline.start("scheduler", settings),
    await pipeline.start("scheduler", settings),
  ];
  await untilReady(...schedulers);
  const untilAllSay = (what: RegExp) =>
    until(`all log ${what}`, () =>
      schedulers.every(({ log }) => log().some(({ msg }) => what.test(String(msg)))),
    );

  await clock.set(DAY_MS);
  await untilAllSay(/^MySQL's clock went ahead by 8\d,\d{3},\d{3} ms$/);
  await insertReservation(test);
  await until("it is claimed", async () => (await countStatuses(test)).PROCESSING === 1);
  {
    await using operator = await openChannel(amqpUrl);
    await until("its message is lost", async () => {
      const { messageCount } = await operator.channel.purgeQueue(pipeline.queueName);
      return messageCount === 1;
    });
  }
  await clock.set(0);
  await untilAllSay(/^MySQL's clock went back by 8\d,\d{3},\d{3} ms$/);
  await pipeline.start("worker");
  await untilDone(test, { count: 1 });
  await insertReservation(test);
  const queue = await pipeline.openQueue({ onlyHints: true });
  await until("a hint wakes a scheduler by the right clock", async () => {
    queue.hint(encodeHint(new Date()));
    return (await countStatuses(test)).DONE === 2;
  });
  await expectAllDoneOnce(test, 2);
  for (const { log } of schedulers) {
    const lines = log().filter(({ msg }) => String(msg).startsWith("MySQL's clock"));
    expect(lines.map(({ level }) => level)).toEqual(["warn", "warn"]);
  }
});
