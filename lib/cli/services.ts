import { spawn } from "node:child_process";
import { constants } from "node:os";
import type { Services, ServicesOptions } from "../dev/clone.ts";
import { kill } from "../dev/processes.ts";
import { acquireServices, findRunning, keepServices, stopServices } from "../dev/services.ts";
import { ANSWER_IS_NO, COULD_NOT_RUN, newCommand, print } from "./command.ts";

const PARENT_CHECK_MS = 500;
/** The exit code of a shell that cannot run a command. */
const CANNOT_RUN = 127;

/** One run of the command: its output, and the signal that stops it. */
interface Run extends ServicesOptions {
  signal: AbortSignal;
  /** Sets the function that receives the signals from now on. */
  onInterrupt(listener: (signal: NodeJS.Signals) => void): void;
}

/** Runs a subcommand, and exits with its exit code, or with that of a signal. */
async function main(work: (run: Run) => Promise<number>): Promise<never> {
  const stopping = new AbortController();
  let interruptedBy: NodeJS.Signals | undefined;
  let listener = (_signal: NodeJS.Signals): void => {};
  function interrupt(signal: NodeJS.Signals): void {
    interruptedBy ??= signal;
    stopping.abort(new Error(`Stopped by ${signal}`));
    listener(signal);
  }
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) process.on(signal, () => interrupt(signal));
  const parent = process.ppid;
  // A killed parent cannot send a signal. An interrupted one may end first, which must not count as a second signal.
  setInterval(() => process.ppid !== parent && !interruptedBy && interrupt("SIGTERM"), PARENT_CHECK_MS);
  const say = (line: string) => console.error(`services: ${line}`);
  try {
    const code = await work({
      say,
      signal: stopping.signal,
      onInterrupt: (added) => {
        listener = added;
      },
    });
    process.exit(code);
  } catch (error) {
    say(error instanceof Error ? error.message : String(error));
    process.exit(interruptedBy ? signalCode(interruptedBy) : COULD_NOT_RUN);
  }
}

async function up(run: Run): Promise<number> {
  show(await keepServices(run));
  return 0;
}

async function down(run: Run): Promise<number> {
  await stopServices(run);
  return 0;
}

async function env(run: Run): Promise<number> {
  const services = await findRunning(run);
  if (!services) {
    run.say("No MySQL and RabbitMQ of this clone are running; `bun run services up` starts them");
    return ANSWER_IS_NO;
  }
  show(services);
  return 0;
}

function show({ databaseUrl, amqpUrl }: Services): void {
  print(`DATABASE_URL=${databaseUrl}\nAMQP_URL=${amqpUrl}`);
}

/** Runs a command with the URLs of the services in its environment. @returns its exit code */
async function runWithServices([file = "", ...args]: string[], run: Run): Promise<number> {
  const services = await acquireServices(run);
  try {
    run.signal.throwIfAborted();
    // In its own session: a Ctrl-C at the terminal reaches it only once, through this process.
    const child = spawn(file === "bun" ? process.execPath : file, args, {
      detached: true,
      stdio: "inherit",
      env: { ...process.env, DATABASE_URL: services.databaseUrl, AMQP_URL: services.amqpUrl },
    });
    const { promise, resolve } = Promise.withResolvers<number>();
    child.once("error", (error) => {
      run.say(`Cannot run ${file}: ${error.message}`);
      resolve(CANNOT_RUN);
    });
    child.once("exit", (code, signal) => resolve(code ?? signalCode(signal)));
    run.onInterrupt((signal) => child.pid !== undefined && kill(-child.pid, signal));
    return await promise;
  } finally {
    await services.release();
  }
}

/** The exit code of a shell for a process that a signal has ended. */
function signalCode(signal: NodeJS.Signals | null): number {
  return 128 + (signal ? constants.signals[signal] : 0);
}

if (import.meta.main) {
  const program = newCommand(
    "services",
    "Finds or starts MySQL and RabbitMQ: DATABASE_URL and AMQP_URL if set, else Docker, else servers installed on this machine.",
    { no: "if none are running (env)" },
  ).enablePositionalOptions();
  program
    .command("up")
    .description("start both, print their URLs, and leave them running")
    .action(() => main(up));
  program
    .command("down")
    .description("stop both, unless a process still uses them")
    .action(() => main(down));
  program
    .command("env")
    .description("print the URLs of those that are running")
    .action(() => main(env));
  program
    .command("run")
    .description("run a command with DATABASE_URL and AMQP_URL set, and exit with its exit code")
    .argument("<command...>", "the command with its own options")
    .passThroughOptions()
    .action((command: string[]) => main((run) => runWithServices(command, run)));
  await program.parseAsync();
}
