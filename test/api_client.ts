import { expect } from "bun:test";
import { pino } from "pino";
import { createApp } from "../api.ts";
import type { Database } from "../lib/database.ts";

export type Send = (path: string, init?: RequestInit) => Promise<Response>;

/** The app in this process, what it logs, and of which times it tells the schedulers. */
export function appOn(database: Database) {
  const log: Record<string, unknown>[] = [];
  const logger = pino({}, { write: (line: string) => log.push(JSON.parse(line)) });
  const hints: Date[] = [];
  const elysia = createApp({ database, logger, reserveBatch: 500, hint: (time) => hints.push(time) });
  const send: Send = async (path, init) => elysia.handle(new Request(`http://localhost${path}`, init));
  return { send, log, hints };
}

/** A valid reservation as a client writes it, with other fields where told. */
export function bodyOf(fields: Record<string, unknown> = {}) {
  return { user_id: "TestUser01", point_amount: 100, execute_at: "2029-02-22T22:59:00+09:00", ...fields };
}

/** A POST of JSON. */
export function post(body: unknown, headers: Record<string, string> = {}): RequestInit {
  const text = typeof body === "string" ? body : JSON.stringify(body);
  return { method: "POST", body: text, headers: { "content-type": "application/json", ...headers } };
}

const TITLES: Record<number, string> = {
  400: "Bad Request",
  404: "Not Found",
  405: "Method Not Allowed",
  409: "Conflict",
  413: "Content Too Large",
  415: "Unsupported Media Type",
  422: "Unprocessable Content",
  500: "Internal Server Error",
  503: "Service Unavailable",
};

/** What a 409 tells besides: where the reservation stands. */
const FACTS = ["reservation_id", "reservation_status", "granted_at", "transaction_id"];

/** Checks that an answer is the problem of RFC 9457 with these sentences, and that it tells nothing of the inside. */
export async function expectProblem(response: Response, status: number, errors: string[]) {
  expect(response.status).toBe(status);
  expect(response.headers.get("content-type")).toBe("application/problem+json");
  const text = await response.text();
  expect(text).not.toMatch(
    /ECONN|ER_|127\.0\.0\.1|localhost|select |insert |point_reservations|node_modules|\.ts|stack/,
  );
  const problem = JSON.parse(text);
  expect(problem).toMatchObject({ type: "about:blank", title: TITLES[status], status, errors });
  expect(problem.detail).toMatch(/\w/);
  const more = status === 409 ? FACTS : status >= 500 ? ["request_id"] : [];
  const known = ["type", "title", "status", "detail", "errors", ...more];
  expect(Object.keys(problem).filter((member) => !known.includes(member))).toEqual([]);
  return problem as { detail: string; request_id?: string } & Record<string, unknown>;
}
