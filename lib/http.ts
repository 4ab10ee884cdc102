import type { TObject } from "@sinclair/typebox";
import { DomainError, ForeseenError, showValue } from "./errors.ts";
import { withDeadline } from "./loop.ts";

/** An error of HTTP itself, before any rule of the domain. */
export class HttpError extends ForeseenError {
  override readonly name = "HttpError";

  constructor(
    readonly status: number,
    readonly sentence: string,
    message: string,
    readonly headers: Record<string, string> = {},
  ) {
    super(message);
  }
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

/** What an HTTP status is called. */
export function titleOf(status: number): string {
  return TITLES[status] ?? "Error";
}

export interface ProblemOptions {
  /** One sentence for each broken rule. */
  errors: string[];
  headers?: Record<string, string>;
  /** By which the log tells more. */
  requestId?: string;
  /** Members beyond those of the RFC, by which a program can tell what is the matter. */
  facts?: Record<string, unknown> | undefined;
}

/** An error as RFC 9457 has it. */
export function problem(
  status: number,
  detail: string,
  { errors, headers, requestId, facts }: ProblemOptions,
): Response {
  const body = { type: "about:blank", title: titleOf(status), status, detail, errors, ...facts };
  return new Response(JSON.stringify(requestId ? { ...body, request_id: requestId } : body), {
    status,
    headers: { ...headers, "content-type": "application/problem+json" },
  });
}

const UTF_8 = new TextDecoder("utf-8", { fatal: true });
/** How long a body may take to arrive, in milliseconds. */
const BODY_MS = 10_000;

/**
 * Reads a body of JSON in UTF-8.
 *
 * @throws {HttpError} 415; 413 where it is larger than `maxBytes`; 408 where it does not arrive within 10 s
 * @throws {DomainError} INVALID_INPUT
 */
export async function readJson(request: Request, { maxBytes }: { maxBytes: number }): Promise<unknown> {
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
    throw new DomainError("INVALID_INPUT", "The body breaks a rule", [
      {
        sentence: "body must be JSON",
        explanation: `the body must be JSON in UTF-8: received ${body.byteLength} bytes that are not`,
      },
    ]);
  }
}

function tooLarge(maxBytes: number): HttpError {
  return new HttpError(413, "body is too large", `The body must not be larger than ${maxBytes} bytes`);
}

async function readBytes(request: Request, maxBytes: number): Promise<Uint8Array> {
  const chunks: Uint8Array[] = [];
  let bytes = 0;
  try {
    // The server reads no more than a body says of itself; in one piece that costs a quarter of its parts.
    if (request.headers.has("content-length")) return await request.bytes();
    for await (const chunk of request.body ?? []) {
      bytes += chunk.byteLength;
      if (bytes > maxBytes) throw tooLarge(maxBytes);
      chunks.push(chunk);
    }
  } catch (error) {
    if (error instanceof HttpError) throw error;
    throw new HttpError(400, "body is incomplete", `The body broke off after ${bytes} bytes`);
  }
  return Buffer.concat(chunks);
}

/** A path that has other methods is 405 and names them; any other is 404. */
export function noRoute(request: Request, routes: readonly { method: string; path: string }[]): HttpError {
  const { pathname } = new URL(request.url);
  const methods = routes
    .filter(({ path }) =>
      new RegExp(`^${path.replace(/:\w+/g, "[^/]+").replace(/\/$/, "")}/?$`).test(pathname),
    )
    .flatMap(({ method }) => (method === "GET" ? ["GET", "HEAD"] : [method]));
  if (methods.length === 0) {
    return new HttpError(404, "route not found", `There is nothing at ${showValue(pathname)}`);
  }
  const allow = [...new Set(methods)].join(", ");
  return new HttpError(405, "method not allowed", `${pathname} takes ${allow}: received ${request.method}`, {
    allow,
  });
}

/**
 * What the query of a URL says, by name. Digits are numbers where the field is one.
 *
 * @throws {DomainError} INVALID_INPUT where a name comes twice
 */
export function readQuery(request: Request, schema: TObject): Record<string, unknown> {
  const query: Record<string, unknown> = Object.create(null);
  for (const [name, text] of new URL(request.url).searchParams) {
    if (Object.hasOwn(query, name)) {
      throw new DomainError("INVALID_INPUT", "The query breaks a rule", [
        {
          sentence: "a parameter is given twice",
          explanation: `the query must name ${showValue(name)} at most once`,
        },
      ]);
    }
    const isNumber = schema.properties[name]?.type === "integer" && /^\d{1,15}$/.test(text);
    query[name] = isNumber ? Number(text) : text;
  }
  return query;
}
