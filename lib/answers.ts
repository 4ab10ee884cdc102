import { type Static, Type } from "@sinclair/typebox";
import { Day } from "./day.ts";
import type { Holdings, ListedReservation, ListedTransaction, ReservationStory } from "./history.ts";
import { clientKeyOf, digitsOf, ENTRY_KINDS, type EntryKind, kindOf, PointAmount, UserId } from "./point.ts";
import { Campaign, type Reservation, Status } from "./reservation.ts";
import type { CampaignCounts, CreateOutcome } from "./reservation_repository.ts";
import type { TotalRow } from "./schema.ts";

// What goes out over HTTP: for each answer its schema, and the function that makes it.

/** What becomes the schema's type as JSON: times may be `Date`s. */
type Outgoing<T> = T extends string
  ? string extends T
    ? T | Date
    : T
  : T extends object
    ? { [Field in keyof T]: Outgoing<T[Field]> }
    : T;

const Time = Type.String({ format: "date-time", description: "RFC 3339 in UTC, with milliseconds" });
const Uuid = Type.String({ format: "uuid" });
const NextCursor = Type.Union([Type.String(), Type.Null()], {
  description: "for the parameter `cursor` of the next page; null on the last one",
});
const EntryKindName = Type.Unsafe<EntryKind>(
  Type.Union(
    ENTRY_KINDS.map((kind) => Type.Literal(kind)),
    { description: "`grant` of a reservation, or a direct `add` or `sub`" },
  ),
);
const large = "up to 9223372036854775807, more than some JSON readers take";

function orNull<T extends Parameters<typeof Type.Union>[0][number]>(schema: T, description: string) {
  return Type.Union([schema, Type.Null()], { description });
}

/** RFC 9457. */
export const Problem = Type.Object({
  type: Type.String({ examples: ["about:blank"] }),
  title: Type.String(),
  status: Type.Integer({ description: "the same as the answer's" }),
  detail: Type.String({ description: "for people: what, which rule and which value" }),
  errors: Type.Array(Type.String(), { description: "one sentence for each broken rule; they do not change" }),
  request_id: Type.Optional(Type.String({ description: "also in the log and in the header X-Request-Id" })),
});

/** Where a reservation stands that cannot be changed any more, beyond what every problem says. */
export const StandsProblem = Type.Object({
  ...Problem.properties,
  reservation_id: Uuid,
  reservation_status: Status,
  granted_at: orNull(Time, "when its points came; null where they did not"),
  transaction_id: orNull(Uuid, "the ledger entry of its points; null where there is none"),
});

/** What a 409 adds to the problem. */
export function standOf(story: ReservationStory) {
  return {
    reservation_id: story.id,
    reservation_status: story.status,
    granted_at: story.grantedAt,
    transaction_id: story.transactionId,
  };
}

export const Messages = Type.Object({ messages: Type.Array(Type.String()) });

export const Reserved = Type.Object({
  reservation_id: Uuid,
  status: Type.Literal("PENDING", { description: "as it was when it was reserved" }),
  execute_at: Time,
});

export function reservedOf({ id, executeAt }: Reservation): Static<typeof Reserved> {
  return { reservation_id: id, status: "PENDING", execute_at: executeAt.toISOString() };
}

const Accepted = Type.Object({
  result: Type.Union([Type.Literal("created"), Type.Literal("replayed")], {
    description: "`replayed`: the same key with the same content came before, in this request or in another",
  }),
  ...Reserved.properties,
});
const Refused = Type.Object({ result: Type.Literal("refused"), errors: Problem.properties.errors });
export const BulkReserved = Type.Object({
  results: Type.Array(Type.Union([Accepted, Refused]), { description: "one for each row, in their order" }),
});

export function acceptedOf({
  kind,
  reservation,
}: Exclude<CreateOutcome, { kind: "conflict" }>): Static<typeof Accepted> {
  return { result: kind, ...reservedOf(reservation) };
}

export function refusedOf(errors: string[]): Static<typeof Refused> {
  return { result: "refused", errors };
}

export const Cancelled = Type.Object({ reservation_id: Uuid, status: Type.Literal("CANCELLED") });

export const Story = Type.Object({
  reservation_id: Uuid,
  user_id: UserId,
  point_amount: PointAmount,
  idempotency_key: Type.String(),
  campaign: orNull(Campaign, "null where it is of none"),
  status: Status,
  execute_at: Time,
  original_point_amount: orNull(PointAmount, "what was reserved at first; null where it was never changed"),
  original_execute_at: orNull(Time, "what was reserved at first; null where it was never changed"),
  next_scan_at: orNull(Time, "when the scheduler looks at it next; null once it is over"),
  attempts: Type.Integer({ description: "how often granting failed for a reason of its own" }),
  last_error: orNull(Type.String(), "why granting failed last"),
  transaction_id: orNull(Uuid, "the ledger entry of its points"),
  granted_at: orNull(Time, "when its points came"),
  late_ms: orNull(Type.Integer(), "from execute_at to granted_at"),
  created_at: Time,
  updated_at: Time,
});

export function storyOf(story: ReservationStory): Outgoing<Static<typeof Story>> {
  return {
    reservation_id: story.id,
    user_id: story.userId,
    point_amount: story.pointAmount,
    idempotency_key: story.idempotencyKey,
    campaign: story.campaign,
    status: story.status,
    execute_at: story.executeAt,
    original_point_amount: story.originalPointAmount,
    original_execute_at: story.originalExecuteAt,
    next_scan_at: story.scanAt,
    attempts: story.attempts,
    last_error: story.lastError,
    transaction_id: story.transactionId,
    granted_at: story.grantedAt,
    late_ms: story.grantedAt && story.grantedAt.getTime() - story.executeAt.getTime(),
    created_at: story.createdAt,
    updated_at: story.updatedAt,
  };
}

export const ReservedPoints = Type.Object({
  reserved_points: Type.Array(
    Type.Object({
      reservation_id: Uuid,
      point: PointAmount,
      status: Status,
      add_date: Type.String({ format: "date-time", description: "its execute_at" }),
      campaign: orNull(Campaign, "null where it is of none"),
    }),
    { description: "by add_date" },
  ),
  next_cursor: NextCursor,
});

export function reservedPointOf({
  id,
  pointAmount,
  status,
  executeAt,
  campaign,
}: ListedReservation): Outgoing<Static<typeof ReservedPoints>["reserved_points"][number]> {
  return { reservation_id: id, point: pointAmount, status, add_date: executeAt, campaign };
}

export const Transactions = Type.Object({
  transactions: Type.Array(
    Type.Object({
      transaction_id: Uuid,
      kind: EntryKindName,
      point: Type.Integer({ description: "negative where points were subtracted" }),
      reservation_id: orNull(Uuid, "the reservation it came from; null where it came from none"),
      campaign: orNull(Campaign, "the reservation's"),
      idempotency_key: Type.String(),
      created_at: Time,
    }),
    { description: "the newest first" },
  ),
  next_cursor: NextCursor,
});

export function transactionOf(
  entry: ListedTransaction,
): Outgoing<Static<typeof Transactions>["transactions"][number]> {
  return {
    transaction_id: entry.id,
    kind: kindOf(entry),
    point: entry.pointAmount,
    reservation_id: entry.reservationId,
    campaign: entry.campaign,
    idempotency_key: clientKeyOf(entry.idempotencyKey),
    created_at: entry.createdAt,
  };
}

export const Balance = Type.Object({
  user_id: UserId,
  point_num: Type.Integer({ description: large }),
  reserved_point_num: Type.Optional(
    Type.Integer({ description: `the sum still to come; left out where \`at\` is given; ${large}` }),
  ),
  next_execute_at: Type.Optional(
    orNull(Time, "when the next of it is due; null where nothing is to come; left out where `at` is given"),
  ),
  at: Type.Optional(Time),
  updated_at: orNull(Time, "when the balance changed last; null where it never did"),
});

export function balanceOf(userId: string, holdings: Holdings): Outgoing<Static<typeof Balance>> {
  return {
    user_id: userId,
    point_num: digitsOf(holdings.pointNum),
    reserved_point_num: digitsOf(holdings.reservedPointNum),
    next_execute_at: holdings.nextExecuteAt,
    updated_at: holdings.updatedAt,
  };
}

export function balanceAtOf(
  userId: string,
  { pointNum, updatedAt, at }: Pick<Holdings, "pointNum" | "updatedAt"> & { at: Date },
): Outgoing<Static<typeof Balance>> {
  return { user_id: userId, point_num: digitsOf(pointNum), at, updated_at: updatedAt };
}

export const Totals = Type.Object({
  time_zone: orNull(Type.String(), "whose days these are; null before anything was counted"),
  from: Day,
  to: Day,
  aggregated_at: orNull(Time, "when all that was there had last been counted; null while it is counted anew"),
  totals: Type.Array(
    Type.Object({
      day: Day,
      kind: EntryKindName,
      campaign: orNull(Campaign, "null where it is of none"),
      entries: Type.Integer({ description: "of the ledger" }),
      points: Type.Integer({ description: "their sum; negative for `sub`" }),
      users: Type.Integer({ description: "how many different ones; of several rows they cannot be added" }),
      late_ms_mean: orNull(Type.Integer(), "from execute_at to the grant, on average; null but for grants"),
      late_ms_max: orNull(Type.Integer(), "the worst of them; null but for grants"),
    }),
    { description: "by day, kind and campaign" },
  ),
  balances: Type.Optional(
    Type.Array(Type.Object({ day: Day, point_num: Type.Integer({ description: large }) }), {
      description: "all points of all users at the end of each day; left out where `campaign` is given",
    }),
  ),
});
type TotalAnswer = Static<typeof Totals>["totals"][number];

export function totalOf(row: TotalRow): TotalAnswer {
  const isGrant = row.kind === "grant" && row.entries > 0n;
  return {
    day: row.day,
    kind: row.kind,
    campaign: row.campaign === "" ? null : row.campaign,
    entries: Number(row.entries),
    points: digitsOf(row.points),
    users: Number(row.users),
    late_ms_mean: isGrant ? Number(row.lateMsSum / row.entries) : null,
    late_ms_max: isGrant ? Number(row.lateMsMax) : null,
  };
}

export function balanceOfDay({ day, pointNum }: { day: string; pointNum: bigint }) {
  return { day, point_num: digitsOf(pointNum) };
}

const TOTAL_COLUMNS = [
  ...(["day", "kind", "campaign", "entries", "points", "users"] as const),
  ...(["late_ms_mean", "late_ms_max"] as const),
];

/** The same as CSV (RFC 4180). No value has a comma or a quote in it. */
export function totalsCsv(rows: readonly TotalRow[]): string {
  const lines = rows.map((row) => {
    const total = { ...totalOf(row), points: row.points };
    return TOTAL_COLUMNS.map((column) => total[column] ?? "").join(",");
  });
  return [TOTAL_COLUMNS.join(","), ...lines].map((line) => `${line}\r\n`).join("");
}

export const CampaignCancelled = Type.Object({
  campaign: Campaign,
  cancelled: Type.Integer({ description: "how many of its reservations are CANCELLED now" }),
  granted: Type.Integer({ description: "how many were granted already, and stay so" }),
  failed: Type.Integer({ description: "how many are FAILED; only a retry can still make points of them" }),
  open: Type.Integer({ description: "how many are left because the time was over: send the same again" }),
});

export function campaignCancelledOf(
  campaign: string,
  counts: CampaignCounts,
): Static<typeof CampaignCancelled> {
  return { campaign, ...counts };
}
