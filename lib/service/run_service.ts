import type { Logger } from "pino";
import { checkSchema } from "../../sql/migrate.ts";
import { readSettings, type Settings } from "../config.ts";
import { type Database, type DatabaseOptions, openDatabase } from "../database.ts";
import { describeError, ExpectedError } from "../errors.ts";
import { type Fetch, listen, type Server } from "../http/listen.ts";
import { openLogger, perSecond } from "../log.ts";
import { openQueue, type Queue, type QueueOptions } from "../queue.ts";
import { openReadiness, type Readiness } from "./readiness.ts";
import { openTrial, type TrialStatement } from "./trial.ts";
import { logRetry, waitForDatabase } from "./wait_for_database.ts";

/** The longest time from a signal, or from the end of the drain, to the exit, in milliseconds; the README promises 10 s. */
const SHUTDOWN_MS = 9_000;

/** The settings of every process. */
const COMMON = [
  "DATABASE_URL",
  "DATABASE_CONNECTIONS",
  "ALLOW_LOSSY_DATABASE",
  "AMQP_URL",
  "QUEUE",
  "HOST",
  "LOG_LEVEL",
] as const satisfies (keyof Settings)[];
type Common = (typeof COMMON)[number];
type Port = "PORT" | "SCHEDULER_PORT" | "WORKER_PORT";

/** The resources of a process. Everything that it opens here is closed at its end. */
export interface Service<Config = unknown> {
  config: Config;
  logger: Logger;
  /** Aborted by SIGTERM or SIGINT: finish the work in progress, then return. */
  signal: AbortSignal;
  /** Listens from the start. */
  server: Server;
  /** The process's own pool. */
  database: Database;
  /** Opens another pool. */
  openDatabase(options: DatabaseOptions): Database;
  /** Opens the queue, and logs each change of its connection. */
  openQueue(options: ServiceQueueOptions): Queue;
  /** Whether MySQL has passed the checks at the start. */
  isChecked(): boolean;
  /** Whether the process can do its work now: MySQL takes its writes, and each of its queues works. */
  readiness: Readiness;
}

/** The queue of the settings; `connected` and `disconnected` are the messages in the log. */
export interface ServiceQueueOptions extends Pick<QueueOptions, "onHint" | "onlyHints"> {
  connected: string;
  disconnected: string;
  onConnected?: () => void;
}

export interface ServiceOptions<Name extends keyof Settings> {
  name: string;
  /** The settings that it reads in addition to those of every process. */
  settings: readonly Name[];
  /** The setting that has its port. */
  port: Port;
  /** What the process writes, as statements that change nothing: it is ready while MySQL takes them. */
  trial: readonly TrialStatement[];
  /** Time limits of the process's own pool. */
  database?: Pick<DatabaseOptions, "acquireMs" | "workMs">;
  /** Makes the HTTP handler. It gets requests even before MySQL is available. */
  serve: (service: Service<ServiceConfig<Name>>) => Fetch;
  /** Does the work, once MySQL is checked, until `signal` is aborted. */
  main: (service: Service<ServiceConfig<Name>>) => Promise<void>;
}

type ServiceConfig<Name extends keyof Settings> = Pick<Settings, Common | Name>;

/**
 * Runs a process: settings, log, HTTP, MySQL, signals, shutdown. Exits with 0 when `main` returns; with 1 if it throws, or takes
 * longer than DRAIN_MS and 9 s after a signal; with 130 or 143 at once on a second signal.
 */
export async function runService<Name extends keyof Settings>(options: ServiceOptions<Name>): Promise<never> {
  const logger = openLogger(options.name, "info");
  const stop = new AbortController();
  let limitMs = SHUTDOWN_MS;
  for (const event of ["unhandledRejection", "uncaughtException"]) {
    process.on(event, (error) => {
      logger.fatal({ error: describeError(error) }, "unexpected error");
      process.exit(1);
    });
  }
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    process.on(signal, () => {
      if (stop.signal.aborted) process.exit(signal === "SIGINT" ? 130 : 143);
      logger.info({ signal }, "stopping");
      setTimeout(() => {
        logger.error(`could not finish within ${limitMs} ms; unfinished work is done again later`);
        process.exit(1);
      }, limitMs).unref();
      stop.abort();
    });
  }
  try {
    const config: Pick<Settings, Common | Port | Name> & { DRAIN_MS?: number } = readSettings([
      ...COMMON,
      options.port,
      ...options.settings,
    ]);
    logger.level = config.LOG_LEVEL;
    limitMs += config.DRAIN_MS ?? 0;
    await serveAndWork(options, { config, logger, signal: stop.signal });
  } catch (error) {
    if (error instanceof ExpectedError) logger.fatal(error.message);
    else logger.fatal({ error: describeError(error) }, "unexpected error");
    process.exit(1);
  }
  perSecond(logger).flush();
  logger.info("stopped");
  process.exit(0);
}

async function serveAndWork<Name extends keyof Settings>(
  options: ServiceOptions<Name>,
  base: Pick<Service<Pick<Settings, Common | Port | Name>>, "config" | "logger" | "signal">,
): Promise<void> {
  const { config, logger, signal } = base;
  const program = `pointservice-${options.name}`;
  const readiness = openReadiness({ logger, signal });
  const opened: { close(): Promise<void> }[] = [];
  const neededQueues: Queue[] = [];
  let isChecked = false;
  let fetch: Fetch;

  function openPool(limits: DatabaseOptions) {
    const { DATABASE_URL: url, DATABASE_CONNECTIONS: connections, ALLOW_LOSSY_DATABASE: allowLossy } = config;
    const usual = { connections, program, allowLossy, onRetry: logRetry(logger) };
    const database = openDatabase(url, { ...usual, ...limits });
    opened.push(database);
    return database;
  }

  const database = openPool(options.database ?? {});
  const { HOST: hostname, [options.port]: port } = config;
  const server = listen({ hostname, port, logger, fetch: (request) => fetch(request) });
  const service: Service<ServiceConfig<Name>> = {
    ...base,
    server,
    database,
    openDatabase: openPool,
    openQueue({ connected, disconnected, onConnected, ...more }) {
      const queue = openQueue(config.AMQP_URL, {
        name: config.QUEUE,
        program,
        logger,
        onConnected() {
          logger.info({ queue: config.QUEUE }, connected);
          onConnected?.();
        },
        onDisconnected: (reason, retryInMs) => logger.warn({ reason, retryInMs }, disconnected),
        ...more,
      });
      if (!more.onlyHints) neededQueues.push(queue);
      opened.push(queue);
      return queue;
    },
    isChecked: () => isChecked,
    readiness,
  };
  async function checkQueues() {
    await Promise.all(neededQueues.map((queue) => queue.check()));
  }

  fetch = options.serve(service);
  isChecked = await waitForDatabase(() => checkSchema(database), {
    signal,
    logger,
    refuseUnsafe: true,
    onFailure: (error) => readiness.fail(error.reason),
  });
  if (isChecked) {
    // Starts first: it opens the queues that the looks check.
    const working = options.main(service);
    readiness.watch([openTrial(database, options.trial), checkQueues]);
    await working;
  }
  await Promise.all([server.stop(true), ...opened.map((one) => one.close())]);
}
