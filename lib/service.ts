import { type Logger, pino } from "pino";
import { type Database, DatabaseError } from "./database.ts";
import { DomainError, ForeseenError } from "./errors.ts";
import { problem } from "./http.ts";
import { retry, withDeadline } from "./loop.ts";

/** How long a process may take to finish what is in hand, in milliseconds; 10 s are promised. */
const SHUTDOWN_MS = 9_000;
/** How long `/ready` waits for what it asks, in milliseconds: less than the patience of the usual probes. */
const READY_MS = 2_000;

/** What a process is given to run with. */
export interface Service<Config> {
  config: Config;
  logger: Logger;
  /** Aborted by SIGTERM or SIGINT: finish what is in hand, then return. */
  signal: AbortSignal;
}

export interface ServiceOptions<Config> {
  name: string;
  /** Reads the settings; what it throws is logged in one line and ends the process. */
  configure: () => Config;
  main: (service: Service<Config>) => Promise<void>;
}

/**
 * Runs a process: structured logs, signals, exit codes. Exit 0 when `main` returns, 1 when it throws or takes longer than
 * 9 s after a signal, 130 or 143 at once on a second signal.
 */
export async function runService<Config extends { LOG_LEVEL: string }>(
  options: ServiceOptions<Config>,
): Promise<never> {
  const { name, configure, main } = options;
  let logger = openLogger(name, "info");
  const stop = new AbortController();
  process.on("unhandledRejection", (error) => {
    logger.fatal({ error: describeError(error) }, "unforeseen error");
    process.exit(1);
  });
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    process.on(signal, () => {
      if (stop.signal.aborted) process.exit(signal === "SIGINT" ? 130 : 143);
      logger.info({ signal }, "stopping");
      setTimeout(() => {
        logger.error(`could not finish within ${SHUTDOWN_MS} ms; what is open will be done again`);
        process.exit(1);
      }, SHUTDOWN_MS).unref();
      stop.abort();
    });
  }
  try {
    const config = configure();
    logger = openLogger(name, config.LOG_LEVEL);
    await main({ config, logger, signal: stop.signal });
  } catch (error) {
    if (error instanceof ForeseenError) logger.fatal(error.message);
    else logger.fatal({ error: describeError(error) }, "unforeseen error");
    process.exit(1);
  }
  logger.info("stopped");
  process.exit(0);
}

function openLogger(name: string, level: string): Logger {
  return pino({
    name,
    level,
    timestamp: pino.stdTimeFunctions.isoTime,
    formatters: { level: (label) => ({ level: label }) },
  });
}

/** An error as a log may show it: whole where it is unforeseen, without the stack where the message says all. */
export function describeError(error: unknown): Record<string, unknown> {
  if (error instanceof ForeseenError) return { name: error.name, message: error.message };
  if (error instanceof Error) return { name: error.name, message: error.message, stack: error.stack };
  return { message: String(error) };
}

/** Says in the log that a piece of work in MySQL starts again, and why: many of these are a storm of deadlocks. */
export function logRetry(logger: Logger): (error: DatabaseError, attempt: number) => void {
  return (error, attempt) => logger.warn({ error: describeError(error), attempt }, "starting again in MySQL");
}

/**
 * Waits until MySQL answers and `check` passes, saying so in the log, for as long as it takes.
 *
 * @returns false where `signal` was aborted first
 * @throws what `check` throws, outages of MySQL excepted
 */
export async function waitForDatabase(
  check: () => Promise<void>,
  { signal, logger }: { signal: AbortSignal; logger: Logger },
): Promise<boolean> {
  let waited = false;
  await retry(check, {
    signal,
    onFailure(error, retryInMs) {
      if (!(error instanceof DatabaseError && error.isOutage)) throw error;
      logger.warn({ error: describeError(error), retryInMs }, "waiting for MySQL");
      waited = true;
    },
  });
  if (waited && !signal.aborted) logger.info("MySQL answers again");
  return !signal.aborted;
}

/** Throws where MySQL does not answer, a DatabaseError with the reason. */
export async function pingDatabase(database: Database): Promise<void> {
  await database.run((connection) => connection.select("select 1"));
}

/** Resolves when `signal` is aborted. */
export function aborted(signal: AbortSignal): Promise<void> {
  if (signal.aborted) return Promise.resolve();
  return new Promise((resolve) => signal.addEventListener("abort", () => resolve(), { once: true }));
}

/** True where `isReady` says so within 2 s. */
export async function isReadyInTime(isReady: () => Promise<boolean>): Promise<boolean> {
  return withDeadline(isReady(), READY_MS, () => new Error("late")).catch(() => false);
}

export interface HealthOptions {
  hostname: string;
  port: number;
  logger: Logger;
  /** Whether the process can do its work now. */
  isReady: () => Promise<boolean>;
  /** Figures for a monitoring system by their names; undefined where one is not known yet. Without it there are none. */
  metrics?: () => Promise<Record<string, number | undefined>>;
}

/**
 * Serves `/health` (200: the process lives), `/ready` (200 or 503) and, where there are any, `/metrics` in the text format of
 * Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/).
 *
 * @throws {DomainError} CANNOT_LISTEN where the port is taken
 */
export function serveHealth({ hostname, port, logger, isReady, metrics }: HealthOptions): {
  stop(): Promise<void>;
} {
  const server = listen({
    hostname,
    port,
    async fetch(request) {
      const { pathname } = new URL(request.url);
      if (pathname === "/health") return Response.json({ messages: ["ok"] });
      if (pathname === "/metrics" && metrics) return showMetrics(metrics);
      if (pathname !== "/ready")
        return problem(404, "There are /health and /ready", { errors: ["route not found"] });
      return (await isReadyInTime(isReady))
        ? Response.json({ messages: ["ok"] })
        : problem(503, "The process cannot do its work now; its log says why", { errors: ["not ready"] });
    },
    logger,
  });
  logger.info({ url: server.url.href }, "health is served");
  return { stop: () => server.stop(true) };
}

/** Gauges; 503 where they cannot be read in time. */
async function showMetrics(metrics: NonNullable<HealthOptions["metrics"]>): Promise<Response> {
  const late = () => new Error("late");
  const values = await withDeadline(metrics(), READY_MS, late).catch(() => undefined);
  if (!values) return problem(503, "MySQL does not answer", { errors: ["metrics are unavailable"] });
  const lines = Object.entries(values)
    .filter(([, value]) => value !== undefined)
    .map(([name, value]) => `# TYPE ${name} gauge\n${name} ${value}\n`);
  return new Response(lines.join(""), { headers: { "content-type": "text/plain; version=0.0.4" } });
}

export interface ListenOptions {
  hostname: string;
  port: number;
  fetch: (request: Request) => Response | Promise<Response>;
  logger: Logger;
}

/**
 * Listens for HTTP.
 *
 * @throws {DomainError} CANNOT_LISTEN where the port is taken, with the address
 */
export function listen({ hostname, port, fetch, logger }: ListenOptions): Bun.Server<undefined> {
  try {
    return Bun.serve({
      hostname,
      port,
      // Two processes would silently share a port, and a forgotten one take half of the requests.
      reusePort: false,
      // Bun's own 413 has no body: the handler refuses long before this, in the words of the interface.
      maxRequestBodySize: Number.MAX_SAFE_INTEGER,
      idleTimeout: 30,
      // Its page would show the code to whoever finds an error.
      development: false,
      error(error) {
        logger.error({ error: describeError(error) }, "request failed");
        return problem(500, "An unforeseen error", { errors: ["internal error"] });
      },
      fetch(request) {
        if (URL.canParse(request.url)) return fetch(request);
        // HTTP/1.0 needs no Host, and some load balancers ask for /health without one.
        if (request.url.startsWith("/")) return fetch(new Request(`http://localhost${request.url}`, request));
        return problem(400, "The header Host must be a host name, with or without a port", {
          errors: ["host is invalid"],
        });
      },
    });
  } catch (error) {
    const isTaken = (error as { code?: string }).code === "EADDRINUSE";
    const reason = isTaken ? "the port is taken" : "HOST must be an address of this machine";
    throw new DomainError("CANNOT_LISTEN", `Cannot listen on ${hostname}:${port}: ${reason}`);
  }
}
