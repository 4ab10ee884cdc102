import type { Channel } from "amqplib";
import { withDeadline } from "../../lib/loop.ts";
import { decodeMessage, type ReservationMessage } from "../../lib/reservations/message.ts";
import { until } from "../harness/harness.ts";
import type { Entry } from "../harness/processes.ts";
import type { Moment, TcpProxy } from "../harness/proxy.ts";
import type { Reserved } from "./client.ts";
import { type Kind, lasting, type Strike } from "./kind.ts";
import type { Node, WayOfRunning } from "./node.ts";
import type { Random } from "./random.ts";
import { SERVER_KINDS } from "./server_kinds.ts";

type Line = "mysql" | "amqp" | "http";

const ALL: readonly Entry[] = ["api", "scheduler", "worker"];
const HOUR_MS = 3_600_000;
const MOMENTS: readonly Moment[] = ["unsent", "sent", "answered"];
const PERSISTENT = { persistent: true };

async function endLife(node: Node, next?: Parameters<Node["strike"]>[1]) {
  const service = node.service();
  node.strike("SIGTERM", next);
  await service?.exited;
}

/** What happens to one process. */
function onProcess(entries: readonly Entry[], kind: Omit<Kind, "entries" | "takes">): Kind {
  return { entries, takes: "process", ...kind };
}

/** What happens to one connection of a process. */
function onLine(takes: Line, kind: Omit<Kind, "entries" | "takes" | "needsLease">): Kind {
  return { entries: takes === "http" ? ["api"] : ALL, takes, needsLease: takes !== "http", ...kind };
}

function kindsOfProcess(entry: Entry): Record<string, Kind> {
  return {
    [`kill-${entry}`]: onProcess([entry], {
      lasts: [0, 2_000],
      weight: 3,
      needsLease: entry === "scheduler",
      async strike({ node, lastsMs }) {
        node.strike("SIGKILL", { backInMs: lastsMs });
        await Bun.sleep(lastsMs);
      },
    }),
    [`stop-${entry}`]: onProcess([entry], {
      lasts: "lease",
      weight: 1,
      needsLease: entry !== "api",
      strike: lasting((isBroken, { node }) => node.strike(isBroken ? "SIGSTOP" : "SIGCONT")),
    }),
    [`term-${entry}`]: onProcess([entry], {
      lasts: [0, 500],
      needsLease: false,
      async strike({ node, lastsMs }) {
        await endLife(node, { backInMs: lastsMs });
        await Bun.sleep(lastsMs);
      },
    }),
  };
}

function kindsOfLine(line: Line): Record<string, Kind> {
  const slow = (delaysMs: [number, number], pieceBytes: number) =>
    onLine(line, {
      lasts: [1_000, 5_000],
      strike: lasting((isBroken, { node, random }) =>
        node[line].slow(isBroken ? { delayMs: random.between(delaysMs), pieceBytes } : undefined),
      ),
    });
  return {
    [`${line}-cut`]: onLine(line, { lasts: [0, 0], weight: 3, strike: async ({ node }) => node[line].cut() }),
    [`${line}-reset`]: onLine(line, { lasts: [0, 0], strike: async ({ node }) => node[line].reset() }),
    [`${line}-hang`]: onLine(line, {
      lasts: [500, 7_000],
      strike: lasting((isBroken, { node }) => (isBroken ? node[line].hold() : node[line].serve())),
    }),
    [`${line}-slow`]: slow([5, 60], 65_536),
    [`${line}-trickle`]: slow([1, 3], 200),
  };
}

/** A life of a process in an unusual way; the next one is ordinary again. */
function lifeOf(wayOf: (random: Random) => WayOfRunning): Kind {
  return onProcess(ALL, {
    lasts: [3_000, 8_000],
    needsLease: false,
    async strike({ node, random, lastsMs }) {
      await endLife(node, { way: wayOf(random) });
      // It never works if other faults have broken what it needs.
      await until(`${node.name} works`, () => node.isReady()).catch(() => {});
      await Bun.sleep(lastsMs);
      await endLife(node);
    },
  });
}

function killServer(takes: "MySQL" | "RabbitMQ"): Kind {
  const place = takes === "MySQL" ? 0 : 1;
  return {
    takes,
    lasts: [200, 2_000],
    weight: 1,
    needsLease: true,
    strike: lasting((isBroken, { world }) => world.servers[place][isBroken ? "kill" : "start"]()),
  };
}

/** The statements that begin with a word, whatever name they carry in a comment before it. */
function statement(words: string): RegExp {
  return new RegExp(`^(?:.*?\\*/ ?)?(?:${words})`);
}

/**
 * Does something when the struck process is about to send, has sent or has the answer to a command.
 *
 * @throws {Error} if the command does not come in time
 */
async function whenSent(
  { lastsMs, random }: Strike,
  options: { proxy: TcpProxy; command: RegExp; moments?: readonly Moment[]; act: () => void },
): Promise<void> {
  const { proxy, command, moments = MOMENTS, act } = options;
  const { promise, resolve } = Promise.withResolvers<void>();
  function spring() {
    // Even if it comes too late: nothing else would end the connection that the trap holds.
    act();
    resolve();
  }
  proxy.trap({ command, moment: random.pick(moments), spring });
  try {
    await withDeadline(promise, lastsMs, () => new Error(`${command} did not come`));
  } finally {
    proxy.trap();
  }
}

interface Tampering extends Strike {
  channel: Channel;
  /** Sends something to the queue, as JSON if it is not a Buffer. */
  send(content: unknown): void;
}

/** What an operator, or a stranger, does with the queue. */
function onQueue(act: (tampering: Tampering) => Promise<void>, needsLease = true): Kind {
  return {
    takes: "queue",
    lasts: [200, 1_500],
    needsLease,
    async strike(strike) {
      const { queueName } = strike.world;
      await using operator = await strike.world.openChannel();
      const { channel } = operator;
      // A channel that the broker has closed answers nothing any more.
      const closed = new Promise<"closed">((resolve) => channel.once("close", () => resolve("closed")));
      function send(content: unknown) {
        const bytes = Buffer.isBuffer(content) ? content : Buffer.from(JSON.stringify(content));
        channel.sendToQueue(queueName, bytes, PERSISTENT);
      }
      const acted = await Promise.race([act({ ...strike, channel, send }), closed]);
      // Answered only when all that was sent has arrived; a connection that closes at once would drop it.
      if (acted !== "closed") await Promise.race([channel.checkQueue(queueName), closed]);
    },
  };
}

/** What clients have reserved, as a message that the scheduler never sent. */
export function messageOf({ id = "", key = "none", reserved }: Reserved): ReservationMessage {
  return {
    reservation_id: id,
    user_id: reserved.userId,
    point_amount: reserved.pointAmount,
    idempotency_key: key,
  };
}

function stolen(message: ReservationMessage): ReservationMessage {
  return { ...message, user_id: "Thief", point_amount: 1_000_000 };
}

/** What a message holds; nothing if it is the garbage of another fault. */
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
async function takeMessages({ channel, world, lastsMs }: Tampering): Promise<Buffer[]> {
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

const ZONES = ["Asia/Tokyo", "America/New_York", "Asia/Kolkata"];

/** Every kind of fault, by its name. */
export const KINDS: Record<string, Kind> = {
  ...kindsOfProcess("api"),
  ...kindsOfProcess("scheduler"),
  ...kindsOfProcess("worker"),
  ...kindsOfLine("mysql"),
  ...kindsOfLine("amqp"),
  "http-cut": onLine("http", { lasts: [0, 0], strike: async ({ node }) => node.http.cut() }),
  "kill-at-statement": onProcess(ALL, {
    lasts: [3_000, 3_000],
    weight: 5,
    needsLease: true,
    async strike(strike) {
      const { node, random } = strike;
      const words = ["begin", "select [\\s\\S]* for update", "insert", "insert", "update", "commit"];
      const command = statement(random.pick(words));
      await whenSent(strike, { proxy: node.mysql, command, act: () => node.strike("SIGKILL") });
    },
  }),
  "mysql-cut-at-commit": onLine("mysql", {
    lasts: [3_000, 3_000],
    weight: 4,
    async strike(strike) {
      const { mysql, entry } = strike.node;
      // An API's INSERT commits by itself.
      const command = statement(entry === "api" ? "commit|insert" : "commit");
      await whenSent(strike, { proxy: mysql, command, act: () => mysql.cut() });
    },
  }),
  "amqp-hang-at-publish": {
    entries: ["scheduler"],
    takes: "amqp",
    lasts: [6_000, 7_000],
    needsLease: true,
    async strike(strike) {
      const { amqp } = strike.node;
      const end = performance.now() + strike.lastsMs;
      const trap = { proxy: amqp, command: /^basic.publish/, moments: MOMENTS.slice(0, 2) };
      await whenSent(strike, { ...trap, act: () => amqp.hold() });
      await Bun.sleep(Math.max(0, end - performance.now()));
      await amqp.serve();
    },
  },
  "kill-mysql": killServer("MySQL"),
  "kill-rabbitmq": killServer("RabbitMQ"),
  "broker-alarm": {
    takes: "RabbitMQ",
    lasts: [1_000, 4_000],
    weight: 1,
    needsLease: true,
    strike: lasting((isBroken, { world }) => world.setAlarm(isBroken)),
  },
  "queue-purge": onQueue(async ({ channel, world, lastsMs }) => {
    for (const end = performance.now() + lastsMs; performance.now() < end; await Bun.sleep(10)) {
      await channel.purgeQueue(world.queueName);
    }
  }),
  "queue-delete": onQueue(async ({ channel, world }) => {
    await channel.deleteQueue(world.queueName);
  }),
  "messages-duplicate": onQueue(async ({ send, ...strike }) => {
    for (let round = 0; round < 5; round++) {
      const messages = someOf(strike, 20).map(messageOf);
      if (messages.length === 0) return;
      send(messages);
      send(messages[0]);
      await Bun.sleep(strike.lastsMs / 5);
    }
  }, false),
  "messages-reorder": onQueue(async (tampering) => {
    for (const content of tampering.random.shuffle(await takeMessages(tampering))) tampering.send(content);
  }),
  "messages-delay": onQueue(async (tampering) => {
    tampering.world.delayed.push(...(await takeMessages(tampering)));
  }),
  "messages-forge": onQueue(async (tampering) => {
    const { reservations, random, send } = tampering;
    const some = [...someOf(tampering, 10), ...someOf(tampering, 10)].map(messageOf);
    for (const [index, message] of some.entries()) {
      send(index < 10 ? stolen(message) : { ...message, point_amount: 1_000_000 });
    }
    const far = reservations.filter(({ id, reserved }) => id && reserved.executeAt > Date.now() + HOUR_MS);
    if (far.length > 0) send(messageOf(random.pick(far)));
    const id = crypto.randomUUID();
    send({ reservation_id: id, user_id: "Thief", point_amount: 5, idempotency_key: "unknown" });
    // What a scheduler has sent, with other amounts and users.
    for (const content of await takeMessages(tampering)) send(readMessages(content).map(stolen));
  }),
  "messages-garbage": onQueue(async ({ send, random }) => {
    for (const text of ["", "{", "[]", "null", '{"reservation_id":1}', "\0\xff", "[".repeat(1_000)]) {
      send(Buffer.from(text, "latin1"));
    }
    send(Buffer.alloc(1 + random.below(500_000), "x"));
  }, false),
  "clock-ahead": lifeOf(() => ({ clockOffMs: HOUR_MS })),
  "clock-behind": lifeOf(() => ({ clockOffMs: -HOUR_MS })),
  "time-zone": lifeOf((random) => ({ timeZone: random.pick(ZONES) })),
  ...SERVER_KINDS,
};
