import type { Channel } from "amqplib";
import { createConnection, type RowDataPacket } from "mysql2/promise";
import { decodeMessage, type ReservationMessage } from "../lib/message.ts";
import { HOT_USERS, type Reserved } from "./faults_client.ts";
import type { Random } from "./faults_random.ts";
import type { Entry, Node, World } from "./faults_world.ts";
import { until } from "./harness.ts";
import type { TcpProxy } from "./proxy.ts";

/** What a fault is given to strike with. */
export interface Strike {
  world: World;
  /** The process that it is about, where it is about one. */
  node: Node;
  /** How long it lasts, in milliseconds. */
  lastsMs: number;
  random: Random;
  /** What clients have reserved so far. */
  reservations: readonly Reserved[];
}

/** One kind of fault. */
export interface Kind {
  /** The processes that it may strike, one at a time; a fault of servers or rows strikes none of them. */
  entries?: Entry[];
  /** What it takes: two faults on the same never overlap. `process`, `mysql`, `amqp` and `http` are the struck node's. */
  takes: "process" | "mysql" | "amqp" | "http" | "MySQL" | "RabbitMQ" | "queue" | "rows";
  /** From … to, in milliseconds; `lease`: a little longer than that. */
  lasts: readonly [number, number] | "lease";
  /** How often it comes beside the others; 2 unless told. */
  weight?: number;
  /** Whether it can lose a claim or a message, so that only the end of the lease brings a reservation again. */
  needsLease: boolean;
  /** Breaks something, and mends it again before it resolves. */
  strike(strike: Strike): Promise<void>;
}

const ALL: Entry[] = ["api", "scheduler", "worker"];
const HOUR_MS = 3_600_000;

function killOf(entry: Entry): Kind {
  return {
    ...{
      entries: [entry],
      takes: "process",
      lasts: [0, 2_000],
      weight: 3,
      needsLease: entry === "scheduler",
    },
    async strike({ node, lastsMs }) {
      node.strike("SIGKILL", { backInMs: lastsMs });
      await Bun.sleep(lastsMs);
    },
  };
}

function stopOf(entry: Entry): Kind {
  return {
    ...{ entries: [entry], takes: "process", lasts: "lease", weight: 1, needsLease: entry !== "api" },
    async strike({ node, lastsMs }) {
      node.strike("SIGSTOP");
      await Bun.sleep(lastsMs);
      node.strike("SIGCONT");
    },
  };
}

function termOf(entry: Entry): Kind {
  return {
    ...{ entries: [entry], takes: "process", lasts: [0, 500], needsLease: false },
    async strike({ node, lastsMs }) {
      const service = node.service();
      node.strike("SIGTERM", { backInMs: lastsMs });
      await service?.exited;
      await Bun.sleep(lastsMs);
    },
  };
}

type Line = "mysql" | "amqp" | "http";

function lineOf({ node }: Strike, line: Line): TcpProxy {
  const proxy = node[line];
  if (!proxy) throw new Error(`Cannot break the ${line} line of ${node.name}: it has none`);
  return proxy;
}

function cutOf(line: Line, how: "cut" | "reset"): Kind {
  return {
    ...{ entries: line === "http" ? ["api"] : ALL, takes: line, lasts: [0, 0], needsLease: line !== "http" },
    strike: async (strike) => lineOf(strike, line)[how](),
  };
}

function hangOf(line: Line): Kind {
  return {
    ...{ entries: ALL, takes: line, lasts: [500, 7_000], needsLease: true },
    async strike(strike) {
      const proxy = lineOf(strike, line);
      proxy.hold();
      await Bun.sleep(strike.lastsMs);
      await proxy.serve();
    },
  };
}

function slowOf(line: Line, paces: { delayMs: readonly [number, number]; pieceBytes: number }): Kind {
  return {
    ...{ entries: ALL, takes: line, lasts: [1_000, 5_000], needsLease: true },
    async strike(strike) {
      const proxy = lineOf(strike, line);
      proxy.slow({ delayMs: strike.random.between(paces.delayMs), pieceBytes: paces.pieceBytes });
      await Bun.sleep(strike.lastsMs);
      proxy.slow();
    },
  };
}

function clockOf(sign: 1 | -1): Kind {
  return {
    ...{ entries: ALL, takes: "process", lasts: [3_000, 8_000], needsLease: false },
    strike: (strike) => liveOtherwise(strike, { clockOffMs: sign * HOUR_MS }),
  };
}

/** One life of a process in another way, and the next one as usual. */
async function liveOtherwise({ node, lastsMs }: Strike, way: { clockOffMs?: number; timeZone?: string }) {
  await endLife(node, way);
  // Not at all, where others have broken what it needs.
  await until(`${node.name} works`, () => node.isReady()).catch(() => {});
  await Bun.sleep(lastsMs);
  await endLife(node);
}

async function endLife(node: Node, way?: { clockOffMs?: number; timeZone?: string }) {
  const service = node.service();
  node.strike("SIGTERM", way && { way });
  await service?.exited;
}

function killServer(index: 0 | 1): Kind {
  return {
    ...{ takes: index === 0 ? "MySQL" : "RabbitMQ", lasts: [200, 2_000], weight: 1, needsLease: true },
    async strike({ world, lastsMs }) {
      const server = world.servers[index];
      await server.kill();
      await Bun.sleep(lastsMs);
      await server.start();
    },
  };
}

/** Deeds of an operator, or of a stranger, on the queue. */
function onQueue(needsLease: boolean, deed: (channel: Channel, strike: Strike) => Promise<void>): Kind {
  return {
    ...{ takes: "queue", lasts: [200, 1_500], needsLease },
    async strike(strike) {
      await using operator = await strike.world.openChannel();
      const { channel } = operator;
      // A channel that the broker closes answers nothing any more.
      let isClosed = false;
      const closed = new Promise<void>((resolve) => channel.once("close", resolve)).then(() => {
        isClosed = true;
      });
      async function act() {
        await deed(channel, strike);
        // Answered only when all that was sent before has arrived; a connection that closes at once would drop it.
        if (!isClosed) await channel.checkQueue(strike.world.queueName);
      }
      await Promise.race([act(), closed]);
    },
  };
}

/** What clients have reserved, as a message that the scheduler never sent. */
function messageOf({ id = "", key = "none", reserved }: Reserved): ReservationMessage {
  const { userId: user_id, pointAmount: point_amount } = reserved;
  return { reservation_id: id, user_id, point_amount, idempotency_key: key };
}

/** What a message holds; nothing, where it is another fault's garbage. */
function readMessages(content: Buffer): ReservationMessage[] {
  try {
    return decodeMessage(content);
  } catch {
    return [];
  }
}

function someOf({ reservations, random }: Strike, count: number): Reserved[] {
  const known = reservations.slice(-5_000).filter(({ id }) => id !== undefined);
  return known.length === 0 ? [] : Array.from({ length: count }, () => random.pick(known));
}

/** Takes the messages that come within a time, as one more worker would, but gives nothing back. */
async function takeMessages(channel: Channel, { world, lastsMs }: Strike): Promise<Buffer[]> {
  const taken: Buffer[] = [];
  const { consumerTag } = await channel.consume(world.queueName, (message) => {
    if (!message) return;
    taken.push(message.content);
    channel.ack(message);
  });
  await Bun.sleep(lastsMs);
  await channel.cancel(consumerTag);
  return taken;
}

const PERSISTENT = { persistent: true };

async function withSession(
  { world }: Strike,
  work: (session: { run(sql: string, values?: unknown[]): Promise<RowDataPacket[]> }) => Promise<void>,
) {
  const connection = await createConnection({ uri: world.test.url, connectTimeout: 2_000 });
  // A server that is killed meanwhile is another fault's doing.
  connection.on("error", () => {});
  try {
    await work({ run: async (sql, values) => (await connection.query<RowDataPacket[]>(sql, values))[0] });
  } finally {
    connection.destroy();
  }
}

/** Every kind of fault, by its name. */
export const KINDS: Record<string, Kind> = {
  "kill-api": killOf("api"),
  "kill-scheduler": killOf("scheduler"),
  "kill-worker": killOf("worker"),
  "kill-at-statement": {
    ...{ entries: ALL, takes: "process", lasts: [3_000, 3_000], weight: 5, needsLease: true },
    async strike({ node, random, lastsMs }) {
      const sprung = Promise.withResolvers<void>();
      node.mysql.trap({
        command: random.pick([
          /^begin/,
          /^select [\s\S]* for update/,
          /^insert/,
          /^insert/,
          /^update/,
          /^commit/,
        ]),
        moment: random.pick(["unsent", "sent", "answered"] as const),
        spring() {
          node.strike("SIGKILL");
          sprung.resolve();
        },
      });
      await Promise.race([sprung.promise, Bun.sleep(lastsMs)]);
      node.mysql.trap();
    },
  },
  "stop-api": stopOf("api"),
  "stop-scheduler": stopOf("scheduler"),
  "stop-worker": stopOf("worker"),
  "term-api": termOf("api"),
  "term-scheduler": termOf("scheduler"),
  "term-worker": termOf("worker"),
  "mysql-cut": { ...cutOf("mysql", "cut"), weight: 3 },
  "mysql-reset": cutOf("mysql", "reset"),
  "mysql-hang": hangOf("mysql"),
  "mysql-slow": slowOf("mysql", { delayMs: [5, 60], pieceBytes: 65_536 }),
  "mysql-trickle": slowOf("mysql", { delayMs: [1, 3], pieceBytes: 200 }),
  "mysql-cut-at-commit": {
    ...{ entries: ALL, takes: "mysql", lasts: [3_000, 3_000], weight: 4, needsLease: true },
    async strike({ node, random, lastsMs }) {
      const sprung = Promise.withResolvers<void>();
      node.mysql.trap({
        // An API's INSERT commits by itself.
        command: node.entry === "api" ? /^(commit|insert)/ : /^commit/,
        moment: random.pick(["unsent", "sent", "answered"] as const),
        spring() {
          node.mysql.cut();
          sprung.resolve();
        },
      });
      await Promise.race([sprung.promise, Bun.sleep(lastsMs)]);
      node.mysql.trap();
    },
  },
  "amqp-cut": { ...cutOf("amqp", "cut"), weight: 3 },
  "amqp-reset": cutOf("amqp", "reset"),
  "amqp-hang": hangOf("amqp"),
  "amqp-slow": slowOf("amqp", { delayMs: [5, 60], pieceBytes: 65_536 }),
  "amqp-trickle": slowOf("amqp", { delayMs: [1, 3], pieceBytes: 200 }),
  "amqp-hang-at-publish": {
    ...{ entries: ["scheduler"], takes: "amqp", lasts: [6_000, 7_000], needsLease: true },
    async strike({ node, random, lastsMs }) {
      const end = performance.now() + lastsMs;
      const moment = random.pick(["unsent", "sent"] as const);
      const sprung = Promise.withResolvers<true>();
      node.amqp.trap({
        command: /^basic.publish/,
        moment,
        spring() {
          node.amqp.hold();
          sprung.resolve(true);
        },
      });
      const isHeld = await Promise.race([sprung.promise, Bun.sleep(lastsMs)]);
      node.amqp.trap();
      if (!isHeld) return;
      await Bun.sleep(Math.max(0, end - performance.now()));
      await node.amqp.serve();
    },
  },
  "http-cut": { ...cutOf("http", "cut"), entries: ["api"] },
  "kill-mysql": killServer(0),
  "kill-rabbitmq": killServer(1),
  "broker-alarm": {
    ...{ takes: "RabbitMQ", lasts: [1_000, 4_000], weight: 1, needsLease: true },
    async strike({ world, lastsMs }) {
      try {
        await world.setAlarm(true);
        await Bun.sleep(lastsMs);
      } finally {
        await world.setAlarm(false);
      }
    },
  },
  "queue-purge": onQueue(true, async (channel, { world, lastsMs }) => {
    for (const end = performance.now() + lastsMs; performance.now() < end; ) {
      await channel.purgeQueue(world.queueName);
      await Bun.sleep(10);
    }
  }),
  "queue-delete": onQueue(true, async (channel, { world }) => {
    await channel.deleteQueue(world.queueName);
  }),
  "messages-duplicate": onQueue(false, async (channel, strike) => {
    for (let round = 0; round < 5; round++) {
      const messages = someOf(strike, 20).map(messageOf);
      if (messages.length === 0) return;
      for (const message of [messages, messages[0]]) {
        channel.sendToQueue(strike.world.queueName, Buffer.from(JSON.stringify(message)), PERSISTENT);
      }
      await Bun.sleep(strike.lastsMs / 5);
    }
  }),
  "messages-reorder": onQueue(true, async (channel, strike) => {
    const taken = await takeMessages(channel, strike);
    for (const content of strike.random.shuffle(taken)) {
      channel.sendToQueue(strike.world.queueName, content, PERSISTENT);
    }
  }),
  "messages-delay": onQueue(true, async (channel, strike) => {
    strike.world.delayed.push(...(await takeMessages(channel, strike)));
  }),
  "messages-forge": onQueue(true, async (channel, strike) => {
    const { world, reservations, random } = strike;
    const far = reservations.filter(({ id, reserved }) => id && reserved.executeAt > Date.now() + HOUR_MS);
    const forged = [
      ...someOf(strike, 10).map((one) => ({ ...messageOf(one), user_id: "Thief", point_amount: 1_000_000 })),
      ...someOf(strike, 10).map((one) => ({ ...messageOf(one), point_amount: 1_000_000 })),
      ...(far.length > 0 ? [messageOf(random.pick(far))] : []),
      { reservation_id: crypto.randomUUID(), user_id: "Thief", point_amount: 5, idempotency_key: "unknown" },
    ];
    for (const message of forged) {
      channel.sendToQueue(world.queueName, Buffer.from(JSON.stringify(message)), PERSISTENT);
    }
    // What a scheduler has sent, with other amounts and users.
    for (const content of await takeMessages(channel, strike)) {
      const altered = readMessages(content).map((message) => ({
        ...message,
        ...{ user_id: "Thief", point_amount: 1_000_000 },
      }));
      channel.sendToQueue(world.queueName, Buffer.from(JSON.stringify(altered)), PERSISTENT);
    }
  }),
  "messages-garbage": onQueue(false, async (channel, { world, random }) => {
    for (const text of ["", "{", "[]", "null", '{"reservation_id":1}', "\0\xff", "[".repeat(1_000)]) {
      channel.sendToQueue(world.queueName, Buffer.from(text, "latin1"), PERSISTENT);
    }
    channel.sendToQueue(world.queueName, Buffer.alloc(1 + random.below(500_000), "x"), PERSISTENT);
  }),
  deadlock: {
    ...{ takes: "rows", lasts: [1_000, 3_000], weight: 3, needsLease: true },
    async strike(strike) {
      await withSession(strike, async ({ run }) => {
        await run("create table if not exists weight (n int)");
        for (const end = performance.now() + strike.lastsMs; performance.now() < end; ) {
          await run("begin");
          // MySQL gives up the transaction that has changed less: this one shall live.
          await run("insert into weight values ?", [Array.from({ length: 2_000 }, (_, n) => [n])]);
          await run("update point_root set updated_at = updated_at where user_id = ?", [HOT_USERS[1]]);
          await Bun.sleep(strike.random.between([20, 100]));
          // Against the order of the workers: who holds the first and waits for the second is in a deadlock now.
          await run("update point_root set updated_at = updated_at where user_id = ?", [HOT_USERS[0]]);
          await run("rollback");
          await Bun.sleep(20);
        }
      });
    },
  },
  "rows-locked": {
    // Longer than anybody waits for a lock.
    ...{ takes: "rows", lasts: [5_500, 7_000], weight: 1, needsLease: true },
    async strike(strike) {
      await withSession(strike, async ({ run }) => {
        await run("begin");
        await run("select 1 from point_root where user_id in (?) for update", [HOT_USERS]);
        await Bun.sleep(strike.lastsMs);
        await run("rollback");
      });
    },
  },
  "clock-ahead": clockOf(1),
  "clock-behind": clockOf(-1),
  "time-zone": {
    ...{ entries: ALL, takes: "process", lasts: [3_000, 8_000], needsLease: false },
    strike: (strike) =>
      liveOtherwise(strike, {
        timeZone: strike.random.pick(["Asia/Tokyo", "America/New_York", "Asia/Kolkata"]),
      }),
  },
};

/** A fault that is planned: what, where, and from when to when. */
export interface Planned {
  kind: string;
  /** Milliseconds after the begin. */
  atMs: number;
  lastsMs: number;
  /** The node, by its place among all of them; 0 where it strikes none. */
  node: number;
  /** Of the random numbers that the fault itself uses. */
  seed: number;
}

const NODES: { entry: Entry; place: number }[] = (
  ["api", "api", "scheduler", "scheduler", "worker", "worker", "worker"] as const
).map((entry, place) => ({ entry, place }));

/**
 * Plans faults at random moments, several at once; the same seed makes the same plan. Every kind comes before any comes
 * again too often: they are drawn from a bag that holds each as often as it weighs.
 */
export function planFaults(
  random: Random,
  options: { seconds: number; kinds: readonly string[]; everyMs: number; leaseMs: number },
): Planned[] {
  const { seconds, kinds, everyMs, leaseMs } = options;
  const endMs = seconds * 1_000;
  const planned: Planned[] = [];
  /** Until when each thing is taken. */
  const taken = new Map<string, number>();
  let bag: string[] = [];
  for (let atMs = everyMs; atMs < endMs - 500; atMs += random.between([0.3, 1.7]) * everyMs) {
    if (bag.length === 0) {
      bag = random.shuffle(kinds.flatMap((name) => Array<string>(kindOf(name).weight ?? 2).fill(name)));
    }
    const name = bag.pop() ?? "";
    const kind = kindOf(name);
    const lastsMs = Math.min(random.between(lastsOf(kind, leaseMs)), endMs - atMs);
    const candidates = kind.entries
      ? NODES.filter(({ entry }) => kind.entries?.includes(entry))
      : NODES.slice(0, 1);
    const seed = random.below(2 ** 31);
    const keyOf = (place: number) => (kind.entries ? `${place} ${kind.takes}` : kind.takes);
    const free = candidates.filter(({ place }) => (taken.get(keyOf(place)) ?? 0) <= atMs);
    if (free.length === 0) continue;
    const { place } = random.pick(free);
    taken.set(keyOf(place), atMs + lastsMs + restMsOf(kind));
    planned.push({ kind: name, atMs, lastsMs, node: kind.entries ? place : 0, seed });
  }
  return planned;
}

/** Plans faults one after the other, each kind in its turn, with time to recover from each before the next one comes. */
export function planApart(
  random: Random,
  { seconds, kinds, leaseMs }: { seconds: number; kinds: readonly string[]; leaseMs: number },
): Planned[] {
  const planned: Planned[] = [];
  const order = random.shuffle(kinds);
  for (let atMs = 2_000, turn = 0; turn < order.length || atMs < seconds * 1_000; turn++) {
    const name = order[turn % order.length] ?? "";
    const kind = kindOf(name);
    const candidates = NODES.filter(({ entry }) => kind.entries?.includes(entry) ?? true);
    const lastsMs = random.between(lastsOf(kind, leaseMs));
    const node = kind.entries ? random.pick(candidates).place : 0;
    planned.push({ kind: name, atMs, lastsMs, node, seed: random.below(2 ** 31) });
    atMs += lastsMs + restMsOf(kind) + leaseMs + 3_000;
  }
  return planned;
}

function kindOf(name: string): Kind {
  const kind = KINDS[name];
  if (!kind) throw new Error(`There is no fault ${name}`);
  return kind;
}

function lastsOf({ lasts }: Kind, leaseMs: number): readonly [number, number] {
  return lasts === "lease" ? [leaseMs + 500, leaseMs + 2_500] : lasts;
}

/** Starting a server, or a process, takes its time as well, in milliseconds. */
function restMsOf({ takes }: Kind): number {
  return { MySQL: 6_000, RabbitMQ: 15_000, process: 3_000 }[takes as string] ?? 100;
}
