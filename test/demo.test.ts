import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { AMQP_URL, createTestDatabase, deleteQueue, type TestDatabase, uniqueName } from "./harness.ts";

let db: TestDatabase;
const QUEUE = uniqueName("demo_test");
beforeAll(async () => {
  db = await createTestDatabase({ migrated: false });
});
afterAll(async () => {
  await deleteQueue(QUEUE);
  await db.drop();
});

/** Runs the demo on a database and a queue of its own; kills it when it takes too long. */
async function demo(...args: string[]) {
  const child = Bun.spawn([process.execPath, "lib/dev/demo.ts", ...args], {
    cwd: join(import.meta.dir, ".."),
    env: { ...Bun.env, DATABASE_URL: db.url, AMQP_URL, QUEUE },
    stdout: "pipe",
    stderr: "pipe",
    timeout: 60_000,
    killSignal: "SIGTERM",
  });
  const [stdout, stderr] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
  ]);
  return { exitCode: await child.exited, stdout, stderr };
}

const AGREE = /ledger \((\d+)\), balances \(\1\) and reservations \(\1\) agree\n$/;

describe("bun run demo", () => {
  test("migrates, reserves, shows each grant, and ends with the sums that agree", async () => {
    const { exitCode, stdout } = await demo("--count", "3", "--seconds", "1");
    expect(exitCode).toBe(0);
    expect(stdout.match(/ PENDING /g)).toHaveLength(3);
    expect(stdout.match(/ DONE +\d+ ms late/g)).toHaveLength(3);
    expect(stdout).toMatch(/\n3 of 3 granted, the latest \d+ ms after its time, 0 early; /);
    expect(stdout).toMatch(AGREE);
    const rows = await db.query("select status from point_reservations");
    expect(rows).toEqual([{ status: "DONE" }, { status: "DONE" }, { status: "DONE" }]);
  }, 90_000);

  test("shows sums where there are too many for a line each, also with quiet logs", async () => {
    Bun.env.LOG_LEVEL = "error";
    const { exitCode, stdout } = await demo("--count", "300", "--seconds", "1").finally(() => {
      delete Bun.env.LOG_LEVEL;
    });
    expect(exitCode).toBe(0);
    expect(stdout).toContain("PENDING 0  PROCESSING 0  DONE 300  worst lateness ");
    expect(stdout).toContain("\n300 of 300 granted, ");
    expect(stdout).toMatch(AGREE);
  }, 90_000);

  test("exits 1 where the sums do not agree", async () => {
    await db.query("insert into point_root (user_id, point_num) values ('Planted', 1)");
    const { exitCode, stdout } = await demo("--count", "1", "--seconds", "1");
    await db.query("delete from point_root where user_id = 'Planted'");
    expect(stdout).toContain("\n1 of 1 granted, ");
    expect(stdout).toContain("DO NOT AGREE");
    expect(exitCode).toBe(1);
  }, 90_000);

  test.each([
    [["--count", "abc"], '--count must be a whole number from 1 to 100000: received "abc"'],
    [["--seconds", "0"], '--seconds must be a whole number from 1 to 3600: received "0"'],
    [["--foo"], "--foo"],
  ])(
    "refuses %j at once, with the usage",
    async (args, message) => {
      const { exitCode, stdout, stderr } = await demo(...args);
      expect({ exitCode, stdout }).toEqual({ exitCode: 2, stdout: "" });
      expect(stderr).toContain(message);
      expect(stderr).toContain("Usage: bun run demo [--count N] [--seconds S]");
    },
    20_000,
  );
});
