import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { withLock } from "../../lib/dev/lock.ts";
import { until } from "../harness/harness.ts";
import { FIXTURE, fakeDocker, processesWith, SERVICES, startRun } from "../harness/services_run.ts";
import { temporaryFolder } from "../harness/temporary_folder.ts";

setDefaultTimeout(30_000);

/** Nobody listens there. */
const URLS = { DATABASE_URL: "mysql://a:b@192.0.2.1:1/x", AMQP_URL: "amqp://192.0.2.1:2" };

describe("acquireServices()", () => {
  test("takes the URLs that are given, and starts nothing", async () => {
    await using folder = await temporaryFolder();
    const PATH = fakeDocker(folder.path, `echo called >> ${folder.path}/docker-calls`);
    await using run = startRun([FIXTURE, "acquire", folder.path], { ...URLS, PATH });
    expect(await run.answer<unknown>()).toEqual({
      databaseUrl: URLS.DATABASE_URL,
      amqpUrl: URLS.AMQP_URL,
      origin: "DATABASE_URL and AMQP_URL",
    });
    expect(await run.end()).toBe(0);
    expect(readdirSync(folder.path)).toEqual(["bin"]);
  });

  test.each([
    ["DATABASE_URL", "AMQP_URL"],
    ["AMQP_URL", "DATABASE_URL"],
  ])("refuses %s without %s", async (set, missing) => {
    await using folder = await temporaryFolder();
    await using run = startRun([FIXTURE, "acquire", folder.path], { [set]: "mysql://192.0.2.1/x" });
    const { error } = await run.answer<{ error: string }>();
    expect(error).toStartWith(`${set} is set, but ${missing} is not`);
    expect(readdirSync(folder.path)).toEqual([]);
  });
});

test("findRunning() gives up a docker client that hangs, and leaves none of its processes", async () => {
  await using folder = await temporaryFolder();
  const PATH = fakeDocker(folder.path, `echo called >> ${folder.path}/docker-calls\nsleep 3600 &\nwait`);
  await using run = startRun([FIXTURE, "find", folder.path], { PATH });
  expect(await run.answer<unknown>()).toBeNull();
  expect(readdirSync(folder.path)).toContain("docker-calls");
  await run.process.exited;
  // The PATH with our folder marks the client and the `sleep` that it started.
  await until("none is left", () => processesWith(folder.path).length === 0);
});

describe("withLock()", () => {
  test("keeps others out, and is free once its holder was killed", async () => {
    await using folder = await temporaryFolder();
    const file = join(folder.path, "lock.sqlite");
    await using holder = startRun([FIXTURE, "lock", file]);
    expect(await holder.answer<string>()).toBe("held");
    const said: string[] = [];
    const options = { say: (line: string) => said.push(line), waiting: "somebody else" };
    const refused = withLock(file, async () => "got it", { ...options, deadlineMs: 500 });
    await expect(refused).rejects.toThrow(/more than \d s/);
    expect(said).toEqual(["somebody else"]);
    holder.process.kill("SIGKILL");
    expect(await withLock(file, async () => "got it", { ...options, deadlineMs: 20_000 })).toBe("got it");
  });

  test("keeps others in the same process out, and passes the result and the error on", async () => {
    await using folder = await temporaryFolder();
    const file = join(folder.path, "lock.sqlite");
    const options = { say: () => undefined, waiting: "" };
    let inside = 0;
    async function work(n: number) {
      expect(++inside).toBe(1);
      await Bun.sleep(20);
      inside--;
      return n;
    }
    const results = await Promise.all([1, 2, 3].map((n) => withLock(file, () => work(n), options)));
    expect(results).toEqual([1, 2, 3]);
    await expect(withLock(file, () => Promise.reject(new Error("no")), options)).rejects.toThrow("no");
    expect(await withLock(file, async () => "free", options)).toBe("free");
  });
});

describe("bun run services", () => {
  test("run gives a command both URLs, and ends with its exit code", async () => {
    const script = 'echo "[\\"$DATABASE_URL\\",\\"$AMQP_URL\\"]"; exit 7';
    await using run = startRun([SERVICES, "run", "--", "sh", "-c", script], URLS);
    expect(await run.answer<string[]>()).toEqual([URLS.DATABASE_URL, URLS.AMQP_URL]);
    expect(await run.process.exited).toBe(7);
  });

  test.each(["SIGINT", "SIGTERM", "SIGHUP"] as const)(
    "run passes %s on, and waits for the end of the command",
    async (signal) => {
      const name = signal.slice(3);
      const script = `trap 'sleep 0.3; exit 5' ${name}; echo 1; while :; do sleep 0.05; done`;
      await using run = startRun([SERVICES, "run", "sh", "-c", script], URLS);
      await run.answer();
      run.process.kill(signal);
      expect(await run.process.exited).toBe(5);
    },
  );

  test("run ends the command when its own parent was killed", async () => {
    await using folder = await temporaryFolder();
    const own = `${process.execPath} ${SERVICES} run sh -c 'echo 1; exec sleep 3600'`;
    const parent = Bun.spawn(["sh", "-c", `${own}; true`], {
      env: { ...process.env, ...URLS, SERVICES_TEST: folder.path },
      stdout: "pipe",
      stderr: "ignore",
    });
    for await (const _ of parent.stdout) break;
    expect(processesWith(folder.path).length).toBeGreaterThanOrEqual(3);
    parent.kill("SIGKILL");
    await until("all have ended", () => processesWith(folder.path).length === 0);
  });

  test.each(["start", "run", ""])("%j is answered with the usage, and exits 2", async (word) => {
    await using run = startRun(word ? [SERVICES, word] : [SERVICES], URLS);
    expect(await run.process.exited).toBe(2);
    expect(await run.process.stderr.text()).toContain("Usage: bun run services");
  });
});
