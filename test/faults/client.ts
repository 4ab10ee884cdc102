import { createWriteStream } from "node:fs";
import type { Random } from "./random.ts";
import type { World } from "./world.ts";

/** What a reservation says, as the client wrote it. */
export interface Content {
  userId: string;
  pointAmount: number;
  /** Milliseconds since 1970. */
  executeAt: number;
}

/** What the client asked for and was told about one reservation. Nothing here is read from the tables. */
export interface Reserved {
  /** What its lines of the history carry. */
  label: string;
  key?: string | undefined;
  campaign?: string | undefined;
  /** Rows of one atomic bulk have the same number: all of them exist, or none. */
  bulk?: number | undefined;
  reserved: Content;
  /** Every content that it may have now: more than one if the answer to a change was lost for good. */
  contents: Content[];
  /** Known since a 201. */
  id?: string;
  /** What its cancel was answered with. */
  cancel?: "cancelled" | "granted" | "refused" | "unknown";
  /** The ledger entry that a 409 named. */
  transactionId?: string;
  /** The last status that a read has shown. */
  seen?: string;
  /** One call at a time changes it. */
  isBusy: boolean;
  /** A change was sent more than once. One of these may still come through, so no other change follows. */
  isLastChange: boolean;
}

/** A direct change of points. */
export interface Change {
  label: string;
  userId: string;
  pointAmount: number;
  key: string;
  /** When it was asked for, and told as done; milliseconds since 1970. */
  calledMs: number;
  answeredMs?: number;
  outcome: "changed" | "refused" | "unknown";
}

/** What the cancel of a campaign was answered with. */
export interface CampaignCancel {
  campaign: string;
  counts: { cancelled: number; granted: number; failed: number; open: number };
}

export type Client = ReturnType<typeof openClient>;

const PER_S = 120;
const TICK_MS = 25;
/** No call begins while so many have no answer. */
const MAX_OPEN = 1_500;
/** How long to wait for an answer before the request is sent again. */
const ANSWER_MS = 8_000;
const USERS = 400;
/** A tenth of everything goes to these; a worker locks the first one first. */
export const HOT_USERS = ["HotOne", "HotTwo"];
/** Some other user. */
export const userOf = (random: Random) => `User${random.below(USERS)}`;
/** How far ahead a reservation is due that is to be granted while the client calls. */
const AHEAD_MS = 8_000;
/** How far ahead a reservation is due that is not granted, unless MySQL's clock is set a day ahead: then the first one may be. */
const FAR_MS = [12 * 3_600_000, 30 * 86_400_000];

interface Call {
  label: string;
  /** The method and the path. */
  request: string;
  body?: unknown;
  /** The statuses that are right. */
  expects: number[];
  /** Whether it may be sent again if its answer is lost. */
  isRepeatable?: boolean;
}

interface Answer {
  status: number;
  body: Record<string, unknown>;
  isReplayed: boolean;
  /** How often it was sent. If more than once, an earlier try may have done it. */
  tries: number;
}

/** A careful client of the APIs: sends each call again, with its key, until it is answered, and writes down every call and answer. */
export function openClient(world: World, { random, historyFile }: { random: Random; historyFile: string }) {
  const reservations: Reserved[] = [];
  const changes: Change[] = [];
  const campaignCancels: CampaignCancel[] = [];
  /** Answers that nobody may get, whatever is broken. */
  const misanswers: { label: string; what: string }[] = [];
  const counts = { calls: 0, tries: 0 };
  const urls = world.nodes
    .filter(({ entry }) => entry === "api")
    .map(({ http }) => http.url.replace(/\/$/, ""));
  const history = createWriteStream(historyFile);
  /** Reservations that a change, a cancel or a repetition may be about. */
  const recent: Reserved[] = [];
  const campaigns: string[] = [];
  const open = new Set<Promise<void>>();
  let number = 0;
  let giveUpMs = Infinity;

  function write(label: string, line: Record<string, unknown>) {
    history.write(`${JSON.stringify({ at: new Date().toISOString(), label, ...line })}\n`);
  }

  function misanswer(label: string, what: string): undefined {
    misanswers.push({ label, what });
  }

  /** Sends a call until the answer is not 503; undefined if the client gave up, or if the answer is wrong. */
  async function send({
    label,
    request,
    body,
    expects,
    isRepeatable = true,
  }: Call): Promise<Answer | undefined> {
    counts.calls++;
    const [method = "", path = ""] = request.split(" ");
    for (let tries = 1; ; tries++) {
      counts.tries++;
      const url = random.pick(urls);
      write(label, { call: request, body, tries, to: url });
      try {
        const response = await fetch(`${url}${path}`, {
          method,
          headers: { "content-type": "application/json" },
          body: body === undefined ? null : JSON.stringify(body),
          signal: AbortSignal.timeout(ANSWER_MS),
        });
        const { status, headers } = response;
        const answer = (await response.json()) as Record<string, unknown>;
        write(label, { status, answer });
        if (expects.includes(status)) {
          return { status, body: answer, isReplayed: headers.get("idempotent-replayed") === "true", tries };
        }
        if (status !== 503) return misanswer(label, `${request}: ${status} ${JSON.stringify(answer)}`);
      } catch (error) {
        write(label, { lost: (error as Error).message });
      }
      if (!isRepeatable || Date.now() > giveUpMs) return undefined;
      await Bun.sleep(50 + Math.min(1_000, tries * 100) * Math.random());
    }
  }

  const someUser = (hotShare: number) => (random() < hotShare ? random.pick(HOT_USERS) : userOf(random));

  function newReserved(fields: Pick<Reserved, "key" | "campaign" | "bulk"> = {}): Reserved {
    const aheadMs = random.pick([0, 0, 1_000, 3_000, AHEAD_MS, AHEAD_MS]);
    const reserved = {
      userId: someUser(0.1),
      pointAmount: 1 + random.below(100),
      executeAt: Date.now() + (random() < 0.03 ? random.pick(FAR_MS) : Math.round(random() * aheadMs)),
    };
    const reservation: Reserved = {
      label: `r${++number}`,
      key: crypto.randomUUID(),
      ...fields,
      reserved,
      contents: [reserved],
      isBusy: false,
      isLastChange: false,
    };
    reservations.push(reservation);
    return reservation;
  }

  const bodyOf = ({ reserved, key, campaign }: Reserved) => ({
    user_id: reserved.userId,
    point_amount: reserved.pointAmount,
    execute_at: new Date(reserved.executeAt),
    idempotency_key: key,
    campaign,
  });

  /** Notes the id that a 201 named. */
  function note(reservation: Reserved, id: unknown) {
    const { label, id: before = id } = reservation;
    if (before !== id) misanswer(label, `was answered with the id ${id}, but it was ${before}`);
    reservation.id = String(id);
    recent.push(reservation);
    if (recent.length > 3_000) recent.splice(0, 1_000);
  }

  async function reserve(reservation: Reserved): Promise<Answer | undefined> {
    const { label, key } = reservation;
    const body = bodyOf(reservation);
    const isRepeatable = key !== undefined;
    const answer = await send({ label, request: "POST /point/reserve", body, expects: [201], isRepeatable });
    if (answer) note(reservation, answer.body.reservation_id);
    return answer;
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
    const label = rows.map((row) => row.label).join(" ");
    const answer = await send({
      label,
      request: "POST /point/reserve/bulk",
      body: { mode: isAtomic ? "atomic" : "each", reservations: rows.map(bodyOf) },
      expects: [isAtomic ? 201 : 200],
      // Some clients are gone for good: of what they asked for all must exist, or nothing.
      isRepeatable: !isAtomic || random() < 0.3,
    });
    if (!answer) return;
    for (const [index, result] of (answer.body.results as Record<string, unknown>[]).entries()) {
      const row = rows[index];
      if (row && result.result !== "refused") note(row, result.reservation_id);
      else misanswer(row?.label ?? label, `refused in a bulk: ${JSON.stringify(result)}`);
    }
    if (campaign) campaigns.push(campaign);
  }

  /** Works on a recent reservation that no other call is about. */
  async function withOne(
    isSuitable: (reservation: Reserved) => boolean,
    work: (reservation: Reserved) => Promise<void>,
  ) {
    for (let look = 0; look < 20 && recent.length > 0; look++) {
      const reservation = recent[recent.length - 1 - random.below(Math.min(recent.length, 1_000))];
      if (!reservation || reservation.isBusy || !isSuitable(reservation)) continue;
      reservation.isBusy = true;
      await work(reservation);
      reservation.isBusy = false;
      return;
    }
  }

  async function repeat(reservation: Reserved) {
    const answer = await reserve(reservation);
    if (answer?.isReplayed === false)
      misanswer(reservation.label, "a repeated request is not marked as replayed");
  }

  async function cancel(reservation: Reserved) {
    const { label, id } = reservation;
    const answer = await send({ label, request: `DELETE /point/reservations/${id}`, expects: [200, 409] });
    const entry = answer?.body.transaction_id;
    if (typeof entry === "string") reservation.transactionId = entry;
    if (!answer) reservation.cancel = "unknown";
    else if (answer.status === 200) reservation.cancel = "cancelled";
    else reservation.cancel = typeof entry === "string" ? "granted" : "refused";
  }

  async function patch(reservation: Reserved) {
    const { label, id, contents: before } = reservation;
    const change: Partial<Content> = {};
    if (random() < 0.7) change.pointAmount = 1 + random.below(100);
    if (random() < 0.7) change.executeAt = Date.now() + random.below(3_000);
    if (Object.keys(change).length === 0) return;
    const { pointAmount: point_amount, executeAt } = change;
    const body = { point_amount, execute_at: executeAt === undefined ? undefined : new Date(executeAt) };
    const after = before.map((content) => ({ ...content, ...change }));
    // Meanwhile it may be both.
    reservation.contents = [...before, ...after];
    const answer = await send({
      label,
      request: `PATCH /point/reservations/${id}`,
      body,
      expects: [200, 409],
    });
    reservation.isLastChange = answer?.tries !== 1;
    if (answer?.status === 200) reservation.contents = after;
    else if (answer?.tries === 1) reservation.contents = before;
  }

  async function read(reservation: Reserved) {
    const { label, id, seen } = reservation;
    const answer = await send({ label, request: `GET /point/reservations/${id}`, expects: [200] });
    if (!answer) return;
    const status = String(answer.body.status);
    const wasOver = seen === "DONE" || seen === "CANCELLED";
    if (wasOver && seen !== status) misanswer(label, `was seen ${seen}, and then ${status}`);
    reservation.seen = status;
  }

  async function changePoints() {
    const [label, key, userId] = [`p${++number}`, crypto.randomUUID(), someUser(0.2)];
    const isAdd = random() < 0.7;
    const points = 1 + random.below(isAdd ? 50 : 20);
    const pointAmount = isAdd ? points : -points;
    const calledMs = Date.now();
    const change: Change = { label, key, userId, pointAmount, calledMs, outcome: "unknown" };
    changes.push(change);
    const answer = await send({
      label,
      request: `PUT /point/${isAdd ? "add" : "sub"}`,
      body: { user_id: userId, point_num: points, idempotency_key: key },
      // There may be too few points to subtract from, or no balance at all.
      expects: isAdd ? [200] : [200, 400],
    });
    if (answer)
      Object.assign(change, {
        outcome: answer.status === 200 ? "changed" : "refused",
        answeredMs: Date.now(),
      });
  }

  async function cancelCampaign() {
    if (campaigns.length <= 5) return;
    const [label = ""] = campaigns.splice(random.below(campaigns.length), 1);
    const answer = await send({ label, request: `POST /point/campaigns/${label}/cancel`, expects: [200] });
    if (!answer) return;
    const { cancelled, granted, failed, open } = answer.body as CampaignCancel["counts"];
    campaignCancels.push({ campaign: label, counts: { cancelled, granted, failed, open } });
  }

  const isAlone = (one: Reserved) => one.campaign === undefined && one.cancel === undefined;
  /** What the client does, and how often. */
  const MIX: [weight: number, act: () => Promise<unknown>][] = [
    [60, () => reserve(newReserved())],
    [1, () => reserve(newReserved({ key: undefined }))],
    [1, reserveTwins],
    [3, reserveBulk],
    [8, () => withOne(isAlone, cancel)],
    [5, () => withOne((one) => isAlone(one) && !one.isLastChange, patch)],
    [3, () => withOne(({ key }) => key !== undefined, repeat)],
    [10, changePoints],
    [8, () => withOne(() => true, read)],
    [1, cancelCampaign],
  ];
  const acts = MIX.flatMap(([weight, act]) => Array.from({ length: weight }, () => act));

  function begin() {
    if (open.size >= MAX_OPEN) return;
    const call: Promise<void> = random
      .pick(acts)()
      .then(() => void open.delete(call));
    open.add(call);
  }

  return {
    reservations,
    changes,
    campaignCancels,
    misanswers,
    counts,
    /** Calls at a steady rate until `untilMs` by `Date.now()`; then waits for the last answers, `lastMs` at most. */
    async run({ untilMs, lastMs }: { untilMs: number; lastMs: number }): Promise<void> {
      const startedAt = Date.now();
      for (let begun = 0; Date.now() < untilMs; await Bun.sleep(TICK_MS)) {
        for (const due = ((Date.now() - startedAt) / 1_000) * PER_S; begun < due; begun++) begin();
      }
      giveUpMs = Date.now() + lastMs;
      await Promise.all(open);
    },
    async close(): Promise<void> {
      const { promise, resolve } = Promise.withResolvers<void>();
      history.end(resolve);
      await promise;
    },
  };
}
