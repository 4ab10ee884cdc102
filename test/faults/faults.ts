import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { Option } from "commander";
import { COULD_NOT_RUN, newCommand, runCommand } from "../../lib/cli/command.ts";
import { install, mustInstall } from "../../lib/dev/install.ts";
import { progress, settingsGiven, someOf, wholeNumber } from "../harness/tool.ts";
import { isThere } from "./broker_parts.ts";
import {
  findLogged,
  findViolations,
  installWitness,
  keepReconciling,
  readTables,
  reconcileAll,
  type Violation,
} from "./check.ts";
import { type Client, openClient } from "./client.ts";
import { isAhead } from "./clock_jumps.ts";
import { KINDS, messageOf } from "./kinds.ts";
import { kindOf, type Planned, planApart, planFaults } from "./plan.ts";
import { randomOf } from "./random.ts";
import { countKinds, describeFirst, figuresOf, type Recovery, recoveryOf, type Struck } from "./report.ts";
import { PLANTS, sabotage } from "./sabotage.ts";
import { openWorld, type World } from "./world.ts";

const DESCRIPTION = `Breaks everything, and checks what becomes of every reservation: real
processes on a MySQL and a RabbitMQ of their own, a client that writes down each
call and answer, and faults of many kinds at random moments. In the end
everything is mended, and what the client was told is compared with the tables.

The servers are a private pair, or those of DATABASE_URL and AMQP_URL if
START_SERVICES is a command that starts those of them that do not run. Settings
of the processes, e.g. LEASE_MS=15000, are passed on to them. Linux only.
MySQL's clock is set by libfaketime, which this command installs as root on
Debian or Ubuntu; without it, those faults are left out.`;

const ROOT = join(import.meta.dir, "../..");
/** How long the client waits for its last answers once everything is mended, in milliseconds. */
const LAST_ANSWERS_MS = 60_000;
/** How much later than the lease a reservation may come that a single fault has hit, in milliseconds. */
const RECOVERY_MS = 2_000;
const QUEUE_EMPTY_MS = 30_000;
const MAX_STALE = 500;

interface Options {
  seconds: number;
  seed: number;
  only: string[];
  apart: boolean;
  json?: string;
  sabotage?: string[];
}

/** Strikes as planned. Leaves out a fault that cannot strike because others have broken what it needs. */
async function strikeAll(
  world: World,
  plan: readonly Planned[],
  { client, isAlone }: { client: Client; isAlone: boolean },
): Promise<Struck[]> {
  const beginMs = Date.now();
  const struck: Struck[] = [];
  async function strikeOne({ kind: name, atMs, lastsMs, node: place, seed }: Planned) {
    await Bun.sleep(Math.max(0, beginMs + atMs - Date.now()));
    const [kind, node] = [kindOf(name), world.nodes[place]];
    if (!node) throw new Error(`Cannot strike ${name} at node ${place}`);
    const { reservations } = client;
    const fault = { name, node: kind.entries ? node.name : "", startMs: Date.now() };
    try {
      const random = randomOf(seed);
      const effect = await kind.strike({ world, node, lastsMs, random, reservations, isAlone });
      struck.push({ ...fault, ...effect, endMs: Date.now() });
    } catch (error) {
      progress(`${name} ${fault.node} did not strike: ${(error as Error).message}`);
    }
  }
  await Promise.all(plan.map(strikeOne));
  return struck.sort((a, b) => a.startMs - b.startMs);
}

const OPEN = `select id from point_reservations
  where status in ('PENDING', 'PROCESSING') and execute_at < now(3) + interval 1 hour limit 1000`;

/** Waits until nothing is left to grant. */
async function untilAtRest({ test }: World, withinMs: number): Promise<Violation[]> {
  for (const end = Date.now() + withinMs; ; await Bun.sleep(50)) {
    const open = await test.query<{ id: string }>(OPEN);
    if (open.length === 0) return [];
    const what = `${open.length} reservations are still open ${withinMs} ms after everything was mended`;
    if (Date.now() > end) return [{ what, names: [open[0]?.id ?? ""] }];
  }
}

/** Sends what was taken away, and messages of reservations that are over: nothing may come of it. */
async function sendStale(world: World, { reservations }: Client): Promise<Violation[]> {
  await using operator = await world.openChannel();
  const { channel } = operator;
  const reserved = reservations.filter(({ id }) => id !== undefined).slice(0, MAX_STALE);
  const stale = reserved.map((one) => Buffer.from(JSON.stringify({ ...messageOf(one), point_amount: 1 })));
  for (const content of [...world.delayed, ...stale]) {
    channel.sendToQueue(world.queueName, content, { persistent: true });
  }
  let empty = 0;
  for (const end = Date.now() + QUEUE_EMPTY_MS; empty < 5; await Bun.sleep(100)) {
    const { messageCount } = await channel.checkQueue(world.queueName);
    empty = messageCount === 0 ? empty + 1 : 0;
    const what = `${messageCount} messages are still in the queue after ${QUEUE_EMPTY_MS} ms`;
    if (Date.now() > end) return [{ what, names: [] }];
  }
  return [];
}

const BROKER_PARTS = ["hints", "dead letters"] as const;
const MADE_AGAIN_MS = 10_000;

/** What is missing on RabbitMQ a while after everything was mended. */
async function findMissing(world: World): Promise<Violation[]> {
  const schedulers = world.nodes.filter(({ entry }) => entry === "scheduler").length;
  for (const end = Date.now() + MADE_AGAIN_MS; ; await Bun.sleep(500)) {
    const missing: string[] = [];
    for (const part of BROKER_PARTS) if (!(await isThere(world, part))) missing.push(part);
    const bound = await world.countBindings();
    if (bound < schedulers) missing.push(`hints for ${schedulers - bound} of ${schedulers} schedulers`);
    if (missing.length === 0) return [];
    const what = `RabbitMQ has no ${missing.join(", ")} ${MADE_AGAIN_MS} ms after everything was mended`;
    if (Date.now() > end) return [{ what, names: [] }];
  }
}

/** Longer than another scheduler waits for the turn of one that was killed, in milliseconds. */
const ACCOUNTING_MS = 100_000;

/** Whether the schedulers do the accounting again after MySQL's clock has jumped. Not by the times in their logs: those may jump too. */
async function findIdle(world: World, struck: readonly Struck[]): Promise<Violation[]> {
  if (!struck.some(({ clockOffMs }) => clockOffMs)) return [];
  const isDone = ({ msg }: { msg?: unknown }) => /^reconciliation found (no )?differences/.test(String(msg));
  const count = () => world.logs().filter(isDone).length;
  const before = count();
  for (const end = Date.now() + ACCOUNTING_MS; Date.now() < end; await Bun.sleep(500)) {
    if (count() > before) return [];
  }
  return [
    {
      what: `no scheduler did the accounting within ${ACCOUNTING_MS} ms after everything was mended`,
      names: [],
    },
  ];
}

/** What each single fault took too long to recover from. */
function findSlow({ byFault }: Recovery, leaseMs: number): Violation[] {
  return byFault.flatMap(({ name, node, recoveredMs, id = "" }) => {
    const boundMs = (kindOf(name).needsLease ? leaseMs : 0) + RECOVERY_MS;
    const what = `${name} ${node}: somebody had to wait ${recoveredMs} ms for it instead of ${boundMs}`;
    return recoveredMs > boundMs ? [{ what, names: [id] }] : [];
  });
}

/** Breaks everything for as long as planned while the client calls; then mends everything and waits for its last answers. */
async function breakEverything(world: World, { seconds, seed, only, apart }: Options) {
  const kinds = only.filter((name) => world.clock || !kindOf(name).needsClock);
  if (kinds.length < only.length)
    progress(`left out: ${only.filter((name) => !kinds.includes(name)).join(", ")}`);
  const plan = (apart ? planApart : planFaults)(randomOf(seed), { seconds, kinds, ...world.settings });
  const folder = join(ROOT, ".services", "faults");
  mkdirSync(folder, { recursive: true });
  const historyFile = join(folder, `history-${seed}.jsonl`);
  const client = openClient(world, { random: randomOf(seed + 1), historyFile });
  const lastMs = Math.max(seconds * 1_000, ...plan.map((fault) => fault.atMs + fault.lastsMs));
  const untilMs = Date.now() + lastMs;
  const planned = new Set(plan.map(({ kind }) => kind)).size;
  progress(`${plan.length} faults of ${planned} kinds in ${Math.round(lastMs / 1_000)} s`);
  const ticking = setInterval(() => {
    const { calls, tries } = client.counts;
    progress(`${client.reservations.length} reservations, ${calls} calls in ${tries} tries`);
  }, 10_000);
  const calling = client.run({ untilMs, lastMs: LAST_ANSWERS_MS });
  const struck = await strikeAll(world, plan, { client, isAlone: apart });
  await Bun.sleep(Math.max(0, untilMs - Date.now()));
  await world.heal();
  await calling;
  clearInterval(ticking);
  await client.close();
  return { client, struck, historyFile, seconds: Math.round(lastMs / 1_000) };
}

async function runIn(world: World, options: Options): Promise<number> {
  const { test, settings, misdeeds } = world;
  const { leaseMs, scanMs } = settings;
  await installWitness(test);
  const over = new AbortController();
  const reconciling = keepReconciling(test, { leaseMs, signal: over.signal });
  const { client, struck, historyFile, seconds } = await breakEverything(world, options);

  const violations = await untilAtRest(world, leaseMs + 2 * scanMs);
  violations.push(...(await findMissing(world)), ...(await findIdle(world, struck)));
  violations.push(...(await sendStale(world, client)));
  over.abort();
  const { runs: reconciliations, violations: differences } = await reconciling;
  // The schedulers reconcile as well.
  const logs = world.logs();
  const found = [...differences, ...findLogged(logs)];
  violations.push(...found.filter(({ overdueMs = 0 }) => !isAhead(overdueMs, struck)));
  violations.push(...(await reconcileAll(test, { leaseMs })));
  const tables = await readTables(test);
  violations.push(...findViolations(client, tables, { struck, leaseMs }));
  for (const node of world.nodes) node.checkConfirmed();
  violations.push(...misdeeds.map((what) => ({ what, names: [] })));
  const recovery = recoveryOf(tables, { struck, changes: client.changes });
  if (options.apart) violations.push(...findSlow(recovery, leaseMs));

  const evidence = { tables, struck, historyFile, logs };
  const { seed, json } = options;
  const figures = {
    seed,
    seconds,
    ...figuresOf(evidence, client),
    reconciliations,
    // Of the time between due and granted, only the part in which nothing was broken.
    slowest_recovery_ms: recovery.slowestMs,
    violations: violations.length,
  };
  const by_kind = countKinds(recovery, options.apart);
  console.table(by_kind);
  console.table([figures]);
  if (json) await Bun.write(json, `${JSON.stringify({ ...figures, settings: settingsGiven(), by_kind })}\n`);
  if (recovery.slowestMs > leaseMs + 2 * scanMs) {
    const what = `waited ${recovery.slowestMs} ms while nothing was broken`;
    console.log(await describeFirst([{ what, names: [recovery.slowestId ?? ""] }], evidence));
  }
  if (violations.length === 0) {
    console.log(`Nothing lost, nothing doubled, nothing early (seed ${seed})`);
    return 0;
  }
  const sorts = Map.groupBy(violations, ({ what }) => what.replaceAll(/[0-9a-f-]{36}|\d+/g, "…"));
  for (const [sort, all] of sorts) console.log(`${all.length} × ${sort}`);
  console.log(await describeFirst(violations, evidence));
  console.log(`VIOLATED: ${violations[0]?.what}`);
  console.log(
    `Again: bun run faults --seed ${seed} --seconds ${options.seconds}; calls and answers: ${historyFile}`,
  );
  return 1;
}

async function run(options: Options): Promise<number> {
  progress(`seed ${options.seed}; starting MySQL, RabbitMQ and 7 processes`);
  const needsClock = options.only.some((name) => kindOf(name).needsClock);
  const world = await openWorld(settingsGiven(), { needsClock, say: progress });
  let closing: Promise<void> | undefined;
  function close() {
    closing ??= world[Symbol.asyncDispose]();
    return closing;
  }
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    process.once(signal, () => close().then(() => process.exit(COULD_NOT_RUN)));
  }
  try {
    return await runIn(world, options);
  } finally {
    await close();
  }
}

const names = Object.keys(KINDS);
const plants = Object.keys(PLANTS);
const parsePlants = (text: string) => (text === "all" ? plants : someOf(plants)(text));
const command = newCommand("faults", DESCRIPTION, { no: "if something is not right" })
  .option("--seconds <n>", "how long it lasts", wholeNumber(5), 120)
  .option("--seed <n>", "the same seed makes the same plan of faults", wholeNumber(0), Date.now() % 1e9)
  .addOption(
    new Option("--only <kinds>", "kinds of faults, with commas between them")
      .argParser(someOf(names))
      .default(names, "all"),
  )
  .option("--apart", `one fault at a time, each recovered from within the lease + ${RECOVERY_MS} ms`, false)
  .option("--json <file>", "where to write the figures")
  .option("--sabotage <bugs>", "plant bugs, `all` or names with commas: each must be caught", parsePlants);
await runCommand<Options>(command, {
  what: "run the faults",
  async run(options) {
    // Servers of its own, which may be killed.
    if (!Bun.env.START_SERVICES && mustInstall()) await install({ say: progress });
    return options.sabotage ? sabotage(options.sabotage) : run(options);
  },
});
