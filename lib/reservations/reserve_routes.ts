import { type Static, Type } from "@sinclair/typebox";
import { Elysia } from "elysia";
import { type BUSY, openUntilFree } from "../busy.ts";
import { coalesce, limitConcurrency } from "../coalesce.ts";
import type { Database } from "../database.ts";
import { DatabaseError } from "../database_errors.ts";
import { type BrokenRule, KEY_CONFLICT, keyConflict } from "../errors.ts";
import { LATEST_MS, objectSchema } from "../field.ts";
import {
  answer,
  describe,
  NO_BODY,
  NO_JSON,
  Problem,
  REPLAYED,
  refusal,
  refused,
  replayed,
  Time,
  UNAVAILABLE,
  Uuid,
} from "../http/describe.ts";
import { FUTURE, PENDING_ID, PROCESSING_ID, RESERVATION } from "../http/examples.ts";
import { BATCHING, headerKeyOf, readJson } from "../http/request.ts";
import { atRow, type BulkReservation, bulkFields, newBulkReservation } from "./bulk.ts";
import { newReservation, type Reservation, reservationFields } from "./reservation.ts";
import {
  type CreateOutcome,
  createBesideLocks,
  createBulk,
  createReservations,
} from "./reservation_repository.ts";

export interface ReserveOptions {
  database: Database;
  /** Sends the schedulers the time at which a committed reservation is due. */
  hint: (executeAt: Date) => void;
}

/** `POST /point/reserve` and `POST /point/reserve/bulk`. */
export function reserveRoutes(options: ReserveOptions) {
  return new Elysia()
    .post("/point/reserve", reserveHandler(options), RESERVE)
    .post("/point/reserve/bulk", bulkHandler(options), RESERVE_BULK);
}

const Reserved = Type.Object({
  reservation_id: Uuid,
  status: Type.Literal("PENDING", { description: "the status when it was reserved" }),
  execute_at: Time,
});

function reservedOf({ id, executeAt }: Reservation): Static<typeof Reserved> {
  return { reservation_id: id, status: "PENDING", execute_at: executeAt.toISOString() };
}

const RESERVED = { reservation_id: PENDING_ID, status: "PENDING", execute_at: FUTURE };

// ---- POST /point/reserve

const RESERVE = describe({
  summary: "Reserve points for a time",
  description:
    "A 201 means that the reservation is committed: its points are granted at `execute_at`, once. A request with the same `idempotency_key` (field or header; if both are given, they must be equal) and the same content gets the first answer again, whatever has happened to the reservation since; with other content it gets 422. Without a key, every request makes another reservation. The body may have at most 64 KiB.",
  body: objectSchema(reservationFields),
  takesKey: true,
  answers: {
    201: {
      ...answer(Reserved, "Reserved", {
        "a key in the body": { body: { ...RESERVATION, idempotency_key: "order-42" }, answer: RESERVED },
        "a key in the header, and a campaign": {
          headers: { "idempotency-key": "order-43" },
          body: { ...RESERVATION, campaign: "summer-2029" },
          answer: RESERVED,
        },
        "a replay": {
          body: { ...RESERVATION, campaign: "summer-2029", idempotency_key: "order-41" },
          answer: RESERVED,
        },
      }),
      headers: { Location: "the URL of the reservation's details", ...REPLAYED },
    },
  },
  refusals: {
    400: refusal("The request breaks rules", {
      "two broken rules": refused(
        { body: { user_id: "Test-User", point_amount: 0, execute_at: FUTURE } },
        ({ body }) => newReservation(body),
      ),
      "a time without an offset": refused(
        { body: { ...RESERVATION, execute_at: "2029-02-22T22:59:00" } },
        ({ body }) => newReservation(body),
      ),
    }),
    ...NO_BODY,
    422: refusal("The idempotency key was used before, with other content", {
      "the key of another reservation": {
        body: { ...RESERVATION, point_amount: 200, idempotency_key: "order-41" },
        error: keyConflict(),
      },
    }),
    ...UNAVAILABLE,
  },
});

/** After an INSERT had to wait for another transaction's lock, none waits for so long, in milliseconds. */
const BESIDE_LOCKS_MS = 5_000;

function reserveHandler({ database, hint }: ReserveOptions) {
  let besideLocksUntilMs = 0;
  const untilFree = openUntilFree();

  async function create(batch: Reservation[]): Promise<(CreateOutcome | typeof BUSY)[]> {
    if (performance.now() > besideLocksUntilMs) {
      try {
        return await database.run((connection) => createReservations(connection, batch));
      } catch (error) {
        if (!(error instanceof DatabaseError && error.kind === "lock_timeout")) throw error;
        // Another transaction holds the row of a replay: it must not hold up the others again.
        besideLocksUntilMs = performance.now() + BESIDE_LOCKS_MS;
      }
    }
    return createBesideLocks(database, batch);
  }

  // One INSERT at a time: with two at once there were 0.95 × the reservations, with three 0.9 × (256 connections, MySQL 9.7, two cores).
  const reserve = coalesce(async (batch: Reservation[]) => {
    const outcomes = await create(batch);
    hint(soonestOf(batch));
    return outcomes;
  }, BATCHING);
  return async ({ request }: { request: Request }) => {
    const body = await readJson(request);
    const reservation = newReservation(body, headerKeyOf(request));
    const outcome = await untilFree(() => reserve(reservation));
    if (outcome.kind === "conflict") throw keyConflict();
    const reserved = reservedOf(outcome.reservation);
    const location = `/point/reservations/${reserved.reservation_id}`;
    return Response.json(reserved, { status: 201, headers: { location, ...replayed(outcome.kind) } });
  };
}

// ---- POST /point/reserve/bulk

const Accepted = Type.Object({
  result: Type.Union([Type.Literal("created"), Type.Literal("replayed")], {
    description: "`replayed`: the key was used before with the same content, in this request or another",
  }),
  ...Reserved.properties,
});
const Refused = Type.Object({ result: Type.Literal("refused"), errors: Problem.properties.errors });
const BulkReserved = Type.Object({
  results: Type.Array(Type.Union([Accepted, Refused]), { description: "one per row, in order" }),
});

const RESERVE_BULK = describe({
  summary: "Make many reservations in one request",
  description:
    "Takes 1 to 10,000 reservations, in a body of at most 8 MiB. With `atomic`, all rows are reserved or none; 400 and 422 name every broken row by its index. With `each`, each row is reserved by itself, and the answer has one result per row, in order: `created`, `replayed`, or `refused` with its `errors`. Idempotency keys also apply within the request. A row without a key gets one from the request's header `Idempotency-Key` and its index; without that header, from the content of all rows and its index. So the same request sent again, for instance after a lost connection, changes nothing and gets the same ids. If you use neither keys nor the header: after a correction, send only the corrected rows; to reserve the same rows twice, give them keys.",
  body: objectSchema(bulkFields),
  takesKey: true,
  answers: {
    200: answer(BulkReserved, "Mode `each`: one result per row", {
      "one refused row of three": {
        body: {
          mode: "each",
          reservations: [
            { ...RESERVATION, idempotency_key: "order-44" },
            { ...RESERVATION, point_amount: 0 },
            { ...RESERVATION, idempotency_key: "order-44" },
          ],
        },
        answer: {
          results: [
            { result: "created", ...RESERVED },
            { result: "refused", errors: ["point amount must be greater than 0"] },
            { result: "replayed", ...RESERVED },
          ],
        },
      },
    }),
    201: answer(BulkReserved, "Mode `atomic`: all rows are reserved", {
      "two rows": {
        headers: { "idempotency-key": "bulk-7" },
        body: { mode: "atomic", reservations: [RESERVATION, { ...RESERVATION, user_id: "TestUser02" }] },
        answer: {
          results: [
            { result: "created", ...RESERVED },
            { result: "created", ...RESERVED, reservation_id: PROCESSING_ID },
          ],
        },
      },
    }),
  },
  refusals: {
    400: refusal(
      "The request breaks rules; those of rows count only in mode `atomic`. Nothing was reserved",
      {
        "a broken row": refused(
          { body: { mode: "atomic", reservations: [RESERVATION, { ...RESERVATION, point_amount: 0 }] } },
          ({ body }) => newBulkReservation(body),
        ),
        "no rows": refused({ body: { mode: "all", reservations: [] } }, ({ body }) =>
          newBulkReservation(body),
        ),
      },
    ),
    413: refusal("The body is larger than 8 MiB"),
    ...NO_JSON,
    422: refusal("Mode `atomic`: some keys were used before, with other content. Nothing was reserved", {
      "the key of another reservation": {
        body: {
          mode: "atomic",
          reservations: [RESERVATION, { ...RESERVATION, point_amount: 200, idempotency_key: "order-41" }],
        },
        error: keyConflict([atRow(1, KEY_CONFLICT)]),
      },
    }),
    ...UNAVAILABLE,
  },
});

/** 10,000 rows with the longest values take 4 MiB, or twice that if they are indented. */
const MAX_BULK_BYTES = 8 * 1024 * 1024;
/** The maximum number of bulk requests at once; more are refused with 503. Four of the largest are answered before clients time out. */
const MAX_BULKS = 4;
/** How long a bulk may wait for those before it, and then take in MySQL, in milliseconds. */
const BULK_MS = 12_000;

/** The outcome of a row, or the rules that it breaks. */
type RowResult = CreateOutcome | { broken: readonly BrokenRule[] };

function bulkHandler({ database, hint }: ReserveOptions) {
  // One at a time: a bulk takes MySQL as long as thousands of single reservations.
  const reserveMany = coalesce(
    async (bulks: BulkReservation[]) => {
      const results = await Promise.all(bulks.map((bulk) => createRows(database, bulk)));
      for (const { rows } of bulks) hint(soonestOf(rows));
      return results;
    },
    { maxBatch: 1, maxWaiting: MAX_BULKS, maxWaitMs: BULK_MS },
  );
  // Bodies are large: only a few may be in memory at once.
  const takeBulk = limitConcurrency(MAX_BULKS, "bulks");

  async function reserveBulk(request: Request): Promise<Response> {
    const body = await readJson(request, { maxBytes: MAX_BULK_BYTES });
    const bulk = newBulkReservation(body, headerKeyOf(request));
    const results = await reserveMany(bulk);
    if (bulk.mode === "atomic") refuseConflicts(results);
    return Response.json({ results: results.map(resultOf) }, { status: bulk.mode === "atomic" ? 201 : 200 });
  }

  return ({ request }: { request: Request }) => takeBulk(() => reserveBulk(request));
}

async function createRows(database: Database, { mode, rows }: BulkReservation): Promise<RowResult[]> {
  const valid = rows.filter((row): row is Reservation => !("broken" in row));
  const outcomes = await createBulk(database, valid, { allOrNone: mode === "atomic", workMs: BULK_MS });
  const next = outcomes.values();
  return rows.map((row) => ("broken" in row ? row : (next.next().value as CreateOutcome)));
}

/** All or none: throws if a row has a key that was used with other content. */
function refuseConflicts(results: readonly RowResult[]): void {
  const broken = results.flatMap((result, index) =>
    "kind" in result && result.kind === "conflict" ? [atRow(index, KEY_CONFLICT)] : [],
  );
  if (broken.length > 0) throw keyConflict(broken);
}

function resultOf(result: RowResult): Static<typeof Accepted> | Static<typeof Refused> {
  if ("broken" in result) {
    return { result: "refused", errors: result.broken.map(({ sentence }) => sentence) };
  }
  if (result.kind === "conflict") return { result: "refused", errors: [KEY_CONFLICT.sentence] };
  return { result: result.kind, ...reservedOf(result.reservation) };
}

/** The earliest time of some reservations; the latest possible time if there are none. */
function soonestOf(rows: readonly (Reservation | { broken: readonly BrokenRule[] })[]): Date {
  return new Date(
    Math.min(LATEST_MS, ...rows.map((row) => ("broken" in row ? LATEST_MS : Number(row.executeAt)))),
  );
}
