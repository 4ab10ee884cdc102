import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { freePorts } from "../../lib/dev/servers.ts";
import { openAdmin } from "../harness/admin.ts";
import { runCommand } from "../harness/command.ts";
import { startFront } from "../harness/front.ts";
import { until } from "../harness/harness.ts";
import {
  expectAllDoneOnce,
  openPipeline,
  type Pipeline,
  requestsOf,
  reserveAll,
  untilDone,
} from "../harness/pipeline.ts";
import { type Entry, type RunningService, untilReady } from "../harness/processes.ts";
import { canRestart, openRestartable } from "../harness/restartable.ts";

// Outages that are not the end of a connection: MySQL, or a proxy before it, answers, and refuses. The servers are private.

setDefaultTimeout(180_000);

if (!canRestart) console.warn("NOT TESTED: outages of MySQL, as no server may be changed here");

/** The pipeline's account, and the proxy that its processes connect through. */
interface Scene {
  account: string;
  front: Awaited<ReturnType<typeof startFront>>;
}

interface Outage {
  what: string;
  begin(scene: Scene): Promise<void>;
  end(scene: Scene): Promise<void>;
  /** What the log says: of work, or of a process without work that is not ready. */
  why: RegExp;
  isPossible?: boolean;
}

describe.skipIf(!canRestart)("in an outage of MySQL", async () => {
  const servers = canRestart ? await openRestartable() : undefined;
  if (!servers) return;
  const { databaseUrl, amqpUrl } = servers;
  const admin = await openAdmin(databaseUrl);
  afterAll(async () => {
    await admin[Symbol.asyncDispose]();
    await servers[Symbol.asyncDispose]();
  });

  /** Ends all sessions of an account. */
  async function killSessions(account: string): Promise<void> {
    const user = account.split("'")[1];
    const sessions = await admin.query<{ id: number }>(
      "select id from information_schema.processlist where user = ?",
      [user],
    );
    // It may have ended meanwhile.
    for (const { id } of sessions) await admin.query(`kill ${id}`).catch(() => undefined);
  }

  async function alter(account: string, how: string): Promise<void> {
    await admin.query(`alter user ${account} ${how}`);
    await killSessions(account);
  }

  const OUTAGES: Outage[] = [
    {
      what: "the account is locked",
      begin: ({ account }) => alter(account, "account lock"),
      end: ({ account }) => alter(account, "account unlock"),
      why: /MySQL has locked the account|\b(3118|4151)\b/,
    },
    {
      what: "the password has expired",
      begin: ({ account }) => alter(account, "password expire"),
      end: ({ account }) => alter(account, "identified by 'plain'"),
      why: /the password for MySQL has expired|\b(1820|1862)\b/,
    },
    {
      what: "the account has reached a limit",
      begin: ({ account }) => alter(account, "with max_queries_per_hour 1"),
      end: ({ account }) => alter(account, "with max_queries_per_hour 0"),
      why: /the account has reached a limit of MySQL|\b1226\b/,
    },
    {
      what: "the server is offline",
      begin: () => admin.setGlobal("offline_mode", 1),
      end: admin.restore,
      why: /MySQL is offline|\b3032\b/,
      isPossible: !admin.isMariaDb,
    },
    {
      what: "the server is read-only",
      begin: () => admin.setGlobal("read_only", 1),
      end: admin.restore,
      why: /read-only/,
    },
    {
      what: "the proxy has no MySQL: 9001",
      async begin({ front }) {
        front.refuse({ errno: 9001, text: "Max connect timeout reached while reaching hostgroup 0" });
      },
      async end({ front }) {
        front.refuse();
      },
      why: /the proxy has no MySQL|error 9001: Max connect timeout/,
    },
    {
      what: "the proxy has no MySQL: a number that nobody knows",
      async begin({ front }) {
        front.refuse({ errno: 31_234, text: "Nobody knows" });
      },
      async end({ front }) {
        front.refuse();
      },
      why: /MySQL failed with error 31234/,
    },
  ];

  /** What a client gets that reserves now. */
  async function reserve({ url }: { url: string }) {
    const [request] = requestsOf(1, { spreadMs: 0 });
    const init = { headers: { "content-type": "application/json" }, body: JSON.stringify(request) };
    const response = await fetch(`${url}/point/reserve`, { method: "POST", ...init });
    return { status: response.status, retryAfter: response.headers.get("retry-after") };
  }

  async function expectEverythingGranted({ test }: Pipeline, granted: number): Promise<void> {
    await untilDone(test, { count: granted });
    await expectAllDoneOnce(test, granted);
    expect(await test.query("select 1 from point_reservations where attempts > 0")).toEqual([]);
  }

  test.each(
    OUTAGES.filter(({ isPossible = true }) => isPossible).map((outage) => [outage.what, outage] as const),
  )(
    "%s: 503, processes wait and say why, new ones too, commands exit 3; then all is granted, no attempt is counted (faults 44, 45)",
    async (_, outage) => {
      await using pipeline = await openPipeline({ databaseUrl, amqpUrl });
      const { account, url: plainUrl } = await admin.createAccount(pipeline.test);
      await using front = await startFront(plainUrl);
      const scene = { account, front };
      const env = { DATABASE_URL: front.url };
      const start = (entry: Entry) => pipeline.start(entry, env);
      /** Starts a process that serves its port at once, but says so only when it serves requests. */
      async function startLate(entry: Entry): Promise<RunningService> {
        const [port] = await freePorts(1);
        const name = { api: "PORT", scheduler: "SCHEDULER_PORT", worker: "WORKER_PORT" }[entry];
        const service = await pipeline.start(entry, { ...env, [name]: String(port) }, { waitForPort: false });
        service.url = `http://127.0.0.1:${port}`;
        await until("it serves its port", () => fetch(`${service.url}/health`).catch(() => false));
        return service;
      }
      const first = [await start("api"), await start("scheduler"), await start("worker")] as const;
      const [api] = first;
      await untilReady(...first);
      // Some are due before the outage, some in it.
      await reserveAll(api.url, { requests: requestsOf(200, { spreadMs: 3_000 }) });

      await outage.begin(scene);
      try {
        await until("a request is refused", async () => (await reserve(api)).status === 503);
        const started = [
          await startLate("api"),
          await startLate("scheduler"),
          await startLate("worker"),
        ] as const;
        for (const service of [...first, ...started]) {
          await until(
            () => `it says why: ${JSON.stringify(service.log().slice(-3))}`,
            () => service.log().some((line) => outage.why.test(JSON.stringify(line))),
          );
          await until("not ready", async () => (await fetch(`${service.url}/ready`)).status === 503);
        }
        expect(await reserve(api)).toEqual({ status: 503, retryAfter: expect.any(String) });
        expect(await reserve(started[0])).toEqual({ status: 503, retryAfter: expect.any(String) });
        const commands = [["reconcile", "--full"], ["aggregate"], ["totals"], ["migrate", "--check"]];
        for (const [name = "", ...args] of commands) {
          const { code, stderr } = await runCommand(name, { args, env });
          expect([name, code, stderr]).toEqual([name, 3, expect.stringMatching(/^Cannot .*MySQL/)]);
        }
      } finally {
        await outage.end(scene);
      }

      await untilReady(...pipeline.services.map(({ service }) => service));
      await reserveAll(api.url, { requests: requestsOf(20, { spreadMs: 0 }) });
      const [all] = await pipeline.test.query<{ count: number }>(
        "select count(*) count from point_reservations",
      );
      await expectEverythingGranted(pipeline, all?.count ?? 0);
      expect(all?.count).toBeGreaterThanOrEqual(220);
      expect(await pipeline.countDead()).toBe(0);
      // Nobody was ended by it, and everybody says that it is over.
      for (const { service } of pipeline.services) {
        expect(service.log().filter(({ level }) => level === "fatal")).toEqual([]);
      }
    },
  );

  test("whose sessions are killed, again and again, no attempt is counted, and all is granted (fault 45)", async () => {
    await using pipeline = await openPipeline({ databaseUrl, amqpUrl });
    const { account, url } = await admin.createAccount(pipeline.test);
    const start = (entry: Entry) => pipeline.start(entry, { DATABASE_URL: url });
    const services = [await start("api"), await start("scheduler"), await start("worker")] as const;
    await untilReady(...services);
    const stop = new AbortController();
    async function killAll() {
      while (!stop.signal.aborted) await killSessions(account);
    }
    const killing = killAll();
    const requests = requestsOf(500, { spreadMs: 2_000 });
    const reserved = reserveAll(services[0].url, { requests, concurrency: 10 });
    await until("each has lost its session", () =>
      services.every(({ log }) => log().some(({ msg }) => msg === "retrying transaction")),
    );
    stop.abort();
    await killing;
    await reserved;
    await expectEverythingGranted(pipeline, 500);
  });
});
