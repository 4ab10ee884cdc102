import { join } from "node:path";
import { kill } from "../../lib/dev/processes.ts";
import { freePorts } from "../../lib/dev/servers.ts";
import { withDeadline } from "../../lib/loop.ts";
import { type Entry, type RunningService, startService } from "../harness/processes.ts";
import { startProxy } from "../harness/proxy.ts";

/** What makes one life of a process different from an ordinary one. */
export interface WayOfRunning {
  clockOffMs?: number;
  timeZone?: string;
}

/** One process under test, across all its lives. It reaches its servers only through proxies of its own. */
export type Node = Awaited<ReturnType<typeof openNode>>;

const PUBLISH = "basic.publish";
const ENDS_WITHIN_MS = 10_000;

/** Starts a process, and starts it again whenever it has ended; writes down as a misdeed what none may do. */
export async function openNode(
  entry: Entry,
  options: {
    name: string;
    env: Record<string, string>;
    urls: [mysql: string, amqp: string];
    misdeeds: string[];
  },
) {
  const { name, env, urls, misdeeds } = options;
  const [port = 0] = await freePorts(1);
  const [mysql, amqp, http] = await Promise.all([
    startProxy(urls[0]),
    startProxy(urls[1]),
    startProxy(`http://127.0.0.1:${port}`),
  ]);
  const own = { ...env, DATABASE_URL: mysql.url, AMQP_URL: amqp.url, PORT: String(port) };
  const lives: Record<string, unknown>[][] = [];
  let service: RunningService | undefined;
  let next: { backInMs?: number; way?: WayOfRunning } = {};
  /** The signals that this life was sent. */
  let signals: NodeJS.Signals[] = [];
  let passedBefore = 0;
  let isClosing = false;

  function checkConfirmed() {
    const confirmed = service?.log().reduce((sum, line) => sum + Number(line.confirmed ?? 0), 0) ?? 0;
    const passed = amqp.passed(PUBLISH) - passedBefore;
    if (confirmed <= passed) return;
    misdeeds.push(`${name} logged ${confirmed} confirmed messages, but sent ${passed}`);
  }

  async function live() {
    const { clockOffMs = 0, timeZone } = next.way ?? {};
    next = {};
    signals = [];
    passedBefore = amqp.passed(PUBLISH);
    const way = { CLOCK_OFF_MS: String(clockOffMs), ...(timeZone && { TZ: timeZone }) };
    const bunArgs = clockOffMs === 0 ? [] : ["--preload", join(import.meta.dir, "clock.ts")];
    service = await startService(entry, { ...own, ...way }, { waitForPort: false, bunArgs });
    const code = await service.exited;
    const log = service.log();
    lives.push(log);
    checkConfirmed();
    service = undefined;
    const isTold = signals.includes("SIGTERM") && (code === 0 || log.length === 0);
    if (isClosing || isTold || signals.includes("SIGKILL")) return;
    const cause = signals.join(" and ") || "no signal";
    misdeeds.push(`${name} ended with ${code} after ${cause}: ${JSON.stringify(log.at(-1))}`);
  }

  async function liveOn() {
    for (; !isClosing; await Bun.sleep(next.backInMs ?? 0)) await live();
  }
  const living = liveOn();

  return {
    name,
    entry,
    mysql,
    amqp,
    /** What clients of an API talk to. */
    http,
    /** Its process now; undefined between two lives. */
    service: () => service,
    /** The log of all its lives. */
    logs: () => [...lives, service?.log() ?? []].flat(),
    /** Whether this life has logged more confirmed messages than it sent: a misdeed. */
    checkConfirmed,
    /** Whether it says that it can do its work now. */
    async isReady(): Promise<boolean> {
      const url = service?.log().find((line) => typeof line.url === "string")?.url;
      if (!url) return false;
      const asking = fetch(`${url}ready`, { signal: AbortSignal.timeout(3_000) });
      return (await asking.catch(() => undefined))?.status === 200;
    },
    /** Sends a signal. If it ends the process, the next life begins after `backInMs` and runs in that `way`. */
    strike(signal: NodeJS.Signals, after: typeof next = {}): void {
      // A second SIGTERM ends a process at once, by design; and a stopped process cannot end in time.
      const isEnding = signals.includes("SIGTERM");
      if (!service || (isEnding && (signal === "SIGTERM" || signal === "SIGSTOP"))) return;
      signals.push(signal);
      if (signal === "SIGKILL" || signal === "SIGTERM") next = after;
      const { pid, exited } = service;
      kill(pid, signal);
      if (signal !== "SIGTERM") return;
      withDeadline(exited, ENDS_WITHIN_MS, () => new Error("late")).catch(() => {
        misdeeds.push(`${name} did not end within ${ENDS_WITHIN_MS} ms of SIGTERM`);
        signals.push("SIGKILL");
        kill(pid, "SIGKILL");
      });
    },
    async stop(): Promise<void> {
      isClosing = true;
      if (service) kill(service.pid, "SIGKILL");
      await living;
      await Promise.all([mysql.close(), amqp.close(), http.close()]);
    },
  };
}
