import { copyFileSync, existsSync, globSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { createConnection, type RowDataPacket } from "mysql2/promise";
import { installPackage } from "../../lib/dev/install.ts";
import { uniqueName, until } from "../harness/harness.ts";
import { listenerOf, rootOf } from "../harness/listener.ts";
import type { KillableServer } from "../harness/restartable.ts";

/** MySQL's clock, apart from that of the machine. */
export type DatabaseClock = Awaited<ReturnType<typeof openDatabaseClock>>;

const LIBRARY = "/usr/lib/*/faketime/libfaketimeMT.so.1";
const PACKAGE = "libfaketime";
/** How soon the server heeds the file of its clock, in seconds. */
const CACHE_S = 1;
const FELT_MS = 10_000;
/** How far a clock may be from where it was set, in milliseconds. */
const NEAR_MS = 60_000;

/**
 * Starts MySQL again with libfaketime, so that its clock can be set while it runs. Its process must be of this machine.
 *
 * @throws {Error} if that is not possible here; the message says why
 */
export async function openDatabaseClock(
  mysql: KillableServer,
  { url, say }: { url: string; say: (line: string) => void },
) {
  const find = () => globSync(LIBRARY)[0];
  if (!find()) await installPackage(PACKAGE, { say });
  const library = find();
  if (library === undefined) throw new Error(`there is no ${PACKAGE} on this machine`);
  // The server may live in a root folder of its own, and sees the library and its file there.
  const root = rootOf(listenerOf(url));
  if (root === undefined) throw new Error("MySQL is not a process of this machine");
  const file = join("/tmp", uniqueName("pointservice-clock"));
  // Also of this root: what starts the server may have the same environment.
  const files = new Set([file, join(root, file)]);
  const put = (offMs: number) => {
    for (const each of files) writeFileSync(each, `${offMs < 0 ? "-" : "+"}${Math.abs(offMs) / 1_000}\n`);
  };
  const libraryThere = join(root, library);
  if (!existsSync(libraryThere)) {
    mkdirSync(dirname(libraryThere), { recursive: true });
    copyFileSync(library, libraryThere);
  }
  put(0);
  Object.assign(mysql.env, {
    LD_PRELOAD: library,
    FAKETIME_TIMESTAMP_FILE: file,
    FAKETIME_CACHE_DURATION: String(CACHE_S),
    // Only the time of day jumps, as it does when somebody sets it.
    FAKETIME_DONT_FAKE_MONOTONIC: "1",
    // Its fix for old versions of glibc makes threads of MySQL 9.7 spin.
    FAKETIME_FORCE_MONOTONIC_FIX: "0",
    FAKETIME_ONLY_CMDS: "mysqld,mariadbd",
  });
  const clock = {
    /** Sets it so much ahead (or behind, if negative) of the machine's; resolves when the server goes by it. */
    async set(offMs: number): Promise<void> {
      put(offMs);
      await untilFelt(url, offMs);
    },
    /** Gives the server the machine's clock back, by starting it again. */
    async [Symbol.asyncDispose](): Promise<void> {
      for (const name of Object.keys(mysql.env)) delete mysql.env[name];
      put(0);
      await mysql.kill();
      await mysql.start();
      for (const each of files) rmSync(each, { force: true });
    },
  };
  try {
    await mysql.kill();
    await mysql.start();
    await clock.set(3_600_000);
    await clock.set(0);
    return clock;
  } catch (error) {
    await clock[Symbol.asyncDispose]();
    throw error;
  }
}

async function untilFelt(url: string, offMs: number): Promise<void> {
  const session = await createConnection({ uri: url, connectTimeout: 2_000 });
  session.on("error", () => {});
  try {
    await until(
      `MySQL's clock is off by ${offMs} ms`,
      async () => {
        const read = "select timestampdiff(microsecond, '1970-01-01', utc_timestamp(6)) div 1000 ms";
        const [rows] = await session.query<RowDataPacket[]>(read);
        return Math.abs(Number(rows[0]?.ms) - Date.now() - offMs) < NEAR_MS;
      },
      FELT_MS,
    );
  } finally {
    session.destroy();
  }
}
