/**
 * Breaks everything, and checks every reservation's fate: real processes on a MySQL and a RabbitMQ of their own, a client that
 * writes down each call and answer, and faults of many kinds at random moments. Then all heals, and what the client was told
 * is compared with the tables.
 *
 *     bun run faults [--seconds 120] [--seed N] [--only KIND,…] [--apart] [--json FILE]
 *     bun run faults --sabotage all|NAME,…
 *
 * The same seed makes the same plan of faults. `--apart` strikes one at a time, and demands that each is recovered from
 * within the lease + 2 s of its end, or within 2 s where the lease has no part in it. `--sabotage` plants bugs in copies of
 * the tree, and demands that each is caught. Exit 0: all is right; 1: something is not; 2: it could not be tried.
 *
 * The servers are a private pair, or those of DATABASE_URL and AMQP_URL where START_SERVICES is a command that starts what
 * does not run of them. Settings of the processes, e.g. `LEASE_MS=15000`, are handed on to them. Linux only.
 */
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { Settings } from "../lib/config.ts";
import { install, mustInstall } from "../lib/dev/install.ts";
import {
  compareAllTheTime,
  compareBooks,
  findViolations,
  installWitness,
  readTables,
  type Violation,
} from "./faults_check.ts";
import { openClient } from "./faults_client.ts";
import { KINDS, type Planned, planApart, planFaults } from "./faults_kinds.ts";
import { randomOf } from "./faults_random.ts";
import { recoveryOf, type Struck, tellStory } from "./faults_report.ts";
import { sabotage } from "./faults_sabotage.ts";
import { openWorld, type World } from "./faults_world.ts";

const ROOT = join(import.meta.dir, "..");
/** One fault every so often, in milliseconds. */
const EVERY_MS = 1_300;
/** For the client's last answers once all is healed, in milliseconds. */
const LAST_ANSWERS_MS = 60_000;
/** How much later than the lease a reservation may come that one fault has hit, in milliseconds. */
const RECOVERY_MS = 2_000;
const QUEUE_EMPTY_MS = 30_000;

const { values } = parseArgs({
  options: {
    seconds: { type: "string" },
    seed: { type: "string" },
    only: { type: "string" },
    apart: { type: "boolean", default: false },
    json: { type: "string" },
    sabotage: { type: "string" },
  },
});

interface Options {
  seconds: number;
  seed: number;
  kinds: string[];
  isApart: boolean;
}

function readOptions(): Options {
  const seconds = Number(values.seconds ?? 120);
  const seed = Number(values.seed ?? Math.floor(Math.random() * 1e9));
  const kinds = values.only?.split(",") ?? Object.keys(KINDS);
  const unknown = kinds.filter((kind) => !(kind in KINDS));
  const broken = [
    !(Number.isInteger(seconds) && seconds >= 5) &&
      `--seconds must be a whole number from 5: received ${values.seconds}`,
    !Number.isSafeInteger(seed) && `--seed must be a whole number: received ${values.seed}`,
    unknown.length > 0 &&
      `--only must be some of ${Object.keys(KINDS).join(", ")}: received ${unknown.join(", ")}`,
  ].filter((fault) => fault !== false);
  if (broken.length > 0) throw new Error(`Cannot begin as ${broken.join("; and as ")}`);
  return { seconds, seed, kinds, isApart: values.apart };
}

const startedAt = performance.now();
function progress(what: string): void {
  console.error(`${String(Math.round((performance.now() - startedAt) / 1_000)).padStart(5)} s  ${what}`);
}

/** Strikes as planned, and says what was struck when; a fault that could not strike, as others had broken what it needs, is left out. */
async function strikeAll(
  world: World,
  plan: readonly Planned[],
  client: ReturnType<typeof openClient>,
): Promise<Struck[]> {
  const beginMs = Date.now();
  const struck: Struck[] = [];
  await Promise.all(
    plan.map(async ({ kind: name, atMs, lastsMs, node: place, seed }) => {
      await Bun.sleep(Math.max(0, beginMs + atMs - Date.now()));
      const [kind, node] = [KINDS[name], world.nodes[place]];
      if (!kind || !node) throw new Error(`Cannot strike ${name} at node ${place}`);
      const startMs = Date.now();
      const where = kind.entries ? node.name : "";
      try {
        await kind.strike({
          world,
          node,
          lastsMs,
          random: randomOf(seed),
          reservations: client.reservations,
        });
        struck.push({ name, where, startMs, endMs: Date.now() });
      } catch (error) {
        progress(`${name} ${where} did not strike: ${(error as Error).message}`);
      }
    }),
  );
  return struck.sort((a, b) => a.startMs - b.startMs);
}

const OPEN = `select count(*) open, min(id) first from point_reservations
  where status in ('PENDING', 'PROCESSING') and execute_at < now(3) + interval 1 hour`;

/** Waits until nothing is left to grant; says what is, where it takes longer than it may. */
async function untilAtRest(world: World, withinMs: number): Promise<Violation[]> {
  const end = Date.now() + withinMs;
  for (;;) {
    const [row] = await world.test.query<{ open: number; first: string | null }>(OPEN);
    if (Number(row?.open) === 0) return [];
    if (Date.now() > end) {
      const what = `${row?.open} reservations are still open ${withinMs} ms after all was healed`;
      return [{ what, names: [String(row?.first)] }];
    }
    await Bun.sleep(50);
  }
}

/** Sends once more what was taken away, and messages of what is over long since: nothing may come of it. */
async function sendStale(world: World, client: ReturnType<typeof openClient>): Promise<Violation[]> {
  await using operator = await world.openChannel();
  const { channel } = operator;
  for (const content of world.delayed) channel.sendToQueue(world.queueName, content, { persistent: true });
  for (const { id, reserved } of client.reservations.filter(({ id }) => id !== undefined).slice(0, 500)) {
    const message = {
      reservation_id: id,
      user_id: reserved.userId,
      point_amount: 1,
      idempotency_key: "stale",
    };
    channel.sendToQueue(world.queueName, Buffer.from(JSON.stringify(message)), { persistent: true });
  }
  let empty = 0;
  for (const end = Date.now() + QUEUE_EMPTY_MS; empty < 5; await Bun.sleep(100)) {
    const { messageCount } = await channel.checkQueue(world.queueName);
    empty = messageCount === 0 ? empty + 1 : 0;
    if (Date.now() < end) continue;
    return [
      { what: `${messageCount} messages are still in the queue after ${QUEUE_EMPTY_MS} ms`, names: [] },
    ];
  }
  return [];
}

async function run({ seconds, seed, kinds, isApart }: Options): Promise<number> {
  const settings = Object.fromEntries(
    Object.keys(Settings.properties).flatMap((name) =>
      Bun.env[name] && !/URL$|PORT$|^HOST$|^QUEUE$/.test(name) ? [[name, Bun.env[name]]] : [],
    ),
  ) as Record<string, string>;
  progress(`seed ${seed}; starting MySQL, RabbitMQ and 7 processes`);
  const world = await openWorld(settings);
  let closing: Promise<unknown> | undefined;
  function close() {
    closing ??= Promise.resolve(world[Symbol.asyncDispose]());
    return closing;
  }
  for (const signal of ["SIGINT", "SIGTERM"] as const)
    process.once(signal, () => close().then(() => process.exit(2)));
  try {
    return await runIn(world, settings);
  } finally {
    await close();
  }

  async function runIn(world: World, settings: Record<string, string>): Promise<number> {
    await installWitness(world.test);
    const { LEASE_MS: leaseMs, SCAN_INTERVAL_MS: scanMs } = world.settings;
    const planned = { seconds, kinds, everyMs: EVERY_MS, leaseMs };
    const plan = isApart ? planApart(randomOf(seed), planned) : planFaults(randomOf(seed), planned);
    const folder = join(ROOT, ".services", "faults");
    mkdirSync(folder, { recursive: true });
    const historyFile = join(folder, `history-${seed}.jsonl`);
    const client = openClient(world, { random: randomOf(seed + 1), historyFile });
    const lastMs = Math.max(seconds * 1_000, ...plan.map(({ atMs, lastsMs: ms }) => atMs + ms));
    const untilMs = Date.now() + lastMs;
    progress(
      `${plan.length} faults of ${new Set(plan.map(({ kind }) => kind)).size} kinds in ${Math.round(lastMs / 1_000)} s`,
    );
    const ticking = setInterval(() => {
      const { calls, tries } = client.counts;
      progress(`${client.reservations.length} reservations, ${calls} calls in ${tries} tries`);
    }, 10_000);
    const comparing = compareAllTheTime(world.test, { leaseMs });
    const calling = client.run({ untilMs, lastMs: LAST_ANSWERS_MS });
    const struck = await strikeAll(world, plan, client);
    await Bun.sleep(Math.max(0, untilMs - Date.now()));
    await world.heal();
    await calling;
    clearInterval(ticking);
    await client.close();
    const violations: Violation[] = [];
    violations.push(...(await untilAtRest(world, leaseMs + 2 * scanMs)));
    violations.push(...(await sendStale(world, client)));
    const compared = await comparing.end();
    violations.push(...compared.violations, ...(await compareBooks(world.test, { leaseMs })));
    const { tables, agree } = await readTables(world.test);
    violations.push(...findViolations(client, tables));
    for (const node of world.nodes) node.findLies();
    violations.push(...world.misdeeds.map((what) => ({ what, names: [] })));
    if (!agree) violations.push({ what: "reservations, ledger and balances do not agree", names: [] });

    const recovery = recoveryOf(tables, struck);
    if (isApart) {
      for (const { name, where, recoveredMs = 0, id } of recovery.byFault) {
        const boundMs = (KINDS[name]?.needsLease ? leaseMs : 0) + RECOVERY_MS;
        if (recoveredMs > boundMs) {
          violations.push({
            what: `${name} ${where} was recovered from after ${recoveredMs} ms, not ${boundMs}`,
            names: [id ?? ""],
          });
        }
      }
    }
    const logs = world.logs();
    // The schedulers compare as well.
    for (const { msg, difference } of logs) {
      if (msg === "the books differ")
        violations.push({ what: `a scheduler found: ${difference}`, names: [] });
    }
    const deadlocks = logs.filter(({ error }) =>
      /DEADLOCK/.test(String((error as Error | undefined)?.message)),
    ).length;
    console.table(
      kinds.flatMap((name) => {
        const times = recovery.byFault.filter((fault) => fault.name === name);
        if (times.length === 0) return [];
        const slowest = Math.max(...times.map(({ recoveredMs = 0 }) => recoveredMs));
        return { fault: name, times: times.length, ...(isApart && { "slowest recovery, ms": slowest }) };
      }),
    );
    const summary = {
      ...{ seed, seconds: Math.round(lastMs / 1_000), faults: struck.length },
      kinds: new Set(struck.map(({ name }) => name)).size,
      reservations: tables.rows.length,
      granted: tables.entries.length - client.changes.filter(({ outcome }) => outcome === "changed").length,
      cancelled: tables.rows.filter(({ status }) => status === "CANCELLED").length,
      ...{ calls: client.counts.calls, retries: client.counts.tries - client.counts.calls, deadlocks },
      ...{ reconciliations: compared.runs, ledger_entries: tables.entries.length },
      // Of the time between due and granted, only that in which nothing was broken.
      slowest_recovery_ms: recovery.slowestMs,
      violations: violations.length,
    };
    console.table([summary]);
    if (values.json) {
      const byKind = Object.fromEntries(
        kinds.map((name) => [name, struck.filter((one) => one.name === name).length]),
      );
      await Bun.write(values.json, `${JSON.stringify({ ...summary, settings, by_kind: byKind })}\n`);
    }
    if (recovery.slowestMs > leaseMs + 2 * scanMs) {
      const names = [recovery.slowestId ?? ""];
      const slow = [{ what: `waited ${recovery.slowestMs} ms while nothing was broken`, names }];
      console.log(await tellStory(slow, { tables, struck, historyFile, logs }));
    }
    if (violations.length === 0) {
      console.log(`Nothing lost, nothing doubled, nothing early (seed ${seed})`);
      return 0;
    }
    const sorts = Map.groupBy(violations, ({ what }) => what.replaceAll(/[0-9a-f-]{36}|\d+/g, "…"));
    for (const [sort, all] of sorts) console.log(`${all.length} × ${sort}`);
    console.log(await tellStory(violations, { tables, struck, historyFile, logs }));
    console.log(
      `VIOLATED: ${violations[0]?.what}\nAgain: bun run faults --seed ${seed} --seconds ${seconds}; calls and answers: ${historyFile}`,
    );
    return 1;
  }
}

try {
  const options = readOptions();
  // Servers of its own, which may be killed.
  if (!Bun.env.START_SERVICES && mustInstall()) await install({ say: progress });
  process.exit(values.sabotage ? await sabotage(values.sabotage) : await run(options));
} catch (error) {
  console.error(error instanceof Error ? error.message : error);
  process.exit(2);
}
