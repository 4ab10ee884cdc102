import { afterEach, beforeEach, describe, expect, jest, setDefaultTimeout, test } from "bun:test";
import { closeSync, constants, openSync } from "node:fs";
import { pino } from "pino";
import type { Database } from "../../lib/database.ts";
import { DatabaseError } from "../../lib/database_errors.ts";
import { freePorts } from "../../lib/dev/servers.ts";
import { ExpectedError } from "../../lib/errors.ts";
import { API_TRIAL, GRANT_TRIAL, SCAN_TRIAL } from "../../lib/reservations/trial_queries.ts";
import { openReadiness } from "../../lib/service/readiness.ts";
import { openTrial } from "../../lib/service/trial.ts";
import { waitForDatabase } from "../../lib/service/wait_for_database.ts";
import { insertReservation } from "../harness/fixtures.ts";
import { until } from "../harness/harness.ts";
import { insertEntries } from "../harness/ledger.ts";
import { openPipeline, type Pipeline } from "../harness/pipeline.ts";
import { ENTRIES, type RunningService, untilReady } from "../harness/processes.ts";
import { beforeStatements } from "../harness/statements.ts";
import { temporaryFolder } from "../harness/temporary_folder.ts";
import { bodyOf, expectProblem, post } from "../http/client.ts";

setDefaultTimeout(60_000);

/** Waits until /ready is 503 with this reason. */
async function untilUnready({ url }: RunningService, reason: RegExp): Promise<void> {
  let seen = "nothing";
  async function isUnready() {
    const response = await fetch(`${url}/ready`);
    seen = await response.clone().text();
    if (response.status !== 503) return false;
    expect(response.headers.get("retry-after")).toBe("1");
    const { detail } = await expectProblem(response, 503, ["not ready"]);
    const [, since = "", what = ""] = /^Not ready since (\S+Z): (.*)$/.exec(String(detail)) ?? [];
    return reason.test(what) && !Number.isNaN(Date.parse(since));
  }
  await until(() => `/ready says ${reason}, but ${seen}`, isUnready);
}

/** What a process has logged of its readiness. */
function changesOf({ log }: RunningService) {
  return log().filter(({ msg }) => /\bready\b/.test(String(msg)));
}

function startAll(pipeline: Pipeline): Promise<RunningService[]> {
  return Promise.all(ENTRIES.map((entry) => pipeline.start(entry)));
}

describe("api.ts, scheduler.ts and worker.ts are not ready, and say why and since when in /ready and once in the log,", () => {
  test("while a table that they write has another name, or is locked (fault 46)", async () => {
    await using pipeline = await openPipeline();
    const services = await startAll(pipeline);
    await untilReady(...services);
    const { query, database } = pipeline.test;
    await query("rename table point_reservations to point_gone");
    for (const service of services) {
      await untilUnready(service, /^a table is missing, at a write to reservations$/);
    }
    await query("rename table point_gone to point_reservations");
    await untilReady(...services);
    await database.run(async ({ execute }) => {
      await execute("lock tables point_reservations write");
      for (const service of services) {
        await untilUnready(service, /^MySQL did not answer within 2000 ms, at a write to reservations$/);
      }
      await execute("unlock tables");
    });
    await untilReady(...services);
    for (const service of services) {
      expect(changesOf(service)).toMatchObject([
        { level: "info", msg: "ready" },
        {
          level: "warn",
          msg: "not ready",
          reason: expect.stringContaining("a table is missing"),
          since: expect.any(String),
        },
        { level: "info", msg: "ready again", notReadyMs: expect.any(Number) },
        { level: "warn", msg: "not ready", reason: expect.stringContaining("did not answer") },
        { level: "info", msg: "ready again" },
      ]);
    }
  });
});

describe("openReadiness()", () => {
  beforeEach(() => void jest.useFakeTimers());
  afterEach(() => void jest.useRealTimers());

  /** A readiness whose looks end as `failure` says, and what it logs. */
  async function openWatched() {
    const lines: Record<string, unknown>[] = [];
    const logger = pino({}, { write: (line: string) => lines.push(JSON.parse(line)) });
    const stop = new AbortController();
    const readiness = openReadiness({ logger, signal: stop.signal });
    const state: { failure?: string } = {};
    readiness.watch([
      async () => {
        if (state.failure) throw new ExpectedError(state.failure);
      },
    ]);
    /** Lets so many seconds pass, with a look in each. */
    async function pass(seconds: number) {
      for (let second = 0; second < seconds; second++) {
        jest.advanceTimersByTime(1_000);
        await new Promise<void>((resolve) => setImmediate(resolve));
      }
    }
    await pass(0.5);
    return { readiness, state, pass, stop, messages: () => lines.map(({ msg, reason }) => reason ?? msg) };
  }

  test("is ready until no look has succeeded for 4 s, and again at the next success", async () => {
    const { readiness, state, pass, messages } = await openWatched();
    expect([readiness.unready, messages()]).toEqual([undefined, ["ready"]]);
    state.failure = "away";
    await pass(3);
    expect(readiness.unready).toBeUndefined();
    await pass(1);
    expect(readiness.unready?.reason).toBe("away");
    const since = readiness.unready?.since;
    state.failure = "read-only";
    await pass(100);
    expect(readiness.unready).toEqual({ reason: "read-only", since: since as Date });
    delete state.failure;
    await pass(1);
    expect([readiness.unready, messages()]).toEqual([undefined, ["ready", "away", "ready again"]]);
    // A failure that passes is none.
    state.failure = "slow";
    await pass(2);
    delete state.failure;
    await pass(10);
    expect(messages()).toHaveLength(3);
  });

  test("is not ready from the first signal on", async () => {
    const { readiness, pass, stop } = await openWatched();
    stop.abort();
    expect(readiness.unready?.reason).toBe("The process is stopping");
    await pass(10);
    expect(readiness.unready?.reason).toBe("The process is stopping");
  });
});

describe("openTrial()", () => {
  test.each([
    ["API", API_TRIAL],
    ["scan", SCAN_TRIAL],
    ["grant", GRANT_TRIAL],
  ])("of the %s waits for no lock of a row, makes nobody wait, and leaves nothing", async (_, statements) => {
    await using pipeline = await openPipeline();
    const { database, query } = pipeline.test;
    const reservation = await insertReservation(pipeline.test);
    await insertEntries(pipeline.test, [{ ...reservation, reservation }]);
    await query("insert into point_root (user_id, point_num) values (?, 1)", [reservation.userId]);
    await database.transaction(async ({ select }) => {
      for (const table of ["point_reservations", "point_transactions", "point_root"]) {
        await select(`select * from ${table} for update`);
      }
      await openTrial(database, statements)();
    });
    const gate = Promise.withResolvers<void>();
    const atEnd = Promise.withResolvers<void>();
    const held = beforeStatements(database, async (sql) => {
      if (!sql.includes("try_commit")) return;
      atEnd.resolve();
      await gate.promise;
    });
    const trial = openTrial(held, statements)();
    await atEnd.promise;
    const next = await insertReservation(pipeline.test);
    await insertEntries(pipeline.test, [{ ...next, reservation: next }]);
    await query("update point_root set point_num = 2");
    await openTrial(database, statements)();
    gate.resolve();
    await trial;
    expect(await query("select id from point_trials")).toEqual([]);
  });

  test("that is late is the same at the next look, and not one more", async () => {
    await using pipeline = await openPipeline();
    let times = 0;
    const gate = Promise.withResolvers<void>();
    const slow: Database = {
      ...pipeline.test.database,
      async run(work, options) {
        times++;
        await gate.promise;
        return pipeline.test.database.run(work, options);
      },
    };
    const look = openTrial(slow, SCAN_TRIAL);
    await expect(look()).rejects.toThrow("MySQL did not answer within 2000 ms");
    const next = look();
    gate.resolve();
    await next;
    expect(times).toBe(1);
    await look();
    expect(times).toBe(2);
  });
});

describe("waitForDatabase()", () => {
  /** A check that ends with each of these errors, then passes; and what the wait for it logs. */
  function openFailing(errors: DatabaseError[]) {
    const lines: unknown[] = [];
    const logger = pino({}, { write: (line: string) => lines.push(JSON.parse(line)) });
    const left = errors.values();
    async function check() {
      const { value } = left.next();
      if (value) throw value;
    }
    return { check, lines, options: { logger, signal: new AbortController().signal } };
  }
  const [away, unsafe] = [new DatabaseError("unavailable", "away"), new DatabaseError("unsafe", "lossy")];

  test("logs the first failure, another one, and the end", async () => {
    const { check, lines, options } = openFailing([away, away, unsafe]);
    expect(await waitForDatabase(check, options)).toBe(true);
    expect(lines).toMatchObject([
      { msg: "waiting for MySQL", error: { message: "away" } },
      { msg: "waiting for MySQL", error: { message: "lossy" } },
      { msg: "MySQL answers again" },
    ]);
  });

  test("does not wait for a server with unsafe settings if it is to refuse it", async () => {
    const { check, options } = openFailing([away, unsafe]);
    await expect(waitForDatabase(check, { ...options, refuseUnsafe: true })).rejects.toBe(unsafe);
  });
});

describe("api.ts at SIGTERM", () => {
  test("serves for DRAIN_MS, also new connections, while /ready is 503; a second signal ends it", async () => {
    await using pipeline = await openPipeline();
    const api = await pipeline.start("api", { DRAIN_MS: "60000" });
    await untilReady(api);
    process.kill(api.pid, "SIGTERM");
    await untilUnready(api, /^The process is stopping$/);
    const init = post(bodyOf(), { connection: "close" });
    for (let times = 0; times < 3; times++) {
      expect((await fetch(`${api.url}/point/reserve`, init)).status).toBe(201);
    }
    expect(await api.kill("SIGTERM")).toBe(143);
    expect(changesOf(api)).toHaveLength(1);
  });

  test("exits 0 by itself after DRAIN_MS", async () => {
    await using pipeline = await openPipeline();
    const api = await pipeline.start("api", { DRAIN_MS: "300" });
    await untilReady(api);
    expect(await api.kill("SIGTERM")).toBe(0);
    const [stopping, stopped] = api.log().slice(-2);
    expect([stopping, stopped]).toMatchObject([{ msg: "stopping" }, { msg: "stopped" }]);
    expect(Date.parse(String(stopped?.time)) - Date.parse(String(stopping?.time))).toBeGreaterThanOrEqual(
      300,
    );
  });
});

test("api.ts serves on if nobody reads its log any more", async () => {
  await using pipeline = await openPipeline();
  await using folder = await temporaryFolder();
  const path = `${folder.path}/stdout`;
  Bun.spawnSync(["mkfifo", path]);
  const reader = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
  const stdout = openSync(path, "w");
  const [port] = await freePorts(1);
  const env = { PORT: String(port) };
  const api = await pipeline.start("api", env, { waitForPort: false, stdout });
  closeSync(stdout);
  closeSync(reader);
  api.url = `http://127.0.0.1:${port}`;
  await until("it is ready", async () => {
    const response = await fetch(`${api.url}/ready`).catch(() => undefined);
    return response?.status === 200;
  });
  expect((await fetch(`${api.url}/point/reserve`, post(bodyOf()))).status).toBe(201);
  expect(api.log()).toMatchObject([{ level: "error", msg: expect.stringContaining("EPIPE") }]);
  expect(await api.kill("SIGTERM")).toBe(0);
});
