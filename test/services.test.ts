import { afterAll, afterEach, beforeAll, describe, expect, test } from "bun:test";
import {
  chmodSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { connect as connectAmqp } from "amqplib";
import type { Subprocess } from "bun";
import { createConnection } from "mysql2/promise";
import { withLock } from "../lib/dev/lock.ts";
import { answersMysql } from "../lib/dev/mysql.ts";
import { processesMarked } from "../lib/dev/processes.ts";
import { answersAmqp } from "../lib/dev/rabbitmq.ts";
import { findServerBinaries, startPrivateServers } from "../lib/dev/servers.ts";

const COMMAND = join(import.meta.dir, "../lib/dev/services.ts");
const FIXTURE = join(import.meta.dir, "services_fixture.ts");
const STARTING_MS = 150_000;

const folders: string[] = [];
const children: Subprocess[] = [];

function temporaryFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), "pointservice-services-"));
  folders.push(folder);
  return folder;
}

/** A program `docker`, first in the PATH of the processes that a test starts. */
function fakeDocker(folder: string, script: string): string {
  const bin = join(folder, "bin");
  mkdirSync(bin, { recursive: true });
  writeFileSync(join(bin, "docker"), `#!/bin/sh\n${script}\n`);
  chmodSync(join(bin, "docker"), 0o755);
  return bin;
}

interface Started {
  process: Subprocess<"pipe", "pipe", "pipe">;
  /** The first line of standard output, parsed. */
  answer<T>(): Promise<T>;
}

function start(args: string[], env: Record<string, string | undefined> = {}): Started {
  const { DATABASE_URL: _database, AMQP_URL: _amqp, ...inherited } = process.env;
  const started = Bun.spawn([process.execPath, ...args], {
    env: { ...inherited, ...env },
    stdin: "pipe",
    stdout: "pipe",
    stderr: "pipe",
  });
  children.push(started);
  return {
    process: started,
    async answer() {
      let text = "";
      for await (const chunk of started.stdout.pipeThrough(new TextDecoderStream())) {
        text += chunk;
        if (text.includes("\n")) break;
      }
      if (text === "") throw new Error(`No answer: ${await started.stderr.text()}`);
      return JSON.parse(text.slice(0, text.indexOf("\n")));
    },
  };
}

/** What is left of a test: processes with its folder on their command line or in their environment. */
function processesOf(folder: string): string[] {
  if (process.platform !== "linux") return [];
  return readdirSync("/proc").filter((pid) => {
    if (!/^\d+$/.test(pid) || pid === String(process.pid)) return false;
    try {
      return ["cmdline", "environ"].some((file) =>
        readFileSync(`/proc/${pid}/${file}`, "utf8").includes(folder),
      );
    } catch {
      return false;
    }
  });
}

async function until(condition: () => boolean | Promise<boolean>, timeoutMs = 10_000): Promise<void> {
  const giveUpAt = Date.now() + timeoutMs;
  while (!(await condition())) {
    if (Date.now() > giveUpAt) throw new Error(`Not within ${timeoutMs} ms: ${condition}`);
    await Bun.sleep(20);
  }
}

afterEach(async () => {
  for (const child of children.splice(0)) {
    child.kill("SIGKILL");
    await child.exited;
  }
});

afterAll(() => {
  for (const folder of folders) {
    for (const name of ["MySQL", "RabbitMQ"]) {
      for (const { pid } of processesMarked(`${folder}/.services:${name}`)) process.kill(pid, "SIGKILL");
    }
    rmSync(folder, { recursive: true, force: true });
  }
});

describe("acquireServices()", () => {
  test("takes the URLs that are given and starts nothing", async () => {
    const root = temporaryFolder();
    const bin = fakeDocker(root, `echo called >> ${root}/docker-calls`);
    const urls = { DATABASE_URL: "mysql://a:b@192.0.2.1:1/x", AMQP_URL: "amqp://192.0.2.1:2" };
    const run = start([FIXTURE, "acquire", root], { ...urls, PATH: `${bin}:${process.env.PATH}` });
    expect(await run.answer<unknown>()).toEqual({
      databaseUrl: urls.DATABASE_URL,
      amqpUrl: urls.AMQP_URL,
      origin: "DATABASE_URL and AMQP_URL",
    });
    run.process.stdin.end();
    expect(await run.process.exited).toBe(0);
    expect(readdirSync(root)).toEqual(["bin"]);
  }, 20_000);

  test.each([
    ["DATABASE_URL", "AMQP_URL"],
    ["AMQP_URL", "DATABASE_URL"],
  ])(
    "refuses %s without %s",
    async (set, missing) => {
      const root = temporaryFolder();
      const run = start([FIXTURE, "acquire", root], { [set]: "mysql://192.0.2.1/x" });
      const { error } = await run.answer<{ error: string }>();
      expect(error).toStartWith(`${set} is set, but ${missing} is not`);
      expect(readdirSync(root)).toEqual([]);
    },
    20_000,
  );
});

describe("findRunning()", () => {
  test("gives up a docker client that hangs after 2 s, and leaves none of its processes", async () => {
    const root = temporaryFolder();
    const bin = fakeDocker(root, `echo called >> ${root}/docker-calls\nsleep 3600 &\nwait`);
    const run = start([FIXTURE, "find", root], { PATH: `${bin}:${process.env.PATH}` });
    const { found, tookMs } = await run.answer<{ found: unknown; tookMs: number }>();
    expect(found).toBeNull();
    expect(tookMs).toBeWithin(1_900, 5_000);
    expect(existsSync(join(root, "docker-calls"))).toBe(true);
    await run.process.exited;
    // The PATH with our folder marks the client and the `sleep` that it started.
    await until(() => processesOf(root).length === 0);
  }, 20_000);
});

describe("withLock()", () => {
  test("keeps others out, and is free once its holder was killed", async () => {
    const file = join(temporaryFolder(), "lock.sqlite");
    const holder = start([FIXTURE, "lock", file]);
    expect(await holder.answer<string>()).toBe("held");
    const said: string[] = [];
    const options = { say: (line: string) => said.push(line), waiting: "somebody else" };
    const refused = withLock(file, async () => "got it", { ...options, deadlineMs: 500 });
    await expect(refused).rejects.toThrow(/more than \d s/);
    expect(said).toEqual(["somebody else"]);
    holder.process.kill("SIGKILL");
    expect(await withLock(file, async () => "got it", { ...options, deadlineMs: 5_000 })).toBe("got it");
  }, 20_000);

  test("keeps others in the same process out, and passes the result and the error on", async () => {
    const file = join(temporaryFolder(), "lock.sqlite");
    const options = { say: () => undefined, waiting: "" };
    let inside = 0;
    const results = await Promise.all(
      [1, 2, 3].map((n) =>
        withLock(
          file,
          async () => {
            expect(++inside).toBe(1);
            await Bun.sleep(20);
            inside--;
            return n;
          },
          options,
        ),
      ),
    );
    expect(results).toEqual([1, 2, 3]);
    await expect(withLock(file, () => Promise.reject(new Error("no")), options)).rejects.toThrow("no");
    expect(await withLock(file, async () => "free", options)).toBe("free");
  }, 20_000);
});

describe("services run", () => {
  const urls = { DATABASE_URL: "mysql://a:b@192.0.2.1:1/x", AMQP_URL: "amqp://192.0.2.1:2" };

  test("gives the command both URLs, and ends with its exit code", async () => {
    const script = 'echo "[\\"$DATABASE_URL\\",\\"$AMQP_URL\\"]"; exit 7';
    const run = start([COMMAND, "run", "--", "sh", "-c", script], urls);
    expect(await run.answer<string[]>()).toEqual([urls.DATABASE_URL, urls.AMQP_URL]);
    expect(await run.process.exited).toBe(7);
  }, 20_000);

  test.each(["SIGINT", "SIGTERM", "SIGHUP"] as const)(
    "passes %s on and waits for the end of the command",
    async (signal) => {
      const name = signal.slice(3);
      const script = `trap 'sleep 0.3; exit 5' ${name}; echo 1; while :; do sleep 0.05; done`;
      const run = start([COMMAND, "run", "sh", "-c", script], urls);
      await run.answer();
      run.process.kill(signal);
      expect(await run.process.exited).toBe(5);
    },
    20_000,
  );

  test("ends the command when its own parent was killed", async () => {
    const root = temporaryFolder();
    const own = `${process.execPath} ${COMMAND} run sh -c 'echo 1; exec sleep 3600'`;
    const parent = Bun.spawn(["sh", "-c", `${own}; true`], {
      env: { ...process.env, ...urls, SERVICES_TEST: root },
      stdout: "pipe",
      stderr: "ignore",
    });
    children.push(parent);
    for await (const _ of parent.stdout) break;
    expect(processesOf(root).length).toBeGreaterThanOrEqual(3);
    parent.kill("SIGKILL");
    await until(() => processesOf(root).length === 0);
  }, 20_000);

  test("an unknown subcommand is answered with the usage and exit code 2", async () => {
    const run = start([COMMAND, "start"], urls);
    expect(await run.process.exited).toBe(2);
    expect(await run.process.stderr.text()).toContain("up | down | env | run");
  }, 20_000);
});

const binaries = findServerBinaries();
if (!binaries) {
  console.error("\n*** SKIPPED: private servers, as mysqld or rabbitmq-server is not on this machine ***\n");
}

describe.skipIf(!binaries)("private servers", () => {
  const root = temporaryFolder();
  // Deeper than the path of a Unix socket may be long.
  const folder = join(root, "deep".repeat(30), ".services");
  let pair: Awaited<ReturnType<typeof startPrivateServers>>;

  beforeAll(async () => {
    pair = await startPrivateServers({ folder, say: () => undefined });
  }, STARTING_MS);

  afterAll(async () => {
    await pair?.stop();
    // The main processes and all they started: mysqld, the Erlang machine, its helpers, its epmd.
    expect(processesOf(folder)).toEqual([]);
  }, 60_000);

  test(
    "mysql: killed and started again, it has its port and its data",
    async () => {
      const { url } = pair.mysql;
      const before = await createConnection({ uri: url });
      before.on("error", () => undefined);
      await before.query("create table kept (n int)");
      await before.query("insert into kept values (42)");
      const pid = pair.mysql.pid();
      await pair.mysql.stop("SIGKILL");
      expect(pair.mysql.pid()).toBeUndefined();
      expect(await pair.mysql.answers()).toBe(false);
      before.destroy();
      await pair.mysql.start();
      expect(pair.mysql.pid()).not.toBe(pid);
      expect(pair.mysql.url).toBe(url);
      const after = await createConnection({ uri: url });
      const [rows] = await after.query("select n from kept");
      expect(rows).toEqual([expect.objectContaining({ n: 42 })]);
      await after.end();
    },
    STARTING_MS,
  );

  test(
    "rabbitmq: killed and started again, it has its port and its confirmed messages",
    async () => {
      const { url } = pair.rabbitmq;
      const before = await connectAmqp(url);
      before.on("error", () => undefined);
      const channel = await before.createConfirmChannel();
      channel.on("error", () => undefined);
      await channel.assertQueue("kept", { durable: true, arguments: { "x-queue-type": "quorum" } });
      channel.sendToQueue("kept", Buffer.from("42"), { persistent: true });
      await channel.waitForConfirms();
      // RabbitMQ writes the list of its quorum queues every 500 ms (ra_directory.erl, auto_save) and nothing tells when: a
      // queue that is younger is lost with a kill.
      await Bun.sleep(1_500);
      await pair.rabbitmq.stop("SIGKILL");
      expect(processesMarked(`${folder}:RabbitMQ`)).toEqual([]);
      await pair.rabbitmq.start();
      expect(pair.rabbitmq.url).toBe(url);
      const connection = await connectAmqp(url);
      const reader = await connection.createChannel();
      const received: string[] = [];
      await until(async () => {
        const message = await reader.get("kept", { noAck: true });
        if (message) received.push(message.content.toString());
        return received.length > 0;
      });
      expect(received).toEqual(["42"]);
      await connection.close();
    },
    STARTING_MS,
  );

  test(
    "start() does nothing to a server that runs",
    async () => {
      const pids = [pair.mysql.pid(), pair.rabbitmq.pid()];
      await Promise.all([pair.mysql.start(), pair.rabbitmq.start()]);
      expect([pair.mysql.pid(), pair.rabbitmq.pid()]).toEqual(pids);
    },
    STARTING_MS,
  );

  test("acquireServices() uses docker compose where an engine answers, and the last user stops it", async () => {
    const clone = temporaryFolder();
    const ports = [pair.mysql.url, pair.rabbitmq.url].map((url) => new URL(url).port);
    // Containers cannot be had everywhere; the servers behind the "published ports" are real.
    const bin = fakeDocker(
      clone,
      `echo "$* $MYSQL_PORT $AMQP_PORT $COMPOSE_PROJECT_NAME" >> ${clone}/calls
      case "$*" in
        info*) echo 28.0.0 ;;
        "compose version") echo v2 ;;
        "compose up"*) touch ${clone}/up ;;
        "compose stop"*) rm ${clone}/up ;;
        "compose port mysql 3306") [ -e ${clone}/up ] && echo 127.0.0.1:${ports[0]} ;;
        "compose port rabbitmq 5672") [ -e ${clone}/up ] && echo 127.0.0.1:${ports[1]} ;;
        "compose port rabbitmq 15672") [ -e ${clone}/up ] && echo 127.0.0.1:1 ;;
        *) exit 1 ;;
      esac`,
    );
    const env = { PATH: `${bin}:${process.env.PATH}`, MYSQL_PORT: ports[0], AMQP_PORT: "" };
    const runs = [start([FIXTURE, "acquire", clone], env), start([FIXTURE, "acquire", clone], env)];
    for (const run of runs) {
      expect(await run.answer<unknown>()).toEqual({
        databaseUrl: `mysql://root:pointservice@127.0.0.1:${ports[0]}/pointservice`,
        amqpUrl: `amqp://pointservice:pointservice@127.0.0.1:${ports[1]}`,
        origin: "docker compose",
      });
    }
    runs[0]?.process.stdin.end();
    await runs[0]?.process.exited;
    expect(existsSync(join(clone, "up"))).toBe(true);
    runs[1]?.process.stdin.end();
    await runs[1]?.process.exited;
    expect(existsSync(join(clone, "up"))).toBe(false);
    const calls = readFileSync(join(clone, "calls"), "utf8").trimEnd().split("\n");
    const ups = calls.filter((call) => call.startsWith("compose up --wait mysql rabbitmq "));
    expect(ups).toHaveLength(2);
    expect(ups[0]).toMatch(new RegExp(` ${ports[0]} \\d+ pointservice-[0-9a-f]{8}$`));
    expect(calls.filter((call) => call.startsWith("compose stop"))).toHaveLength(1);
  }, 60_000);

  test(
    "runs that start at once share one pair; the last one stops it, one that was killed does not count",
    async () => {
      const clone = temporaryFolder();
      const env = { PATH: `${fakeDocker(clone, "exit 1")}:${process.env.PATH}` };
      const [first, killed, last] = [1, 2, 3].map(() => start([FIXTURE, "acquire", clone], env));
      if (!first || !killed || !last) throw new Error("unreachable");
      const answers = await Promise.all(
        [first, killed, last].map((run) => run.answer<{ databaseUrl: string; amqpUrl: string }>()),
      );
      expect(new Set(answers.map((answer) => JSON.stringify(answer))).size).toBe(1);
      const mysqlPort = Number(new URL(answers[0]?.databaseUrl ?? "").port);
      const amqpPort = Number(new URL(answers[0]?.amqpUrl ?? "").port);

      first.process.stdin.end();
      expect(await first.process.exited).toBe(0);
      killed.process.kill("SIGKILL");
      await killed.process.exited;
      expect(await answersMysql(mysqlPort)).toBe(true);
      expect(await answersAmqp(amqpPort)).toBe(true);

      last.process.stdin.end();
      expect(await last.process.exited).toBe(0);
      expect(processesOf(clone)).toEqual([]);
      expect(await answersMysql(mysqlPort)).toBe(false);
    },
    STARTING_MS,
  );
});
