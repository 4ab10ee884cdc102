import { openapi } from "@elysiajs/openapi";
import type { Static, TObject } from "@sinclair/typebox";
import { Elysia, NotFoundError } from "elysia";
import Negotiator from "negotiator";
import type { Logger } from "pino";
import { v7 as uuidv7 } from "uuid";
import {
  acceptedOf,
  balanceAtOf,
  balanceOf,
  balanceOfDay,
  campaignCancelledOf,
  refusedOf,
  reservedOf,
  reservedPointOf,
  standOf,
  storyOf,
  totalOf,
  totalsCsv,
  transactionOf,
} from "./lib/answers.ts";
import { atRow, type BulkReservation, newBulkReservation } from "./lib/bulk.ts";
import { atMost, coalesce, OverloadError } from "./lib/coalesce.ts";
import { readConfig } from "./lib/config.ts";
import { type Database, DatabaseError, openDatabase } from "./lib/database.ts";
import { dayRule, newDays } from "./lib/day.ts";
import { type BrokenRule, DomainError, type DomainErrorCode, explain } from "./lib/errors.ts";
import {
  findBalanceAt,
  findHoldings,
  findReservation,
  findReservationByKey,
  listReservations,
  listTransactions,
  type ReservationStory,
} from "./lib/history.ts";
import { HttpError, noRoute, problem, readJson, readQuery } from "./lib/http.ts";
import {
  brokenFieldRules,
  type FieldRules,
  idempotencyKeyRule,
  LATEST_MS,
  parseTime,
  refuseBroken,
  timeRule,
} from "./lib/input.ts";
import { sleep, withDeadline } from "./lib/loop.ts";
import { encodeHint } from "./lib/message.ts";
import { cursorRule, limitRule, nextCursor, pageOf } from "./lib/page.ts";
import {
  MAX_POINT_NUM,
  newPointChange,
  type PointTransaction,
  parseUserId,
  userIdRule,
} from "./lib/point.ts";
import { type ChangeOutcome, changePoints, findBalance } from "./lib/point_repository.ts";
import { openQueue, type Queue } from "./lib/queue.ts";
import {
  campaignRule,
  newReservation,
  newReservationPatch,
  parseCampaign,
  parseReservationId,
  type Reservation,
  type ReservationStatus,
  statusRule,
} from "./lib/reservation.ts";
import {
  type CreateOutcome,
  cancelCampaign,
  cancelReservation,
  createBulk,
  createReservations,
  patchReservation,
  retryReservation,
} from "./lib/reservation_repository.ts";
import * as routes from "./lib/routes.ts";
import {
  aborted,
  describeError,
  isReadyInTime,
  listen,
  logRetry,
  pingDatabase,
  runService,
  waitForDatabase,
} from "./lib/service.ts";
import { findAggregatedAt, findAggregation, findBalances, findTotals } from "./lib/total_repository.ts";
import { version } from "./package.json" with { type: "json" };
import { checkDatabase } from "./sql/migrate.ts";

const ABOUT = `Grants points at a promised time: once, not twice, not early, not lost.

Errors are application/problem+json (RFC 9457); \`errors\` has one sentence for each broken rule, all at once. After a 503, or
no answer at all, send the same request again: with an idempotency key it cannot count twice. An example with a
reservation's id stands for one of yours, in the state that the example's name says.`;

const MAX_BODY_BYTES = 64 * 1024;
/** 10,000 rows with the longest values are 4 MiB, and as much again where they are indented. */
const MAX_BULK_BYTES = 8 * 1024 * 1024;
/** Bulk requests in hand at once; more are refused with 503. Four of the largest are answered within a client's patience. */
const MAX_BULKS = 4;
/** How long a bulk may wait for those before it, and then take in MySQL, in milliseconds. */
const BULK_MS = 12_000;
/** Campaigns that are cancelled at once. */
const MAX_CAMPAIGNS = 2;
/** How long one request may cancel a campaign, in milliseconds: an answer must come before clients give up. */
const CAMPAIGN_MS = 20_000;
/** Requests that wait for their batch; more are refused with 503, since their answers would come too late. */
const MAX_WAITING = 10_000;
/** After this long a request is refused with 503 if no batch has taken it, in milliseconds. */
const MAX_WAIT_MS = 5_000;
/** How long MySQL may take for an INSERT or a SELECT, in milliseconds: clients have less patience than a worker. */
const ACQUIRE_MS = 3_000;
const WORK_MS = 5_000;
/**
 * Schedulers are told of what is due within this time, in milliseconds: far more than they ever sleep, since the clock of
 * this host may be off.
 */
const HINT_AHEAD_MS = 3_600_000;
/** The shortest time between two hints, in milliseconds. */
const HINT_EVERY_MS = 5;
/** How long open requests may take after a signal, in milliseconds. */
const STOP_MS = 5_000;

type RefusedChange = Exclude<ChangeOutcome, "changed" | "replayed">;

const KEY_CONFLICT: BrokenRule = {
  sentence: "idempotency key is used with other content",
  explanation: "one key must always come with the same content; nothing was done",
};

/** Codes that are not here are no client's business: 500. */
const STATUS: Partial<Record<DomainErrorCode, number>> = {
  INVALID_INPUT: 400,
  NOT_FOUND: 404,
  CONFLICT: 409,
  IDEMPOTENCY_CONFLICT: 422,
};

export interface AppOptions {
  database: Database;
  logger: Logger;
  /** The most reservations in one INSERT. */
  reserveBatch: number;
  /** Called when something that is due at a time was reserved, or came to be due then: committed, and its scheduler may sleep. */
  hint?: (executeAt: Date) => void;
}

/** The HTTP interface; `app.handle(request)` answers without a port. */
export function createApp({ database, logger, reserveBatch, hint = () => {} }: AppOptions) {
  // One INSERT at a time: two at once made 0.95 × the reservations, three 0.9 × (256 connections, MySQL 9.7, two cores).
  const waiting = { maxBatch: reserveBatch, maxWaiting: MAX_WAITING, maxWaitMs: MAX_WAIT_MS };
  const reserve = coalesce(async (batch: Reservation[]) => {
    const outcomes = await database.run((connection) => createReservations(connection, batch));
    hint(soonestOf(batch));
    return outcomes;
  }, waiting);
  // A balance that somebody holds must not hold up those of others: its changes wait apart.
  const change = coalesce(
    (batch: PointTransaction[]) => changePoints(database, batch, { wait: false }),
    waiting,
  );
  const changeBusy = coalesce(
    (batch: PointTransaction[]) => changePoints(database, batch, { wait: true }),
    waiting,
  );
  // One at a time: a bulk takes MySQL for as long as thousands of single ones.
  const reserveMany = coalesce(
    async (bulks: BulkReservation[]) => {
      const results = await Promise.all(bulks.map((bulk) => createRows(database, bulk)));
      for (const { rows } of bulks) hint(soonestOf(rows));
      return results;
    },
    { maxBatch: 1, maxWaiting: MAX_BULKS, maxWaitMs: BULK_MS },
  );
  // Their bodies are large: few at once may be in memory.
  const takeBulk = atMost(MAX_BULKS, "bulks");
  const takeCampaign = atMost(MAX_CAMPAIGNS, "campaigns to cancel");

  async function reserveBulk(request: Request): Promise<Response> {
    const body = await readJson(request, { maxBytes: MAX_BULK_BYTES });
    const bulk = newBulkReservation(body, headerKeyOf(request));
    const results = await reserveMany(bulk);
    if (bulk.mode === "atomic") refuseConflicts(results);
    const shown = results.map((result) => {
      if ("broken" in result) return refusedOf(result.broken.map(({ sentence }) => sentence));
      return result.kind === "conflict" ? refusedOf([KEY_CONFLICT.sentence]) : acceptedOf(result);
    });
    return Response.json({ results: shown }, { status: bulk.mode === "atomic" ? 201 : 200 });
  }

  /** Adds to a balance, or subtracts from it. */
  async function changeBalance(request: Request, sign: 1 | -1, message: string): Promise<Response> {
    const body = await readJson(request, { maxBytes: MAX_BODY_BYTES });
    const entry = newPointChange(body, { sign, headerKey: headerKeyOf(request) });
    let outcome = await change(entry);
    if (outcome === "busy") outcome = await changeBusy(entry);
    if (outcome !== "changed" && outcome !== "replayed") throw refusedChange(entry, outcome);
    return Response.json({ messages: [message] }, { headers: replayed(outcome) });
  }

  /** The story of a reservation that must be there. */
  async function tell(id: string): Promise<ReservationStory> {
    const story = await findReservation(database, id);
    if (!story) throw notFound("reservation not found", `no reservation has the id ${id}`);
    return story;
  }

  const known: { method: string; path: string }[] = [];
  // Without it a host of three characters is taken for a part of the path.
  const app = new Elysia({ handler: { standardHostname: false } })
    // Before the routes: a handler that is registered after them does not fire.
    .onError({ as: "global" }, ({ error, request }) =>
      // Not by `code`, which Elysia takes from any error that has one: a DomainError's NOT_FOUND is another thing.
      problemOf(error instanceof NotFoundError ? noRoute(request, known) : error, logger),
    )
    .use(openapi({ documentation: { info: { title: "pointservice", version, description: ABOUT } } }))
    .get("/", ok, routes.health)
    .get("/health", ok, routes.health)
    .get(
      "/ready",
      async () => ((await isReadyInTime(() => pingDatabase(database).then(() => true))) ? ok() : notReady()),
      routes.ready,
    )
    .post(
      "/point/reserve",
      async ({ request }) => {
        const body = await readJson(request, { maxBytes: MAX_BODY_BYTES });
        const outcome = await reserve(newReservation(body, headerKeyOf(request)));
        if (outcome.kind === "conflict") throw keyConflict([KEY_CONFLICT]);
        const reserved = reservedOf(outcome.reservation);
        const location = `/point/reservations/${reserved.reservation_id}`;
        return Response.json(reserved, { status: 201, headers: { location, ...replayed(outcome.kind) } });
      },
      routes.reserve,
    )
    .post("/point/reserve/bulk", ({ request }) => takeBulk(() => reserveBulk(request)), routes.reserveBulk)
    .get(
      "/point/reservations",
      async ({ request }) => {
        const rules = { idempotency_key: idempotencyKeyRule };
        const { idempotency_key: key } = parseQuery(request, routes.KeyQuery, rules);
        const story = await findReservationByKey(database, key);
        if (!story) throw notFound("reservation not found", `no reservation has the idempotency key ${key}`);
        return Response.json(storyOf(story));
      },
      routes.findByKey,
    )
    .get(
      "/point/reservations/:id",
      async ({ params }) => Response.json(storyOf(await tell(parseReservationId(params.id)))),
      routes.readReservation,
    )
    .delete(
      "/point/reservations/:id",
      async ({ params }) => {
        const id = parseReservationId(params.id);
        if (!(await twice(() => cancelReservation(database, id)))) {
          const story = await tell(id);
          if (story.status !== "CANCELLED") throw cannotCancel(story);
        }
        return Response.json({ reservation_id: id, status: "CANCELLED" });
      },
      routes.cancel,
    )
    .patch(
      "/point/reservations/:id",
      async ({ params, request }) => {
        const id = parseReservationId(params.id);
        const patch = newReservationPatch(await readJson(request, { maxBytes: MAX_BODY_BYTES }));
        const isPatched = await twice(() => patchReservation(database, id, patch));
        const story = await tell(id);
        if (!isPatched) throw standsAgainst("change", story, "PENDING");
        hint(story.executeAt);
        return Response.json(storyOf(story));
      },
      routes.patch,
    )
    .post(
      "/point/reservations/:id/retry",
      async ({ params }) => {
        const id = parseReservationId(params.id);
        const isRetried = await twice(() => retryReservation(database, id));
        const story = await tell(id);
        if (!isRetried) throw standsAgainst("retry", story, "FAILED");
        hint(story.executeAt);
        return Response.json(storyOf(story));
      },
      routes.retry,
    )
    .post(
      "/point/campaigns/:campaign/cancel",
      async ({ params }) => {
        const campaign = parseCampaign(params.campaign);
        const untilMs = performance.now() + CAMPAIGN_MS;
        const counts = await takeCampaign(() => cancelCampaign(database, campaign, { untilMs }));
        if (Object.values(counts).every((count) => count === 0)) {
          throw notFound("campaign not found", `no reservation is of the campaign ${campaign}`);
        }
        return Response.json(campaignCancelledOf(campaign, counts));
      },
      routes.cancelAll,
    )
    .get(
      "/users/:user_id/points",
      async ({ params, request }) => {
        const userId = parseUserId(params.user_id);
        const { at } = parseQuery(request, routes.PointsQuery, { at: timeRule });
        if (at === undefined) {
          const holdings = await findHoldings(database, userId);
          if (!holdings) throw unknownUser(userId);
          return Response.json(balanceOf(userId, holdings));
        }
        const time = parseTime(at, "at") as Date;
        const balance = await findBalanceAt(database, userId, time);
        if (!balance) throw unknownUser(userId);
        return Response.json(balanceAtOf(userId, { ...balance, at: time }));
      },
      routes.readPoints,
    )
    .get(
      "/users/:user_id/reserved-points",
      async ({ params, request }) => {
        const userId = parseUserId(params.user_id);
        const query = parseQuery(request, routes.ReservedPointsQuery, {
          status: statusRule,
          campaign: campaignRule,
          limit: limitRule,
          cursor: cursorRule,
        });
        const page = pageOf(query);
        const found = await listReservations(database, userId, { ...page, ...query });
        return Response.json({
          reserved_points: found.slice(0, page.limit).map(reservedPointOf),
          next_cursor: nextCursor(
            found.map(({ executeAt, id }) => ({ time: executeAt, id })),
            page.limit,
          ),
        });
      },
      routes.listReserved,
    )
    .get(
      "/users/:user_id/transactions",
      async ({ params, request }) => {
        const userId = parseUserId(params.user_id);
        const rules = { limit: limitRule, cursor: cursorRule };
        const page = pageOf(parseQuery(request, routes.TransactionsQuery, rules));
        const found = await listTransactions(database, userId, page);
        return Response.json({
          transactions: found.slice(0, page.limit).map(transactionOf),
          next_cursor: nextCursor(
            found.map(({ createdAt, id }) => ({ time: createdAt, id })),
            page.limit,
          ),
        });
      },
      routes.listLedger,
    )
    .get(
      "/point/totals",
      async ({ request }) => {
        const rules = { from: dayRule, to: dayRule, campaign: campaignRule };
        const { campaign, ...query } = parseQuery(request, routes.TotalsQuery, rules);
        const { generation, timeZone } = await findAggregation(database);
        const days = newDays(query, { timeZone: timeZone || "UTC" });
        const found = await findTotals(database, { generation, ...days, campaign });
        if (prefersCsv(request)) {
          return new Response(totalsCsv(found), { headers: { "content-type": "text/csv; charset=utf-8" } });
        }
        const answer = {
          ...{ time_zone: timeZone || null, ...days, aggregated_at: await findAggregatedAt(database) },
          totals: found.map(totalOf),
        };
        if (campaign !== undefined) return Response.json(answer);
        const balances = await findBalances(database, found, { generation, ...days });
        return Response.json({ ...answer, balances: balances.map(balanceOfDay) });
      },
      routes.totals,
    )
    .put("/point/add", ({ request }) => changeBalance(request, 1, "point updated"), routes.add)
    .put("/point/sub", ({ request }) => changeBalance(request, -1, "point subtracted"), routes.sub)
    .get(
      "/point/confirm",
      async ({ request }) => {
        const { user_id } = parseQuery(request, routes.ConfirmQuery, { user_id: userIdRule });
        const balance = await findBalance(database, user_id);
        if (!balance) {
          throw refused("Cannot confirm points", "user not found", `the user ${user_id} never got any`);
        }
        return Response.json({ messages: [`userID: ${user_id}`, `pointNum: ${balance.pointNum}`] });
      },
      routes.confirm,
    );
  known.push(...app.routes);
  return app;
}

/** What a typed client is made of. */
export type App = ReturnType<typeof createApp>;

function ok(): Response {
  return Response.json({ messages: ["ok"] });
}

/** The soonest time of what was reserved; the end of all time where all of it was refused. */
function soonestOf(rows: readonly (Reservation | { broken: readonly BrokenRule[] })[]): Date {
  return new Date(
    Math.min(LATEST_MS, ...rows.map((row) => ("broken" in row ? LATEST_MS : Number(row.executeAt)))),
  );
}

/** Tells the schedulers of what is due soon: one hint for all that comes within a few milliseconds, lost where RabbitMQ is away. */
function hintThrough(queue: Pick<Queue, "hint">): (executeAt: Date) => void {
  const tell = coalesce(
    async (times: number[]) => {
      queue.hint(encodeHint(new Date(Math.min(...times))));
      await sleep(HINT_EVERY_MS);
      return times;
    },
    { maxBatch: MAX_WAITING },
  );
  return (executeAt) => {
    if (executeAt.getTime() < Date.now() + HINT_AHEAD_MS) tell(executeAt.getTime());
  };
}

function headerKeyOf(request: Request): string | undefined {
  return request.headers.get("idempotency-key") ?? undefined;
}

/** Whether a client would rather have CSV than JSON. */
function prefersCsv(request: Request): boolean {
  const headers = { accept: request.headers.get("accept") ?? undefined };
  return new Negotiator({ headers }).mediaType(["application/json", "text/csv"]) === "text/csv";
}

function replayed(outcome: string): Record<string, string> {
  return outcome === "replayed" ? { "idempotent-replayed": "true" } : {};
}

/**
 * Reads the query of a URL by the schema that describes it.
 *
 * @throws {DomainError} INVALID_INPUT, with one broken rule for each
 */
function parseQuery<Schema extends TObject>(request: Request, schema: Schema, rules: FieldRules<Schema>) {
  const query = readQuery(request, schema);
  refuseBroken(brokenFieldRules(schema, query, rules), "query");
  return query as Static<Schema>;
}

function refused(what: string, sentence: string, explanation: string): DomainError {
  return new DomainError("INVALID_INPUT", what, [{ sentence, explanation }]);
}

function notFound(sentence: string, explanation: string): DomainError {
  return new DomainError("NOT_FOUND", "Not found", [{ sentence, explanation }]);
}

function unknownUser(userId: string): DomainError {
  return notFound("user not found", `the user ${userId} never got points, and none are to come`);
}

function keyConflict(broken: BrokenRule[]): DomainError {
  return new DomainError(
    "IDEMPOTENCY_CONFLICT",
    "The idempotency key was used before, with other content",
    broken,
  );
}

/** A row's outcome, or the rules that it breaks. */
type RowResult = CreateOutcome | { broken: readonly BrokenRule[] };

async function createRows(database: Database, { mode, rows }: BulkReservation): Promise<RowResult[]> {
  const valid = rows.filter((row): row is Reservation => !("broken" in row));
  const allOrNone = mode === "atomic";
  const outcomes = await database[allOrNone ? "transaction" : "run"](
    (connection) => createBulk(connection, valid, { allOrNone }),
    { workMs: BULK_MS },
  );
  const next = outcomes.values();
  return rows.map((row) => ("broken" in row ? row : (next.next().value as CreateOutcome)));
}

/** All or none: throws where one of the rows has a key that was used with other content. */
function refuseConflicts(results: readonly RowResult[]): void {
  const broken = results.flatMap((result, index) =>
    "kind" in result && result.kind === "conflict" ? [atRow(index, KEY_CONFLICT)] : [],
  );
  if (broken.length > 0) throw keyConflict(broken);
}

function refusedChange({ userId, pointAmount }: PointTransaction, outcome: RefusedChange): DomainError {
  const what = `Cannot ${pointAmount > 0 ? "add" : "subtract"} ${Math.abs(pointAmount)} points`;
  switch (outcome) {
    case "conflict":
      return keyConflict([KEY_CONFLICT]);
    case "unknown_user":
      return refused(what, "user not found", `the user ${userId} never got any`);
    case "busy":
      // Who waited for the balance has it.
      throw new Error("A change that waits for its balance found it busy");
    case "too_few":
      return refused(what, "points must be greater than 0", `the balance of ${userId} would fall below 0`);
    case "too_many":
      return refused(
        what,
        `points must be at most ${MAX_POINT_NUM}`,
        `the balance of ${userId} would be more than ${MAX_POINT_NUM}`,
      );
  }
}

/** Tries a transition once more: only then does the row's story say why not, and not where it has come to since. */
async function twice(transition: () => Promise<boolean>): Promise<boolean> {
  return (await transition()) || (await transition());
}

function cannotCancel(story: ReservationStory): DomainError {
  const [sentence, explanation] = story.grantedAt
    ? [
        "reservation was granted",
        `it was granted at ${story.grantedAt.toISOString()} by the ledger entry ${story.transactionId}`,
      ]
    : [`reservation is ${story.status}`, `it is ${story.status}`];
  return conflict("cancel", story, { sentence, explanation });
}

function standsAgainst(verb: string, story: ReservationStory, status: ReservationStatus): DomainError {
  return conflict(verb, story, {
    sentence: `reservation is not ${status}`,
    explanation: `it is ${story.status}, and only what is ${status} can be ${verb === "retry" ? "tried again" : "changed"}`,
  });
}

function conflict(verb: string, story: ReservationStory, broken: BrokenRule): DomainError {
  return new DomainError("CONFLICT", `Cannot ${verb} the reservation`, [broken], standOf(story));
}

function isHealth(request: Request): boolean {
  return /^\/(health\/?)?$/.test(new URL(request.url).pathname);
}

function notReady(): Response {
  return problem(503, "MySQL does not answer", { errors: ["not ready"], headers: { "retry-after": "1" } });
}

/** The answer to anything that was thrown. What is not of the domain says nothing of the inside. */
function problemOf(error: unknown, logger: Logger): Response {
  if (error instanceof HttpError) {
    return problem(error.status, error.message, { errors: [error.sentence], headers: error.headers });
  }
  const status = error instanceof DomainError && STATUS[error.code];
  if (error instanceof DomainError && status) {
    const errors = error.brokenRules.map(({ sentence }) => sentence);
    return problem(status, explain(error), { errors, facts: error.facts });
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
        "AMQP_URL",
        "QUEUE",
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
        onRetry: logRetry(logger),
      });
      // Only for hints: without RabbitMQ all is reserved, and found when the schedulers next look.
      const queue = openQueue(config.AMQP_URL, {
        name: config.QUEUE,
        onConnected: () => logger.info({ queue: config.QUEUE }, "connected to RabbitMQ"),
        onDisconnected: (reason, retryInMs) => logger.warn({ reason, retryInMs }, "cannot wake schedulers"),
      });
      const app = createApp({
        ...{ database, logger, reserveBatch: config.RESERVE_BATCH },
        hint: hintThrough(queue),
      });
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
      await Promise.all([queue.close(), database.close()]);
    },
  });
}
