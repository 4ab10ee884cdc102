import { beforeEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { drawBars } from "../../lib/cli/bars.ts";
import { fill, fillTotals } from "../accounting/filled.ts";
import { expectExactTotals } from "../accounting/totals_by_sql.ts";
import { runCommand } from "../harness/command.ts";
import { emptyTables, openTestDatabase } from "../harness/database.ts";
import { insertReservation } from "../harness/fixtures.ts";

setDefaultTimeout(60_000);

const db = await openTestDatabase();
beforeEach(() => emptyTables(db));

function run(name: string, args: string[] = [], env: Record<string, string> = {}) {
  return runCommand(name, { args, env: { DATABASE_URL: db.url, ...env } });
}

describe("bun run aggregate", () => {
  test("says how many entries it has counted; --from --to counts days again whose totals are wrong", async () => {
    await fillTotals(db);
    await emptyTotals();
    const tokyo = { AGGREGATE_TIME_ZONE: "Asia/Tokyo" };
    // Days that were never counted.
    const some = await run("aggregate", ["--from", "2026-03-02", "--to", "2026-03-03"], tokyo);
    expect(some).toMatchObject({ code: 0, stderr: "" });
    expect(some.stdout).toMatch(/6 ledger entries counted in \S+ s, by days of Asia\/Tokyo/);
    await expectExactTotals(db, "Asia/Tokyo");
    await db.query("update point_daily_totals set points = points + 1, users = 0");
    const again = await run("aggregate", ["--from", "2026-03-01", "--to", "2026-03-04"], tokyo);
    expect(again.stdout).toStartWith("2026-03-01 to 2026-03-04");
    await expectExactTotals(db, "Asia/Tokyo");
    expect((await run("aggregate", [], tokyo)).stdout).toMatch(/^0 ledger entries counted/);
  });

  test("refuses another zone, until --rebuild counts everything by its days", async () => {
    await fillTotals(db);
    expect(await run("aggregate")).toEqual({
      code: 3,
      stdout: "",
      stderr:
        "Cannot aggregate by days of UTC as the totals are by days of Asia/Tokyo. Set AGGREGATE_TIME_ZONE to the time zone of the totals; or, to change it for all totals, run `bun run aggregate --rebuild` once with the new one\n",
    });
    expect(await run("aggregate", ["--rebuild"])).toMatchObject({
      code: 0,
      stdout: expect.stringContaining("Set AGGREGATE_TIME_ZONE=UTC"),
    });
    await expectExactTotals(db, "UTC");
  });

  async function emptyTotals() {
    for (const table of ["daily_totals", "daily_users", "user_totals", "reservation_totals"]) {
      await db.query(`delete from point_${table}`);
    }
    await db.query("update point_aggregation set time_zone = ''");
    await db.query("update point_transactions set aggregated_in = 0");
  }
});

test("bun run totals shows a table, a bar for each day and the points of all users", async () => {
  await fillTotals(db);
  const { code, stdout } = await run("totals", ["--from", "2026-03-01", "--to", "2026-03-04"]);
  expect(code).toBe(0);
  expect(stdout).toMatch(/│ 2026-03-02 +│ grant +│ spring +│ 2 +│ 30 +│ 2 +│ 4 +│ 8 +│/);
  expect(stdout).toContain(`2026-03-01 ${"█".repeat(50)} 100\n`);
  expect(stdout).toContain(`2026-03-02 ${"█".repeat(30)} 60, 40 subtracted\n`);
  expect(stdout).toContain("2026-03-03 0\n");
  expect(stdout).toContain("All points of all users at the end of 2026-03-04: 127\nDays of Asia/Tokyo\n");
});

test("drawBars() draws in eighths, and nothing for what is not above 0", () => {
  const bars = [160n, 81n, 1n, 0n, -5n].map((value, index) => ({ label: `day ${index}`, value }));
  expect(drawBars(bars).split("\n")).toEqual([
    `day 0 ${"█".repeat(50)} 160`,
    `day 1 ${"█".repeat(25)}▎ 81`,
    "day 2 ▎ 1",
    "day 3 0",
    "day 4 -5",
  ]);
  expect(drawBars([])).toBe("");
});

describe("bun run reconcile", () => {
  test("exits 0 if all agree, and says what it has checked", async () => {
    await fill(db);
    const first = await run("reconcile");
    expect(first.code).toBe(0);
    expect(first.stdout).toMatch(
      /^3 users, 7 reservations, 6 ledger entries and 1 day checked in .* s \(everything; .*\): all agree\n$/,
    );
    expect((await run("reconcile")).stdout).toContain("(what differs from the counted entries;");
    expect((await run("reconcile", ["--full"])).stdout).toContain("(everything;");
  });

  test("exits 1 and names each difference, in lines and as JSON; --repair mends balances and nothing else", async () => {
    await fill(db);
    await db.query("update point_root set point_num = 9007199254740993 where user_id = 'Ann'");
    await db.query("delete from point_root where user_id = 'Bob'");
    await insertReservation(db, { status: "DONE", userId: "Cat", pointAmount: 5 });
    const lines = await run("reconcile");
    expect(lines.code).toBe(1);
    expect(lines.stdout).toContain(
      "balance mismatch: Ann has 9007199254740993, but the ledger has 230 in 4 entries",
    );
    expect(lines.stdout).toContain("3 differences, 0 repaired\n");
    expect(lines.stdout).toMatch(/\n {2}balance: .*--repair/);
    expect(lines.stdout).toMatch(/\n {2}reservation: /);
    const json = await run("reconcile", ["--json", "--full"]);
    expect(json.code).toBe(1);
    expect(json.stdout).toContain('"balance":9007199254740993');
    expect(JSON.parse(json.stdout)).toMatchObject({
      differences: [
        { kind: "balance", user_id: "Ann", ledger: 230, entry_count: 4 },
        { kind: "balance", user_id: "Bob", balance: null, ledger: 100, entries: [{ point_amount: 100 }] },
        { kind: "reservation", user_id: "Cat", point_amount: 5, entries: [] },
      ],
      is_full: true,
      difference_count: 3,
      repaired: 0,
      checked: { users: 2, reservations: 8, entries: 6, days: 1 },
    });
    const repair = await run("reconcile", ["--repair"]);
    expect(repair.code).toBe(1);
    expect(repair.stdout).toContain(" - repaired: 9007199254740993 -> 230\n");
    expect(repair.stdout).toContain(" - repaired: none -> 100\n");
    expect(
      await db.query("select user_id, point_num_before, point_num_after from point_repairs order by user_id"),
    ).toEqual([
      { user_id: "Ann", point_num_before: "9007199254740993", point_num_after: 230 },
      { user_id: "Bob", point_num_before: null, point_num_after: 100 },
    ]);
    await db.query("delete from point_reservations where point_amount = 5");
    await db.query("update point_root set point_num = 0 where user_id = 'Ann'");
    // Nothing is left.
    const repaired = await run("reconcile", ["--repair", "--json"]);
    expect(repaired.code).toBe(0);
    expect(JSON.parse(repaired.stdout)).toMatchObject({ differences: [{ repaired: true }], repaired: 1 });
  });
});

describe("a command whose output cannot be written", () => {
  /** Runs `reconcile` in a shell, with its output where `to` says. */
  async function reconcileTo(to: string): Promise<{ code: number; stderr: string }> {
    await fill(db);
    // The reader has gone before the command writes.
    const script = `set -o pipefail; (sleep 0.3; exec "$0" lib/cli/reconcile.ts --full) ${to}`;
    const child = Bun.spawn(["bash", "-c", script, process.execPath], {
      cwd: join(import.meta.dir, "../.."),
      env: { ...Bun.env, DATABASE_URL: db.url },
      stderr: "pipe",
    });
    return { code: await child.exited, stderr: await child.stderr.text() };
  }

  test.skipIf(!existsSync("/dev/full"))("says so, and exits 3: a full disk", async () => {
    expect(await reconcileTo("> /dev/full")).toEqual({
      code: 3,
      stderr: expect.stringMatching(/^Cannot reconcile: the output cannot be written: ENOSPC.*\n$/),
    });
  });

  test("says nothing, and exits 3: a reader that has gone", async () => {
    expect(await reconcileTo("| true")).toEqual({ code: 3, stderr: "" });
  });
});
