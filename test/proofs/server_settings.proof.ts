import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { openDatabase } from "../../lib/database.ts";
import { openAdmin } from "../harness/admin.ts";
import { runCommand } from "../harness/command.ts";
import { createTestDatabase } from "../harness/database.ts";
import { until } from "../harness/harness.ts";
import {
  countStatuses,
  expectAgreement,
  openPipeline,
  requestsOf,
  reserveAll,
  untilDone,
} from "../harness/pipeline.ts";
import {
  type Entry,
  type RunningService,
  type StartOptions,
  untilLogged,
  untilReady,
} from "../harness/processes.ts";
import { canRestart, openRestartable } from "../harness/restartable.ts";

// Settings of MySQL that break a promise, or that change what a statement means. The servers are private: nobody else may see
// such settings.

setDefaultTimeout(180_000);

if (!canRestart) console.warn("NOT TESTED: settings of the server, as no server may be changed here");

type Value = string | number;
/** A variable, its worst value, and the variable of the session that must not follow it, if that is another one. */
type Worst = [variable: string, value: Value, session?: string];

const WORST: Worst[] = [
  ["completion_type", "CHAIN"],
  ["autocommit", 0],
  ["sql_select_limit", 5],
  ["max_join_size", 1, "sql_big_selects"],
  ["sql_mode", ""],
  ["time_zone", "+09:00"],
  ["sql_safe_updates", 1],
  ["sql_auto_is_null", 1],
  ["unique_checks", 0],
  ["foreign_key_checks", 0],
  ["max_sort_length", 64],
  ["div_precision_increment", 0],
  ["innodb_lock_wait_timeout", 100_000],
  ["lock_wait_timeout", 1],
  ["wait_timeout", 2],
  ["net_read_timeout", 1],
  ["net_write_timeout", 1],
  ["collation_connection", "latin1_german1_ci"],
  ["init_connect", "set names latin1, autocommit = 0, completion_type = 1", "character_set_client"],
];

const WORST_OF_MYSQL: Worst[] = [
  ["transaction_isolation", "SERIALIZABLE"],
  ["transaction_read_only", 1],
  ["max_execution_time", 1],
  ["range_optimizer_max_mem_size", 1],
];

const WORST_OF_MARIADB: Worst[] = [
  ["tx_isolation", "SERIALIZABLE"],
  ["tx_read_only", 1],
  ["max_statement_time", 0.001],
  ["idle_transaction_timeout", 1],
  ["idle_write_transaction_timeout", 1],
  ["idle_readonly_transaction_timeout", 1],
  ["check_constraint_checks", 0],
  ["in_predicate_conversion_threshold", 2],
  ["optimizer_max_sel_arg_weight", 1],
  ["max_session_mem_used", 1_000_000],
  ["tmp_disk_table_size", 1_024],
  ["old_mode", "IGNORE_INDEX_ONLY_FOR_JOIN,ZERO_DATE_TIME_CAST"],
  ["sql_if_exists", 1],
  ["alter_algorithm", "INSTANT"],
];

/** What no session sets: the worst value makes statements slower, but they mean the same. */
const HARMLESS: [variable: string, value: Value][] = [
  [
    "optimizer_switch",
    "mrr=on,mrr_cost_based=off,index_condition_pushdown=off,index_merge=off,materialization=off,semijoin=off,derived_merge=off",
  ],
  ["sort_buffer_size", 32_768],
  ["join_buffer_size", 128],
  ["read_rnd_buffer_size", 8_192],
  ["tmp_table_size", 1_024],
  ["max_heap_table_size", 16_384],
  ["big_tables", 1],
  ["sql_buffer_result", 1],
  ["eq_range_index_dive_limit", 1],
  ["group_concat_max_len", 4],
  ["default_week_format", 7],
  ["lc_time_names", "ja_JP"],
  ["lc_messages", "de_DE"],
  ["max_error_count", 0],
  ["auto_increment_increment", 7],
  ["low_priority_updates", 1],
  ["session_track_schema", 1],
  ["session_track_state_change", 1],
  ["session_track_system_variables", "*"],
  ["session_track_transaction_info", "CHARACTERISTICS"],
  ["innodb_rollback_on_timeout", 1],
  // No session may have more than this.
  ["parser_max_mem_size", 10_000_000],
];

describe.skipIf(!canRestart)("the settings of the server", async () => {
  const servers = canRestart ? await openRestartable() : undefined;
  if (!servers) return;
  const { databaseUrl, amqpUrl } = servers;
  const admin = await openAdmin(databaseUrl);
  const { drop, ...db } = await createTestDatabase({ server: databaseUrl });
  const { url } = await admin.createAccount(db);
  afterAll(async () => {
    await drop();
    await admin[Symbol.asyncDispose]();
    await servers[Symbol.asyncDispose]();
  });
  const worst = [...WORST, ...(admin.isMariaDb ? WORST_OF_MARIADB : WORST_OF_MYSQL)];

  /** Opens a pipeline whose processes have an ordinary account, and starts them. */
  async function openPlain(env: Record<string, string> = {}) {
    const pipeline = await openPipeline({ databaseUrl, amqpUrl });
    const { url } = await admin.createAccount(pipeline.test);
    const start = (entry: Entry, options?: StartOptions) =>
      pipeline.start(entry, { DATABASE_URL: url, ...env }, options);
    return { ...pipeline, url, start };
  }

  test.each(worst)(
    "%s = %p does not reach a session (fault 38)",
    async (variable, value, session = variable) => {
      await using _ = { [Symbol.asyncDispose]: admin.restore };
      const read = async () => {
        const database = openDatabase(url, { connections: 1 });
        const sql = `select @@session.${session} value`;
        const rows = await database
          .run(({ select }) => select<{ value: Value }>(sql))
          .finally(() => database.close());
        return rows[0]?.value;
      };
      const before = await read();
      await admin.setGlobal(variable, value);
      const [now] = await admin.query<{ value: Value }>(`select @@global.${variable} value`);
      if (session === variable) expect(now?.value).not.toEqual(before);
      expect(await read()).toEqual(before);
    },
  );

  test("at its worst all at once, the whole pipeline keeps its promises, and every command works (faults 38, 39)", async () => {
    await using pipeline = await openPlain({ DATABASE_CONNECTIONS: "1" });
    const fresh = await createTestDatabase({ server: databaseUrl, migrated: false });
    await using _ = {
      async [Symbol.asyncDispose]() {
        await admin.restore();
        await fresh.drop();
      },
    };
    for (const [variable, value] of worst) await admin.setGlobal(variable, value);
    for (const [variable, value] of HARMLESS) {
      // A server does not have all of them, or only from its start.
      await admin.setGlobal(variable, value).catch((error) => expect([1193, 1238]).toContain(error.errno));
    }
    const api = await pipeline.start("api");
    const others = [await pipeline.start("scheduler"), await pipeline.start("worker")];
    await untilReady(api, ...others);

    async function send(method: string, path: string, body: unknown, status: number) {
      const init = { method, headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
      const response = await fetch(`${api.url}${path}`, init);
      expect([response.status, await response.text()]).toEqual([status, expect.any(String)]);
    }
    // In turns on one connection: what follows a COMMIT must not be in a transaction of its own.
    for (const request of requestsOf(20, { spreadMs: 1_000 })) {
      const { user_id } = request;
      await send("PUT", "/point/add", { user_id, point_num: 10 }, 200);
      await send("POST", "/point/reserve", request, 201);
      await send("PUT", "/point/sub", { user_id, point_num: 3 }, 200);
    }
    const [reservations, later] = [requestsOf(10_000, { spreadMs: 0 }), requestsOf(40, { spreadMs: 2_000 })];
    await send("POST", "/point/reserve/bulk", { mode: "each", reservations }, 200);
    await reserveAll(api.url, { requests: later, concurrency: 5 });

    await untilDone(pipeline.test, { count: 10_060, withinMs: 60_000 });
    expect(await countStatuses(pipeline.test)).toEqual({ DONE: 10_060 });
    await expectAgreement(pipeline.test);
    expect(await pipeline.countDead()).toBe(0);
    const attempts = await pipeline.test.query("select 1 from point_reservations where attempts > 0");
    expect(attempts).toEqual([]);

    const env = { DATABASE_URL: pipeline.url };
    for (const [name, ...args] of [
      ["aggregate"],
      ["totals"],
      ["reconcile", "--full"],
      ["migrate", "--check"],
    ]) {
      expect(await runCommand(name ?? "", { args, env })).toMatchObject({ code: 0, stderr: "" });
    }
    const [total] = await pipeline.test.query("select sum(entries) entries from point_daily_totals");
    expect(Number((total as { entries: string }).entries)).toBe(10_100);
    // Also from nothing, by an operator's account.
    expect(await runCommand("migrate", { env: { DATABASE_URL: fresh.url } })).toMatchObject({
      code: 0,
      stderr: "",
    });
    for (const { log } of [api, ...others]) {
      // With one connection, a bulk keeps the readiness check waiting.
      const lines = log().filter(({ msg }) => msg !== "not ready");
      expect(lines.filter(({ level }) => level === "warn" || level === "error")).toEqual([]);
    }
  });

  /** Waits until an API that gets requests all the time refuses them, with this message in its log. */
  async function untilRefused(api: RunningService, message: RegExp): Promise<void> {
    await until("a request is refused", async () => {
      const response = await fetch(`${api.url}/users/User1/points`);
      expect([200, 404, 503]).toContain(response.status);
      return response.status === 503 && response.headers.get("retry-after") !== null;
    });
    await until("the log says why", () => api.log().find((line) => message.test(JSON.stringify(line))));
  }

  const LOSSY = /may lose commits: innodb_flush_log_at_trx_commit must be 1: it is 2/;
  const SETTINGS: [string, string, Value, RegExp, boolean][] = [
    ["that loses commits", "innodb_flush_log_at_trx_commit", 2, LOSSY, true],
    [
      "that loses commits of its binary log",
      "sync_binlog",
      0,
      /sync_binlog must be 1: it is 0/,
      admin.hasBinaryLog,
    ],
    [
      "that refuses every write",
      "binlog_format",
      "STATEMENT",
      /binlog_format must be ROW or MIXED/,
      admin.hasBinaryLog,
    ],
    [
      "that refuses large statements",
      "max_allowed_packet",
      1_048_576,
      /at least 4194304: it is 1048576/,
      true,
    ],
  ];

  for (const [what, variable, value, message, isPossible] of SETTINGS) {
    test.skipIf(!isPossible)(
      `a setting ${what} (${variable} = ${value}), made at run time, is noticed within seconds, and when it is put back (fault 49)`,
      async () => {
        await using pipeline = await openPlain();
        await using _ = { [Symbol.asyncDispose]: admin.restore };
        const api = await pipeline.start("api");
        const others = [await pipeline.start("scheduler"), await pipeline.start("worker")];
        await untilReady(api, ...others);
        await admin.setGlobal(variable, value);
        await untilRefused(api, message);
        for (const { url } of [api, ...others]) {
          await until("not ready", async () => (await fetch(`${url}/ready`)).status === 503);
        }
        await admin.restore();
        await untilReady(api, ...others);
        await reserveAll(api.url, { requests: requestsOf(20, { spreadMs: 0 }) });
        await untilDone(pipeline.test, { count: 20 });
      },
    );

    test.skipIf(!isPossible)(
      `no process starts on a MySQL ${what}: it exits 1, and says why in one line`,
      async () => {
        await using pipeline = await openPlain();
        await using _ = { [Symbol.asyncDispose]: admin.restore };
        await admin.setGlobal(variable, value);
        for (const entry of ["api", "scheduler", "worker"] as const) {
          const service = await pipeline.start(entry, { waitForPort: false });
          expect(await service.exited).toBe(1);
          const complaints = service.log().filter(({ level }) => level !== "info");
          expect(complaints).toEqual([
            expect.objectContaining({ level: "fatal", msg: expect.stringMatching(message) }),
          ]);
        }
      },
    );
  }

  test("ALLOW_LOSSY_DATABASE lets processes run on a MySQL that may lose commits", async () => {
    await using pipeline = await openPlain({ ALLOW_LOSSY_DATABASE: "true" });
    await using _ = { [Symbol.asyncDispose]: admin.restore };
    await admin.setGlobal("innodb_flush_log_at_trx_commit", 2);
    const services = [
      await pipeline.start("api"),
      await pipeline.start("scheduler"),
      await pipeline.start("worker"),
    ];
    await untilReady(...services);
    for (const service of services) await untilLogged(service, "ready");
  });
});
