import { afterAll, describe, expect, test } from "bun:test";
import { migrate } from "../../sql/migrate.ts";
import { runCommand } from "../harness/command.ts";
import { openTestDatabase } from "../harness/database.ts";
import { uniqueName } from "../harness/harness.ts";
import { deleteQueue } from "../harness/queue.ts";

const db = await openTestDatabase({ migrated: false });
const QUEUE = uniqueName("demo_test");
afterAll(() => deleteQueue(QUEUE));

/** Runs the demo on a database and a queue of its own. */
function demo(args: readonly string[], env: Record<string, string> = {}) {
  return runCommand("demo", { args, env: { DATABASE_URL: db.url, QUEUE, ...env } });
}

const AGREE = /ledger \((\d+)\), balances \(\1\) and reservations \(\1\) agree\n$/;

describe("bun run demo", () => {
  test("migrates, reserves, shows each grant, and ends with the sums that agree", async () => {
    const { code, stdout } = await demo(["--count", "3", "--seconds", "1"]);
    expect(code).toBe(0);
    expect(stdout.match(/ PENDING /g)).toHaveLength(3);
    expect(stdout.match(/ DONE +\d+ ms late/g)).toHaveLength(3);
    expect(stdout).toMatch(/\n3 of 3 granted, the latest \d+ ms after its time, 0 early; /);
    expect(stdout).toMatch(AGREE);
  });

  test("shows sums if there are too many for a line each, also with quiet logs", async () => {
    const { code, stdout } = await demo(["--count", "300", "--seconds", "1"], { LOG_LEVEL: "error" });
    expect(code).toBe(0);
    expect(stdout).toContain("PENDING 0  PROCESSING 0  DONE 300  worst lateness ");
    expect(stdout).toContain("\n300 of 300 granted, ");
    expect(stdout).toMatch(AGREE);
  });

  test("exits 1 if the sums do not agree", async () => {
    await migrate(db.url);
    await db.query("insert into point_root (user_id, point_num) values ('Planted', 1)");
    const { code, stdout } = await demo(["--count", "1", "--seconds", "1"]);
    await db.query("delete from point_root where user_id = 'Planted'");
    expect(stdout).toContain("\n1 of 1 granted, ");
    expect(stdout).toContain("DO NOT AGREE");
    expect(code).toBe(1);
  });

  test.each([
    [
      ["--count", "abc"],
      "'--count <n>' argument 'abc' is invalid. It must be a whole number from 1 to 100000",
    ],
    [["--seconds", "0"], "'--seconds <n>' argument '0' is invalid. It must be a whole number from 1 to 3600"],
    [["--foo"], "unknown option '--foo'"],
  ])("refuses %j with the usage, and exits 2", async (args, message) => {
    const { code, stdout, stderr } = await demo(args);
    expect({ code, stdout }).toEqual({ code: 2, stdout: "" });
    expect(stderr).toContain(message);
    expect(stderr).toContain("Usage: bun run demo");
  });
});
