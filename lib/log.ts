import { writeSync } from "node:fs";
import { type Logger, pino } from "pino";

/** Opens the log of a process, once: one JSON object a line on stdout, with the process's name. */
export function openLogger(name: string, level: string): Logger {
  const options = {
    name,
    level,
    timestamp: pino.stdTimeFunctions.isoTime,
    formatters: { level: (label: string) => ({ level: label }) },
  };
  const destination = openDestination((lost) =>
    logger.warn({ lost }, "lines of the log are lost: stdout did not take them"),
  );
  const logger: Logger = pino(options, destination);
  return logger;
}

/** The most that is kept for a stdout that takes nothing, in bytes; later lines are dropped, and counted. */
const MAX_KEPT = 1_048_576;
/** The wait before the next attempt after a failed one, in milliseconds: a full pipe is read sooner than a full disk is emptied. */
const RETRY_MS = { full: 5, failed: 1_000 };
/** How long an exit may wait for a reader that is slow, in milliseconds. */
const EXIT_MS = 500;

/**
 * Writes lines to stdout at once. Grants matter more than their log: if stdout fails (its reader has gone, the disk is full),
 * or its reader is stuck, the process goes on. It says so once on stderr, keeps 1 MiB of lines, tries again, and calls
 * `onLost` with the number of lines that it had to drop.
 */
function openDestination(onLost: (lines: number) => void): { write(line: string): void } {
  // Bun makes pipes and sockets non-blocking when it opens `process.stdout`: a full pipe then fails with EAGAIN.
  const { fd } = process.stdout;
  const kept: Buffer[] = [];
  let keptBytes = 0;
  let lost = 0;
  let hasComplained = false;

  /** Says once, until stdout works again, what is wrong with it. */
  function complain(problem: string) {
    if (hasComplained) return;
    hasComplained = true;
    try {
      const line = { level: "error", time: new Date(), msg: `cannot write the log to stdout: ${problem}` };
      writeSync(process.stderr.fd, `${JSON.stringify(line)}\n`);
    } catch {
      // stderr is often the same pipe.
    }
  }

  /** Writes what is kept, as far as stdout takes it; returns the code of the error that ended this. */
  function writeKept(): string | undefined {
    try {
      for (let first = kept[0]; first; first = kept[0]) {
        const written = writeSync(fd, first);
        keptBytes -= written;
        if (written < first.length) kept[0] = first.subarray(written);
        else kept.shift();
      }
      return undefined;
    } catch (error) {
      return (error as { code?: string }).code ?? String(error);
    }
  }

  function tryAgain() {
    const code = writeKept();
    if (code === undefined) {
      const lines = lost;
      lost = 0;
      hasComplained = false;
      if (lines > 0) onLost(lines);
      return;
    }
    const isFull = code === "EAGAIN";
    if (!isFull) complain(code);
    setTimeout(tryAgain, isFull ? RETRY_MS.full : RETRY_MS.failed).unref();
  }

  process.once("exit", () => {
    let code = writeKept();
    for (const end = performance.now() + EXIT_MS; code === "EAGAIN" && performance.now() < end; ) {
      Bun.sleepSync(10);
      code = writeKept();
    }
    if (code) complain(`${code}; the last ${kept.length + lost} lines are lost`);
  });

  return {
    write(line) {
      const bytes = Buffer.from(line);
      if (keptBytes + bytes.length > MAX_KEPT) {
        lost++;
        complain("its reader does not read, lines are dropped");
        return;
      }
      const isFirst = kept.length === 0;
      kept.push(bytes);
      keptBytes += bytes.length;
      // Otherwise a retry is already scheduled.
      if (isFirst) tryAgain();
    },
  };
}

/** A log of lines that may come once per request or message. */
export interface BoundedLog {
  /** `atOnce` is how many lines of a kind are logged at once, 1 by default. */
  warn(fields: Record<string, unknown>, message: string, atOnce?: number): void;
  error(fields: Record<string, unknown>, message: string, atOnce?: number): void;
  /** Logs what is held back now. */
  flush(): void;
}

/** The period in which lines of one kind are counted, in milliseconds. */
const PERIOD_MS = 1_000;
/** Lines of more kinds within a period are told apart by their text alone, not by their errors. */
const MAX_KINDS = 50;

interface Kind {
  level: "warn" | "error";
  message: string;
  /** How many lines of this period were logged at once. */
  logged: number;
  /** How many lines are held back, and the fields of the last of them. */
  held: number;
  fields: Record<string, unknown>;
  timer: ReturnType<typeof setTimeout>;
}

const opened = new WeakMap<object, BoundedLog>();

/**
 * Bounds the volume of a log. The first line of a kind (level, text and message of the error) is logged at once; more of
 * the same kind within a second come as one line at its end, with the fields of the last of them and `count`, the number of
 * lines that it stands for. The same logger gets the same bounded log.
 */
export function perSecond(logger: Pick<Logger, "warn" | "error">): BoundedLog {
  const known = opened.get(logger);
  if (known) return known;
  const kinds = new Map<string, Kind>();

  function report(kind: Kind) {
    const { level, message, held, fields } = kind;
    kind.held = 0;
    logger[level]({ ...fields, count: held }, message);
  }

  function startPeriod(key: string) {
    return setTimeout(endPeriod, PERIOD_MS, key).unref();
  }

  function endPeriod(key: string) {
    const kind = kinds.get(key);
    if (kind && kind.held > 0) {
      report(kind);
      // In a flood, the next line comes at the end of the next second.
      kind.timer = startPeriod(key);
    } else {
      kinds.delete(key);
    }
  }

  function log(level: "warn" | "error", fields: Record<string, unknown>, message: string, atOnce = 1) {
    const { message: reason = "" } = (fields.error ?? {}) as { message?: unknown };
    const exact = `${level} ${message} ${reason}`;
    const key = kinds.has(exact) || kinds.size < MAX_KINDS ? exact : `${level} ${message}`;
    let kind = kinds.get(key);
    if (!kind) {
      kind = { level, message, logged: 0, held: 0, fields, timer: startPeriod(key) };
      kinds.set(key, kind);
    }
    if (kind.logged < atOnce && kind.held === 0) {
      kind.logged++;
      logger[level](fields, message);
    } else {
      kind.held++;
      kind.fields = fields;
    }
  }

  const bounded: BoundedLog = {
    warn: (fields, message, atOnce) => log("warn", fields, message, atOnce),
    error: (fields, message, atOnce) => log("error", fields, message, atOnce),
    flush() {
      for (const kind of kinds.values()) {
        clearTimeout(kind.timer);
        if (kind.held > 0) report(kind);
      }
      kinds.clear();
    },
  };
  opened.set(logger, bounded);
  return bounded;
}
