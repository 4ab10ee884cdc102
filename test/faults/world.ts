import { connect } from "amqplib";
import { createTestDatabase, type TestDatabase } from "../harness/database.ts";
import { uniqueName } from "../harness/harness.ts";
import { deleteQueue } from "../harness/queue.ts";
import { rabbitmqctl } from "../harness/rabbitmqctl.ts";
import { openRestartable } from "../harness/restartable.ts";
import { openDatabaseClock } from "./database_clock.ts";
import { openNode } from "./node.ts";
import { openSession, WORST_SETTINGS } from "./session.ts";

/** The processes under test, by their place in `World.nodes`. */
export const NODES = ["api", "api", "scheduler", "scheduler", "worker", "worker", "worker"] as const;

export type World = Awaited<ReturnType<typeof openWorld>>;

/** Small, so that a few hundred reservations a second are many messages and many transactions. */
const DEFAULTS = {
  LEASE_MS: "5000",
  SCAN_INTERVAL_MS: "2000",
  AGGREGATE_INTERVAL_MS: "5000",
  SCAN_BATCH: "200",
  PUBLISH_CHUNK: "20",
  WORKER_BATCH: "50",
  QUEUED_RESERVATIONS: "2000",
};
const READY_MS = 60_000;

/**
 * Starts servers, a database, a queue and the processes under test on them.
 *
 * @param options.needsClock whether MySQL's clock will be set; if that is not possible, `clock` is undefined
 */
export async function openWorld(
  settings: Record<string, string>,
  { needsClock, say }: { needsClock: boolean; say: (line: string) => void },
) {
  // If it cannot be opened, what it has started must end all the same.
  await using opened = new AsyncDisposableStack();
  const restartable = opened.use(await openRestartable());
  const { databaseUrl, amqpUrl, servers } = restartable;
  async function tryClock() {
    try {
      return opened.use(await openDatabaseClock(servers[0], { url: databaseUrl, say }));
    } catch (error) {
      say(`MySQL's clock stays as it is: ${(error as Error).message}`);
      return undefined;
    }
  }
  const clock = needsClock ? await tryClock() : undefined;
  const test = await createTestDatabase({ server: databaseUrl });
  opened.defer(test.drop);
  const account = opened.use(await createAccount(test));
  const queueName = uniqueName("faults");
  opened.defer(() => deleteQueue(queueName, amqpUrl).catch(() => undefined));
  const env = { ...DEFAULTS, ...settings, QUEUE: queueName };
  /** What a process did that none may do, whatever is broken around it. */
  const misdeeds: string[] = [];
  /** Contents of messages that a fault has taken away; they are sent again at the end. */
  const delayed: Buffer[] = [];
  const nodes = await Promise.all(
    NODES.map((entry, place) => {
      const name = `${entry}-${place - NODES.indexOf(entry) + 1}`;
      return openNode(entry, { name, env, urls: [account.url, amqpUrl], misdeeds });
    }),
  );
  opened.defer(async () => void (await Promise.all(nodes.map((node) => node.stop()))));
  const closing = new AsyncDisposableStack();
  const world = {
    test,
    queueName,
    servers,
    /** Sets MySQL's clock; undefined if it cannot be set here. */
    clock,
    /** MySQL's user that the processes under test are, and their URL; the tests themselves are an administrator. */
    account: account.name,
    processUrl: account.url,
    nodes,
    settings: { leaseMs: Number(env.LEASE_MS), scanMs: Number(env.SCAN_INTERVAL_MS) },
    misdeeds,
    delayed,
    /** The logs of all processes. */
    logs: () => nodes.flatMap((node) => node.logs()),
    /** Opens a channel as an operator has one, without our code. */
    async openChannel() {
      const connection = await connect(amqpUrl, { timeout: 2_000 });
      // Whoever uses it sees its calls fail.
      connection.on("error", () => {});
      const channel = await connection.createChannel();
      channel.on("error", () => {});
      return { channel, [Symbol.asyncDispose]: () => connection.close().catch(() => undefined) };
    },
    /** Opens a session as an administrator has one, without our code. */
    openSession: () => openSession(test.url),
    /** Gives MySQL back its settings, and the processes their account. */
    mendMysql: account.mend,
    /** Switches RabbitMQ's memory alarm: nobody may publish while it is on. */
    async setAlarm(isOn: boolean): Promise<void> {
      await rabbitmqctl(amqpUrl, "set_vm_memory_high_watermark", isOn ? "0" : "0.4");
    },
    /** How many queues get each hint. */
    async countBindings(): Promise<number> {
      const output = await rabbitmqctl(amqpUrl, "list_bindings", "source_name");
      return output.split("\n").filter((line) => line.trim() === `${queueName}.hints`).length;
    },
    /** Mends the servers and every connection, and waits until every process runs in the ordinary way and is ready. */
    async heal(): Promise<void> {
      await clock?.set(0);
      await account.mend();
      for (const node of nodes) {
        node.strike("SIGCONT");
        for (const proxy of [node.mysql, node.amqp, node.http]) proxy.slow();
      }
      const waiting = new Set(nodes);
      for (const end = performance.now() + READY_MS; waiting.size > 0; await Bun.sleep(50)) {
        for (const node of waiting) if (await node.isReady()) waiting.delete(node);
        if (performance.now() < end) continue;
        const names = Array.from(waiting, ({ name }) => name).join(", ");
        misdeeds.push(`Not ready within ${READY_MS} ms: ${names}`);
        return;
      }
    },
    [Symbol.asyncDispose]: () => closing.disposeAsync(),
  };
  await world.heal();
  if (misdeeds.length === 0) {
    closing.use(opened.move());
    return world;
  }
  const log = world
    .logs()
    .slice(-20)
    .map((line) => JSON.stringify(line))
    .join("\n");
  throw new Error(`Cannot start: ${misdeeds.join("; ")}\n${log}`);
}

/** Makes a user of MySQL with the rights that README names and no more: an administrator's rights bypass `read_only`. */
async function createAccount({ url: adminUrl, name: database }: TestDatabase) {
  const name = uniqueName("faults");
  const { href: url } = Object.assign(new URL(adminUrl), { username: name, password: "faults" });
  async function asAdmin(statements: [sql: string, values: unknown[]][]) {
    await using session = await openSession(adminUrl);
    const results: Record<string, string>[][] = [];
    for (const [sql, values] of statements) results.push(await session.run(sql, values));
    return results;
  }
  const settings = Object.keys(WORST_SETTINGS);
  // A number of 64 bits stays what it is as a text.
  const literalOf = (value = "") => (/^\d+$/.test(value) ? value : `'${value}'`);
  const [[before = {}] = []] = await asAdmin([
    [`select ${settings.map((setting) => `concat(@@global.${setting}) ${setting}`).join(", ")}`, []],
    ["create user ?@'%' identified by 'faults'", [name]],
    // Not by GRANT: an administrator with all privileges does not have that right by itself.
    [
      `insert into mysql.db (Host, Db, User, Select_priv, Insert_priv, Update_priv, Delete_priv)
        values ('%', ?, ?, 'Y', 'Y', 'Y', 'Y')`,
      [database.replaceAll("_", "\\_"), name],
    ],
    ["flush privileges", []],
  ]);
  return {
    name,
    url,
    /** Gives MySQL back the settings that it had, and the user the right to log in. */
    async mend() {
      await asAdmin([
        ["set global read_only = 0", []],
        ["alter user ?@'%' account unlock", [name]],
        ...settings.map((setting): [string, unknown[]] => [
          `set global ${setting} = ${literalOf(before[setting])}`,
          [],
        ]),
      ]);
    },
    async [Symbol.asyncDispose]() {
      await asAdmin([["drop user ?@'%'", [name]]]);
    },
  };
}
