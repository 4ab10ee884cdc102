import { until } from "../harness/harness.ts";
import { type BrokerPart, deadLettersOf, hintsOf, isThere } from "./broker_parts.ts";
import { HOT_USERS, userOf } from "./client.ts";
import type { Kind, Strike } from "./kind.ts";
import { openSession, type Run, WORST_SETTINGS } from "./session.ts";
import type { World } from "./world.ts";

type Operator = Awaited<ReturnType<World["openChannel"]>>;

// What an operator, a backup, a stranger's transaction or a clock does to the servers.

const HOUR_MS = 3_600_000;
const DAY_MS = 24 * HOUR_MS;
const HELD_USERS = 8;
const HELD_RESERVATIONS = 30;
/** How soon a reservation is due that is locked meanwhile, in milliseconds. */
const HELD_AHEAD_MS = 8_000;
/** How soon what was deleted must be there again, in milliseconds. */
const MADE_AGAIN_MS = 5_000;
/** Numbers of MySQL and MariaDB. */
const READ_ONLY = [1290, 1836];
const ACCOUNT_LOCKED = [3118, 4151];
const KILL_EVERY_MS = 200;

/** A transaction of somebody else, which holds some users or reservations. All others must be served meanwhile. */
function holding(hold: (run: Run, strike: Strike) => Promise<string[]>): Kind {
  return {
    takes: "rows",
    // Longer than anybody waits for a lock, and than the lease.
    lasts: [5_500, 10_000],
    needsLease: false,
    async strike(strike) {
      await using session = await strike.world.openSession();
      await session.run("begin");
      const held = await hold(session.run, strike);
      if (held.length === 0) throw new Error("there is nothing to hold");
      await Bun.sleep(strike.lastsMs);
      await session.run("rollback");
      return { held };
    },
  };
}

/** What happens to MySQL as a whole. It is like an outage: nothing is lost but claims. */
function onMysql(kind: Pick<Kind, "lasts" | "needsClock" | "strike">): Kind {
  return { takes: "MySQL", weight: 1, needsLease: true, ...kind };
}

/** Breaks something by statements, and mends it in any case. */
function byStatements(breakIt: (run: Run, strike: Strike) => Promise<unknown>): Kind["strike"] {
  return async (strike) => {
    try {
      await using session = await strike.world.openSession();
      await breakIt(session.run, strike);
      await Bun.sleep(strike.lastsMs);
    } finally {
      await strike.world.mendMysql();
    }
  };
}

/** Ends the sessions of the processes under test. Resolves to how many there were. */
async function killSessions(run: Run, { world }: Strike): Promise<number> {
  const all = await run<{ Id: number; User: string }>("show processlist");
  const theirs = all.filter(({ User }) => User === world.account);
  // Some end by themselves meanwhile.
  await Promise.all(theirs.map(({ Id }) => run(`kill ${Id}`).catch(() => undefined)));
  return theirs.length;
}

/** Makes sure that the processes under test are refused with one of those numbers. */
async function expectRefused({ world }: Strike, numbers: readonly number[]): Promise<void> {
  try {
    await using session = await openSession(world.processUrl);
    await session.run("update point_root set point_num = point_num where user_id = 'Nobody'");
  } catch (error) {
    const { errno, message } = error as { errno?: number; message: string };
    if (numbers.includes(Number(errno))) return;
    throw new Error(`The processes are refused, but with ${errno}: ${message}`);
  }
  throw new Error("The processes are not refused");
}

/** Sets MySQL's clock, and sets it right again. */
function clockJump(sign: 1 | -1): Kind {
  return onMysql({
    lasts: [2_000, 6_000],
    needsClock: true,
    async strike({ world, random, lastsMs }) {
      const clockOffMs = sign * random.pick([HOUR_MS, DAY_MS]);
      try {
        await world.clock?.set(clockOffMs);
        await Bun.sleep(lastsMs);
      } finally {
        await world.clock?.set(0);
      }
      return { clockOffMs };
    },
  });
}

/** Deletes something that the processes have made on RabbitMQ, and that they must make again. */
function deletion(part: BrokerPart, act: (operator: Operator, world: World) => Promise<unknown>): Kind {
  return {
    takes: "queue",
    lasts: [500, 2_000],
    weight: 1,
    needsLease: false,
    async strike({ world, lastsMs, isAlone }) {
      if (!(await isThere(world, part))) throw new Error(`${part}: not there`);
      {
        await using operator = await world.openChannel();
        await act(operator, world);
      }
      await Bun.sleep(lastsMs);
      if (!isAlone) return;
      await until("there again", () => isThere(world, part), MADE_AGAIN_MS).catch(() => {
        world.misdeeds.push(
          `${part}: deleted, and not there again within ${Math.round(lastsMs) + MADE_AGAIN_MS} ms`,
        );
      });
    },
  };
}

/** Keeps one snapshot open until `endMs` by `performance.now()`. Resolves to how many ledger entries it does not see by then. */
async function holdSnapshot(world: World, endMs: number): Promise<number> {
  const count = "select count(*) entries from point_transactions";
  await using reader = await world.openSession();
  await using outside = await world.openSession();
  await reader.run("set session transaction isolation level repeatable read");
  await reader.run("start transaction with consistent snapshot");
  for (const table of ["point_reservations", "point_root"]) await reader.run(`select count(*) from ${table}`);
  while (performance.now() < endMs) {
    await Bun.sleep(Math.min(500, Math.max(0, endMs - performance.now())));
    await reader.run("select 1");
  }
  const [[seen], [all]] = await Promise.all([reader.run(count), outside.run(count)]);
  return Number(all?.entries) - Number(seen?.entries);
}

/** The kinds that need more than a process and its connections. */
export const SERVER_KINDS: Record<string, Kind> = {
  deadlock: {
    takes: "rows",
    lasts: [1_000, 3_000],
    weight: 3,
    needsLease: true,
    async strike({ world, random, lastsMs }) {
      await using session = await world.openSession();
      const { run } = session;
      const touch = "update point_root set updated_at = updated_at where user_id = ?";
      await run("create table if not exists weight (n int)");
      for (const end = performance.now() + lastsMs; performance.now() < end; await Bun.sleep(20)) {
        await run("begin");
        // MySQL gives up the transaction that has changed less: this one must survive.
        await run("insert into weight values ?", [Array.from({ length: 2_000 }, (_, n) => [n])]);
        await run(touch, [HOT_USERS[1]]);
        await Bun.sleep(random.between([20, 100]));
        // Against the order of the workers: who holds the first and waits for the second is in a deadlock now.
        await run(touch, [HOT_USERS[0]]);
        await run("rollback");
      }
    },
  },
  "balances-locked": holding(async (run, { random }) => {
    const users = [...HOT_USERS, ...Array.from({ length: HELD_USERS }, () => userOf(random))];
    const lock = "select user_id name from point_root where user_id in (?) for update";
    return (await run<{ name: string }>(lock, [users])).map(({ name }) => name);
  }),
  "reservations-locked": holding(async (run, { random, reservations }) => {
    const soon = reservations.filter(({ id, reserved: { executeAt } }) => {
      return id !== undefined && executeAt > Date.now() && executeAt < Date.now() + HELD_AHEAD_MS;
    });
    const ids = random.shuffle(soon.map(({ id }) => id)).slice(0, HELD_RESERVATIONS);
    if (ids.length === 0) return [];
    const lock = `select id name from point_reservations where id in (?) and status in ('PENDING', 'PROCESSING')
      for update skip locked`;
    return (await run<{ name: string }>(lock, [ids])).map(({ name }) => name);
  }),
  "long-snapshot": {
    takes: "snapshot",
    lasts: [15_000, 45_000],
    needsLease: false,
    async strike({ world, lastsMs }) {
      let unseen = 0;
      // Another fault may kill MySQL meanwhile: then with another snapshot.
      for (const endMs = performance.now() + lastsMs; performance.now() < endMs; await Bun.sleep(200)) {
        const more = await holdSnapshot(world, endMs).catch(() => 0);
        unseen = Math.max(unseen, more);
      }
      if (unseen === 0) throw new Error("nothing has happened beside the snapshot");
      return { held: [] };
    },
  },
  "read-only": onMysql({
    lasts: [1_000, 5_000],
    strike: byStatements(async (run, strike) => {
      await run("set global read_only = 1");
      await expectRefused(strike, READ_ONLY);
    }),
  }),
  "account-locked": onMysql({
    lasts: [1_000, 5_000],
    strike: byStatements(async (run, strike) => {
      await run("alter user ?@'%' account lock", [strike.world.account]);
      if ((await killSessions(run, strike)) === 0) throw new Error("There are no sessions to kill");
      // Those that were logging in meanwhile.
      await Bun.sleep(KILL_EVERY_MS);
      await killSessions(run, strike);
      await expectRefused(strike, ACCOUNT_LOCKED);
    }),
  }),
  // All that a session inherits from the server; those that come meanwhile do.
  "worst-settings": onMysql({
    lasts: [2_000, 6_000],
    strike: byStatements(async (run, strike) => {
      for (const [name, worst] of Object.entries(WORST_SETTINGS))
        await run(`set global ${name} = ?`, [worst]);
      if ((await killSessions(run, strike)) === 0) throw new Error("There are no sessions to kill");
    }),
  }),
  "database-clock-ahead": clockJump(1),
  "database-clock-behind": clockJump(-1),
  "hints-delete": deletion("hints", ({ channel }, world) => channel.deleteExchange(hintsOf(world))),
  "hints-unbind": deletion("hints", async ({ channel }, world) => {
    // The bindings are gone with the exchange; the next one has none.
    await channel.deleteExchange(hintsOf(world));
    await channel.assertExchange(hintsOf(world), "fanout", { durable: true });
  }),
  "dead-letters-delete": deletion("dead letters", ({ channel }, world) => {
    return channel.deleteQueue(deadLettersOf(world));
  }),
};
