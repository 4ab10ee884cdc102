import { pino } from "pino";
import { createApp } from "../../api.ts";
import type { Readiness } from "../../lib/service/readiness.ts";
import type { TestDatabase } from "./database.ts";

export interface SendOptions {
  /** Sent as JSON; a text as it is. */
  body?: unknown;
  headers?: Record<string, string>;
  query?: Record<string, string>;
}

export interface Answer {
  status: number;
  headers: Headers;
  /** What the JSON says, or the text of any other answer. */
  body: ReturnType<typeof JSON.parse>;
}

/** The HTTP interface in this process, without a port; what it logs, and of which times it tells the schedulers. */
export function openApp({
  database,
  readiness = { unready: undefined },
}: Pick<TestDatabase, "database"> & { readiness?: Readiness }) {
  const log: Record<string, unknown>[] = [];
  const hints: Date[] = [];
  const logger = pino({}, { write: (line: string) => log.push(JSON.parse(line)) });
  const app = createApp({ database, logger, readiness, hint: (time) => hints.push(time) });
  async function send(
    method: string,
    path: string,
    { body, headers = {}, query = {} }: SendOptions = {},
  ): Promise<Answer> {
    const url = new URL(path, "http://localhost");
    for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value);
    const request =
      body === undefined
        ? new Request(url.href, { method, headers })
        : new Request(url.href, {
            method,
            headers: { "content-type": "application/json", ...headers },
            body: typeof body === "string" ? body : JSON.stringify(body),
          });
    const response = await app.handle(request);
    const text = await response.text();
    const isJson = /[/+]json\b/.test(response.headers.get("content-type") ?? "");
    return { status: response.status, headers: response.headers, body: isJson ? JSON.parse(text) : text };
  }
  return { app, send, log, hints };
}
