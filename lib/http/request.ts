import type { DomainError } from "../errors.ts";
import { showValue } from "../errors.ts";
import { type Fields, invalidInput, parseFields, type Values } from "../field.ts";
import { withDeadline } from "../loop.ts";
import { HttpError } from "./problem.ts";

/** The largest body of an ordinary request, in bytes. */
const MAX_BODY_BYTES = 64 * 1024;
/** The longest time that a body may take to arrive, in milliseconds. */
const BODY_MS = 10_000;
/** The limits of requests that are combined into one batch for MySQL. */
export const BATCHING = {
  /** At 256 connections, batches of 128 reached 1.0 × and batches of 64 reached 0.8 × the reservations of this. */
  maxBatch: 500,
  /** More are refused with 503, since their answers would be too late. */
  maxWaiting: 10_000,
  /** A request that no batch has taken after this time is refused with 503. */
  maxWaitMs: 5_000,
};
const UTF_8 = new TextDecoder("utf-8", { fatal: true });

/**
 * Reads a body of JSON in UTF-8.
 *
 * @throws {HttpError} 415; 413 if it is larger than `maxBytes`; 408 if it does not arrive within 10 s
 * @throws {DomainError} INVALID_INPUT
 */
export async function readJson(request: Request, { maxBytes = MAX_BODY_BYTES } = {}): Promise<unknown> {
  const type = request.headers.get("content-type") ?? undefined;
  const encoding = request.headers.get("content-encoding") ?? "identity";
  if (!type || !/^application\/json\s*(;\s*charset="?utf-8"?\s*)?$/i.test(type) || encoding !== "identity") {
    throw new HttpError(
      415,
      "content type must be application/json",
      `The body must be application/json in UTF-8, not compressed: received content-type ${showValue(type)}, content-encoding ${showValue(encoding)}`,
    );
  }
  if (Number(request.headers.get("content-length")) > maxBytes) throw tooLarge(maxBytes);
  const tooSlow = () => new HttpError(408, "body is too slow", `The body must arrive within ${BODY_MS} ms`);
  const body = await withDeadline(readBytes(request, maxBytes), BODY_MS, tooSlow);
  try {
    return JSON.parse(UTF_8.decode(body));
  } catch {
    const explanation = `the body must be JSON in UTF-8: received ${body.byteLength} bytes of something else`;
    throw invalidInput("body", [{ sentence: "body must be JSON", explanation }]);
  }
}

function tooLarge(maxBytes: number): HttpError {
  return new HttpError(413, "body is too large", `The body must not be larger than ${maxBytes} bytes`);
}

async function readBytes(request: Request, maxBytes: number): Promise<Uint8Array> {
  const chunks: Uint8Array[] = [];
  let bytes = 0;
  try {
    // The server reads no more bytes than the header names; reading them at once costs a quarter of reading in chunks.
    if (request.headers.has("content-length")) return await request.bytes();
    for await (const chunk of request.body ?? []) {
      bytes += chunk.byteLength;
      if (bytes > maxBytes) throw tooLarge(maxBytes);
      chunks.push(chunk);
    }
  } catch (error) {
    if (error instanceof HttpError) throw error;
    throw new HttpError(400, "body is incomplete", `The body ended after ${bytes} bytes`);
  }
  return Buffer.concat(chunks);
}

/**
 * Parses the query of a URL.
 *
 * @throws {DomainError} INVALID_INPUT, with every broken rule
 */
export function parseQuery<F extends Fields>(request: Request, fields: F): Values<F> {
  const query: Record<string, unknown> = Object.create(null);
  for (const [name, text] of new URL(request.url).searchParams) {
    if (Object.hasOwn(query, name)) throw givenTwice(name);
    // Every object has a `constructor`.
    const field = Object.hasOwn(fields, name) ? fields[name] : undefined;
    const isNumber = field?.schema.type === "integer" && /^\d{1,15}$/.test(text);
    query[name] = isNumber ? Number(text) : text;
  }
  return parseQueryFields(fields, query);
}

/**
 * Parses the parameters of a query, by name.
 *
 * @throws {DomainError} INVALID_INPUT, with every broken rule
 */
export function parseQueryFields<F extends Fields>(fields: F, query: unknown): Values<F> {
  return parseFields(fields, query, { what: "query" });
}

function givenTwice(name: string): DomainError {
  const explanation = `the query must name ${showValue(name)} at most once`;
  return invalidInput("query", [{ sentence: "a parameter is given twice", explanation }]);
}

/** The header `Idempotency-Key`. */
export function headerKeyOf(request: Request): string | undefined {
  return request.headers.get("idempotency-key") ?? undefined;
}

/** The error for a path and method without a route: 405 with the allowed methods if the path has others, else 404. */
export function noRoute(request: Request, routes: readonly { method: string; path: string }[]): HttpError {
  const { pathname } = new URL(request.url);
  const methods = routes
    .filter(({ path }) =>
      new RegExp(`^${path.replace(/:\w+/g, "[^/]+").replace(/\/$/, "")}/?$`).test(pathname),
    )
    .flatMap(({ method }) => (method === "GET" ? ["GET", "HEAD"] : [method]));
  if (methods.length === 0) {
    return new HttpError(404, "route not found", `No route has the path ${showValue(pathname)}`);
  }
  const allow = [...new Set(methods)].join(", ");
  return new HttpError(405, "method not allowed", `${pathname} allows ${allow}: received ${request.method}`, {
    allow,
  });
}
