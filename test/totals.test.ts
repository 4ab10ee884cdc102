import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { aggregate } from "../lib/aggregate.ts";
import { dayOf } from "../lib/day.ts";
import { drawBars } from "../lib/terminal.ts";
import { appOn, expectProblem } from "./api_client.ts";
import { createTestDatabase, insertReservation, type TestDatabase } from "./harness.ts";

const ROOT = join(import.meta.dir, "..");

let db: TestDatabase;
let send: ReturnType<typeof appOn>["send"];
beforeAll(async () => {
  db = await createTestDatabase();
  ({ send } = appOn(db.database));
  await grant({ userId: "Ann", points: 100, campaign: "spring", at: "2026-03-01T14:59:59.999Z", lateMs: 5 });
  // In Tokyo the next day begins.
  await grant({ userId: "Ann", points: 10, campaign: "spring", at: "2026-03-01T15:00:00.000Z", lateMs: 0 });
  await grant({ userId: "Bob", points: 20, campaign: "spring", at: "2026-03-01T15:00:00.001Z", lateMs: 8 });
  await grant({ userId: "Bob", points: 30, campaign: null, at: "2026-03-02T01:00:00.000Z", lateMs: 2 });
  await insertEntry("direct:1", "Ann", -40, "2026-03-02T02:00:00.000Z");
  await insertEntry("direct:2", "Cat", 7, "2026-03-04T02:00:00.000Z");
  await aggregate(db.database, { timeZone: "Asia/Tokyo" });
}, 20_000);
afterAll(() => db.drop());

function insertEntry(key: string, userId: string, points: number, at: string) {
  return db.query(
    "insert into point_transactions (id, idempotency_key, user_id, point_amount, created_at) values (?)",
    [[crypto.randomUUID(), key, userId, points, new Date(at)]],
  );
}

async function grant({
  userId,
  points,
  campaign,
  at,
  lateMs,
}: {
  userId: string;
  points: number;
  campaign: string | null;
  at: string;
  lateMs: number;
}) {
  const executeAt = new Date(Date.parse(at) - lateMs);
  const { idempotencyKey } = await insertReservation(db, {
    ...{ status: "DONE", userId, pointAmount: points, campaign, executeAt },
  });
  await insertEntry(idempotencyKey, userId, points, at);
}

const TOTALS = [
  ["2026-03-01", "grant", "spring", 1, 100, 1, 5, 5],
  ["2026-03-02", "grant", null, 1, 30, 1, 2, 2],
  ["2026-03-02", "grant", "spring", 2, 30, 2, 4, 8],
  ["2026-03-02", "sub", null, 1, -40, 1, null, null],
  ["2026-03-04", "add", null, 1, 7, 1, null, null],
].map(([day, kind, campaign, entries, points, users, late_ms_mean, late_ms_max]) => ({
  ...{ day, kind, campaign, entries, points, users, late_ms_mean, late_ms_max },
}));

describe("GET /point/totals", () => {
  test("gives totals by day, kind and campaign, and what all users had at each day's end", async () => {
    const response = await send("/point/totals?from=2026-03-01&to=2026-03-05");
    expect(response.status).toBe(200);
    expect(await response.json()).toEqual({
      ...{ time_zone: "Asia/Tokyo", from: "2026-03-01", to: "2026-03-05" },
      aggregated_at: expect.any(String),
      totals: TOTALS,
      balances: [
        { day: "2026-03-01", point_num: 100 },
        { day: "2026-03-02", point_num: 120 },
        { day: "2026-03-03", point_num: 120 },
        { day: "2026-03-04", point_num: 127 },
        { day: "2026-03-05", point_num: 127 },
      ],
    });
    const later = (await (await send("/point/totals?from=2026-03-03&to=2026-03-03")).json()) as object;
    expect(later).toMatchObject({ totals: [], balances: [{ day: "2026-03-03", point_num: 120 }] });
  });

  test("gives one campaign's, without balances", async () => {
    const response = await send("/point/totals?from=2026-03-01&to=2026-03-05&campaign=spring");
    const answer = (await response.json()) as { totals: unknown };
    expect(answer.totals).toEqual(TOTALS.filter(({ campaign }) => campaign === "spring"));
    expect(answer).not.toHaveProperty("balances");
  });

  test("without days gives the last 31, by its own zone", async () => {
    const answer = (await (await send("/point/totals")).json()) as { to: string; balances: unknown[] };
    expect(Math.abs(Date.parse(answer.to) - Date.parse(dayOf(new Date(), "Asia/Tokyo")))).toBeLessThanOrEqual(
      86_400_000,
    );
    expect(answer.balances).toHaveLength(31);
  });

  test.each([
    ["text/csv", "text/csv;charset=utf-8"],
    ["text/csv, application/json;q=0.5", "text/csv;charset=utf-8"],
    ["text/csv;q=0.5, application/json", "application/json;charset=utf-8"],
    ["application/json", "application/json;charset=utf-8"],
    ["*/*", "application/json;charset=utf-8"],
    ["image/png", "application/json;charset=utf-8"],
    ["", "application/json;charset=utf-8"],
  ])("answers Accept: %s with %s", async (accept, type) => {
    const response = await send("/point/totals?from=2026-03-01&to=2026-03-01", { headers: { accept } });
    expect(response.headers.get("content-type")?.replace(" ", "")).toBe(type);
  });

  test("gives the same as CSV", async () => {
    const headers = { accept: "text/csv" };
    const response = await send("/point/totals?from=2026-03-01&to=2026-03-05", { headers });
    expect(await response.text()).toBe(
      [
        "day,kind,campaign,entries,points,users,late_ms_mean,late_ms_max",
        "2026-03-01,grant,spring,1,100,1,5,5",
        "2026-03-02,grant,,1,30,1,2,2",
        "2026-03-02,grant,spring,2,30,2,4,8",
        "2026-03-02,sub,,1,-40,1,,",
        "2026-03-04,add,,1,7,1,,",
        "",
      ].join("\r\n"),
    );
  });

  test.each([
    ["from=2026-02-30", ["from must be a day that exists"]],
    ["from=yesterday&to=1", ["from must be a day like 2026-01-31", "to must be a day like 2026-01-31"]],
    ["from=2026-03-02&to=2026-03-01", ["from must not be after to"]],
    ["from=2024-01-01&to=2026-03-01", ["days must be at most 366"]],
    ["campaign=a%20b", ["campaign is invalid format"]],
    ["day=2026-03-01", ['unknown field "day"']],
  ])("refuses ?%s", async (query, errors) => {
    await expectProblem(await send(`/point/totals?${query}`), 400, errors);
  });

  test("refuses more totals than one answer holds, and says what to ask for", async () => {
    await using other = Object.assign(await createTestDatabase(), {
      [Symbol.asyncDispose]: () => other.drop(),
    });
    const rows = Array.from({ length: 10_001 }, (_, index) => [
      1,
      "2026-05-05",
      "grant",
      `c${index}`,
      1,
      1,
      1,
    ]);
    await other.query(
      "insert into point_daily_totals (generation, day, kind, campaign, entries, points, users) values ?",
      [rows],
    );
    const app = appOn(other.database);
    const path = "/point/totals?from=2026-05-05&to=2026-05-05";
    const problem = await expectProblem(await app.send(path), 400, ["totals must be at most 10000"]);
    expect(problem.detail).toContain("ask for fewer days, or one campaign");
    expect((await app.send(`${path}&campaign=c10000`)).status).toBe(200);
  });

  test("gives all digits of what no JavaScript number holds", async () => {
    await using other = Object.assign(await createTestDatabase(), {
      [Symbol.asyncDispose]: () => other.drop(),
    });
    await other.query(
      "insert into point_daily_totals (generation, day, kind, campaign, entries, points, users) values (1, '2026-05-05', 'add', '', 1, 9007199254740993, 1)",
    );
    const path = "/point/totals?from=2026-05-05&to=2026-05-05";
    const app = appOn(other.database);
    const json = await (await app.send(path)).text();
    expect(json).toContain('"points":9007199254740993');
    expect(json).toContain('"point_num":9007199254740993');
    expect(await (await app.send(path, { headers: { accept: "text/csv" } })).text()).toContain(
      ",9007199254740993,",
    );
  });
});

describe("bun run totals", () => {
  function runCommand(args: string[]) {
    return Bun.spawn(["bun", "lib/totals.ts", ...args], {
      ...{ cwd: ROOT, stdout: "pipe", stderr: "pipe" },
      env: { ...Bun.env, DATABASE_URL: db.url },
    });
  }

  test("shows a table, a bar for each day and the points of all users", async () => {
    const run = runCommand(["--from", "2026-03-01", "--to", "2026-03-04"]);
    expect(await run.exited).toBe(0);
    const text = await new Response(run.stdout).text();
    expect(text).toMatch(/│ 2026-03-02 +│ grant +│ spring +│ 2 +│ 30 +│ 2 +│ 4 +│ 8 +│/);
    expect(text).toContain(`2026-03-01 ${"█".repeat(50)} 100\n`);
    expect(text).toContain(`2026-03-02 ${"█".repeat(30)} 60, 40 subtracted\n`);
    expect(text).toContain("2026-03-03 0\n");
    expect(text).toContain("All points of all users at the end of 2026-03-04: 127\nDays of Asia/Tokyo\n");
  });

  test.each([
    [["--from", "2026-02-30"], 2, 'from 1970 to 9999: received "2026-02-30"'],
    [["--campaign", "a b"], 2, "campaign must be 1 to 64 of"],
    [["--day"], 2, "Usage: bun run totals"],
  ])("refuses %p", async (args, code, reason) => {
    const run = runCommand(args);
    expect(await run.exited).toBe(code);
    expect(await new Response(run.stderr).text()).toContain(reason);
  });
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
