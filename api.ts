import { openapi } from "@elysiajs/openapi";
import { Type } from "@sinclair/typebox";
import { Elysia, NotFoundError } from "elysia";
import type { Logger } from "pino";
import { v7 as uuidv7 } from "uuid";
import { coalesce, OverloadError } from "./lib/coalesce.ts";
import { readConfig } from "./lib/config.ts";
import { type Database, DatabaseError, openDatabase } from "./lib/database.ts";
import { DomainError, type DomainErrorCode, ForeseenError, showValue } from "./lib/errors.ts";
import { withDeadline } from "./lib/loop.ts";
import { PointAmount, parseUserId, UserId } from "./lib/point.ts";
import { findBalance } from "./lib/point_repository.ts";
import {
  newReservation,
  parseReservationId,
  RESERVATION_STATUSES,
  type Reservation,
  ReservationCreateInput,
} from "./lib/reservation.ts";
import { createReservations, findReservation } from "./lib/reservation_repository.ts";
import {
  aborted,
  describeError,
  isReadyInTime,
  listen,
  pingDatabase,
  problem,
  runService,
  titleOf,
  waitForDatabase,
} from "./lib/service.ts";
import { version } from "./package.json" with { type: "json" };
import { checkDatabase } from "./sql/migrate.ts";

const MAX_BODY_BYTES = 64 * 1024;
/** Requests that wait for an INSERT; more are refused with 503, since their answers would come too late. */
const MAX_WAITING = 10_000;
/** After this long a request is refused with 503 if no INSERT has taken it, in milliseconds. */
const MAX_WAIT_MS = 5_000;
/** How long MySQL may take for an INSERT or a SELECT, in milliseconds: clients have less patience than a worker. */
const ACQUIRE_MS = 3_000;
const WORK_MS = 5_000;
/** How long open requests may take after a signal, in milliseconds. */
const STOP_MS = 5_000;

/** An error of HTTP itself, before any rule of the domain. */
class HttpError extends ForeseenError {
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

/** Codes that are not here are no client's business: 500. */
const STATUS: Partial<Record<DomainErrorCode, number>> = {
  INVALID_INPUT: 400,
  NOT_FOUND: 404,
  IDEMPOTENCY_CONFLICT: 422,
};
/** RFC 9457. `errors` has one sentence for each broken rule. */
const Problem = Type.Object({
  type: Type.String({ examples: ["about:blank"] }),
  title: Type.String(),
  status: Type.Integer(),
  detail: Type.String(),
  errors: Type.Array(Type.String(), { examples: [["user id is invalid format"]] }),
  request_id: Type.Optional(Type.String({ description: "also in the log and in the header X-Request-Id" })),
});
const Time = Type.String({ format: "date-time", examples: ["2029-02-22T13:59:00.000Z"] });
const Uuid = Type.String({ format: "uuid" });
const Reserved = Type.Object({
  reservation_id: Uuid,
  status: Type.Literal("PENDING"),
  execute_at: Time,
});
const ReservationStory = Type.Object({
  reservation_id: Uuid,
  user_id: UserId,
  point_amount: PointAmount,
  idempotency_key: Type.String(),
  status: Type.Union(RESERVATION_STATUSES.map((status) => Type.Literal(status))),
  execute_at: Time,
  next_scan_at: Type.Union([Time, Type.Null()], {
    description: "when the scheduler looks at it next; null once it is over",
  }),
  attempts: Type.Integer({ description: "how often granting failed for a reason of its own" }),
  last_error: Type.Union([Type.String(), Type.Null()]),
  granted_at: Type.Union([Time, Type.Null()]),
  late_ms: Type.Union([Type.Integer(), Type.Null()], { description: "from execute_at to granted_at" }),
  created_at: Time,
  updated_at: Time,
});
const Balance = Type.Object({
  user_id: UserId,
  point_num: Type.Integer({ description: "up to 9223372036854775807, more than some JSON readers take" }),
  updated_at: Time,
});
const Messages = Type.Object({ messages: Type.Array(Type.String(), { examples: [["ok"]] }) });

export interface AppOptions {
  database: Database;
  logger: Logger;
  /** The most reservations in one INSERT. */
  reserveBatch: number;
}

/** The HTTP interface; `app.handle(request)` answers without a port. */
export function createApp({ database, logger, reserveBatch }: AppOptions) {
  const reserve = coalesce((batch: Reservation[]) => createReservations(database, batch), {
    maxBatch: reserveBatch,
    maxWaiting: MAX_WAITING,
    maxWaitMs: MAX_WAIT_MS,
  });

  const routes: { method: string; path: string }[] = [];
  // Without it a host of three characters is taken for a part of the path.
  const app = new Elysia({ handler: { standardHostname: false } })
    // Before the routes: a handler that is registered after them does not fire.
    .onError({ as: "global" }, ({ error, request }) =>
      // Not by `code`, which Elysia takes from any error that has one: a DomainError's NOT_FOUND is another thing.
      problemOf(error instanceof NotFoundError ? noRoute(request, routes) : error, logger),
    )
    .use(
      openapi({
        provider: null,
        documentation: {
          info: {
            title: "pointservice",
            version,
            description: "Grants points at a promised time: once, not twice, not early, not lost.",
          },
        },
      }),
    )
    .get("/", ok, describe("The process lives", { 200: Messages }))
    .get("/health", ok, describe("The process lives", { 200: Messages }))
    .get(
      "/ready",
      async () => ((await isReadyInTime(() => pingDatabase(database).then(() => true))) ? ok() : notReady()),
      describe("MySQL answers", { 200: Messages, 503: Problem }),
    )
    .post(
      "/point/reserve",
      async ({ request }) => {
        const headerKey = request.headers.get("idempotency-key") ?? undefined;
        const outcome = await reserve(newReservation(await readJson(request), headerKey));
        if (outcome.kind === "conflict") {
          throw new DomainError(
            "IDEMPOTENCY_CONFLICT",
            "The idempotency key was used before, with another user_id, point_amount or execute_at",
            [
              {
                sentence: "idempotency key is used with other content",
                explanation: "one key must always come with the same content; nothing was reserved",
              },
            ],
          );
        }
        const { id, executeAt } = outcome.reservation;
        return Response.json(
          { reservation_id: id, status: "PENDING", execute_at: executeAt.toISOString() },
          {
            status: 201,
            headers: {
              location: `/point/reservations/${id}`,
              ...(outcome.kind === "replayed" && { "idempotent-replayed": "true" }),
            },
          },
        );
      },
      {
        parse: "none",
        detail: {
          ...describe("Promise points at a time", {
            201: Reserved,
            ...Object.fromEntries([400, 413, 415, 422, 503].map((status) => [status, Problem])),
          }).detail,
          parameters: [
            {
              name: "Idempotency-Key",
              in: "header",
              required: false,
              description: "the same as the field idempotency_key; where both are given they must be equal",
              schema: { type: "string" },
            },
          ],
          requestBody: {
            required: true,
            content: { "application/json": { schema: ReservationCreateInput as never } },
          },
        },
      },
    )
    .get(
      "/point/reservations/:id",
      async ({ params }) => {
        const found = await findReservation(database, parseReservationId(params.id));
        if (!found) throw notFound("reservation not found", `no reservation has the id ${params.id}`);
        return Response.json({
          reservation_id: found.id,
          user_id: found.userId,
          point_amount: found.pointAmount,
          idempotency_key: found.idempotencyKey,
          status: found.status,
          execute_at: found.executeAt,
          next_scan_at: found.scanAt,
          attempts: found.attempts,
          last_error: found.lastError,
          granted_at: found.grantedAt,
          late_ms: found.grantedAt && found.grantedAt.getTime() - found.executeAt.getTime(),
          created_at: found.createdAt,
          updated_at: found.updatedAt,
        });
      },
      describe("The whole story of one reservation", {
        200: ReservationStory,
        400: Problem,
        404: Problem,
        503: Problem,
      }),
    )
    .get(
      "/users/:user_id/points",
      async ({ params }) => {
        const userId = parseUserId(params.user_id);
        const balance = await findBalance(database, userId);
        if (!balance) throw notFound("user not found", `the user ${userId} never got points`);
        // JSON's numbers have no limit, but JavaScript's have: all digits of a BIGINT go out as they are.
        const body = `{"user_id":"${userId}","point_num":${balance.pointNum},"updated_at":"${balance.updatedAt.toISOString()}"}`;
        return new Response(body, { headers: { "content-type": "application/json;charset=utf-8" } });
      },
      describe("What a user has", { 200: Balance, 400: Problem, 404: Problem, 503: Problem }),
    );
  routes.push(...app.routes);
  return app;
}

function ok(): Response {
  return Response.json({ messages: ["ok"] });
}

function notFound(sentence: string, explanation: string): DomainError {
  return new DomainError("NOT_FOUND", "Not found", [{ sentence, explanation }]);
}

function isHealth(request: Request): boolean {
  return /^\/(health\/?)?$/.test(new URL(request.url).pathname);
}

function notReady(): Response {
  return problem(503, "MySQL does not answer", { errors: ["not ready"], headers: { "retry-after": "1" } });
}

/** What OpenAPI tells of a route. */
function describe(summary: string, answers: Record<number, unknown>) {
  const responses = Object.entries(answers).map(([status, schema]) => {
    const type = Number(status) < 400 ? "application/json" : "application/problem+json";
    const description = Number(status) < 400 ? summary : titleOf(Number(status));
    return [status, { description, content: { [type]: { schema: schema as never } } }];
  });
  return { detail: { summary, responses: Object.fromEntries(responses) } };
}

/**
 * Reads a body of JSON in UTF-8, 64 KiB at most.
 *
 * @throws {HttpError} 415, 413
 * @throws {DomainError} INVALID_INPUT
 */
async function readJson(request: Request): Promise<unknown> {
  const type = request.headers.get("content-type") ?? undefined;
  const encoding = request.headers.get("content-encoding") ?? "identity";
  if (!type || !/^application\/json\s*(;\s*charset="?utf-8"?\s*)?$/i.test(type) || encoding !== "identity") {
    throw new HttpError(
      415,
      "content type must be application/json",
      `The body must be application/json in UTF-8, not compressed: received content-type ${showValue(type)}, content-encoding ${showValue(encoding)}`,
    );
  }
  const tooLarge = new HttpError(
    413,
    "body is too large",
    `The body must not be larger than ${MAX_BODY_BYTES} bytes`,
  );
  if (Number(request.headers.get("content-length")) > MAX_BODY_BYTES) throw tooLarge;
  const chunks: Uint8Array[] = [];
  let bytes = 0;
  try {
    for await (const chunk of request.body ?? []) {
      bytes += chunk.byteLength;
      if (bytes > MAX_BODY_BYTES) throw tooLarge;
      chunks.push(chunk);
    }
  } catch (error) {
    if (error === tooLarge) throw error;
    throw new HttpError(400, "body is incomplete", `The body broke off after ${bytes} bytes`);
  }
  try {
    return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(Buffer.concat(chunks)));
  } catch {
    throw new DomainError("INVALID_INPUT", "The body breaks a rule", [
      {
        sentence: "body must be JSON",
        explanation: `the body must be JSON in UTF-8: received ${bytes} bytes that are not`,
      },
    ]);
  }
}

/** A path that has other methods is 405 and names them; any other is 404. */
function noRoute(request: Request, routes: readonly { method: string; path: string }[]): HttpError {
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

/** The answer to anything that was thrown. What is not of the domain says nothing of the inside. */
function problemOf(error: unknown, logger: Logger): Response {
  if (error instanceof HttpError) {
    return problem(error.status, error.message, { errors: [error.sentence], headers: error.headers });
  }
  const status = error instanceof DomainError && STATUS[error.code];
  if (error instanceof DomainError && status) {
    const rules = error.brokenRules;
    const detail = `${error.message}: ${rules.map(({ explanation }) => explanation).join("; ")}`;
    return problem(status, detail, { errors: rules.map(({ sentence }) => sentence) });
  }
  const requestId = uuidv7();
  const isBusy =
    error instanceof OverloadError ||
    (error instanceof DatabaseError && (error.isOutage || error.isContended));
  logger[isBusy ? "warn" : "error"]({ requestId, error: describeError(error) }, "request failed");
  const headers = { "x-request-id": requestId, ...(isBusy && { "retry-after": "1" }) };
  return isBusy
    ? problem(
        503,
        "The service cannot answer now; the same request with the same idempotency key may be sent again",
        {
          errors: ["service is unavailable"],
          headers,
          requestId,
        },
      )
    : problem(500, "An unforeseen error; the log tells more of this request id", {
        errors: ["internal error"],
        headers,
        requestId,
      });
}

if (import.meta.main) {
  await runService({
    name: "api",
    configure: () =>
      readConfig(Bun.env, [
        "DATABASE_URL",
        "DATABASE_CONNECTIONS",
        "ALLOW_LOSSY_DATABASE",
        "HOST",
        "PORT",
        "RESERVE_BATCH",
        "LOG_LEVEL",
      ]),
    async main({ config, logger, signal }) {
      const database = openDatabase(config.DATABASE_URL, {
        connections: config.DATABASE_CONNECTIONS,
        acquireMs: ACQUIRE_MS,
        workMs: WORK_MS,
      });
      const app = createApp({ database, logger, reserveBatch: config.RESERVE_BATCH });
      let isChecked = false;
      const server = listen({
        hostname: config.HOST,
        port: config.PORT,
        logger,
        // The process lives before MySQL does, and says so; it promises nothing before MySQL is checked.
        fetch: (request) => (isChecked || isHealth(request) ? app.fetch(request) : notReady()),
      });
      isChecked = await waitForDatabase(() => checkDatabase(database, config), { signal, logger });
      if (isChecked) logger.info({ url: server.url.href }, "listening");
      await aborted(signal);
      await withDeadline(server.stop(), STOP_MS, () => new Error("late")).catch(() => server.stop(true));
      await database.close();
    },
  });
}
