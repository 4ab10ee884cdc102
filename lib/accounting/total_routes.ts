import { type Static, Type } from "@sinclair/typebox";
import { Elysia } from "elysia";
import Negotiator from "negotiator";
import type { Database } from "../database.ts";
import { described, objectSchema, optional, parseFields } from "../field.ts";
import {
  answer,
  describe,
  type Outgoing,
  orNull,
  refusal,
  refused,
  Time,
  UNAVAILABLE,
} from "../http/describe.ts";
import { NOW } from "../http/examples.ts";
import { parseQuery } from "../http/request.ts";
import { digitsOf, EntryKindName } from "../points/point.ts";
import { campaignField } from "../reservations/reservation.ts";
import { type DailyTotal, dailyTotalOf, TOTAL_COLUMNS } from "./daily_total.ts";
import { dayField, MAX_DAYS, newDays } from "./day.ts";
import { findAggregatedAt, findAggregation, findBalances, findTotals } from "./total_repository.ts";

/** `GET /point/totals`. */
export function totalRoutes({ database }: { database: Database }) {
  return new Elysia().get(
    "/point/totals",
    async ({ request }) => {
      const { campaign, ...range } = parseQuery(request, totalFields);
      const { generation, timeZone } = await findAggregation(database);
      const days = newDays(range, { timeZone: timeZone || "UTC" });
      const found = await findTotals(database, { generation, ...days, campaign });
      const totals = found.map(dailyTotalOf);
      if (prefersCsv(request)) {
        return new Response(toCsv(totals), { headers: { "content-type": "text/csv; charset=utf-8" } });
      }
      const answer: Outgoing<Static<typeof Totals>> = {
        time_zone: timeZone || null,
        from: days.from,
        to: days.to,
        aggregated_at: await findAggregatedAt(database),
        totals: totals.map((total) => ({ ...total, points: digitsOf(total.points) })),
      };
      if (campaign !== undefined) return Response.json(answer);
      const balances = await findBalances(database, found, { generation, ...days });
      const shown = balances.map(({ day, pointNum }) => ({ day, point_num: digitsOf(pointNum) }));
      return Response.json({ ...answer, balances: shown });
    },
    LIST_TOTALS,
  );
}

const totalFields = {
  from: optional(described(dayField, "the first day; if left out, 31 days until `to`")),
  to: optional(described(dayField, "the last day; if left out, today")),
  campaign: optional(campaignField),
};

const Total = Type.Object({
  day: dayField.schema,
  kind: EntryKindName,
  campaign: orNull(campaignField.schema, "null if it has none"),
  entries: Type.Integer({ description: "ledger entries" }),
  points: Type.Integer({ description: "their sum; negative for `sub`" }),
  users: Type.Integer({ description: "distinct users; they cannot be added up over several rows" }),
  late_ms_mean: orNull(Type.Integer(), "mean time from execute_at to the grant; null except for grants"),
  late_ms_max: orNull(Type.Integer(), "longest time from execute_at to the grant; null except for grants"),
});
const DayBalance = Type.Object({
  day: dayField.schema,
  point_num: Type.Integer({
    description: "up to 9223372036854775807, more than some JSON parsers can hold",
  }),
});
const Totals = Type.Object({
  time_zone: orNull(Type.String(), "the time zone of the days; null before anything was counted"),
  from: dayField.schema,
  to: dayField.schema,
  aggregated_at: orNull(
    Time,
    "when all entries had last been counted; null while they are counted from scratch",
  ),
  totals: Type.Array(Total, { description: "by day, kind and campaign" }),
  balances: Type.Optional(
    Type.Array(DayBalance, {
      description: "all points of all users at the end of each day; left out if `campaign` is given",
    }),
  ),
});

/** Whether the client prefers CSV to JSON. */
function prefersCsv(request: Request): boolean {
  const headers = { accept: request.headers.get("accept") ?? undefined };
  return new Negotiator({ headers }).mediaType(["application/json", "text/csv"]) === "text/csv";
}

/** The totals as CSV (RFC 4180). No value holds a comma or a quote. */
function toCsv(totals: readonly DailyTotal[]): string {
  const lines = totals.map((total) => TOTAL_COLUMNS.map((column) => total[column] ?? "").join(","));
  return [TOTAL_COLUMNS.join(","), ...lines].map((line) => `${line}\r\n`).join("");
}

const LIST_TOTALS = describe({
  summary: "Points per day",
  description: `The ledger by day, kind and campaign, and all points of all users at the end of each day, for at most ${MAX_DAYS} days. A day is one of \`time_zone\`. The schedulers count new entries every hour; \`bun run aggregate\` does so at once. As CSV if the header Accept prefers text/csv: the columns of \`totals\`, with their names in the first line.`,
  query: objectSchema(totalFields),
  answers: {
    200: {
      ...answer(Totals, "The totals", {
        "two days": {
          query: { from: "2026-01-31", to: "2026-02-01" },
          answer: {
            time_zone: "Asia/Tokyo",
            from: "2026-01-31",
            to: "2026-02-01",
            aggregated_at: NOW,
            totals: [
              {
                day: "2026-02-01",
                kind: "grant",
                campaign: "summer-2029",
                entries: 1,
                points: 100,
                users: 1,
                late_ms_mean: 0,
                late_ms_max: 0,
              },
              {
                day: "2026-02-01",
                kind: "sub",
                campaign: null,
                entries: 1,
                points: -20,
                users: 1,
                late_ms_mean: null,
                late_ms_max: null,
              },
            ],
            balances: [
              { day: "2026-01-31", point_num: 50 },
              { day: "2026-02-01", point_num: 130 },
            ],
          },
        },
      }),
      alsoAs: "text/csv",
    },
  },
  refusals: {
    400: refusal("Broken rules, or more than 10000 totals", {
      "no day": refused({ query: { from: "31.1.2026" } }, ({ query }) =>
        parseFields(totalFields, query, { what: "query" }),
      ),
      "the wrong order": refused({ query: { from: "2026-02-02", to: "2026-02-01" } }, ({ query }) =>
        newDays(query, { timeZone: "UTC" }),
      ),
    }),
    ...UNAVAILABLE,
  },
});
