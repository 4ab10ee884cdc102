import { type Static, Type } from "@sinclair/typebox";
import { Elysia } from "elysia";
import Negotiator from "negotiator";
import type { Database } from "../database.ts";
import { described, objectSchema, optional } from "../field.ts";
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
import { parseQuery, parseQueryFields } from "../http/request.ts";
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
  from: optional(
    described(dayField, "the first day; by default, the first of the 31 days that end with `to`"),
  ),
  to: optional(described(dayField, "the last day; by default, today")),
  campaign: optional(campaignField),
};

const Total = Type.Object({
  day: dayField.schema,
  kind: EntryKindName,
  campaign: orNull(campaignField.schema, "null if there is none"),
  entries: Type.Integer({ description: "ledger entries" }),
  points: Type.Integer({ description: "the sum of the entries; negative for `sub`" }),
  users: Type.Integer({ description: "distinct users; do not add them up over several rows" }),
  late_ms_mean: orNull(
    Type.Integer(),
    "mean milliseconds from when it could be granted (execute_at, or later if it was made or changed later) to the grant; null for `add` and `sub`",
  ),
  late_ms_max: orNull(
    Type.Integer(),
    "maximum milliseconds from when it could be granted (execute_at, or later if it was made or changed later) to the grant; null for `add` and `sub`",
  ),
});
const DayBalance = Type.Object({
  day: dayField.schema,
  point_num: Type.Integer({
    description: "up to 9223372036854775807, more than some JSON parsers can hold",
  }),
});
const Totals = Type.Object({
  time_zone: orNull(Type.String(), "the time zone of the days; null before the first aggregation"),
  from: dayField.schema,
  to: dayField.schema,
  aggregated_at: orNull(
    Time,
    "when an aggregation last counted all entries; null before the first one, and while totals are recalculated",
  ),
  totals: Type.Array(Total, { description: "by day, kind and campaign" }),
  balances: Type.Optional(
    Type.Array(DayBalance, {
      description: "the sum of all balances at the end of each day; left out if `campaign` is given",
    }),
  ),
});

/** Whether the client prefers CSV to JSON. */
function prefersCsv(request: Request): boolean {
  const headers = { accept: request.headers.get("accept") ?? undefined };
  return new Negotiator({ headers }).mediaType(["application/json", "text/csv"]) === "text/csv";
}

/** The totals as CSV (RFC 4180). No value has a comma or a quote. */
function toCsv(totals: readonly DailyTotal[]): string {
  const lines = totals.map((total) => TOTAL_COLUMNS.map((column) => total[column] ?? "").join(","));
  return [TOTAL_COLUMNS.join(","), ...lines].map((line) => `${line}\r\n`).join("");
}

const LIST_TOTALS = describe({
  summary: "List the points per day",
  description: `The sums of the ledger by day, kind and campaign, and the sum of all balances at the end of each day, for at most ${MAX_DAYS} days. The days are those of \`time_zone\`. By default, the schedulers count new entries every hour; \`bun run aggregate\` counts them at once. If the header Accept prefers text/csv, the answer is CSV: the columns of \`totals\`, with their names in the first line.`,
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
    400: refusal("The request breaks rules, or there are more than 10,000 totals", {
      "not a day": refused({ query: { from: "31.1.2026" } }, ({ query }) =>
        parseQueryFields(totalFields, query),
      ),
      "the wrong order": refused({ query: { from: "2026-02-02", to: "2026-02-01" } }, ({ query }) =>
        newDays(query, { timeZone: "UTC" }),
      ),
    }),
    ...UNAVAILABLE,
  },
});
