import { afterEach, beforeEach, describe, expect, jest, setDefaultTimeout, test } from "bun:test";
import { closeSync, constants, openSync, readSync } from "node:fs";
import { join } from "node:path";
import { perSecond } from "../../lib/log.ts";
import { until } from "../harness/harness.ts";
import { temporaryFolder } from "../harness/temporary_folder.ts";

setDefaultTimeout(30_000);

type Line = Record<string, unknown>;

function linesOf(text: string): Line[] {
  return text
    .split("\n")
    .filter(Boolean)
    .map((line): Line => JSON.parse(line));
}

/** A process that logs to a pipe of the file system, whose reader may go and come back; or to the file. */
async function startChatty(file?: string) {
  const folder = await temporaryFolder();
  const path = file ?? `${folder.path}/stdout`;
  if (!file) Bun.spawnSync(["mkfifo", path]);
  const openReader = () => openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
  let reader = file ? undefined : openReader();
  const stdout = openSync(path, "w");
  const child = Bun.spawn([process.execPath, join(import.meta.dir, "../harness/chatty.ts")], {
    stdin: "pipe",
    stdout,
    stderr: "pipe",
  });
  closeSync(stdout);
  let complaints = "";
  const collected = (async () => {
    const decoder = new TextDecoder();
    for await (const bytes of child.stderr) complaints += decoder.decode(bytes, { stream: true });
  })();
  let text = "";
  const bytes = Buffer.alloc(1_048_576);
  const chatty = {
    /** Logs so many lines; resolves when the process has gone on. */
    async log(lines: number) {
      const before = linesOf(complaints).filter(({ logged }) => logged).length;
      child.stdin.write(`${lines}\n`);
      child.stdin.flush();
      await until("it goes on", () => linesOf(complaints).filter(({ logged }) => logged).length > before);
    },
    leave() {
      if (reader !== undefined) closeSync(reader);
      reader = undefined;
    },
    comeBack() {
      reader = openReader();
    },
    /** Reads what is in the pipe; all complete lines so far. */
    read(): Line[] {
      for (let length = 1; length > 0; ) {
        length = readNow();
        text += bytes.toString("utf8", 0, length);
      }
      return linesOf(text.slice(0, text.lastIndexOf("\n") + 1));
    },
    complaints: () => linesOf(complaints).filter(({ logged }) => !logged),
    /** Ends it; resolves to its exit code. */
    async end() {
      child.stdin.end();
      const code = await child.exited;
      await collected;
      return code;
    },
    async [Symbol.asyncDispose]() {
      child.kill("SIGKILL");
      chatty.leave();
      await folder[Symbol.asyncDispose]();
    },
  };
  function readNow(): number {
    try {
      return reader === undefined ? 0 : readSync(reader, bytes);
    } catch (error) {
      if ((error as { code?: string }).code === "EAGAIN") return 0;
      throw error;
    }
  }
  return chatty;
}

describe("openLogger()", () => {
  test("has written the last line when the process exits", async () => {
    await using chatty = await startChatty();
    await chatty.log(3);
    expect(await chatty.end()).toBe(7);
    expect(chatty.read().map(({ msg }) => msg)).toEqual(["line", "line", "line", "last"]);
    expect(chatty.complaints()).toEqual([]);
  });

  test("does not wait for a reader that is stuck: it drops lines, counts them, and says so", async () => {
    await using chatty = await startChatty();
    const lines = 5_000;
    await chatty.log(lines);
    expect(chatty.complaints()).toMatchObject([
      { level: "error", msg: expect.stringContaining("does not read") },
    ]);
    const { lost } = await until("it says how many are lost", () => chatty.read().find(({ lost }) => lost));
    const read = chatty.read().filter(({ msg }) => msg === "line");
    expect(read.length + Number(lost)).toBe(lines);
    // The beginning is there, complete and in order.
    expect(read.map(({ number }) => number)).toEqual(read.map((_, index) => index + 1));
    await chatty.log(1);
    await until("the next one comes", () => chatty.read().at(-1)?.number === lines + 1);
    // More than a pipe holds: the exit waits for a reader that is slow, but not for ever.
    await chatty.log(200);
    expect(await chatty.end()).toBe(7);
  });

  test("goes on without its reader, and gives the next one what it has kept", async () => {
    await using chatty = await startChatty();
    chatty.leave();
    await chatty.log(3);
    await chatty.log(3);
    expect(chatty.complaints()).toMatchObject([{ level: "error", msg: expect.stringContaining("EPIPE") }]);
    chatty.comeBack();
    await until("all are there", () => chatty.read().length === 6);
    expect(await chatty.end()).toBe(7);
    expect(chatty.read().map(({ msg, lost }) => lost ?? msg)).toEqual([...Array(6).fill("line"), "last"]);
  });

  test("goes on with a full disk behind stdout", async () => {
    await using chatty = await startChatty("/dev/full");
    await chatty.log(3);
    await chatty.log(3_000);
    expect(chatty.complaints()).toMatchObject([{ level: "error", msg: expect.stringContaining("ENOSPC") }]);
    expect(await chatty.end()).toBe(7);
  });
});

describe("perSecond()", () => {
  beforeEach(() => void jest.useFakeTimers());
  afterEach(() => void jest.useRealTimers());

  /** A bounded log, and what it lets through. */
  function openBounded() {
    const lines: Line[] = [];
    const take = (level: string) => (fields: Line, msg: string) => void lines.push({ level, msg, ...fields });
    const logger = { warn: take("warn"), error: take("error") };
    return { lines, log: perSecond(logger as never), again: perSecond(logger as never) };
  }

  test("logs the first line at once, and one a second for those that follow", () => {
    const { lines, log, again } = openBounded();
    for (let number = 1; number <= 1_000; number++) (number % 2 ? log : again).warn({ number }, "failed");
    expect(lines).toEqual([{ level: "warn", msg: "failed", number: 1 }]);
    jest.advanceTimersByTime(1_000);
    expect(lines.slice(1)).toEqual([{ level: "warn", msg: "failed", number: 1_000, count: 999 }]);
    log.warn({ number: 1_001 }, "failed");
    expect(lines).toHaveLength(2);
    jest.advanceTimersByTime(1_000);
    expect(lines.slice(2)).toEqual([{ level: "warn", msg: "failed", number: 1_001, count: 1 }]);
    // After a quiet second, the next one is a first one.
    jest.advanceTimersByTime(1_000);
    log.warn({ number: 1_002 }, "failed");
    expect(lines.slice(3)).toEqual([{ level: "warn", msg: "failed", number: 1_002 }]);
  });

  test("tells levels, texts and errors apart, but not thousands of errors", () => {
    const { lines, log } = openBounded();
    for (const message of ["refused", "read-only"]) {
      for (let times = 0; times < 3; times++) {
        log.warn({ error: { message } }, "failed");
        log.error({ error: { message } }, "failed");
        log.warn({ error: { message } }, "waiting");
      }
    }
    expect(lines).toHaveLength(6);
    for (let number = 0; number < 10_000; number++) log.warn({ error: { message: number } }, "failed");
    jest.advanceTimersByTime(1_000);
    expect(lines.length).toBeWithin(12, 120);
    const stands = lines.slice(6).reduce((sum, { count }) => sum + Number(count ?? 1), 0);
    expect(stands).toBe(12 + 10_000);
  });

  test("logs as many at once as it is told, and at flush() what it holds back", () => {
    const { lines, log } = openBounded();
    for (let number = 1; number <= 25; number++) log.error({ number }, "failed", 10);
    expect(lines.map(({ number }) => number)).toEqual([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    log.flush();
    expect(lines.slice(10)).toEqual([{ level: "error", msg: "failed", number: 25, count: 15 }]);
    jest.advanceTimersByTime(5_000);
    expect(lines).toHaveLength(11);
  });
});
