import { aggregate } from "../lib/aggregate.ts";
import { DatabaseError } from "../lib/database.ts";
import { sleep } from "../lib/loop.ts";
import { compareSums } from "../lib/point_repository.ts";
import { describeDifference, reconcile } from "../lib/reconcile.ts";
import type { ReservationStatus } from "../lib/reservation.ts";
import { countWaiting, findAggregation } from "../lib/total_repository.ts";
import type { Client, Content, Reserved } from "./faults_client.ts";
import { type TestDatabase, until } from "./harness.ts";

/** Something that must never be, and by whose labels, ids or keys its story is found. */
export interface Violation {
  what: string;
  /** What the lines of its story hold. */
  names: string[];
}

/**
 * Lets MySQL itself write down every change of a reservation's state and of the ledger, in the very transaction of the
 * change: what was committed, in which order, and when by the database's clock. Not numbered by an auto-increment: its lock
 * would make those wait for each other who otherwise do not.
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
  await query(
    `create trigger witness_reservations after update on point_reservations for each row
     insert into witness (number, id, was, became, attempts_added, ms_until_due, session, at)
     select uuid_short(), new.id, old.status, new.status, new.attempts - old.attempts,
       timestampdiff(microsecond, now(3), new.execute_at) div 1000, connection_id(), now(6)
     from dual
     where not (old.status = new.status and old.scan_at <=> new.scan_at and old.attempts = new.attempts
       and old.point_amount = new.point_amount and old.execute_at = new.execute_at and old.user_id = new.user_id)`,
  );
  // That a total has counted it is no change of an entry.
  const isSame = `new.id = old.id and new.idempotency_key = old.idempotency_key and new.user_id = old.user_id
    and new.point_amount = old.point_amount and new.created_at = old.created_at`;
  for (const [name, moment, row, where] of [
    ["witness_ledger_changed", "update", "new", `not (${isSame})`],
    ["witness_ledger_removed", "delete", "old", "true"],
  ] as const) {
    await query(
      `create trigger ${name} after ${moment} on point_transactions for each row
       insert into witness (number, id, was, became, attempts_added, ms_until_due, session, at)
       select uuid_short(), ${row}.id, 'LEDGER', '${moment}', 0, 0, connection_id(), now(6) from dual where ${where}`,
    );
  }
}

/**
 * Compares the books again and again, every other time all of them, whatever is broken meanwhile: a difference that is none
 * would wake somebody at night.
 */
export function compareAllTheTime({ database }: TestDatabase, { leaseMs }: { leaseMs: number }) {
  const stop = new AbortController();
  const violations: Violation[] = [];
  let runs = 0;
  const done = (async () => {
    for (let isFull = true; !stop.signal.aborted; isFull = !isFull) {
      const names: string[] = [];
      const differences: string[] = [];
      try {
        await reconcile(database, {
          ...{ isFull, leaseMs, signal: stop.signal },
          onDifference(difference) {
            differences.push(describeDifference(difference));
            // A reservation has more of a story than its user.
            if ("reservation_id" in difference && difference.reservation_id)
              names.push(difference.reservation_id);
            else if ("user_id" in difference) names.push(difference.user_id);
          },
        });
        runs++;
      } catch (error) {
        // MySQL is among what is broken.
        if (!(error instanceof DatabaseError)) throw error;
      }
      await sleep(1_000, stop.signal);
      violations.push(...differences.map((what) => ({ what: `while it ran: ${what}`, names })));
    }
  })();
  return {
    async end() {
      stop.abort();
      await done;
      return { runs, violations };
    },
  };
}

/** Counts what is left to count, and compares all of the books. */
export async function compareBooks(
  { database }: TestDatabase,
  { leaseMs }: { leaseMs: number },
): Promise<Violation[]> {
  const violations: Violation[] = [];
  const { timeZone } = await findAggregation(database);
  // A scheduler may be at the last page.
  await until("every entry is counted", async () => {
    await aggregate(database, { timeZone: timeZone || "UTC" });
    return (await countWaiting(database)) === 0;
  });
  await reconcile(database, {
    ...{ isFull: true, leaseMs },
    onDifference: (difference) => void violations.push({ what: describeDifference(difference), names: [] }),
  });
  return violations;
}

interface WitnessRow {
  id: string;
  was: string;
  became: string;
  attempts_added: number;
  ms_until_due: number | string;
}

const MAY_BECOME: Record<ReservationStatus, ReservationStatus[]> = {
  PENDING: ["PENDING", "PROCESSING", "CANCELLED"],
  PROCESSING: ["PROCESSING", "DONE", "FAILED", "CANCELLED"],
  FAILED: ["PENDING"],
  DONE: [],
  CANCELLED: [],
};

/** Whether the picture of states allows it: from PROCESSING back to PENDING only after an attempt that failed. */
function isLegal({ was, became, attempts_added: added }: WitnessRow): boolean {
  if (was === "PROCESSING" && became === "PENDING") return added === 1;
  return MAY_BECOME[was as ReservationStatus]?.includes(became as ReservationStatus) ?? false;
}

interface Row {
  id: string;
  key: string;
  userId: string;
  pointAmount: number;
  executeAt: Date;
  createdAt: Date;
  status: ReservationStatus;
  campaign: string | null;
  lastError: string | null;
}

interface Entry {
  id: string;
  key: string;
  userId: string;
  pointAmount: number;
  createdAt: Date;
}

/** What stands in the tables, as of one moment when nothing changes any more. */
export interface Tables {
  rows: Row[];
  entries: Entry[];
  balances: Map<string, bigint>;
  witness: WitnessRow[];
}

export async function readTables({
  query,
  database,
}: TestDatabase): Promise<{ tables: Tables; agree: boolean }> {
  const rows = await query<Row>(
    `select id, idempotency_key \`key\`, user_id userId, point_amount pointAmount, execute_at executeAt, created_at createdAt,
       status, campaign, last_error lastError from point_reservations`,
  );
  const entries = await query<Entry>(
    `select id, idempotency_key \`key\`, user_id userId, point_amount pointAmount, created_at createdAt
     from point_transactions`,
  );
  const balances = await query<{ userId: string; pointNum: number | string }>(
    "select user_id userId, point_num pointNum from point_root",
  );
  const witness = await query<WitnessRow>(
    "select id, was, became, attempts_added, ms_until_due, session, at from witness order by number",
  );
  const { agree } = await compareSums(database, { workMs: 60_000 });
  return {
    tables: {
      ...{ rows, entries, witness },
      balances: new Map(balances.map(({ userId, pointNum }) => [userId, BigInt(pointNum)])),
    },
    agree,
  };
}

/**
 * Compares what the client was told with what stands in the tables, and each row with its ledger entry.
 *
 * @returns everything that must not be; empty where all is right
 */
export function findViolations(client: Client, tables: Tables): Violation[] {
  const violations: Violation[] = [];
  const report = (what: string, ...names: (string | undefined)[]) =>
    violations.push({ what, names: names.filter((name) => name !== undefined) });

  for (const { label, what } of client.misanswers) report(what, ...label.split(" "));
  for (const row of tables.witness) {
    const { id, was, became } = row;
    if (!isLegal(row)) report(`${was} became ${became}`, id);
    if (became === "PROCESSING" && Number(row.ms_until_due) > 0) {
      report(`was claimed ${row.ms_until_due} ms before its time`, id);
    }
  }

  const byId = new Map(tables.rows.map((row) => [row.id, row]));
  const byKey = new Map(tables.rows.map((row) => [row.key, row]));
  const entries = Map.groupBy(tables.entries, ({ key }) => key);
  const owned = new Set<Row>();
  for (const reservation of client.reservations) {
    const row = rowOf(reservation, { byId, byKey, rows: tables.rows, owned });
    if (row) owned.add(row);
    const names = [reservation.label, reservation.id ?? row?.id, row?.key];
    if (!row) {
      if (reservation.id !== undefined)
        report("a reservation that was answered with 201 is not there", ...names);
      continue;
    }
    for (const what of faultsOf(reservation, row, entries.get(row.key) ?? [])) report(what, ...names);
  }
  for (const row of tables.rows)
    if (!owned.has(row)) report("a reservation that nobody asked for", row.id, row.key);
  checkBulks(client, { byKey, report });
  checkLedger(client, { tables, byKey, entries, report });
  checkCampaigns(client, { tables, report });
  checkBalances(tables, report);
  return violations;
}

type Report = (what: string, ...names: (string | undefined)[]) => void;

/** The row of a reservation: by its id or key; one without either, whose answer was lost, by its content. */
function rowOf(
  { id, key, reserved }: Reserved,
  {
    byId,
    byKey,
    rows,
    owned,
  }: { byId: Map<string, Row>; byKey: Map<string, Row>; rows: Row[]; owned: Set<Row> },
): Row | undefined {
  if (id !== undefined) return byId.get(id);
  if (key !== undefined) return byKey.get(key);
  return rows.find((row) => row.key === row.id && !owned.has(row) && hasContent(row, reserved));
}

function hasContent(row: Row, { userId, pointAmount, executeAt }: Content): boolean {
  return row.userId === userId && row.pointAmount === pointAmount && row.executeAt.getTime() === executeAt;
}

function faultsOf({ contents, cancel, transactionId, key }: Reserved, row: Row, entries: Entry[]): string[] {
  const faults: string[] = [];
  const expectThat = (isRight: boolean, what: string) => isRight || faults.push(what);
  expectThat(
    key === undefined ? row.key === row.id : row.key === key,
    `has the key ${row.key} instead of ${key}`,
  );
  expectThat(
    contents.some((content) => hasContent(row, content)),
    `is ${row.userId}, ${row.pointAmount}, ${row.executeAt.toISOString()} instead of ${contents.map(showContent).join(" or ")}`,
  );
  const isFar = row.executeAt.getTime() > Date.now() + 3_600_000;
  const ends: ReservationStatus[] =
    cancel === "cancelled" ? ["CANCELLED"] : cancel === "unknown" ? ["CANCELLED", "DONE"] : ["DONE"];
  // A campaign is cancelled as a whole; how many of it is checked apart.
  if (row.campaign !== null) ends.push("CANCELLED");
  if (isFar && cancel === undefined)
    ends.splice(0, ends.length, "PENDING", ...(row.campaign ? ["CANCELLED" as const] : []));
  expectThat(
    ends.includes(row.status),
    `is ${row.status} (${row.lastError}) instead of ${ends.join(" or ")}`,
  );
  expectThat(cancel !== "refused", "could not be cancelled, for another reason than its grant");
  expectThat(cancel !== "granted" || row.status === "DONE", `was told as granted, but is ${row.status}`);
  const isDone = row.status === "DONE";
  expectThat(entries.length === (isDone ? 1 : 0), `is ${row.status} with ${entries.length} ledger entries`);
  for (const entry of entries) {
    expectThat(
      entry.userId === row.userId && entry.pointAmount === row.pointAmount,
      `was granted as ${entry.pointAmount} to ${entry.userId} instead of ${row.pointAmount} to ${row.userId}`,
    );
    expectThat(
      entry.createdAt >= row.executeAt,
      `was granted at ${entry.createdAt.toISOString()}, before its time`,
    );
    expectThat(
      transactionId === undefined || entry.id === transactionId,
      `was told as granted by ${transactionId}, but is by ${entry.id}`,
    );
  }
  return faults;
}

function showContent({ userId, pointAmount, executeAt }: Content): string {
  return `${userId}, ${pointAmount}, ${new Date(executeAt).toISOString()}`;
}

/** A bulk of all or none is there whole, or not at all, also where its answer was lost. */
function checkBulks(
  { reservations }: Client,
  { byKey, report }: { byKey: Map<string, Row>; report: Report },
) {
  const bulks = Map.groupBy(
    reservations.filter(({ bulk }) => bulk !== undefined),
    ({ bulk }) => bulk,
  );
  for (const rows of bulks.values()) {
    const there = rows.filter(({ key }) => byKey.has(String(key))).length;
    if (there > 0 && there < rows.length) {
      report(
        `${there} of the ${rows.length} rows of an atomic bulk are there`,
        ...rows.map(({ label }) => label),
      );
    }
  }
}

/** Every change that was answered with 200 has its entry, one that was refused has none; nothing else is in the ledger. */
function checkLedger(
  { changes }: Client,
  options: { tables: Tables; byKey: Map<string, Row>; entries: Map<string, Entry[]>; report: Report },
) {
  const { tables, byKey, entries, report } = options;
  const known = new Set<string>();
  for (const { key, label, outcome, userId, pointAmount } of changes) {
    const found = entries.get(`direct:${key}`) ?? [];
    known.add(`direct:${key}`);
    const wanted = { changed: [1], refused: [0], unknown: [0, 1] }[outcome];
    if (!wanted.includes(found.length)) {
      report(
        `${pointAmount} points of ${userId} were ${outcome}, with ${found.length} ledger entries`,
        label,
        key,
      );
    }
    for (const entry of found) {
      if (entry.userId !== userId || entry.pointAmount !== pointAmount) {
        report(
          `${pointAmount} of ${userId} is in the ledger as ${entry.pointAmount} of ${entry.userId}`,
          label,
          key,
        );
      }
    }
  }
  for (const { key, id } of tables.entries) {
    if (!known.has(key) && !byKey.has(key)) report("a ledger entry of nothing that was asked for", key, id);
  }
}

/** What the cancel of a campaign has told still holds. */
function checkCampaigns({ campaignCancels }: Client, { tables, report }: { tables: Tables; report: Report }) {
  for (const { campaign, counts } of campaignCancels) {
    const rows = tables.rows.filter((row) => row.campaign === campaign);
    const count = (status: ReservationStatus) => rows.filter((row) => row.status === status).length;
    const now = { cancelled: count("CANCELLED"), granted: count("DONE"), failed: count("FAILED"), open: 0 };
    if (JSON.stringify(now) !== JSON.stringify(counts)) {
      report(`the cancel told ${JSON.stringify(counts)}, but there are ${JSON.stringify(now)}`, campaign);
    }
  }
}

function checkBalances({ balances, entries }: Tables, report: Report) {
  const sums = new Map([...balances.keys()].map((userId) => [userId, 0n]));
  for (const { userId, pointAmount } of entries)
    sums.set(userId, (sums.get(userId) ?? 0n) + BigInt(pointAmount));
  for (const [userId, sum] of sums) {
    const balance = balances.get(userId);
    if (balance !== sum) report(`the balance of ${userId} is ${balance}, but the ledger says ${sum}`, userId);
  }
}
