import { beforeEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { dayOf } from "../../lib/accounting/day.ts";
import { openApp } from "../harness/app.ts";
import { emptyTables, openTestDatabase } from "../harness/database.ts";
import { fillTotals } from "./filled.ts";

setDefaultTimeout(30_000);

const db = await openTestDatabase();
const { app, send } = openApp(db);
beforeEach(async () => {
  await emptyTables(db);
  await fillTotals(db);
});

const DAYS = "from=2026-03-01&to=2026-03-05";
const CSV = `day,kind,campaign,entries,points,users,late_ms_mean,late_ms_max
2026-03-01,grant,spring,1,100,1,5,5
2026-03-02,grant,,1,30,1,2,2
2026-03-02,grant,spring,2,30,2,4,8
2026-03-02,sub,,1,-40,1,,
2026-03-04,add,,1,7,1,,
`;

/** The totals as JSON, by what the CSV says. */
const TOTALS = CSV.trim()
  .split("\n")
  .slice(1)
  .map((line) => {
    const [day, kind, campaign, ...figures] = line.split(",");
    const [entries, points, users, late_ms_mean, late_ms_max] = figures.map((text) =>
      text ? Number(text) : null,
    );
    return { day, kind, campaign: campaign || null, entries, points, users, late_ms_mean, late_ms_max };
  });

function get(query: string, accept?: string) {
  return send("GET", `/point/totals?${query}`, accept === undefined ? {} : { headers: { accept } });
}

/** A total that was counted on 2026-05-05. */
function insertTotals(rows: [campaign: string, points: string][]) {
  return db.query(
    "insert into point_daily_totals (generation, day, kind, campaign, entries, points, users) values ?",
    [rows.map(([campaign, points]) => [1, "2026-05-05", "grant", campaign, 1, points, 1])],
  );
}

describe("GET /point/totals", () => {
  test("gives totals by day, kind and campaign, and what all users had at each day's end", async () => {
    expect(await get(DAYS)).toMatchObject({
      status: 200,
      body: {
        time_zone: "Asia/Tokyo",
        from: "2026-03-01",
        to: "2026-03-05",
        aggregated_at: expect.stringMatching(/^\d{4}-.*Z$/),
        totals: TOTALS,
        balances: [100, 120, 120, 127, 127].map((point_num, index) => ({
          day: `2026-03-0${index + 1}`,
          point_num,
        })),
      },
    });
    const { body } = await get("from=2026-03-03&to=2026-03-03");
    expect(body).toMatchObject({ totals: [], balances: [{ day: "2026-03-03", point_num: 120 }] });
  });

  test("gives one campaign's, without balances", async () => {
    const { body } = await get(`${DAYS}&campaign=spring`);
    expect(body).toMatchObject({ totals: TOTALS.filter(({ campaign }) => campaign === "spring") });
    expect(body).not.toHaveProperty("balances");
  });

  test("without days gives the last 31, by its own zone", async () => {
    const before = dayOf(new Date(), "Asia/Tokyo");
    const { body } = await send("GET", "/point/totals");
    const { to, balances } = body as { to: string; balances: unknown[] };
    expect([before, dayOf(new Date(), "Asia/Tokyo")]).toContain(to);
    expect(balances).toHaveLength(31);
  });

  test.each([
    ["text/csv", "text/csv;charset=utf-8"],
    ["text/csv, application/json;q=0.5", "text/csv;charset=utf-8"],
    ["text/csv;q=0.5, application/json", "application/json;charset=utf-8"],
    ["*/*", "application/json;charset=utf-8"],
    ["image/png", "application/json;charset=utf-8"],
    ["", "application/json;charset=utf-8"],
  ])("answers Accept: %s with %s", async (accept, type) => {
    const { headers } = await get(DAYS, accept);
    expect(headers.get("content-type")?.replace(" ", "")).toBe(type);
  });

  test("gives the same as CSV", async () => {
    const { body } = await get(DAYS, "text/csv");
    expect(body).toBe(CSV.replaceAll("\n", "\r\n"));
  });

  test("refuses more totals than one answer holds, and says what to ask for", async () => {
    await insertTotals(Array.from({ length: 10_001 }, (_, index) => [`c${index}`, "1"]));
    const day = "from=2026-05-05&to=2026-05-05";
    expect(await get(day)).toMatchObject({
      status: 400,
      body: {
        errors: ["totals must be at most 10000"],
        detail: expect.stringContaining("ask for fewer days, or one campaign"),
      },
    });
    expect((await get(`${day}&campaign=c10000`)).status).toBe(200);
  });

  test("gives all digits of what no JavaScript number holds", async () => {
    await insertTotals([["big", "9007199254740993"]]);
    const response = await app.handle(
      new Request("http://localhost/point/totals?from=2026-05-05&to=2026-05-05"),
    );
    const text = await response.text();
    expect(text).toContain('"points":9007199254740993');
    expect(text).toContain('"point_num":9007199254741120');
    expect((await get("from=2026-05-05&to=2026-05-05", "text/csv")).body).toContain(",9007199254740993,");
  });
});
