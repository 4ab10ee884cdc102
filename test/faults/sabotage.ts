import { cpSync, mkdtempSync, rmSync, symlinkSync } from "node:fs";
import { readFile, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { lastLines, runCommand } from "../../lib/dev/processes.ts";

const ROOT = join(import.meta.dir, "../..");

/** A bug that somebody might write, and the faults in which it shows. */
interface Plant {
  only: string[];
  apart?: boolean;
  settings?: Record<string, string>;
  seconds?: number;
  /** What each file has exactly once, and what it gets instead; `$&` stands for the former. */
  edits: [file: string, from: string, to: string][];
}

const WORKER = "worker.ts";
const DATABASE = "lib/database.ts";
const SESSION = "lib/database_session.ts";
const SCANS = "lib/reservations/scan_repository.ts";
const SWEEPS = "lib/reservations/sweep.ts";
const TURNS = "lib/accounting/turn_repository.ts";
const CLAIMS = "lib/reservations/claim_repository.ts";
const RESERVATIONS = "lib/reservations/reservation_repository.ts";
const LEDGER = "lib/points/ledger_repository.ts";

const HOST_NOW = `.replaceAll("now(3)", () => JSON.stringify(new Date()).replace("Z", ""))`;
const MARK_DONE = "where id in (?) and status = 'PROCESSING'`";
const COMMIT_AND_BEGIN = `await transaction.execute("commit"); await transaction.execute("begin");`;

/** The bugs, by their names. */
export const PLANTS: Record<string, Plant> = {
  "ack before commit": {
    only: ["kill-worker"],
    apart: true,
    // Only the end of the lease brings again what a dead worker has acknowledged.
    settings: { LEASE_MS: "9000", WORKER_BATCH: "1", PUBLISH_CHUNK: "1" },
    seconds: 60,
    edits: [
      [
        WORKER,
        `return message ? grantCoalesced(message) : "dead";`,
        `if (message) grantCoalesced(message).catch(() => undefined);
          return message ? "ack" : "dead";`,
      ],
    ],
  },
  "ledger and balance in two transactions": {
    only: ["mysql-cut-at-commit", "kill-worker"],
    edits: [[LEDGER, "  await insertLedgerEntries(transaction, entries);", `$& ${COMMIT_AND_BEGIN}`]],
  },
  "amount taken from the message": {
    only: ["messages-forge"],
    edits: [
      [WORKER, "export interface GrantOptions {", "const AMOUNTS = new Map(); $&"],
      [
        WORKER,
        "const ids =",
        "for (const m of messages.flat()) AMOUNTS.set(m.reservation_id, m.point_amount ?? AMOUNTS.get(m.reservation_id)); $&",
      ],
      [WORKER, "const refused = refuse(row);", "$& row.pointAmount = AMOUNTS.get(row.id);"],
    ],
  },
  "no lease": {
    only: ["queue-purge", "messages-delay", "kill-scheduler"],
    edits: [[SCANS, "scan_at = now(3) + interval ? microsecond", "$& + interval 1 day"]],
  },
  "publish without confirm": {
    only: ["amqp-hang-at-publish"],
    edits: [
      [
        "lib/queue.ts",
        "resolve(!error && !returned.has(messageId));\n      });",
        "if (error) returned.delete(messageId);\n      });\n      resolve(true);",
      ],
    ],
  },
  "back to PENDING after a failed publish": {
    only: ["amqp-hang-at-publish", "amqp-cut"],
    edits: [
      [
        "scheduler.ts",
        "    const confirmed = await queue.publish(messages);",
        `$&
    if (confirmed < messages.length) {
      const sql = "update point_reservations set status = 'PENDING', scan_at = execute_at where id in (?) and status = 'PROCESSING'";
      await database.run((connection) => connection.execute(sql, [claimed.map(({ id }) => id)]));
    }`,
      ],
    ],
  },
  "cancel by read then write": {
    only: ["mysql-slow"],
    edits: [
      [
        RESERVATIONS,
        `.for("update", { skipLocked: true });\n  if (row) return row;`,
        ";\n  if (row) return row;",
      ],
      [RESERVATIONS, "id = ? and status in (?)", `id = ? and ('\${name}' like 'cancel%' or status in (?))`],
    ],
  },
  "no lock and no status in the claim": {
    only: ["mysql-slow"],
    edits: [
      [SCANS, "order by scan_at, id limit ? for update skip locked`", "order by scan_at, id limit ?`"],
      [SCANS, "where id in (?) and status in ('PENDING', 'PROCESSING')`", "where id in (?)`"],
    ],
  },
  "the host's clock instead of the database's": {
    only: ["clock-ahead"],
    edits: [
      [SCANS, "(CLAIM_DUE,", `(CLAIM_DUE${HOST_NOW},`],
      [SCANS, "(FIND_NEXT_SCAN,", `(FIND_NEXT_SCAN${HOST_NOW},`],
      [CLAIMS, "(LOCK_RESERVATIONS,", `(LOCK_RESERVATIONS${HOST_NOW},`],
      [CLAIMS, "(LOCK_FREE,", `(LOCK_FREE${HOST_NOW},`],
    ],
  },
  "keys without regard to case": {
    only: ["kill-api"],
    edits: [
      [
        "sql/0001_points.sql",
        "idempotency_key varchar(100) character set ascii collate ascii_bin not null,\n  campaign",
        "idempotency_key varchar(100) character set ascii collate ascii_general_ci not null,\n  campaign",
      ],
    ],
  },
  "a retry that does not start at BEGIN": {
    only: ["deadlock"],
    edits: [
      [
        DATABASE,
        "execute: async (sql, values) => (await promised.query<ResultSetHeader>(sql, values))[0],",
        `execute: async (sql, values) => {
      const send = () => promised.query<ResultSetHeader>(sql, values);
      return (await send().catch((error) => (error.errno === 1213 ? send() : Promise.reject(error))))[0];
    },`,
      ],
    ],
  },
  "balance by read then modify then write": {
    only: ["mysql-slow"],
    edits: [
      [
        LEDGER,
        "  if (sums.length === 0) return;",
        `$&
  const read = "select user_id id, point_num points from point_root where user_id in (?)";
  const before = await transaction.select(read, [sums.map(([userId]) => userId)]);
  for (const sum of sums) sum[1] += Number(before.find(({ id }) => id === sum[0])?.points ?? 0);`,
      ],
      [LEDGER, "point_num = point_num + values(point_num)", "point_num = values(point_num)"],
    ],
  },
  "a grant of what is not claimed": {
    only: ["messages-forge"],
    edits: [
      [WORKER, `row.status === "PENDING" ? "not_due"`, `row.status === "PENDING" ? undefined`],
      [CLAIMS, MARK_DONE, "where id in (?) and status in ('PENDING', 'PROCESSING')`"],
    ],
  },
  "a grant of what was cancelled": {
    only: ["messages-duplicate"],
    edits: [
      [WORKER, `if (row.status === "PROCESSING")`, `if (["PROCESSING", "CANCELLED"].includes(row.status))`],
      [CLAIMS, MARK_DONE, "where id in (?) and status in ('CANCELLED', 'PROCESSING')`"],
    ],
  },
  "a replay that gets an id of its own": {
    only: ["kill-api"],
    edits: [[RESERVATIONS, `kind: "replayed", reservation: first }`, `kind: "replayed", reservation }`]],
  },
  "times in the process's own zone": {
    only: ["time-zone"],
    edits: [[SESSION, `timezone: "Z"`, `timezone: "local"`]],
  },
  "an atomic bulk without a transaction": {
    only: ["kill-at-statement", "kill-api"],
    seconds: 60,
    edits: [
      [RESERVATIONS, "database.transaction(create,", "database.run(create,"],
      [RESERVATIONS, "const INSERT_ROWS = 1_000;", "const INSERT_ROWS = 1;"],
    ],
  },
  "a direct change without its key": {
    only: ["mysql-cut-at-commit"],
    edits: [
      [
        "lib/points/change_repository.ts",
        "const first = known.get(idempotencyKey);",
        "change.idempotencyKey = crypto.randomUUID(); const first = known.get(change.idempotencyKey);",
      ],
    ],
  },
  "an outage that counts as an attempt": {
    only: ["kill-mysql"],
    seconds: 60,
    edits: [
      [WORKER, " || error.isOutage) throw error;\n    // One row", ") throw error;\n    // One row"],
      [WORKER, " || error.isOutage) throw error;\n    const", ") throw error;\n    const"],
      [WORKER, "if (attempts >= maxAttempts)", "if (attempts >= 1)"],
    ],
  },
  "a worker that dies of garbage": {
    only: ["messages-garbage"],
    edits: [[WORKER, `dead letter");\n    return undefined;`, `dead letter");\n    process.exit(1);`]],
  },
  "a setting that is inherited from the server": {
    only: ["worst-settings"],
    edits: [[SESSION, "autocommit = 1, completion_type = 0", "autocommit = 1"]],
  },
  "a scan that does not look behind its position": {
    only: ["reservations-locked"],
    edits: [[SWEEPS, "(await claimFrom(oldest))", "false"]],
  },
  "a lease that a clock ahead has set": {
    only: ["database-clock-ahead", "queue-purge"],
    edits: [[SWEEPS, "await releaseSetAside(database, { leaseMs, wasAheadMs })", "0"]],
  },
  "locked rows that wait for their lease": {
    only: ["balances-locked"],
    apart: true,
    edits: [[WORKER, "options.room?.put(heldId, id) ?? 0", "Number(heldId === id)"]],
  },
  "the turn of the accounting by MySQL's clock": {
    only: ["database-clock-ahead"],
    edits: [
      [
        TURNS,
        "runs, is_wanted isWanted",
        "runs, is_wanted isWanted, timestampdiff(second, finished_at, now(3)) ago",
      ],
      [TURNS, "nowMs - finished.sinceMs >= intervalMs", "Number(row.ago ?? 1e9) * 1_000 >= intervalMs"],
    ],
  },
};

const SECONDS = 25;
/** The plans of faults that are tried one after the other until one shows the bug. */
const SEEDS = [1, 2, 3];
const RUN_MS = 300_000;
const MAX_SHOWN = 100;
/** In the output of a run that found what must not be. */
const VIOLATED = /^VIOLATED: (.*)$/m;

/**
 * Plants each bug in a copy of the tree, and runs the faults there: each must be caught. Resolves to the exit code.
 *
 * @throws {Error} if the code that one of them edits has changed
 */
export async function sabotage(names: readonly string[]): Promise<number> {
  // Before the first one takes its minute: whether the last one can be planted.
  for (const name of names) for (const edit of plantOf(name).edits) await edited(ROOT, edit);
  const rows: { bug: string; caught: boolean; runs: number; by: string | undefined }[] = [];
  for (const bug of names) {
    console.error(`planting: ${bug}`);
    let by: string | undefined;
    let runs = 0;
    while (by === undefined && runs < SEEDS.length) {
      const { code, output } = await runPlanted(plantOf(bug), SEEDS[runs++]);
      if (code === 1) by = VIOLATED.exec(output)?.[1];
      if (by === undefined) console.error(lastLines(output));
    }
    rows.push({ bug, caught: by !== undefined, runs, by: by?.slice(0, MAX_SHOWN) });
    console.error(`  ${by === undefined ? "NOT CAUGHT" : `caught: ${by}`}`);
  }
  console.table(rows);
  const missed = rows.filter(({ caught }) => !caught).length;
  console.log(
    `${rows.length - missed} of ${rows.length} bugs were caught${missed > 0 ? `, ${missed} were NOT` : ""}`,
  );
  return missed === 0 ? 0 : 1;
}

function plantOf(name: string): Plant {
  const plant = PLANTS[name];
  if (!plant) throw new Error(`Unknown bug: ${name}`);
  return plant;
}

/** The text of a file of a tree with the bug in it. */
async function edited(root: string, [file, from, to]: Plant["edits"][number]) {
  const path = join(root, file);
  const text = await readFile(path, "utf8");
  const found = text.split(from).length - 1;
  if (found === 1) return { path, text: text.replace(from, to) };
  throw new Error(`Cannot plant a bug as ${file} must have this once, and has it ${found} times: ${from}`);
}

async function runPlanted({ only, apart, settings, seconds = SECONDS, edits }: Plant, seed = 0) {
  const copy = mkdtempSync(join(tmpdir(), "pointservice-sabotage-"));
  try {
    const isCopied = (path: string) => !/\/(node_modules|\.services|\.git)$/.test(path);
    cpSync(ROOT, copy, { recursive: true, filter: isCopied });
    symlinkSync(join(ROOT, "node_modules"), join(copy, "node_modules"));
    for (const edit of edits) {
      const { path, text } = await edited(copy, edit);
      await writeFile(path, text);
    }
    const args = ["--seconds", String(seconds), "--seed", String(seed), "--only", only.join(",")];
    return await runCommand(
      [process.execPath, "test/faults/faults.ts", ...args, ...(apart ? ["--apart"] : [])],
      {
        cwd: copy,
        env: { ...process.env, ...settings },
        signal: AbortSignal.timeout(RUN_MS),
        // It has servers to stop.
        abortWith: "SIGINT",
      },
    );
  } finally {
    rmSync(copy, { recursive: true, force: true });
  }
}
