import { expect } from "bun:test";
import { withDeadline } from "../lib/loop.ts";
import { AMQP_URL, type RunningService } from "./harness.ts";
import type { Pipeline } from "./pipeline.ts";
import { type Moment, startProxy, type TcpProxy } from "./proxy.ts";

// What the processes send, by the statement's beginning.
export const BEGIN = /^begin/;
export const LOCK = /^select [\s\S]* for update/;
export const READ = /^select (?![\s\S]* for update)/;
export const INSERT_RESERVATION = /^insert into point_reservations/;
export const INSERT_LEDGER = /^insert into point_transactions/;
export const INSERT_BALANCE = /^insert into point_root/;
export const UPDATE = /^update `?point_reservations`?/;
export const UPDATE_BALANCE = /^update point_root/;
export const COMMIT = /^commit/;
export const PUBLISH = /^basic.publish/;
export const ACK = /^basic.ack/;

/** A command that is told by more than its own text. */
function commandWhere(command: RegExp, test: (text: string) => boolean): RegExp {
  return Object.assign(new RegExp(command), { test });
}

/** The n-th command that matches, counted over all connections; for one trap. */
export function nth(command: RegExp, n: number): RegExp {
  let count = 0;
  return commandWhere(command, (text) => command.test(text) && ++count === n);
}

/** The first command that matches after the first one that matches `first`; for one trap. */
export function after(first: RegExp, command: RegExp): RegExp {
  let hasCome = false;
  return commandWhere(command, (text) => {
    if (hasCome) return command.test(text);
    hasCome = first.test(text);
    return false;
  });
}

/** Calls `see` with every command, and stops none; until the next trap is set. */
export function watch(proxy: TcpProxy, see: (text: string) => void): void {
  const command = commandWhere(/^/, (text) => {
    see(text);
    return false;
  });
  proxy.trap({ command, moment: "unsent", spring() {} });
}

/** Resolves when a command that matches is on its way to the server; in time, or not at all. */
export function seen(proxy: TcpProxy, command: RegExp): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  watch(proxy, (text) => command.test(text) && resolve());
  return withDeadline(promise, 20_000, () => new Error(`${command} did not come`));
}

/** The statements that go through while some work is done, each by the name of what it matches, e.g. `begin 2`. */
export async function statementsOf(
  proxy: TcpProxy,
  names: Record<string, RegExp>,
  work: () => Promise<unknown>,
): Promise<string[]> {
  const statements: string[] = [];
  const counts = new Map<string, number>();
  watch(proxy, (text) => {
    // Not a statement, or one that sets a new connection up.
    if (text === "" || /^set /.test(text)) return;
    const [name] = Object.entries(names).find(([, command]) => command.test(text)) ?? [`unknown: ${text}`];
    const n = (counts.get(name) ?? 0) + 1;
    counts.set(name, n);
    statements.push(`${name} ${n}`);
  });
  await work();
  return statements;
}

/** Proxies to both servers, and the settings that lead a process through them. */
export async function openProxies({ test }: Pick<Pipeline, "test">) {
  const [mysql, amqp] = [await startProxy(test.url), await startProxy(AMQP_URL)];
  return {
    mysql,
    amqp,
    env: { DATABASE_URL: mysql.url, AMQP_URL: amqp.url },
    /** The proxy that a command comes through. */
    of: (command: RegExp) => (command.source.startsWith("^basic") ? amqp : mysql),
    async [Symbol.asyncDispose]() {
      await Promise.all([mysql.close(), amqp.close()]);
    },
  };
}
export type Proxies = Awaited<ReturnType<typeof openProxies>>;

/** Kills a process, as kill -9 does, when its command is at that moment; `struck` resolves when it is dead. */
export function killAt(
  proxies: Proxies,
  { command, moment, service }: { command: RegExp; moment: Moment; service: RunningService },
) {
  const { promise, resolve } = Promise.withResolvers<void>();
  const spring = () => {
    process.kill(service.pid, "SIGKILL");
    resolve();
  };
  proxies.of(command).trap({ command, moment, spring });
  return async function struck() {
    await withDeadline(promise, 20_000, () => new Error(`${command} did not come to be ${moment}`));
    // No exit code: the signal ended it, not an error of its own.
    expect(await service.exited).toBeNull();
  };
}

/** Stops a process, as SIGSTOP does, when it has sent a command; the answer waits for it. */
export function stopAt(
  proxy: TcpProxy,
  { command, service }: { command: RegExp; service: RunningService },
): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  let isStopped = false;
  watch(proxy, (text) => {
    if (isStopped || !command.test(text)) return;
    isStopped = true;
    process.kill(service.pid, "SIGSTOP");
    resolve();
  });
  return withDeadline(promise, 20_000, () => new Error(`${command} did not come`));
}

/** Gives the process that runs, and where it was killed starts the next one, which finds what it has left. */
export function relay(start: () => Promise<RunningService>) {
  let running: RunningService | undefined;
  return async function runner() {
    if (running) return running;
    const started = await start();
    running = started;
    started.exited.then(() => {
      if (running === started) running = undefined;
    });
    return started;
  };
}
