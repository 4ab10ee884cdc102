import { expect } from "bun:test";
import { randomBytes } from "node:crypto";
import { join } from "node:path";
import { connect } from "amqplib";
import { createConnection } from "mysql2/promise";
import { pino } from "pino";
import { type Connection, type Database, DatabaseError, openDatabase } from "../lib/database.ts";
import { newReservation, type Reservation, type ReservationStatus } from "../lib/reservation.ts";
import { migrate } from "../sql/migrate.ts";

/** The services' URLs; `setup.ts` has made sure that they are set. */
export const DATABASE_URL = Bun.env.DATABASE_URL ?? "";
export const AMQP_URL = Bun.env.AMQP_URL ?? "";
const ROOT = join(import.meta.dir, "..");

/** A logger that says nothing. */
export const silent = pino({ level: "silent" });

/** A name that no other run on these servers uses. */
export function uniqueName(prefix: string): string {
  return `${prefix}_${randomBytes(6).toString("hex")}`;
}

export interface TestDatabase {
  url: string;
  name: string;
  database: Database;
  /** Runs a statement as an operator would, past all of our code. */
  query<Row extends object>(sql: string, values?: unknown[]): Promise<Row[]>;
  drop(): Promise<void>;
}

/** A database of its own, migrated unless told otherwise; `drop()` when done. */
export async function createTestDatabase({
  migrated = true,
  server = DATABASE_URL,
} = {}): Promise<TestDatabase> {
  const name = uniqueName("pointservice_test");
  const admin = await createConnection({ uri: server });
  await admin.query(`create database ${name}`);
  await admin.end();
  const parsed = new URL(server);
  parsed.pathname = `/${name}`;
  const url = parsed.href;
  if (migrated) await migrate(url);
  const database = openDatabase(url);
  return {
    url,
    name,
    database,
    query: (sql, values) => database.run((connection: Connection) => connection.select(sql, values)),
    async drop() {
      await database.close();
      const again = await createConnection({ uri: server });
      await again.query(`drop database if exists ${name}`);
      await again.end();
    },
  };
}

/** A valid reservation, due since a second unless told otherwise. */
export function reservationOf(fields: Partial<Reservation> = {}): Reservation {
  const { id, ...rest } = newReservation({
    user_id: "TestUser01",
    point_amount: 100,
    execute_at: new Date(Date.now() - 1_000).toISOString(),
  });
  return { ...rest, id, idempotencyKey: id, ...fields };
}

/** Inserts a row as it is, whatever the rules of the program say: for states that only a crash or an operator makes. */
export async function insertReservation(
  { query }: TestDatabase,
  fields: Partial<Reservation> & { status?: ReservationStatus; scanAt?: Date | null } = {},
): Promise<Reservation> {
  const { status = "PENDING", scanAt, ...rest } = fields;
  const reservation = reservationOf(rest);
  const isOpen = status === "PENDING" || status === "PROCESSING";
  await query("insert into point_reservations set ?", [
    {
      id: reservation.id,
      user_id: reservation.userId,
      point_amount: reservation.pointAmount,
      execute_at: reservation.executeAt,
      idempotency_key: reservation.idempotencyKey,
      campaign: reservation.campaign,
      status,
      scan_at: scanAt === undefined ? (isOpen ? reservation.executeAt : null) : scanAt,
    },
  ]);
  return reservation;
}

/** The DatabaseError that some work must end with. */
export async function errorOf(work: Promise<unknown>): Promise<DatabaseError> {
  const error = await work.then(
    () => undefined,
    (thrown) => thrown,
  );
  expect(error).toBeInstanceOf(DatabaseError);
  return error;
}

/** Waits until `condition` gives a value that is not false or undefined; fails with `what` after `withinMs`. */
export async function until<T>(
  what: string,
  condition: () => T | Promise<T>,
  withinMs = 20_000,
): Promise<NonNullable<Exclude<T, false>>> {
  const end = Date.now() + withinMs;
  for (;;) {
    const value = await condition();
    if (value !== false && value !== undefined && value !== null)
      return value as NonNullable<Exclude<T, false>>;
    if (Date.now() > end) throw new Error(`Not within ${withinMs} ms: ${what}`);
    await Bun.sleep(20);
  }
}

/** Deletes a queue, its dead-letter queue and its exchange of hints. */
export async function deleteQueue(name: string, url: string = AMQP_URL): Promise<void> {
  const connection = await connect(url);
  const channel = await connection.createChannel();
  await channel.deleteQueue(name);
  await channel.deleteQueue(`${name}.dead`);
  await channel.deleteExchange(`${name}.hints`);
  await connection.close();
}

export interface RunningService {
  pid: number;
  /** Where its HTTP port answers, e.g. `http://127.0.0.1:41234`. */
  url: string;
  /** The log so far, one object a line. */
  log(): Record<string, unknown>[];
  /** Sends a signal and waits for the end and all of its log: the exit code, or null where a signal ended it. */
  kill(signal: NodeJS.Signals): Promise<number | null>;
  exited: Promise<number | null>;
}

/** Starts a real process of an entry file, on a free port, with these settings; waits until its port answers unless told otherwise. */
export async function startService(
  entry: "api" | "scheduler" | "worker",
  env: Record<string, string>,
  { waitForPort = true, bunArgs = [] as string[] } = {},
): Promise<RunningService> {
  const child = Bun.spawn([process.execPath, ...bunArgs, `${entry}.ts`], {
    cwd: ROOT,
    env: {
      PATH: Bun.env.PATH,
      ...(Bun.env.TZ && { TZ: Bun.env.TZ }),
      AMQP_URL,
      PORT: "0",
      SCHEDULER_PORT: "0",
      WORKER_PORT: "0",
      SCAN_INTERVAL_MS: "100",
      ...env,
    },
    stdout: "pipe",
    stderr: "pipe",
  });
  let text = "";
  const collected = [child.stdout, child.stderr].map(collect);
  async function collect(stream: ReadableStream<Uint8Array>) {
    const decoder = new TextDecoder();
    for await (const bytes of stream) text += decoder.decode(bytes, { stream: true });
  }
  const log = (): Record<string, unknown>[] =>
    text
      .split("\n")
      .slice(0, -1)
      .filter(Boolean)
      .map((line) => {
        try {
          return JSON.parse(line) as Record<string, unknown>;
        } catch {
          return { line };
        }
      });
  // Its last lines may still be in the pipes when it is gone.
  const exited = Promise.all([child.exited, ...collected]).then(() => child.exitCode);
  const service: RunningService = {
    pid: child.pid,
    url: "",
    log,
    exited,
    async kill(signal) {
      child.kill(signal);
      return exited;
    },
  };
  if (waitForPort) {
    service.url = await until(`${entry} serves its port`, () => {
      if (child.exitCode !== null) throw new Error(`${entry} exited with ${child.exitCode}`);
      const url = log().find((line) => typeof line.url === "string")?.url;
      return typeof url === "string" && url.replace(/\/$/, "");
    }).catch(async (error) => {
      // Nobody gets to know this process, so nobody else would end it.
      await service.kill("SIGKILL");
      throw new Error(`${error.message}; its log: ${text}`);
    });
  }
  return service;
}

/**
 * How many rows and entries of indexes and temporary tables the server reads for some work.
 *
 * @param single a pool of one connection: the counters are the session's
 */
export async function countReads(
  single: Database,
  work: (database: Database) => Promise<unknown>,
): Promise<number> {
  const count = async () => {
    const counters = await single.run(({ select }) =>
      select<{ Value: string }>("show session status where variable_name like 'Handler_read%'"),
    );
    return counters.reduce((sum, { Value }) => sum + Number(Value), 0);
  };
  await count();
  const [first, second] = [await count(), await count()];
  await work(single);
  // Reading the counters counts as well.
  return (await count()) - second - (second - first);
}

/** Leaves nothing in the tables, as they were when the database was new. */
export async function emptyBooks({ query }: TestDatabase): Promise<void> {
  for (const table of [
    ...["point_transactions", "point_reservations", "point_root", "point_daily_totals", "point_daily_users"],
    ...["point_reconciliations", "point_repairs", "point_aggregation_turns"],
  ]) {
    await query(`delete from ${table}`);
  }
  await query("insert into point_aggregation_turns (id) values (1)");
  await query("update point_aggregation set generation = 1, time_zone = ''");
}
