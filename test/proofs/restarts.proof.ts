import { expect, setDefaultTimeout, test } from "bun:test";
import { until } from "../harness/harness.ts";
import {
  countStatuses,
  expectAllDoneOnce,
  openPipeline,
  requestsOf,
  reserveAll,
  untilDone,
} from "../harness/pipeline.ts";
import { untilReady } from "../harness/processes.ts";
import { canRestart, openRestartable } from "../harness/restartable.ts";

setDefaultTimeout(300_000);

/** Batches so small that 'in the middle' lasts. */
const SMALL = { SCAN_BATCH: "40", PUBLISH_CHUNK: "4", WORKER_BATCH: "8", LEASE_MS: "2000" };

if (!canRestart) {
  console.warn(
    "NOT TESTED: a restart of MySQL and RabbitMQ. Set START_SERVICES to a command that starts what does not run of the servers behind DATABASE_URL and AMQP_URL, or install mysqld or mariadbd and rabbitmq-server",
  );
}

test.skipIf(!canRestart)(
  "MySQL and RabbitMQ restarted in the middle of 1,000 reservations: no process is, and all are DONE once (fault 14)",
  async () => {
    await using restartable = await openRestartable();
    await using pipeline = await openPipeline(restartable);
    const countDone = async () => (await countStatuses(pipeline.test)).DONE ?? 0;
    const api = await pipeline.start("api");
    const services = [api, await pipeline.start("scheduler", SMALL), await pipeline.start("worker", SMALL)];
    const reserve = () => reserveAll(api.url, { requests: requestsOf(250, { spreadMs: 3_000 }) });
    for (const [index, server] of restartable.servers.entries()) {
      await reserve();
      const reserved = index * 500 + 250;
      await until("some of these are DONE", async () => (await countDone()) > reserved - 230);
      expect(await countDone()).toBeLessThan(reserved);
      await Promise.all([server.kill().then(server.start), reserve()]);
    }
    await untilDone(pipeline.test, { count: 1_000, withinMs: 90_000 });
    await expectAllDoneOnce(pipeline.test, 1_000);
    await untilReady(...services);
    const messages = services.flatMap((service) => service.log().map(({ msg }) => msg));
    expect(messages).not.toContain("stopping");
    expect(messages).toContain("waiting for RabbitMQ");
    expect(messages).toContain("not consuming");
  },
);
