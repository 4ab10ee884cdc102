import { cpSync, mkdtempSync, rmSync, symlinkSync } from "node:fs";
import { readFile, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { runCommand } from "../lib/dev/processes.ts";

const ROOT = join(import.meta.dir, "..");

/** A bug that somebody might write, and the faults in which it shows. */
interface Plant {
  /** What each file has, once, and what it gets instead. */
  edits: { file: string; from: string; to: string }[];
  only: string[];
  apart?: boolean;
  settings?: Record<string, string>;
  seconds?: number;
}

const WORKER = "worker.ts";
const RESERVATIONS = "lib/reservation_repository.ts";
const POINTS = "lib/point_repository.ts";
const DATABASE = "lib/database.ts";

const PLANTS: Record<string, Plant> = {
  "ack before commit": {
    edits: [
      {
        file: WORKER,
        from: `return message ? grantCoalesced(message) : "dead";`,
        to: `if (message) grantCoalesced(message).catch(() => undefined);\n            return message ? "ack" : "dead";`,
      },
    ],
    only: ["kill-worker"],
    apart: true,
    // Nothing but the end of the lease brings again what a dead worker has acknowledged.
    settings: { LEASE_MS: "9000", WORKER_BATCH: "1", PUBLISH_CHUNK: "1" },
    seconds: 60,
  },
  "ledger and balance in two transactions": {
    edits: [
      {
        file: POINTS,
        from: `  await insertLedgerEntries(connection, entries);\n  await upsertBalances(connection, [...sumByUser(entries)]);`,
        to: `  await insertLedgerEntries(connection, entries);\n  await connection.execute("commit");\n  await connection.execute("begin");\n  await upsertBalances(connection, [...sumByUser(entries)]);`,
      },
    ],
    only: ["mysql-cut-at-commit", "kill-worker"],
  },
  "amount taken from the message": {
    edits: [
      {
        file: WORKER,
        from: "  const ids = [...new Set(messages.flat().map((message) => message.reservation_id))];",
        to: "  const ids = [...new Set(messages.flat().map((message) => message.reservation_id))];\n  for (const message of messages.flat()) AMOUNTS.set(message.reservation_id, message.point_amount);",
      },
      {
        file: WORKER,
        from: "  const due = rows.filter((row) => refuse(row) === undefined);",
        to: "  for (const row of rows) row.pointAmount = AMOUNTS.get(row.id) ?? row.pointAmount;\n  const due = rows.filter((row) => refuse(row) === undefined);",
      },
      {
        file: WORKER,
        from: "export interface GrantOptions {",
        to: "const AMOUNTS = new Map<string, number>();\n\nexport interface GrantOptions {",
      },
    ],
    only: ["messages-forge"],
  },
  "no lease": {
    edits: [
      {
        file: RESERVATIONS,
        from: "set status = 'PROCESSING', scan_at = now(3) + interval ? microsecond",
        to: "set status = 'PROCESSING', scan_at = now(3) + interval ? microsecond + interval 1 day",
      },
    ],
    only: ["queue-purge", "messages-delay", "kill-scheduler"],
  },
  "publish without confirm": {
    edits: [
      {
        file: "lib/queue.ts",
        from: "        resolve(!error && !returned.has(messageId));\n      });",
        to: "        if (error) returned.delete(messageId);\n      });\n      resolve(true);",
      },
    ],
    only: ["amqp-hang-at-publish"],
  },
  "back to PENDING after a failed publish": {
    edits: [
      {
        file: "scheduler.ts",
        from: "    const confirmed = await queue.publish(messages);",
        to: `    const confirmed = await queue.publish(messages);
    if (confirmed < messages.length) {
      await database.run((connection) =>
        connection.execute("update point_reservations set status = 'PENDING', scan_at = execute_at where id in (?) and status = 'PROCESSING'", [
          claimed.map(({ id }) => id),
        ]),
      );
    }`,
      },
    ],
    only: ["amqp-hang-at-publish", "amqp-cut"],
  },
  "cancel by read, then write": {
    edits: [
      {
        file: RESERVATIONS,
        from: "  return database.run(async ({ drizzle }) => {\n    const [{ affectedRows }] = await drizzle",
        to: `  return database.run(async ({ drizzle }) => {
    const open = await drizzle
      .select({ id: reservations.id })
      .from(reservations)
      .where(and(inArray(reservations.id, ids.toSorted()), inArray(reservations.status, OPEN)));
    if (open.length === 0) return 0;
    const [{ affectedRows }] = await drizzle`,
      },
      {
        file: RESERVATIONS,
        from: ".where(and(inArray(reservations.id, ids.toSorted()), inArray(reservations.status, OPEN)));\n    return affectedRows;",
        to: ".where(inArray(reservations.id, ids.toSorted()));\n    return affectedRows;",
      },
    ],
    only: ["mysql-slow"],
  },
  "no lock and no status in the claim": {
    edits: [
      {
        file: RESERVATIONS,
        from: "order by scan_at, id limit ? for update skip locked`",
        to: "order by scan_at, id limit ?`",
      },
      {
        file: RESERVATIONS,
        from: "\n  where id in (?) and status in ('PENDING', 'PROCESSING')`",
        to: "\n  where id in (?)`",
      },
    ],
    only: ["mysql-slow"],
  },
  "the host's clock instead of the database's": {
    edits: [
      {
        file: RESERVATIONS,
        from: "connection.select<ClaimedReservation>(CLAIMABLE, [limit])",
        to: "connection.select<ClaimedReservation>(CLAIMABLE.replaceAll(\"now(3)\", () => JSON.stringify(new Date()).replaceAll('Z', '')), [limit])",
      },
      {
        file: RESERVATIONS,
        from: "connection.select<Row>(LOCK, [ids])",
        to: "connection.select<Row>(LOCK.replaceAll(\"now(3)\", () => JSON.stringify(new Date()).replaceAll('Z', '')), [ids])",
      },
    ],
    only: ["clock-ahead"],
  },
  "keys without regard to case": {
    edits: [
      {
        file: "sql/0001_points.sql",
        from: "  idempotency_key varchar(100) character set ascii collate ascii_bin not null,\n  -- when",
        to: "  idempotency_key varchar(100) character set ascii collate ascii_general_ci not null,\n  -- when",
      },
    ],
    only: ["kill-api"],
  },
  "a retry that does not start at BEGIN": {
    edits: [
      {
        file: DATABASE,
        from: "    execute: async (sql, values) => (await promised.query<ResultSetHeader>(sql, values))[0],",
        to: `    execute: async (sql, values) => {
      try {
        return (await promised.query<ResultSetHeader>(sql, values))[0];
      } catch (error) {
        if ((error as { errno?: number }).errno !== 1213) throw error;
        return (await promised.query<ResultSetHeader>(sql, values))[0];
      }
    },`,
      },
    ],
    only: ["deadlock"],
  },
  "balance by read, modify, write": {
    edits: [
      {
        file: POINTS,
        from: "  await connection.execute(\n    `insert into point_root (user_id, point_num) values ?\n     on duplicate key update point_num = point_num + values(point_num)`,",
        to: `  const before = await connection.select<{ user_id: string; point_num: number }>(
    "select user_id, point_num from point_root where user_id in (?)",
    [sums.map(([userId]) => userId)],
  );
  for (const sum of sums) sum[1] += Number(before.find((row) => row.user_id === sum[0])?.point_num ?? 0);
  await connection.execute(
    \`insert into point_root (user_id, point_num) values ?
     on duplicate key update point_num = values(point_num)\`,`,
      },
    ],
    only: ["mysql-slow"],
  },
  "a grant of what is not claimed": {
    edits: [
      {
        file: WORKER,
        from: `  return row.status === "PENDING" ? "not_due" : "over";`,
        to: `  return row.status === "PENDING" ? undefined : "over";`,
      },
      {
        file: RESERVATIONS,
        from: "where id in (?) and status = 'PROCESSING'`",
        to: "where id in (?) and status in ('PENDING', 'PROCESSING')`",
      },
    ],
    only: ["messages-forge"],
  },
  "a grant of what was cancelled": {
    edits: [
      {
        file: WORKER,
        from: `  if (row.status === "PROCESSING") return`,
        to: `  if (row.status === "PROCESSING" || row.status === "CANCELLED") return`,
      },
      {
        file: RESERVATIONS,
        from: "where id in (?) and status = 'PROCESSING'`",
        to: "where id in (?) and status in ('CANCELLED', 'PROCESSING')`",
      },
    ],
    only: ["messages-duplicate"],
  },
  "a replay that gets an id of its own": {
    edits: [
      {
        file: RESERVATIONS,
        from: `? { kind: "replayed", reservation: first }`,
        to: `? { kind: "replayed", reservation }`,
      },
    ],
    only: ["kill-api"],
  },
  "times in the process's own zone": {
    edits: [{ file: DATABASE, from: `timezone: "Z"`, to: `timezone: "local"` }],
    only: ["time-zone"],
  },
  "an atomic bulk without a transaction": {
    edits: [
      { file: "api.ts", from: `database[allOrNone ? "transaction" : "run"]`, to: `database.run` },
      { file: RESERVATIONS, from: "const INSERT_ROWS = 1_000;", to: "const INSERT_ROWS = 1;" },
    ],
    only: ["kill-at-statement", "kill-api"],
    seconds: 60,
  },
  "a direct change without its key": {
    edits: [
      {
        file: POINTS,
        from: `    const first = known.get(idempotencyKey);`,
        to: `    change.idempotencyKey = \`\${idempotencyKey.slice(0, 60)}:\${uuidv7()}\`;\n    const first = known.get(change.idempotencyKey);`,
      },
    ],
    only: ["mysql-cut-at-commit"],
  },
  "an outage that counts as an attempt": {
    edits: [
      {
        file: WORKER,
        from: "    if (!(error instanceof DatabaseError) || error.isOutage) throw error;\n    if (!error.isContended) return",
        to: "    if (!(error instanceof DatabaseError)) throw error;\n    if (!error.isContended) return",
      },
      {
        file: WORKER,
        from: "    if (!(error instanceof DatabaseError) || error.isOutage) throw error;\n    // One row",
        to: "    if (!(error instanceof DatabaseError)) throw error;\n    // One row",
      },
      { file: WORKER, from: "    if (attempts >= options.maxAttempts) {", to: "    if (attempts >= 1) {" },
    ],
    only: ["kill-mysql"],
    seconds: 60,
  },
  "a worker that dies of garbage": {
    edits: [
      {
        file: WORKER,
        from: `    logger.error({ error: describeError(error) }, "unreadable message: dead letter");\n    return undefined;`,
        to: `    logger.error({ error: describeError(error) }, "unreadable message: dead letter");\n    process.exit(1);`,
      },
    ],
    only: ["messages-garbage"],
  },
};

const SECONDS = 25;
/** The plans of faults that are tried one after the other until one shows the bug. */
const SEEDS = [1, 2, 3];
const RUN_MS = 300_000;
const MAX_SHOWN = 100;
/** The end of the output of a run that found what must not be. */
const VIOLATED = /^VIOLATED: (.*)$/m;

/**
 * Plants each bug in a copy of the tree, and runs the faults there: each must be caught. Resolves to the exit code.
 *
 * @param wanted `all`, or names of bugs with commas between them
 * @throws Error where there is no such bug, or where the code that one edits has moved
 */
export async function sabotage(wanted: string): Promise<number> {
  const names = wanted === "all" ? Object.keys(PLANTS) : wanted.split(",");
  const unknown = names.filter((name) => !(name in PLANTS));
  if (unknown.length > 0) {
    throw new Error(
      `--sabotage must be all or some of ${Object.keys(PLANTS).join(", ")}: received ${unknown.join(", ")}`,
    );
  }
  // Before the first one takes its minute: whether the last one can be planted.
  for (const name of names) for (const edit of PLANTS[name]?.edits ?? []) await edited(ROOT, edit);
  const rows: Record<string, unknown>[] = [];
  for (const name of names) {
    console.error(`planting: ${name}`);
    let caughtBy: string | undefined;
    let runs = 0;
    for (const seed of SEEDS) {
      runs++;
      const { code, output } = await runPlanted(PLANTS[name] as Plant, seed);
      caughtBy = code === 1 ? VIOLATED.exec(output)?.[1] : undefined;
      if (caughtBy !== undefined) break;
      console.error(output.split("\n").slice(-30).join("\n"));
    }
    rows.push({ bug: name, caught: caughtBy !== undefined, runs, by: caughtBy?.slice(0, MAX_SHOWN) });
    console.error(`  ${caughtBy === undefined ? "NOT CAUGHT" : `caught: ${caughtBy}`}`);
  }
  console.table(rows);
  const missed = rows.filter(({ caught }) => !caught).length;
  console.log(
    missed === 0 ? `All ${rows.length} bugs were caught` : `${missed} of ${rows.length} bugs were NOT caught`,
  );
  return missed === 0 ? 0 : 1;
}

async function edited(
  root: string,
  { file, from, to }: Plant["edits"][number],
): Promise<{ path: string; text: string }> {
  const path = join(root, file);
  const parts = (await readFile(path, "utf8")).split(from);
  if (parts.length !== 2) {
    throw new Error(
      `Cannot plant a bug as ${file} must have these lines once, and has them ${parts.length - 1} times: ${from}`,
    );
  }
  return { path, text: parts.join(to) };
}

async function runPlanted({ edits, only, apart, settings, seconds = SECONDS }: Plant, seed: number) {
  const copy = mkdtempSync(join(tmpdir(), "pointservice-sabotage-"));
  try {
    cpSync(ROOT, copy, {
      recursive: true,
      filter: (path) => !/\/(node_modules|\.services|\.git)$/.test(path),
    });
    symlinkSync(join(ROOT, "node_modules"), join(copy, "node_modules"));
    for (const edit of edits) {
      const { path, text } = await edited(copy, edit);
      await writeFile(path, text);
    }
    const args = [
      "test/faults.ts",
      "--seconds",
      String(seconds),
      "--seed",
      String(seed),
      "--only",
      only.join(","),
    ];
    return await runCommand([process.execPath, ...args, ...(apart ? ["--apart"] : [])], {
      cwd: copy,
      env: { ...process.env, ...settings },
      signal: AbortSignal.timeout(RUN_MS),
      // It has servers to stop.
      abortWith: "SIGINT",
    });
  } finally {
    rmSync(copy, { recursive: true, force: true });
  }
}
