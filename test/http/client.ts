import { expect } from "bun:test";
import type { Database } from "../../lib/database.ts";
import type { Readiness } from "../../lib/service/readiness.ts";
import { openApp } from "../harness/app.ts";

export type Send = (path: string, init?: RequestInit) => Promise<Response>;

/** The app in this process, and what it logs. `send` takes what `fetch()` takes, and gives the whole `Response`. */
export function appOn(database: Database, readiness?: Readiness) {
  const { app, log } = openApp({ database, ...(readiness && { readiness }) });
  const send: Send = async (path, init) => app.handle(new Request(`http://localhost${path}`, init));
  return { app, send, log };
}

/** A valid reservation as a client writes it. */
export function bodyOf(fields: Record<string, unknown> = {}) {
  return { user_id: "TestUser01", point_amount: 100, execute_at: "2029-02-22T22:59:00+09:00", ...fields };
}

/** A request with a body of JSON; a text is sent as it is. */
export function json(method: "POST" | "PUT" | "PATCH", body: unknown, headers: Record<string, string> = {}) {
  const text = typeof body === "string" ? body : JSON.stringify(body);
  return { method, body: text, headers: { "content-type": "application/json", ...headers } };
}

export function post(body: unknown, headers?: Record<string, string>) {
  return json("POST", body, headers);
}

/** A POST whose body comes in seven chunks, without its length. */
export function streamed(text: string): RequestInit {
  const bytes = Buffer.from(text);
  const chunkBytes = Math.ceil(bytes.length / 7);
  const body = new ReadableStream({
    async start(controller) {
      for (let at = 0; at < bytes.length; at += chunkBytes) {
        controller.enqueue(bytes.subarray(at, at + chunkBytes));
        await Bun.sleep(0);
      }
      controller.close();
    },
  });
  return { ...post(""), body };
}

const TITLES: Record<number, string> = {
  400: "Bad Request",
  404: "Not Found",
  405: "Method Not Allowed",
  408: "Request Timeout",
  409: "Conflict",
  413: "Content Too Large",
  415: "Unsupported Media Type",
  422: "Unprocessable Content",
  500: "Internal Server Error",
  503: "Service Unavailable",
};

/** The members of a 409 that say where the reservation stands. */
const FACTS = ["reservation_id", "reservation_status", "granted_at", "transaction_id"];

/** Checks that an answer is a problem of RFC 9457 with these sentences, and shows nothing of the inside. */
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
