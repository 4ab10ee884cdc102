import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { connect as connectAmqp } from "amqplib";
import { createConnection } from "mysql2/promise";
import { answersMysql } from "../../lib/dev/mysql.ts";
import { kill, markOf, processesMarked } from "../../lib/dev/processes.ts";
import { answersAmqp } from "../../lib/dev/rabbitmq.ts";
import { findServerBinaries, startPrivateServers } from "../../lib/dev/servers.ts";
import { until } from "../harness/harness.ts";
import { openChannel } from "../harness/queue.ts";
import { FIXTURE, fakeDocker, processesWith, startRun } from "../harness/services_run.ts";
import { temporaryFolder } from "../harness/temporary_folder.ts";

// The servers that `dev`, `demo` and `services` start: killed, started again, shared and stopped.

setDefaultTimeout(150_000);

const binaries = findServerBinaries();
if (!binaries)
  console.warn("NOT TESTED: private servers, as mysqld or rabbitmq-server is not on this machine");

async function openPair() {
  const root = await temporaryFolder();
  // Deeper than the path of a Unix socket may be long.
  const folder = join(root.path, "deep".repeat(30), ".services");
  const pair = await startPrivateServers({ folder, say: () => undefined });
  afterAll(async () => {
    await pair.stop();
    // The main processes and all they started: mysqld, the Erlang machine, its helpers, its epmd.
    expect(processesWith(folder)).toEqual([]);
    await root[Symbol.asyncDispose]();
  });
  return { ...pair, folder };
}
type Pair = Awaited<ReturnType<typeof openPair>>;

/** Whatever fails in a test, no server stays. */
async function killServers(folder: string) {
  for (const name of ["MySQL", "RabbitMQ"]) {
    for (const { pid } of processesMarked(markOf(folder, name))) kill(pid, "SIGKILL");
  }
}

describe.skipIf(!binaries)("private servers", async () => {
  const { mysql, rabbitmq, folder } = binaries ? await openPair() : ({} as Pair);

  test("killed and started again, they have their ports, data and confirmed messages", async () => {
    const urls = [mysql.url, rabbitmq.url];
    const pids = [mysql.pid(), rabbitmq.pid()];
    const database = await createConnection({ uri: mysql.url });
    const broker = await connectAmqp(rabbitmq.url);
    const channel = await broker.createConfirmChannel();
    const ignore = () => undefined;
    database.on("error", ignore);
    broker.on("error", ignore);
    channel.on("error", ignore);
    await database.query("create table kept (n int)");
    await database.query("insert into kept values (42)");
    await channel.assertQueue("kept", { durable: true, arguments: { "x-queue-type": "quorum" } });
    channel.sendToQueue("kept", Buffer.from("42"), { persistent: true });
    await channel.waitForConfirms();
    // RabbitMQ writes the list of its quorum queues every 500 ms (ra_directory.erl, auto_save) and nothing tells when: a
    // queue that is younger is lost with a kill.
    await Bun.sleep(1_500);
    for (const server of [mysql, rabbitmq]) {
      await server.stop("SIGKILL");
      expect(server.pid()).toBeUndefined();
      expect(await server.answers()).toBe(false);
    }
    database.destroy();
    expect(processesWith(folder)).toEqual([]);
    // The second time, start() does nothing.
    for (const server of [mysql, rabbitmq, mysql, rabbitmq]) await server.start();
    expect([mysql.url, rabbitmq.url]).toEqual(urls);
    expect([mysql.pid(), rabbitmq.pid()]).not.toEqual(pids);

    const again = await createConnection({ uri: mysql.url });
    expect((await again.query("select n from kept"))[0]).toMatchObject([{ n: 42 }]);
    await again.end();
    await using operator = await openChannel(rabbitmq.url);
    const message = await until("the message", () => operator.channel.get("kept", { noAck: true }));
    expect(message.content.toString()).toBe("42");
  });

  test("acquireServices() uses docker compose if an engine answers, and the last user stops it", async () => {
    await using clone = await temporaryFolder();
    const [mysqlPort, amqpPort] = [mysql.url, rabbitmq.url].map((url) => new URL(url).port);
    // Containers cannot be had everywhere; the servers behind the "published ports" are real.
    const PATH = fakeDocker(
      clone.path,
      `cd ${clone.path}
      echo "$* $MYSQL_PORT $AMQP_PORT $COMPOSE_PROJECT_NAME" >> calls
      case "$*" in
        info*) echo 28.0.0 ;;
        "compose version") echo v2 ;;
        "compose up"*) touch up ;;
        "compose stop"*) rm up ;;
        "compose port mysql 3306") [ -e up ] && echo 127.0.0.1:${mysqlPort} ;;
        "compose port rabbitmq 5672") [ -e up ] && echo 127.0.0.1:${amqpPort} ;;
        "compose port rabbitmq 15672") [ -e up ] && echo 127.0.0.1:1 ;;
        *) exit 1 ;;
      esac`,
    );
    const env = { PATH, MYSQL_PORT: mysqlPort, AMQP_PORT: "" };
    await using first = startRun([FIXTURE, "acquire", clone.path], env);
    await using last = startRun([FIXTURE, "acquire", clone.path], env);
    for (const run of [first, last]) {
      expect(await run.answer<unknown>()).toEqual({
        databaseUrl: `mysql://root:pointservice@127.0.0.1:${mysqlPort}/pointservice`,
        amqpUrl: `amqp://pointservice:pointservice@127.0.0.1:${amqpPort}`,
        origin: "docker compose",
      });
    }
    const up = join(clone.path, "up");
    await first.end();
    expect(existsSync(up)).toBe(true);
    await last.end();
    expect(existsSync(up)).toBe(false);
    const calls = readFileSync(join(clone.path, "calls"), "utf8").trimEnd().split("\n");
    const ups = calls.filter((call) => call.startsWith("compose up --wait mysql rabbitmq "));
    expect(ups).toHaveLength(2);
    expect(ups[0]).toMatch(new RegExp(` ${mysqlPort} \\d+ pointservice-[0-9a-f]{8}$`));
    expect(calls.filter((call) => call.startsWith("compose stop"))).toHaveLength(1);
  });

  test("runs that start at once share one pair; the last one stops it, one that was killed does not count", async () => {
    await using clone = await temporaryFolder();
    await using _ = { [Symbol.asyncDispose]: () => killServers(join(clone.path, ".services")) };
    const env = { PATH: fakeDocker(clone.path, "exit 1") };
    await using first = startRun([FIXTURE, "acquire", clone.path], env);
    await using killed = startRun([FIXTURE, "acquire", clone.path], env);
    await using last = startRun([FIXTURE, "acquire", clone.path], env);
    type Urls = { databaseUrl: string; amqpUrl: string };
    const answers = await Promise.all([first, killed, last].map((run) => run.answer<Urls>()));
    expect(new Set(answers.map((answer) => JSON.stringify(answer))).size).toBe(1);
    const mysqlPort = Number(new URL(answers[0]?.databaseUrl ?? "").port);
    const amqpPort = Number(new URL(answers[0]?.amqpUrl ?? "").port);

    expect(await first.end()).toBe(0);
    killed.process.kill("SIGKILL");
    await killed.process.exited;
    expect(await answersMysql(mysqlPort)).toBe(true);
    expect(await answersAmqp(amqpPort)).toBe(true);

    expect(await last.end()).toBe(0);
    expect(processesWith(clone.path)).toEqual([]);
    expect(await answersMysql(mysqlPort)).toBe(false);
  });
});
