import type { Logger } from "pino";
import { describeError, ExpectedError } from "../errors.ts";
import { perSecond } from "../log.ts";
import { sleep } from "../loop.ts";

/** The pause between two looks, in milliseconds: while the process is ready, and while it is not. */
const PAUSE_MS = { ready: 1_000, unready: 250 };
/** How long a success counts, in milliseconds: one slow look must not take a process out of service. */
const READY_MS = 4_000;

/** Why a process is not ready, in our own words, safe for clients; and since when. */
export interface Unready {
  reason: string;
  since: Date;
}

/** Whether a process can do its work now. Reading it costs nothing. */
export interface Readiness {
  /** Undefined if the process is ready. */
  readonly unready: Unready | undefined;
}

/** The readiness of a process that runs. */
export interface WatchedReadiness extends Readiness {
  /** Records a failure: while the process is not ready, this is its reason. */
  fail(reason: string, startedAt?: Date): void;
  /**
   * Does all parts of a look about every second, until the process stops. The process is ready for 4 s from each look that succeeds.
   * Logs when it is no longer ready, with the reason, and when it is again.
   */
  watch(parts: readonly (() => Promise<void>)[]): Promise<void>;
}

/** The readiness of a process that has just started: it is not ready. With `signal`, it is stopping. */
export function openReadiness(options: { logger: Logger; signal: AbortSignal }): WatchedReadiness {
  const { logger, signal } = options;
  let unready: Unready | undefined = { reason: "MySQL is not checked yet", since: new Date() };
  /** Whether the log says that it is not ready. */
  let isLogged = false;
  /** Since the last success: the latest failure, and the start of the first look that failed. */
  let failing: Unready | undefined;
  let succeededAt = new Date();
  let timer: ReturnType<typeof setTimeout> | undefined;

  signal.addEventListener("abort", () => {
    clearTimeout(timer);
    unready = { reason: "The process is stopping", since: new Date() };
  });

  function startTimer() {
    clearTimeout(timer);
    timer = setTimeout(becomeUnready, READY_MS).unref();
  }

  function becomeUnready() {
    // Every look ends in time, unless this process itself did not run.
    unready = failing ?? { reason: "The process was stopped, or is too busy", since: succeededAt };
    isLogged = true;
    logger.warn(unready, "not ready");
  }

  function succeed() {
    if (unready) {
      const notReadyMs = Date.now() - unready.since.getTime();
      logger.info({ notReadyMs }, isLogged ? "ready again" : "ready");
    }
    unready = undefined;
    failing = undefined;
    isLogged = false;
    succeededAt = new Date();
    startTimer();
  }

  function fail(reason: string, startedAt = new Date()) {
    if (signal.aborted) return;
    failing = { reason, since: failing?.since ?? startedAt };
    if (unready) unready = { reason, since: unready.since };
  }

  return {
    get unready() {
      return unready;
    },
    fail,
    async watch(parts) {
      startTimer();
      while (!signal.aborted) {
        const startedAt = new Date();
        const results = await Promise.allSettled(parts.map((part) => part()));
        if (signal.aborted) return;
        const failed = results.filter((result) => result.status === "rejected");
        if (failed.length === 0) succeed();
        else fail(failed.map(({ reason }) => reasonOf(reason, logger)).join("; "), startedAt);
        await sleep(unready ? PAUSE_MS.unready : PAUSE_MS.ready, signal);
      }
    },
  };
}

function reasonOf(error: unknown, logger: Logger): string {
  if (error instanceof ExpectedError) return error.message;
  perSecond(logger).error({ error: describeError(error) }, "unexpected error");
  return "Unexpected error; the log has it";
}
