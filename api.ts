// The API takes reservations over HTTP and shows their state. Each route is one section of a file in `lib/`.

import { openapi } from "@elysiajs/openapi";
import { Elysia, NotFoundError } from "elysia";
import type { Logger } from "pino";
import { totalRoutes } from "./lib/accounting/total_routes.ts";
import type { Database } from "./lib/database.ts";
import { answerError } from "./lib/http/error_answer.ts";
import { noRoute } from "./lib/http/request.ts";
import { aborted, sleep, withDeadline } from "./lib/loop.ts";
import { pointRoutes } from "./lib/points/point_routes.ts";
import { userRoutes } from "./lib/points/user_routes.ts";
import { campaignRoutes } from "./lib/reservations/campaign_routes.ts";
import { hintThrough } from "./lib/reservations/hint.ts";
import { reservationChangeRoutes } from "./lib/reservations/reservation_change_routes.ts";
import { reservationRoutes } from "./lib/reservations/reservation_routes.ts";
import { reserveRoutes } from "./lib/reservations/reserve_routes.ts";
import { reservedPointsRoutes } from "./lib/reservations/reserved_points_routes.ts";
import { API_TRIAL } from "./lib/reservations/trial_queries.ts";
import { serveOnceChecked } from "./lib/service/health.ts";
import { healthRoutes } from "./lib/service/health_routes.ts";
import type { Readiness } from "./lib/service/readiness.ts";
import { runService } from "./lib/service/run_service.ts";
import { version } from "./package.json" with { type: "json" };

const ABOUT = `Grants points at a promised time: once, not twice, not early, not lost.

Errors are application/problem+json (RFC 9457); \`errors\` has one sentence for each broken rule. After a 503, or if no answer
arrives, send the same request again: with an idempotency key it has no second effect. Replace the reservation ids of the examples
with ids of your own reservations, in the state that the name of the example gives.`;

/** How long to wait for a connection and for the work on it, in milliseconds: clients wait less long than a worker. */
const DATABASE = { acquireMs: 3_000, workMs: 5_000 };
/** How long open requests may take after a signal, in milliseconds. */
const STOP_MS = 5_000;

export interface AppOptions {
  database: Database;
  logger: Logger;
  readiness: Readiness;
  /** Called with the time at which a committed reservation is due, so that the schedulers do not sleep past it. */
  hint?: (executeAt: Date) => void;
}

/** The HTTP interface; `app.handle(request)` answers without a port. */
export function createApp({ database, logger, readiness, hint = () => {} }: AppOptions) {
  const routes: { method: string; path: string }[] = [];
  // Without this setting, Elysia takes a host of three characters for a part of the path.
  const app = new Elysia({ handler: { standardHostname: false } })
    // Before the routes: a handler that is registered after them is not called.
    .onError({ as: "global" }, ({ error, request }) =>
      // Not by `code`: Elysia copies it from any error that has one, e.g. a DomainError.
      answerError(error instanceof NotFoundError ? noRoute(request, routes) : error, logger),
    )
    .use(openapi({ documentation: { info: { title: "pointservice", version, description: ABOUT } } }))
    .use(healthRoutes({ readiness }))
    .use(reserveRoutes({ database, hint }))
    .use(reservationRoutes({ database }))
    .use(reservationChangeRoutes({ database, hint }))
    .use(campaignRoutes({ database }))
    .use(userRoutes({ database }))
    .use(reservedPointsRoutes({ database }))
    .use(totalRoutes({ database }))
    .use(pointRoutes({ database }));
  routes.push(...app.routes);
  return app;
}

/** The types of a client. */
export type App = ReturnType<typeof createApp>;

if (import.meta.main) {
  await runService({
    name: "api",
    port: "PORT",
    settings: ["DRAIN_MS"],
    trial: API_TRIAL,
    database: DATABASE,
    serve(service) {
      // The API uses RabbitMQ only for hints. Without it, the schedulers find every reservation at their next scan.
      const queue = service.openQueue({
        connected: "connected to RabbitMQ",
        disconnected: "cannot wake schedulers",
        onlyHints: true,
      });
      const app = createApp({ ...service, hint: hintThrough(queue) });
      return serveOnceChecked(service, (request) => app.fetch(request));
    },
    async main({ config, logger, server, signal }) {
      logger.info({ url: server.url.href }, "listening");
      await aborted(signal);
      // Load balancers see that /ready is 503, and send later requests elsewhere. Until then, requests are served.
      await sleep(config.DRAIN_MS);
      await withDeadline(server.stop(), STOP_MS, () => new Error("late")).catch(() => server.stop(true));
    },
  });
}
