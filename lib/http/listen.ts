import type { Logger } from "pino";
import { DomainError, describeError } from "../errors.ts";
import { perSecond } from "../log.ts";
import { problem } from "./problem.ts";

/** Answers one request. */
export type Fetch = (request: Request) => Response | Promise<Response>;

/** A server that listens. */
export type Server = Bun.Server<undefined>;

export interface ListenOptions {
  hostname: string;
  port: number;
  fetch: Fetch;
  logger: Logger;
}

/**
 * Listens for HTTP.
 *
 * @throws {DomainError} CANNOT_LISTEN, with the address, if the port is taken or the address is not one of this machine
 */
export function listen({ hostname, port, fetch, logger }: ListenOptions): Server {
  try {
    return Bun.serve({
      hostname,
      port,
      // Otherwise two processes could share a port, and a forgotten one would get half of the requests.
      reusePort: false,
      // Bun's own 413 has no body. Our handler has a far smaller limit, and answers with a problem.
      maxRequestBodySize: Number.MAX_SAFE_INTEGER,
      idleTimeout: 30,
      // Bun's error page would show source code.
      development: false,
      error(error) {
        perSecond(logger).error({ error: describeError(error) }, "request failed");
        return problem(500, "Unexpected error", { errors: ["internal error"] });
      },
      fetch(request) {
        if (URL.canParse(request.url)) return fetch(request);
        // HTTP/1.0 needs no Host, and some load balancers send none with GET /health.
        if (request.url.startsWith("/")) return fetch(new Request(`http://localhost${request.url}`, request));
        const detail = "The header Host must be a host name, with or without a port";
        return problem(400, detail, { errors: ["host is invalid"] });
      },
    });
  } catch (error) {
    const isTaken = (error as { code?: string }).code === "EADDRINUSE";
    const reason = isTaken ? "the port is taken" : "HOST must be an address of this machine";
    throw new DomainError("CANNOT_LISTEN", `Cannot listen on ${hostname}:${port}: ${reason}`);
  }
}
