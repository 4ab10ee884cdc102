import type { Fetch } from "../http/listen.ts";
import { problem } from "../http/problem.ts";
import { withDeadline } from "../loop.ts";
import type { Service } from "./run_service.ts";

/** The longest wait of `/ready` and `/metrics` for MySQL, in milliseconds: shorter than the usual timeouts of probes. */
const READY_MS = 2_000;

/** Figures for a monitoring system, by name; undefined if a figure is not known yet. */
export type Metrics = Record<string, number | undefined>;

/**
 * Makes the handler of `/health` (200: the process runs), `/ready` (200 or 503) and, with `metrics`, `/metrics` in the text
 * format of Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/).
 */
export function serveHealth(
  { logger, server, isReady }: Pick<Service, "logger" | "server" | "isReady">,
  { metrics }: { metrics?: () => Promise<Metrics> } = {},
): Fetch {
  logger.info({ url: server.url.href }, "serving health checks");
  return async (request) => {
    const { pathname } = new URL(request.url);
    if (pathname === "/health") return Response.json({ messages: ["ok"] });
    if (pathname === "/metrics" && metrics) return showMetrics(metrics);
    if (pathname !== "/ready") {
      return problem(404, "The paths are /health, /ready and /metrics (scheduler)", {
        errors: ["route not found"],
      });
    }
    return (await isReadyInTime(isReady))
      ? Response.json({ messages: ["ok"] })
      : problem(503, "The process cannot do its work now; its log has the reason", { errors: ["not ready"] });
  };
}

/** Whether `isReady` resolves to true within 2 s. */
export async function isReadyInTime(isReady: () => Promise<boolean>): Promise<boolean> {
  return withDeadline(isReady(), READY_MS, () => new Error("late")).catch(() => false);
}

async function showMetrics(metrics: () => Promise<Metrics>): Promise<Response> {
  const values = await withDeadline(metrics(), READY_MS, () => new Error("late")).catch(() => undefined);
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
export function serveOnceChecked({ isChecked }: Pick<Service, "isChecked">, fetch: Fetch): Fetch {
  return (request) => (isChecked() || isHealth(request) ? fetch(request) : notReady());
}

function isHealth(request: Request): boolean {
  return /^\/(health\/?)?$/.test(new URL(request.url).pathname);
}

/** The answer while MySQL is unavailable. */
export function notReady(): Response {
  return problem(503, "MySQL does not answer", { errors: ["not ready"], headers: { "retry-after": "1" } });
}
