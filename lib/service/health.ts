import type { Fetch } from "../http/listen.ts";
import { problem } from "../http/problem.ts";
import { withDeadline } from "../loop.ts";
import type { Readiness } from "./readiness.ts";
import type { Service } from "./run_service.ts";

/** The longest wait of `/metrics` for MySQL, in milliseconds: shorter than the usual timeouts of monitoring systems. */
const METRICS_MS = 2_000;

/** Figures for a monitoring system, by name; undefined if a figure is not known yet. */
export type Metrics = Record<string, number | undefined>;

/**
 * Makes the handler of `/health` (200: the process runs), `/ready` (200 or 503) and, with `metrics`, `/metrics` in the text
 * format of Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/).
 */
export function serveHealth(
  { logger, server, readiness }: Pick<Service, "logger" | "server" | "readiness">,
  { metrics }: { metrics?: () => Promise<Metrics> } = {},
): Fetch {
  logger.info({ url: server.url.href }, "serving health checks");
  return async (request) => {
    const { pathname } = new URL(request.url);
    if (pathname === "/health") return answerOk();
    if (pathname === "/ready") return answerReady(readiness);
    if (pathname === "/metrics" && metrics) return showMetrics(metrics);
    const paths = metrics ? "/health, /ready and /metrics" : "/health and /ready";
    return problem(404, `The paths are ${paths}`, { errors: ["route not found"] });
  };
}

/** The answer that all is well. */
export function answerOk(): Response {
  return Response.json({ messages: ["ok"] });
}

/** 200, or 503 with what fails and since when. */
export function answerReady({ unready }: Readiness): Response {
  if (!unready) return answerOk();
  return problem(503, `Not ready since ${unready.since.toISOString()}: ${unready.reason}`, {
    errors: ["not ready"],
    headers: { "retry-after": "1" },
  });
}

async function showMetrics(metrics: () => Promise<Metrics>): Promise<Response> {
  const values = await withDeadline(metrics(), METRICS_MS, () => new Error("late")).catch(() => undefined);
  if (!values) return problem(503, "MySQL does not answer", { errors: ["metrics are unavailable"] });
  const lines = Object.entries(values)
    .filter(([, value]) => value !== undefined)
    .map(([name, value]) => `# TYPE ${name} gauge\n${name} ${value}\n`);
  return new Response(lines.join(""), { headers: { "content-type": "text/plain; version=0.0.4" } });
}

/**
 * Makes a handler that passes only health checks to `fetch` until MySQL is checked, and then all requests: before that, the
 * service must not promise anything.
 */
export function serveOnceChecked(
  { isChecked, readiness }: Pick<Service, "isChecked" | "readiness">,
  fetch: Fetch,
): Fetch {
  return (request) => (isChecked() || isHealth(request) ? fetch(request) : answerReady(readiness));
}

function isHealth(request: Request): boolean {
  return /^\/(health\/?)?$/.test(new URL(request.url).pathname);
}
