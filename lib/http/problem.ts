import { ExpectedError } from "../errors.ts";

/** An error of HTTP itself, before any rule of the domain. */
export class HttpError extends ExpectedError {
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

/** The name of an HTTP status. */
export function titleOf(status: number): string {
  return TITLES[status] ?? "Error";
}

/** The contents of a problem besides its status and detail. */
export interface ProblemOptions {
  /** One sentence per broken rule. */
  errors: string[];
  headers?: Record<string, string>;
  /** The id of the error in the log. */
  requestId?: string;
  /** Members in addition to those of the RFC, for programs. */
  facts?: Record<string, unknown> | undefined;
}

/** An error answer as RFC 9457 defines it. */
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
