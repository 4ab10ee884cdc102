import { once } from "node:events";
import { connect, createServer, type Socket } from "node:net";

const PROTOCOL_41 = 0x0200;
const SECURE_CONNECTION = 0x8000;
const PLUGIN_AUTH = 0x0008;
const COM_QUIT = 1;

/**
 * A proxy like those that stand before several MySQLs: it passes everything on, or, while it has no MySQL, takes every login and
 * answers every statement with an error of its own. https://dev.mysql.com/doc/dev/mysql-server/latest/PAGE_PROTOCOL.html
 */
export async function startFront(target: string) {
  const { hostname, port } = new URL(target);
  const open = new Set<Socket>();
  let refusal: { errno: number; text: string } | undefined;

  const listener = createServer((client) => {
    open.add(client);
    client.on("close", () => open.delete(client));
    client.on("error", () => client.destroy());
    if (refusal) return refuseAll(client, refusal);
    const server = connect({ host: hostname, port: Number(port) });
    server.on("error", () => client.destroy());
    server.on("close", () => client.destroy());
    client.on("close", () => server.destroy());
    client.pipe(server).pipe(client);
  });
  listener.listen(0, "127.0.0.1");
  await once(listener, "listening");
  const address = listener.address() as { port: number };

  function cut() {
    for (const client of open) client.destroy();
  }
  return {
    url: Object.assign(new URL(target), { hostname: "127.0.0.1", port: String(address.port) }).href,
    /** Ends all connections. New ones get this error for each statement, or are passed on again. */
    refuse(next?: { errno: number; text: string }) {
      refusal = next;
      cut();
    },
    async [Symbol.asyncDispose]() {
      const closed = new Promise((resolve) => listener.close(resolve));
      cut();
      await closed;
    },
  };
}

function refuseAll(client: Socket, { errno, text }: { errno: number; text: string }): void {
  client.write(packet(0, greeting()));
  let isLoggedIn = false;
  let rest: Buffer = Buffer.alloc(0);
  client.on("data", (chunk: Buffer) => {
    rest = Buffer.concat([rest, chunk]);
    while (rest.length >= 4 && rest.length >= 4 + rest.readUIntLE(0, 3)) {
      const [sequence, command] = [rest[3] ?? 0, rest[4]];
      rest = rest.subarray(4 + rest.readUIntLE(0, 3));
      if (!isLoggedIn) client.write(packet(sequence + 1, Buffer.from([0, 0, 0, 2, 0, 0, 0])));
      else if (command === COM_QUIT) client.end();
      else client.write(packet(sequence + 1, errorOf(errno, text)));
      isLoggedIn = true;
    }
  });
}

function packet(sequence: number, payload: Buffer): Buffer {
  const head = Buffer.alloc(4);
  head.writeUIntLE(payload.length, 0, 3);
  head[3] = sequence;
  return Buffer.concat([head, payload]);
}

function greeting(): Buffer {
  const flags = Buffer.alloc(2);
  flags.writeUInt16LE(PROTOCOL_41 | SECURE_CONNECTION);
  return Buffer.concat([
    Buffer.from([10]),
    Buffer.from("8.4.0-front\0"),
    Buffer.from([7, 0, 0, 0]),
    Buffer.from("saltsalt\0"),
    flags,
    Buffer.from([45, 2, 0, PLUGIN_AUTH, 0, 21]),
    Buffer.alloc(10),
    Buffer.from("saltsaltsalt\0mysql_native_password\0"),
  ]);
}

function errorOf(errno: number, text: string): Buffer {
  const number = Buffer.alloc(2);
  number.writeUInt16LE(errno);
  return Buffer.concat([Buffer.from([0xff]), number, Buffer.from(`#HY000${text}`)]);
}
