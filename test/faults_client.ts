import { createWriteStream } from "node:fs";
import type { Random } from "./faults_random.ts";
import type { World } from "./faults_world.ts";

/** What a reservation says, as the client wrote it. */
export interface Content {
  userId: string;
  pointAmount: number;
  /** Milliseconds since 1970. */
  executeAt: number;
}

/** What the client asked for and was told, of one reservation. Nothing here was read from the tables. */
export interface Reserved {
  /** What its lines of the history carry. */
  label: string;
  key: string | undefined;
  campaign: string | undefined;
  reserved: Content;
  /** Every content that it may have now: more than one where an answer to a change was lost for good. */
  contents: Content[];
  /** Undefined until a 201 came. */
  id: string | undefined;
  /** What cancelling it was answered with. */
  cancel: "cancelled" | "granted" | "refused" | "unknown" | undefined;
  /** The ledger entry that a 409 named. */
  transactionId: string | undefined;
  /** The farthest status that a read has shown. */
  seen: string | undefined;
  /** One call at a time changes it. */
  isBusy: boolean;
  /** A change was sent more than once: one of these may still come through, so that no other change follows. */
  isLastChange: boolean;
  /** Rows of one atomic bulk carry the same number: all of them are there, or none. */
  bulk: number | undefined;
}

/** A direct change of points. */
export interface Change {
  label: string;
  userId: string;
  pointAmount: number;
  key: string;
  outcome: "changed" | "refused" | "unknown";
}

export interface CampaignCancel {
  campaign: string;
  counts: { cancelled: number; granted: number; failed: number; open: number };
}

export interface Client {
  reservations: Reserved[];
  changes: Change[];
  campaignCancels: CampaignCancel[];
  /** Answers that none may get, whatever is broken. */
  misanswers: { label: string; what: string }[];
  counts: { calls: number; tries: number; skipped: number };
  historyFile: string;
  /** Calls at a steady rate until `untilMs` by `Date.now()`; then waits for its last answers, `lastMs` at most. */
  run(options: { untilMs: number; lastMs: number }): Promise<void>;
  close(): Promise<void>;
}

const PER_S = 120;
const TICK_MS = 25;
/** Calls without an answer; while there are so many no others begin. */
const MAX_OPEN = 1_500;
/** How long to wait for one answer before the same request is sent again. */
const ANSWER_MS = 8_000;
const USERS = 400;
/** A tenth of everything goes to these; a worker locks the first one first. */
export const HOT_USERS = ["HotOne", "HotTwo"];
/** As far ahead as a time is set that shall come while the client calls. */
const AHEAD_MS = 8_000;
/** These never come. */
const FAR_MS = 86_400_000;

interface Call {
  label: string;
  method: string;
  path: string;
  body?: unknown;
  headers?: Record<string, string>;
}

interface Answer {
  status: number;
  body: Record<string, unknown>;
  replayed: boolean;
  /** How often it was sent: with more than once, an earlier try may have done it already. */
  tries: number;
}

/** A careful client of the APIs: every call has its key, and is sent again until it is answered; every call and answer is written down. */
export function openClient(
  world: World,
  { random, historyFile }: { random: Random; historyFile: string },
): Client {
  const reservations: Reserved[] = [];
  const changes: Change[] = [];
  const campaignCancels: CampaignCancel[] = [];
  const misanswers: Client["misanswers"] = [];
  const counts = { calls: 0, tries: 0, skipped: 0 };
  const urls = world.nodes.flatMap(({ http }) => (http ? [http.url.replace(/\/$/, "")] : []));
  const history = createWriteStream(historyFile);
  /** Those that a change, a cancel or a repetition may be about. */
  const recent: Reserved[] = [];
  const campaigns: string[] = [];
  const open = new Set<Promise<void>>();
  let number = 0;
  let giveUpMs = Infinity;

  function write(label: string, line: Record<string, unknown>) {
    history.write(`${JSON.stringify({ at: new Date().toISOString(), label, ...line })}\n`);
  }

  /** Sends until it is answered by something else than 503; undefined where the client gave up before. */
  async function send(call: Call, { isRepeatable = true } = {}): Promise<Answer | undefined> {
    const { label, method, path, body, headers = {} } = call;
    counts.calls++;
    for (let tries = 1; ; tries++) {
      counts.tries++;
      const url = random.pick(urls);
      write(label, { call: `${method} ${path}`, body, headers, tries, to: url });
      try {
        const response = await fetch(`${url}${path}`, {
          method,
          headers: { "content-type": "application/json", ...headers },
          ...(body !== undefined && { body: JSON.stringify(body) }),
          signal: AbortSignal.timeout(ANSWER_MS),
        });
        const answer = (await response.json()) as Record<string, unknown>;
        write(label, { status: response.status, answer });
        if (response.status !== 503) {
          if (response.status >= 500)
            misanswers.push({ label, what: `${method} ${path}: ${response.status}` });
          const replayed = response.headers.get("idempotent-replayed") === "true";
          return { status: response.status, body: answer, replayed, tries };
        }
      } catch (error) {
        write(label, { lost: (error as Error).message });
      }
      if (!isRepeatable || Date.now() > giveUpMs) return undefined;
      await Bun.sleep(50 + Math.min(1_000, tries * 100) * Math.random());
    }
  }

  function expectStatus(call: Call, answer: Answer | undefined, statuses: number[]): boolean {
    if (!answer || statuses.includes(answer.status)) return true;
    const what = `${call.method} ${call.path} was answered with ${answer.status}: ${JSON.stringify(answer.body)}`;
    misanswers.push({ label: call.label, what });
    return false;
  }

  function newReserved(fields: Partial<Pick<Reserved, "key" | "campaign" | "bulk">> = {}): Reserved {
    const isHot = random() < 0.1;
    const aheadMs = random.pick([0, 0, 1_000, 3_000, AHEAD_MS, AHEAD_MS]);
    const reserved = {
      userId: isHot ? random.pick(HOT_USERS) : `User${random.below(USERS)}`,
      pointAmount: 1 + random.below(100),
      executeAt: Date.now() + (random() < 0.03 ? FAR_MS : Math.round(random() * aheadMs)),
    };
    const reservation: Reserved = {
      ...{ label: `r${++number}`, key: crypto.randomUUID(), campaign: undefined, bulk: undefined, ...fields },
      ...{ reserved, contents: [reserved], id: undefined, cancel: undefined, transactionId: undefined },
      ...{ seen: undefined, isBusy: false, isLastChange: false },
    };
    reservations.push(reservation);
    return reservation;
  }

  function bodyOf({ reserved, key, campaign }: Reserved) {
    return {
      user_id: reserved.userId,
      point_amount: reserved.pointAmount,
      execute_at: new Date(reserved.executeAt).toISOString(),
      ...(key !== undefined && { idempotency_key: key }),
      ...(campaign !== undefined && { campaign }),
    };
  }

  /** A 201 names the id; another one than before is a second reservation. */
  function take(reservation: Reserved, id: unknown) {
    if (reservation.id !== undefined && reservation.id !== id) {
      misanswers.push({ label: reservation.label, what: `replayed as ${id}, but it was ${reservation.id}` });
    }
    reservation.id = String(id);
    recent.push(reservation);
    if (recent.length > 3_000) recent.splice(0, 1_000);
  }

  async function reserve(reservation: Reserved) {
    const call = {
      label: reservation.label,
      method: "POST",
      path: "/point/reserve",
      body: bodyOf(reservation),
    };
    const answer = await send(call, { isRepeatable: reservation.key !== undefined });
    if (expectStatus(call, answer, [201]) && answer) take(reservation, answer.body.reservation_id);
  }

  /** Two keys that differ only in case are two reservations. */
  async function reserveTwins() {
    const key = `twin-${crypto.randomUUID()}`;
    await Promise.all([key, key.toUpperCase()].map((each) => reserve(newReserved({ key: each }))));
  }

  async function reserveBulk() {
    const isAtomic = random() < 0.5;
    const campaign = random() < 0.5 ? `campaign-${++number}` : undefined;
    const bulk = isAtomic ? ++number : undefined;
    const rows = Array.from({ length: 20 + random.below(40) }, () => newReserved({ campaign, bulk }));
    const body = { mode: isAtomic ? "atomic" : "each", reservations: rows.map(bodyOf) };
    const call = {
      label: rows.map(({ label }) => label).join(" "),
      method: "POST",
      path: "/point/reserve/bulk",
      body,
    };
    // Some clients are gone for good: of what they asked for all must be there, or nothing.
    const answer = await send(call, { isRepeatable: !isAtomic || random() < 0.3 });
    if (!expectStatus(call, answer, [isAtomic ? 201 : 200]) || !answer) return;
    for (const [index, result] of (answer.body.results as Record<string, unknown>[]).entries()) {
      const row = rows[index];
      if (row && result.result !== "refused") take(row, result.reservation_id);
      else
        misanswers.push({
          label: row?.label ?? call.label,
          what: `refused in a bulk: ${JSON.stringify(result)}`,
        });
    }
    if (campaign) campaigns.push(campaign);
  }

  /** A recent reservation that no other call is about, held until the work is done. */
  async function withOne(
    isIt: (reservation: Reserved) => boolean,
    work: (reservation: Reserved) => Promise<void>,
  ) {
    for (let look = 0; look < 20 && recent.length > 0; look++) {
      const reservation = recent[recent.length - 1 - random.below(Math.min(recent.length, 1_000))];
      if (!reservation || reservation.isBusy || !isIt(reservation)) continue;
      reservation.isBusy = true;
      await work(reservation);
      reservation.isBusy = false;
      return;
    }
  }

  async function repeat(reservation: Reserved) {
    const call = {
      label: reservation.label,
      method: "POST",
      path: "/point/reserve",
      body: bodyOf(reservation),
    };
    const answer = await send(call);
    if (!expectStatus(call, answer, [201]) || !answer) return;
    take(reservation, answer.body.reservation_id);
    if (!answer.replayed)
      misanswers.push({ label: reservation.label, what: "repeated, but not told as replayed" });
  }

  async function cancel(reservation: Reserved) {
    const { label, id } = reservation;
    const call = { label, method: "DELETE", path: `/point/reservations/${id}` };
    const answer = await send(call);
    if (!answer) reservation.cancel = "unknown";
    if (!expectStatus(call, answer, [200, 409]) || !answer) return;
    const { transaction_id: entry } = answer.body;
    if (answer.status === 200) reservation.cancel = "cancelled";
    else reservation.cancel = typeof entry === "string" ? "granted" : "refused";
    if (typeof entry === "string") reservation.transactionId = entry;
  }

  async function patch(reservation: Reserved) {
    const { label, id } = reservation;
    const change = {
      ...(random() < 0.7 && { pointAmount: 1 + random.below(100) }),
      ...(random() < 0.7 && { executeAt: Date.now() + random.below(3_000) }),
    };
    if (Object.keys(change).length === 0) return;
    const body = {
      ...(change.pointAmount !== undefined && { point_amount: change.pointAmount }),
      ...(change.executeAt !== undefined && { execute_at: new Date(change.executeAt).toISOString() }),
    };
    const call = { label, method: "PATCH", path: `/point/reservations/${id}`, body };
    const before = reservation.contents;
    const after = before.map((content) => ({ ...content, ...change }));
    // Meanwhile it may be both.
    reservation.contents = [...before, ...after];
    const answer = await send(call);
    reservation.isLastChange = answer?.tries !== 1;
    if (!expectStatus(call, answer, [200, 409]) || !answer) return;
    if (answer.status === 200) reservation.contents = after;
    else if (answer.tries === 1) reservation.contents = before;
  }

  async function read(reservation: Reserved) {
    const { label, id } = reservation;
    const call = { label, method: "GET", path: `/point/reservations/${id}` };
    const answer = await send(call);
    if (!expectStatus(call, answer, [200]) || !answer) return;
    const status = String(answer.body.status);
    const { seen } = reservation;
    if ((seen === "DONE" || seen === "CANCELLED") && seen !== status) {
      misanswers.push({ label, what: `was seen ${seen}, and then ${status}` });
    }
    reservation.seen = status;
  }

  async function changePoints() {
    const sign = random() < 0.7 ? 1 : -1;
    const points = 1 + random.below(sign > 0 ? 50 : 20);
    const isHot = random() < 0.2;
    const userId = isHot ? random.pick(HOT_USERS) : `User${random.below(USERS)}`;
    const change: Change = {
      ...{
        label: `p${++number}`,
        userId,
        pointAmount: sign * points,
        key: crypto.randomUUID(),
        outcome: "unknown",
      },
    };
    changes.push(change);
    const body = { user_id: userId, point_num: points, idempotency_key: change.key };
    const call = { label: change.label, method: "PUT", path: sign > 0 ? "/point/add" : "/point/sub", body };
    const answer = await send(call);
    // There may be too little to subtract from, or no balance at all.
    if (!expectStatus(call, answer, sign > 0 ? [200] : [200, 400]) || !answer) return;
    change.outcome = answer.status === 200 ? "changed" : "refused";
  }

  async function cancelCampaign() {
    const campaign = campaigns.splice(random.below(campaigns.length), 1)[0];
    if (campaign === undefined) return;
    const call = { label: campaign, method: "POST", path: `/point/campaigns/${campaign}/cancel` };
    const answer = await send(call);
    if (!expectStatus(call, answer, [200]) || !answer) return;
    const { cancelled, granted, failed, open: left } = answer.body as Record<string, number>;
    campaignCancels.push({
      campaign,
      counts: {
        cancelled: Number(cancelled),
        granted: Number(granted),
        failed: Number(failed),
        open: Number(left),
      },
    });
  }

  const isAlone = ({ campaign, cancel: cancelled }: Reserved) =>
    campaign === undefined && cancelled === undefined;
  /** What the client does, and how often. */
  const MIX: [weight: number, act: () => Promise<void>][] = [
    [60, () => reserve(newReserved())],
    [1, () => reserve(newReserved({ key: undefined }))],
    [1, reserveTwins],
    [3, reserveBulk],
    [8, () => withOne(isAlone, cancel)],
    [5, () => withOne((one) => isAlone(one) && !one.isLastChange, patch)],
    [3, () => withOne(({ key }) => key !== undefined, repeat)],
    [10, changePoints],
    [8, () => withOne(() => true, read)],
    [1, () => (campaigns.length > 5 ? cancelCampaign() : Promise.resolve())],
  ];
  const acts = MIX.flatMap(([weight, act]) => Array.from({ length: weight }, () => act));

  function begin() {
    if (open.size >= MAX_OPEN) {
      counts.skipped++;
      return;
    }
    const call = random
      .pick(acts)()
      .finally(() => open.delete(call));
    open.add(call);
  }

  return {
    ...{ reservations, changes, campaignCancels, misanswers, counts, historyFile },
    async run({ untilMs, lastMs }) {
      const startedAt = Date.now();
      for (let begun = 0; Date.now() < untilMs; ) {
        for (const due = ((Date.now() - startedAt) / 1_000) * PER_S; begun < due; begun++) begin();
        await Bun.sleep(TICK_MS);
      }
      giveUpMs = Date.now() + lastMs;
      await Promise.all(open);
    },
    async close() {
      const { promise, resolve } = Promise.withResolvers<void>();
      history.end(resolve);
      await promise;
    },
  };
}
