import { afterAll, expect, setDefaultTimeout } from "bun:test";
import { withDeadline } from "../../lib/loop.ts";
import { AMQP_URL } from "./harness.ts";
import { openPipeline } from "./pipeline.ts";
import type { Entry, RunningService } from "./processes.ts";
import { type Moment, startProxy, type TcpProxy } from "./proxy.ts";

const PATIENCE_MS = 20_000;

/** The statements of every connection, whatever it does. */
export const SESSION = ["set_session", "check_server"];

/** The name of a command: that in a statement's comment, else its first word, e.g. `begin`; or its name in AMQP. */
export function nameOf(text: string): string {
  return /^\/\* (\w+) \*\//.exec(text)?.[1] ?? /^[\w.]+/.exec(text)?.[0] ?? "";
}

/** Tells a command that a process sends; for one trap. */
export interface Command {
  name: string;
  test(text: string): boolean;
}

/** The first command of that name, or the n-th one, or the first one behind another; counted over all connections. */
export function command(name: string, { nth = 1, after }: { nth?: number; after?: string } = {}): Command {
  let left = nth;
  let counts = after === undefined;
  function test(text: string) {
    const found = nameOf(text);
    if (counts) return found === name && --left === 0;
    counts = found === after;
    return false;
  }
  return { name, test };
}

/** Calls `see` with every command, and stops none; until the next trap is set. */
function watch(proxy: TcpProxy, see: (text: string) => void): void {
  function test(text: string) {
    see(text);
    return false;
  }
  proxy.trap({ command: { test }, moment: "unsent", spring() {} });
}

/** Resolves when a command is on its way to the server, after `then` was called; in time, or not at all. */
export function seen(proxy: TcpProxy, { name, test }: Command, then = () => {}): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  watch(proxy, (text) => {
    if (!test(text)) return;
    then();
    resolve();
  });
  return withDeadline(promise, PATIENCE_MS, () => new Error(`${name} did not come`));
}

/** The names of the statements that go through while some work is done, with spaces between them. */
export async function statementsOf(proxy: TcpProxy, work: () => Promise<unknown>): Promise<string> {
  const names: string[] = [];
  watch(proxy, (text) => names.push(nameOf(text)));
  await work();
  return names.filter((name) => name !== "" && !SESSION.includes(name) && !name.startsWith("try_")).join(" ");
}

/** Proxies to both servers, and the settings that lead a process through them. */
export async function openProxies({ url }: { url: string }) {
  const [mysql, amqp] = [await startProxy(url), await startProxy(AMQP_URL)];
  return {
    mysql,
    amqp,
    env: { DATABASE_URL: mysql.url, AMQP_URL: amqp.url },
    async [Symbol.asyncDispose]() {
      await Promise.all([mysql.close(), amqp.close()]);
    },
  };
}
export type Proxies = Awaited<ReturnType<typeof openProxies>>;

/** Kills a process, as kill -9 does, when its command is at that moment; `struck` resolves when it is dead. */
export function killAt(
  { mysql, amqp }: Proxies,
  { command, moment, service }: { command: Command; moment: Moment; service: RunningService },
) {
  const { promise, resolve } = Promise.withResolvers<void>();
  function spring() {
    process.kill(service.pid, "SIGKILL");
    resolve();
  }
  const proxy = command.name.startsWith("basic.") ? amqp : mysql;
  proxy.trap({ command, moment, spring });
  return async function struck() {
    await withDeadline(promise, PATIENCE_MS, () => new Error(`${command.name} did not come to be ${moment}`));
    // No exit code: the signal ended it, not an error of its own.
    expect(await service.exited).toBeNull();
  };
}

/** Stops a process, as SIGSTOP does, when it has sent a command; the answer waits for it. */
export function stopAt(
  proxy: TcpProxy,
  { command, service }: { command: Command; service: RunningService },
): Promise<void> {
  return seen(proxy, command, () => process.kill(service.pid, "SIGSTOP"));
}

/** Where to kill a process, and the state that this leaves. */
export interface KillPoint<State> {
  statement: string;
  nth: number;
  moment: Moment;
  state: State;
}

/**
 * Before the first statement of some work, and after each one of them.
 *
 * @param work the names of all its statements; `!` behind those that lead to the next state, e.g. `begin mark_done commit!`
 */
export function killPoints<State>(work: string, states: readonly State[]): KillPoint<State>[] {
  const points: KillPoint<State>[] = [];
  let place = 0;
  for (const word of work.split(" ")) {
    const statement = word.replace("!", "");
    if (points.length === 0) {
      points.push({ statement, nth: 1, moment: "unsent", state: states[0] as State });
    }
    if (statement !== word) place++;
    const earlier = points.filter((point) => point.statement === statement && point.moment === "answered");
    points.push({ statement, nth: earlier.length + 1, moment: "answered", state: states[place] as State });
  }
  return points;
}

/**
 * Opens a pipeline for all tests of a file, at its top level, with a process that is killed in each of them. `runner` gives
 * the process that runs, and if it was killed starts the next one, which finds what it has left.
 */
export async function openCrashing(entry: Entry, env: Record<string, string> = {}) {
  setDefaultTimeout(60_000);
  const pipeline = await openPipeline();
  const proxies = await openProxies(pipeline.test);
  afterAll(async () => {
    await pipeline[Symbol.asyncDispose]();
    await proxies[Symbol.asyncDispose]();
  });
  let running: RunningService | undefined;
  async function runner() {
    if (running) return running;
    const started = await pipeline.start(entry, { ...proxies.env, ...env });
    running = started;
    started.exited.then(() => {
      if (running === started) running = undefined;
    });
    return started;
  }
  return { pipeline, proxies, runner };
}
