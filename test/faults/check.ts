import { aggregate } from "../../lib/accounting/aggregate.ts";
import { countWaiting } from "../../lib/accounting/count_repository.ts";
import { type Difference, describeDifference } from "../../lib/accounting/difference.ts";
import { reconcile } from "../../lib/accounting/reconcile.ts";
import { findAggregation } from "../../lib/accounting/total_repository.ts";
import { DatabaseError } from "../../lib/database_errors.ts";
import { compareSums } from "../../lib/dev/compare_sums.ts";
import { sleep } from "../../lib/loop.ts";
import { pointReservations, pointRoot, pointTransactions, type ReservationStatus } from "../../lib/schema.ts";
import type { TestDatabase } from "../harness/database.ts";
import { until } from "../harness/harness.ts";
import type { Client, Content, Reserved } from "./client.ts";
import { mayBeSetBack } from "./clock_jumps.ts";
import type { Struck } from "./report.ts";

/** Something that must never be. */
export interface Violation {
  what: string;
  /** The labels, ids or keys by which the evidence is found. */
  names: string[];
  /** When it was found, in milliseconds since 1970, if that is by MySQL's clock alone: a reservation that is overdue. */
  overdueMs?: number;
}

/**
 * Lets MySQL itself write down every change of a reservation's state and of the ledger, in the transaction of the change:
 * what was committed, in which order, and when by the database's clock. Without auto-increment: its lock would make
 * transactions wait for each other that otherwise do not.
 */
export async function installWitness({ query }: TestDatabase): Promise<void> {
  await query(
    `create table witness (
      number bigint unsigned not null primary key,
      id char(36) character set ascii collate ascii_bin not null,
      was varchar(10) not null, became varchar(10) not null, attempts_added int not null,
      ms_until_due bigint not null, session bigint not null, at datetime(6) not null,
      key (id)
    )`,
  );
  const insert = "insert into witness (number, session, at, id, was, became, attempts_added, ms_until_due)";
  const facts = "uuid_short(), connection_id(), now(6)";
  const isSame = (columns: string) =>
    columns
      .split(" ")
      .map((column) => `old.${column} <=> new.${column}`)
      .join(" and ");
  await query(
    `create trigger witness_reservations after update on point_reservations for each row
     ${insert} select ${facts}, new.id, old.status, new.status, new.attempts - old.attempts,
       timestampdiff(microsecond, now(3), new.execute_at) div 1000 from dual
     where not (${isSame("status scan_at attempts point_amount execute_at user_id")})`,
  );
  // A total that counts an entry does not change it.
  const isSameEntry = isSame("id idempotency_key user_id point_amount kind reservation_id created_at");
  await query(
    `create trigger witness_ledger_update after update on point_transactions for each row
     ${insert} select ${facts}, new.id, 'LEDGER', 'update', 0, 0 from dual where not (${isSameEntry})`,
  );
  await query(
    `create trigger witness_ledger_delete after delete on point_transactions for each row
     ${insert} select ${facts}, old.id, 'LEDGER', 'delete', 0, 0`,
  );
}

function violationOf(difference: Difference): Violation {
  const { reservation_id, user_id } = difference as { reservation_id?: string; user_id?: string };
  const name = reservation_id ?? user_id;
  const what = `reconciling found: ${describeDifference(difference)}`;
  const found: Violation = { what, names: name ? [name] : [] };
  return difference.kind === "overdue" ? { ...found, overdueMs: Date.now() } : found;
}

/** Reconciles again and again while everything is broken, in full every other time: a false alarm would wake somebody at night. */
export async function keepReconciling(
  { database }: TestDatabase,
  { leaseMs, signal }: { leaseMs: number; signal: AbortSignal },
): Promise<{ runs: number; violations: Violation[] }> {
  const violations: Violation[] = [];
  const onDifference = (difference: Difference) => void violations.push(violationOf(difference));
  let runs = 0;
  for (let isFull = true; !signal.aborted; isFull = !isFull) {
    try {
      await reconcile(database, { isFull, leaseMs, signal, onDifference });
      runs++;
    } catch (error) {
      // MySQL is among what is broken.
      if (!(error instanceof DatabaseError)) throw error;
    }
    await sleep(1_000, signal);
  }
  return { runs, violations };
}

/** The differences in the log of the schedulers. */
export function findLogged(logs: readonly Record<string, unknown>[]): Violation[] {
  return logs.flatMap(({ difference, time }) => {
    if (typeof difference !== "string") return [];
    const found: Violation = { what: `a scheduler found: ${difference}`, names: [] };
    return [difference.startsWith("overdue") ? { ...found, overdueMs: Date.parse(String(time)) } : found];
  });
}

/** Counts what no total holds yet, and reconciles everything. */
export async function reconcileAll(
  { database }: TestDatabase,
  { leaseMs }: { leaseMs: number },
): Promise<Violation[]> {
  const violations: Violation[] = [];
  const onDifference = (difference: Difference) => void violations.push(violationOf(difference));
  const { timeZone } = await findAggregation(database);
  // A scheduler may be at the last page.
  await until("every entry is counted", async () => {
    await aggregate(database, { timeZone: timeZone || "UTC" });
    return (await countWaiting(database)) === 0;
  });
  await reconcile(database, { isFull: true, leaseMs, onDifference });
  return violations;
}

interface WitnessRow {
  id: string;
  was: string;
  became: string;
  attempts_added: number;
  ms_until_due: number | string;
  /** By MySQL's clock. */
  at: Date;
}

/** The contents of the tables when nothing changes any more. */
export type Tables = Awaited<ReturnType<typeof readTables>>;
type Row = Tables["rows"][number];
type Entry = Tables["entries"][number];

/** Reads the tables as they are. */
export async function readTables({ query, database }: TestDatabase) {
  const sums = await compareSums(database, { workMs: 60_000 });
  const witness = await query<WitnessRow>("select * from witness order by number");
  const [now] = await query<{ at: Date }>("select now(3) at");
  return database.run(async ({ drizzle }) => ({
    rows: await drizzle("check_reservations").select().from(pointReservations),
    entries: await drizzle("check_ledger").select().from(pointTransactions),
    balances: await drizzle("check_balances").select().from(pointRoot),
    witness,
    /** The time of MySQL's clock. */
    now: now?.at ?? new Date(),
    /** Whether reservations, ledger and balances agree; each entry's time is checked apart. */
    agree:
      sums.reservations + sums.direct === sums.ledger &&
      sums.ledger === sums.balances &&
      sums.balanceMismatches + sums.reservationMismatches === 0,
  }));
}

interface Context {
  client: Client;
  tables: Tables;
  byKey: Map<string, Row>;
  struck: readonly Struck[];
  leaseMs: number;
  /** The latest time that MySQL's clock has shown, in milliseconds since 1970. */
  latestMs: number;
  report(what: string, ...names: (string | undefined)[]): void;
}

/**
 * Compares what the client was told with the tables, and each row with its ledger entry. Returns everything that must not be.
 * Whether a grant comes too early is a matter of MySQL's clock, which may have been set ahead meanwhile.
 */
export function findViolations(
  client: Client,
  tables: Tables,
  { struck, leaseMs }: { struck: readonly Struck[]; leaseMs: number },
): Violation[] {
  const violations: Violation[] = [];
  const context: Context = {
    client,
    tables,
    byKey: new Map(tables.rows.map((row) => [row.idempotencyKey, row])),
    struck,
    leaseMs,
    latestMs: tables.witness.reduce((latest, { at }) => Math.max(latest, at.getTime()), tables.now.getTime()),
    report: (what, ...names) => violations.push({ what, names: names.filter((name) => name !== undefined) }),
  };
  for (const { label, what } of client.misanswers) context.report(what, ...label.split(" "));
  checkStates(context);
  checkScans(context);
  checkReservations(context);
  checkBulks(context);
  checkChanges(context);
  checkCampaigns(context);
  checkBalances(context);
  if (!tables.agree) context.report("reservations, ledger and balances do not agree");
  return violations;
}

const MAY_BECOME: Record<string, ReservationStatus[]> = {
  PENDING: ["PENDING", "PROCESSING", "CANCELLED"],
  PROCESSING: ["PROCESSING", "DONE", "FAILED", "CANCELLED"],
  FAILED: ["PENDING"],
};

/** Whether the state machine allows it: from PROCESSING back to PENDING only after an attempt that failed. */
function isLegal({ was, became, attempts_added: added }: WitnessRow): boolean {
  if (was === "PROCESSING" && became === "PENDING") return added === 1;
  return MAY_BECOME[was]?.includes(became as ReservationStatus) ?? false;
}

function checkStates({ tables, struck, report }: Context) {
  for (const row of tables.witness) {
    const { id, was, became, at, ms_until_due } = row;
    const ms = Number(ms_until_due);
    if (!isLegal(row)) report(`${was} became ${became}`, id);
    if (became !== "PROCESSING" || ms <= 0 || mayBeSetBack(at.getTime(), at.getTime() + ms, struck)) continue;
    report(`was claimed ${ms} ms before its time`, id);
  }
}

/** A row that is not over is looked at when it is due, or when a lease ends; after a failure, by the backoff. */
function checkScans({ tables: { rows, now }, leaseMs, report }: Context) {
  for (const { id, status, executeAt, scanAt, attempts } of rows) {
    if ((status !== "PENDING" && status !== "PROCESSING") || attempts > 0) continue;
    const latestMs = Math.max(executeAt.getTime(), now.getTime() + leaseMs);
    if (scanAt && scanAt.getTime() <= latestMs) continue;
    report(`is ${status} and due at ${executeAt.toISOString()}, but looked at ${scanAt?.toISOString()}`, id);
  }
}

function checkReservations(context: Context) {
  const { client, tables, byKey, report } = context;
  const { rows, entries } = tables;
  const byId = new Map(rows.map((row) => [row.id, row]));
  const entriesById = Map.groupBy(entries, ({ reservationId }) => reservationId);
  const unowned = new Set(rows);

  function rowOf({ id, key, reserved }: Reserved): Row | undefined {
    if (id !== undefined) return byId.get(id);
    if (key !== undefined) return byKey.get(key);
    // Without a key, and its answer was lost.
    return rows.find((row) => row.idempotencyKey === row.id && unowned.has(row) && hasContent(row, reserved));
  }

  for (const reservation of client.reservations) {
    const { label, id } = reservation;
    const row = rowOf(reservation);
    if (row) {
      unowned.delete(row);
      const faults = faultsOf(context, { reservation, row, entries: entriesById.get(row.id) ?? [] });
      for (const what of faults) report(what, label, row.id, row.idempotencyKey);
    } else if (id !== undefined) {
      report("a reservation that was answered with 201 does not exist", label, id);
    }
  }
  for (const row of unowned) report("a reservation that nobody asked for", row.id);
  for (const { kind, reservationId, id } of entries) {
    const isGrant = kind === "grant";
    if (isGrant !== (reservationId !== null) || (isGrant && !byId.has(String(reservationId)))) {
      report(`a ${kind} entry of the reservation ${reservationId}`, id);
    }
  }
}

type Points = Pick<Entry, "userId" | "pointAmount">;

function hasPoints(one: Points, { userId, pointAmount }: Points): boolean {
  return one.userId === userId && one.pointAmount === pointAmount;
}

function hasContent(row: Row, content: Content): boolean {
  return hasPoints(row, content) && row.executeAt.getTime() === content.executeAt;
}

/** The states that a reservation may have in the end. */
function endsOf(
  { latestMs, tables: { now } }: Context,
  { cancel }: Reserved,
  { executeAt, campaign }: Row,
): ReservationStatus[] {
  if (cancel === "cancelled") return ["CANCELLED"];
  const isFar = executeAt.getTime() > now.getTime() + 3_600_000;
  const ends: ReservationStatus[] = [isFar ? "PENDING" : "DONE"];
  // It was due for a while by a clock that was set ahead; not all were granted by the time that it was set right again.
  if (isFar && executeAt.getTime() <= latestMs) ends.push("DONE", "PROCESSING");
  // How many of a campaign are cancelled is checked apart.
  return cancel === "unknown" || campaign !== null ? [...ends, "CANCELLED"] : ends;
}

function faultsOf(
  context: Context,
  { reservation, row, entries }: { reservation: Reserved; row: Row; entries: Entry[] },
): string[] {
  const { contents, cancel, transactionId, key } = reservation;
  const faults: string[] = [];
  const expectThat = (isRight: boolean, what: string) => isRight || faults.push(what);
  const { status } = row;
  expectThat(row.idempotencyKey === (key ?? row.id), `has the key ${row.idempotencyKey} instead of ${key}`);
  expectThat(
    contents.some((content) => hasContent(row, content)),
    `is ${JSON.stringify(row)} instead of ${JSON.stringify(contents)}`,
  );
  const ends = endsOf(context, reservation, row);
  expectThat(ends.includes(status), `is ${status} (${row.lastError}) instead of ${ends.join(" or ")}`);
  expectThat(cancel !== "refused", "could not be cancelled, but not because of its grant");
  expectThat(cancel !== "granted" || status === "DONE", `was told as granted, but is ${status}`);
  expectThat(
    entries.length === (status === "DONE" ? 1 : 0),
    `is ${status} with ${entries.length} ledger entries`,
  );
  for (const entry of entries) {
    const isSame = hasPoints(entry, row) && entry.idempotencyKey === row.idempotencyKey;
    expectThat(isSame, `was granted as ${JSON.stringify(entry)} instead of ${JSON.stringify(row)}`);
    const isEarly = entry.createdAt < row.executeAt;
    expectThat(
      !isEarly || mayBeSetBack(entry.createdAt.getTime(), row.executeAt.getTime(), context.struck),
      `was granted at ${entry.createdAt.toISOString()}, before its time`,
    );
    const isAsTold = transactionId === undefined || entry.id === transactionId;
    expectThat(isAsTold, `was told as granted by ${transactionId}, but is by ${entry.id}`);
  }
  return faults;
}

/** An atomic bulk exists whole, or not at all, even if its answer was lost. */
function checkBulks({ client, byKey, report }: Context) {
  const bulks = Map.groupBy(client.reservations, ({ bulk }) => bulk);
  for (const [bulk, rows] of bulks) {
    const found = rows.filter(({ key }) => byKey.has(String(key))).length;
    if (bulk === undefined || found === 0 || found === rows.length) continue;
    report(`${found} of the ${rows.length} rows of an atomic bulk exist`, ...rows.map(({ label }) => label));
  }
}

/** Every change that was answered with 200 has its entry, one that was refused has none; the ledger holds nothing else. */
function checkChanges({ client, tables, report }: Context) {
  const direct = tables.entries.filter(({ kind }) => kind !== "grant");
  const entries = Map.groupBy(direct, ({ idempotencyKey }) => idempotencyKey);
  for (const change of client.changes) {
    const { key, label, outcome, userId, pointAmount } = change;
    const found = entries.get(key) ?? [];
    entries.delete(key);
    const counts = { changed: [1], refused: [0], unknown: [0, 1] }[outcome];
    const kind = pointAmount > 0 ? "add" : "sub";
    const isRight = found.every((entry) => entry.kind === kind && hasPoints(entry, change));
    if (counts.includes(found.length) && isRight) continue;
    report(
      `${pointAmount} points of ${userId} were ${outcome}, but the ledger has ${JSON.stringify(found)}`,
      label,
      key,
    );
  }
  for (const [key, found] of entries) {
    report("a ledger entry that nobody asked for", key, ...found.map(({ id }) => id));
  }
}

/** What the cancel of a campaign was answered with still holds. */
function checkCampaigns({ client, tables, report }: Context) {
  for (const { campaign, counts } of client.campaignCancels) {
    const rows = tables.rows.filter((row) => row.campaign === campaign);
    const count = (status: ReservationStatus) => rows.filter((row) => row.status === status).length;
    const now = { cancelled: count("CANCELLED"), granted: count("DONE"), failed: count("FAILED"), open: 0 };
    const [told, found] = [JSON.stringify(counts), JSON.stringify(now)];
    if (told !== found) report(`the cancel of a campaign told ${told}, but there are ${found}`, campaign);
  }
}

function checkBalances({ tables: { balances, entries }, report }: Context) {
  const left = new Map(balances.map(({ userId, pointNum }) => [userId, pointNum]));
  for (const { userId, pointAmount } of entries) {
    left.set(userId, (left.get(userId) ?? 0n) - BigInt(pointAmount));
  }
  for (const [userId, points] of left) {
    if (points !== 0n) report(`the balance of ${userId} is ${points} more than its ledger entries`, userId);
  }
}
