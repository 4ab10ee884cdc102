import { once } from "node:events";
import { connect, createServer, type Socket } from "node:net";
import { freePorts } from "../../lib/dev/servers.ts";

/** Where a client's command is caught: before the server has it, once the server has it, or with its answer in hand. */
export type Moment = "unsent" | "sent" | "answered";

export interface Trap {
  /** Tells by a command's text: a statement of SQL with its name, or `basic.publish`, `basic.ack` and other names of AMQP. */
  command: { test(text: string): boolean };
  moment: Moment;
  /** Called once. Nothing passes on that connection any more, in either direction. */
  spring: () => void;
}

/** How bytes pass on a bad line: each piece so much later than the one before it. */
export interface Pace {
  delayMs: number;
  /** The most bytes of one piece. */
  pieceBytes: number;
}

export type TcpProxy = Awaited<ReturnType<typeof startProxy>>;

/**
 * Starts a proxy to the server of a MySQL, AMQP or HTTP URL, on a free port: it stands between a client and a real server,
 * and breaks what a network breaks. `await using` closes it.
 */
export async function startProxy(target: string, { serving = true } = {}) {
  const { hostname, port: targetPort, protocol } = new URL(target);
  const readCommand = { "amqp:": amqpCommand, "mysql:": mysqlCommand }[protocol] ?? anyBytes;
  const [port = 0] = await freePorts(1);
  const pairs = new Set<{ client: Socket; server: Socket }>();
  let held = false;
  let pace: Pace | undefined;
  let trap: Trap | undefined;
  const passed: Record<string, number> = {};

  const listener = createServer((client) => {
    const server = connect({ host: hostname, port: Number(targetPort) });
    const pair = { client, server };
    pairs.add(pair);
    let caught = false;
    let awaited: Trap | undefined;
    const split = splitCommands(readCommand);
    const toServer = lineTo(server, () => pace);
    const toClient = lineTo(client, () => pace);

    function spring(sprung: Trap) {
      caught = true;
      sprung.spring();
    }
    client.on("data", (chunk: Buffer) => {
      if (held || caught) return;
      for (const { bytes, text } of split(chunk)) {
        const matching = trap?.command.test(text) ? trap : undefined;
        if (matching) trap = undefined;
        if (matching?.moment === "unsent") return spring(matching);
        if (matching?.moment === "answered") awaited = matching;
        if (text.startsWith("basic.")) passed[text] = (passed[text] ?? 0) + 1;
        if (matching?.moment === "sent") return server.write(bytes, () => spring(matching));
        toServer(bytes);
      }
    });
    server.on("data", (chunk: Buffer) => {
      if (awaited && !caught) spring(awaited);
      if (!held && !caught) toClient(chunk);
    });
    // end() and not destroy(): what was passed on before one side went arrives at the other.
    client.on("close", () => {
      pairs.delete(pair);
      server.end();
    });
    server.on("close", () => client.end());
    for (const socket of [client, server]) {
      socket.setNoDelay(true);
      socket.on("error", () => socket.destroy());
    }
  });

  function end(how: "destroy" | "resetAndDestroy") {
    for (const { client, server } of pairs) {
      client[how]();
      server[how]();
    }
    pairs.clear();
  }
  const cut = () => end("destroy");
  async function listen() {
    if (listener.listening) return;
    listener.listen(port, "127.0.0.1");
    await once(listener, "listening");
  }
  async function refuse() {
    const closed = listener.listening && new Promise((resolve) => listener.close(resolve));
    cut();
    await closed;
  }
  if (serving) await listen();

  return {
    /** The server's URL, but through the proxy. */
    url: Object.assign(new URL(target), { hostname: "127.0.0.1", port }).href,
    /** The number of connections that are open. */
    connections: () => pairs.size,
    /** How many commands of that name have been passed on to the server, `basic.publish` for example. */
    passed: (command: string) => passed[command] ?? 0,
    /** Ends every connection; new ones come through. */
    cut,
    /** Like a server that is down: ends every connection, and takes no new ones. */
    refuse,
    /** Ends every connection with a reset, as a peer that has rebooted does; new ones come through. */
    reset: () => end("resetAndDestroy"),
    /** Like a dead peer: takes connections and bytes, and passes nothing on. */
    hold() {
      held = true;
    },
    /** Like a bad line: passes everything on, in both directions, but late and in small pieces. */
    slow(next?: Pace) {
      pace = next;
    },
    /** All is well again, on new connections. */
    async serve() {
      held = false;
      pace = undefined;
      cut();
      await listen();
    },
    /** Sends bytes to every client as if the server had. */
    inject(bytes: Uint8Array) {
      for (const { client } of pairs) client.write(bytes);
    },
    /** Sets a trap for the next command that matches, instead of the one before; none without `next`. */
    trap(next?: Trap) {
      trap = next;
    },
    close: refuse,
    [Symbol.asyncDispose]: refuse,
  };
}

/** Writes at once, or at the pace of that moment; in order in any case. */
function lineTo(socket: Socket, paceNow: () => Pace | undefined): (bytes: Buffer) => void {
  const waiting: Buffer[] = [];
  let isBusy = false;
  async function writeLate() {
    isBusy = true;
    for (let bytes = waiting.shift(); bytes; bytes = waiting.shift()) {
      const { delayMs = 0, pieceBytes = bytes.length } = paceNow() ?? {};
      if (delayMs > 0) await Bun.sleep(delayMs);
      socket.write(bytes.subarray(0, pieceBytes));
      if (bytes.length > pieceBytes) waiting.unshift(bytes.subarray(pieceBytes));
    }
    isBusy = false;
  }
  return (bytes) => {
    if (!isBusy && !paceNow()) return void socket.write(bytes);
    waiting.push(bytes);
    if (!isBusy) writeLate();
  };
}

type ReadCommand = (bytes: Buffer) => { length: number; text: () => string } | undefined;

/** Gathers a client's bytes, and gives them back in whole packets. */
function splitCommands(read: ReadCommand) {
  let rest: Buffer = Buffer.alloc(0);
  return function* (chunk: Buffer) {
    rest = Buffer.concat([rest, chunk]);
    for (let next = read(rest); next && next.length <= rest.length; next = read(rest)) {
      const bytes = rest.subarray(0, next.length);
      rest = rest.subarray(next.length);
      yield { bytes, text: next.text() };
    }
  };
}

/** No protocol that anybody sets traps for. */
function anyBytes(bytes: Buffer) {
  return bytes.length === 0 ? undefined : { length: bytes.length, text: () => "" };
}

const COM_QUERY = 3;

/** https://dev.mysql.com/doc/dev/mysql-server/latest/page_protocol_com_query.html */
function mysqlCommand(bytes: Buffer) {
  if (bytes.length < 4) return undefined;
  const length = 4 + bytes.readUIntLE(0, 3);
  return {
    length,
    text() {
      if (bytes[3] !== 0 || bytes[4] !== COM_QUERY) return "";
      const text = bytes.toString("latin1", 5, length);
      // MySQL's own clients send query attributes first: how many, in bytes that begin no statement.
      return text.slice(text.search(/[a-z/]/i));
    },
  };
}

const PROTOCOL_HEADER = 8;
/** Where the length of the name of the exchange is, in the frame of a basic.publish. */
const EXCHANGE_LENGTH = 13;
const AMQP_NAMES: Record<string, string> = { "60.40": "basic.publish", "60.80": "basic.ack" };

/** AMQP 0-9-1: frames of type, channel, size, payload and an end byte. */
function amqpCommand(bytes: Buffer) {
  if (bytes.length < PROTOCOL_HEADER) return undefined;
  const isHeader = bytes.toString("latin1", 0, 4) === "AMQP";
  return {
    length: isHeader ? PROTOCOL_HEADER : PROTOCOL_HEADER + bytes.readUInt32BE(3),
    text() {
      if (isHeader || bytes[0] !== 1) return "";
      const method = `${bytes.readUInt16BE(7)}.${bytes.readUInt16BE(9)}`;
      const name = AMQP_NAMES[method] ?? method;
      // Hints and their probes go to an exchange, messages to the unnamed one.
      return name === "basic.publish" && bytes[EXCHANGE_LENGTH] !== 0 ? "basic.publish.hint" : name;
    },
  };
}

/** The frame with which RabbitMQ says that it takes no messages now (`connection.blocked`), or takes them again. */
export function blockedFrame(blocked: boolean): Uint8Array {
  const reason = Buffer.from("test");
  const payload = blocked
    ? Buffer.concat([Buffer.from([0, 10, 0, 60, reason.length]), reason])
    : Buffer.from([0, 10, 0, 61]);
  const head = Buffer.from([1, 0, 0, 0, 0, 0, payload.length]);
  return Buffer.concat([head, payload, Buffer.from([0xce])]);
}
