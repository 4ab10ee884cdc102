import { type Name, runWithStack, type Stack } from "../dev/stack.ts";
import { aborted } from "../loop.ts";
import { newCommand, runCommand } from "./command.ts";

/** Shorter than the default of 10 s, so that manual tests need not wait. */
const SCAN_INTERVAL_MS = "500";

const say = (line: string) => console.error(`dev: ${line}`);

/** A log line for people: time, level, message, then the fields. */
function formatLog(name: Name, line: string): string {
  const prefix = `${name.padEnd(9)} | `;
  try {
    const { time, level, msg, name: _, pid: __, hostname: ___, ...fields } = JSON.parse(line);
    const rest = Object.entries(fields).map(([key, value]) => ` ${key}=${JSON.stringify(value)}`);
    return `${prefix}${String(time).slice(11, 23)} ${String(level).toUpperCase()} ${msg}${rest.join("")}`;
  } catch {
    return prefix + line;
  }
}

function showWhatToTry({ databaseUrl, amqpUrl, apiUrl }: Stack): void {
  const bun = Bun.which("bun", { PATH: "/usr/local/bin:/usr/bin:/opt/homebrew/bin" }) ? "bun" : "npx bun";
  const body = JSON.stringify({
    user_id: "TestUser01",
    point_amount: 100,
    execute_at: new Date(Date.now() + 60_000).toISOString(),
  });
  console.log(`
pointservice is running at ${apiUrl}. Try, in another terminal:

  curl -i ${apiUrl}/point/reserve -H 'content-type: application/json' -d '${body}'
  curl ${apiUrl}/users/TestUser01/points

To start another scheduler or worker, or to replace one that was killed (port 0 chooses a free port):

  export DATABASE_URL=${databaseUrl} AMQP_URL=${amqpUrl}
  SCHEDULER_PORT=0 ${bun} run scheduler.ts
  WORKER_PORT=0 ${bun} run worker.ts

Press Ctrl-C to stop everything that this command has started.
`);
}

function main(): Promise<number> {
  return runWithStack(
    {
      env: { SCAN_INTERVAL_MS: Bun.env.SCAN_INTERVAL_MS || SCAN_INTERVAL_MS },
      usualPorts: true,
      say,
      onLog: (name, line) => console.log(formatLog(name, line)),
      onExit: (name, how) =>
        say(`${name} ended with ${how}; start another one as shown above, or stop everything with Ctrl-C`),
    },
    async (stack) => {
      showWhatToTry(stack);
      await aborted(stack.signal);
      return 0;
    },
  );
}

if (import.meta.main) {
  const command = newCommand(
    "dev",
    "Runs API, scheduler and worker until Ctrl-C. Finds or starts MySQL and RabbitMQ, and brings the tables up to date.",
  );
  await runCommand(command, { what: "run pointservice", run: main });
}
