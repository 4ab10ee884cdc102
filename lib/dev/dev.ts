/** `bun run dev`: api, scheduler and worker with prefixed logs, until Ctrl-C. */
import { aborted } from "../service.ts";
import { type Name, runWithStack } from "./stack.ts";

const say = (line: string) => console.error(`dev: ${line}`);
/** Whoever tries something out does not want to wait for the 10 s of production. */
const SCAN_INTERVAL_MS = "500";

/** A line of JSON as a person reads it: time, level, message, then the fields. */
function format(name: Name, line: string): string {
  const prefix = `${name.padEnd(9)} | `;
  try {
    const { time, level, msg, name: _, pid: __, hostname: ___, ...fields } = JSON.parse(line);
    const rest = Object.entries(fields).map(([key, value]) => ` ${key}=${JSON.stringify(value)}`);
    return `${prefix}${String(time).slice(11, 23)} ${String(level).toUpperCase()} ${msg}${rest.join("")}`;
  } catch {
    return prefix + line;
  }
}

const bun = Bun.which("bun", { PATH: "/usr/local/bin:/usr/bin:/opt/homebrew/bin" }) ? "bun" : "npx bun";

await runWithStack(
  {
    env: { SCAN_INTERVAL_MS: Bun.env.SCAN_INTERVAL_MS || SCAN_INTERVAL_MS },
    usualPorts: true,
    say,
    onLog: (name, line) => console.log(format(name, line)),
    onExit: (name, how) => say(`${name} ended by ${how}; Ctrl-C ends the rest, or start it again by hand`),
  },
  async ({ databaseUrl, amqpUrl, apiUrl, signal }) => {
    const body = JSON.stringify({
      user_id: "TestUser01",
      point_amount: 100,
      execute_at: new Date(Date.now() + 60_000).toISOString(),
    });
    console.log(`
pointservice is up at ${apiUrl}. Try, in another terminal:

  curl -i ${apiUrl}/point/reserve -H 'content-type: application/json' -d '${body}'
  curl ${apiUrl}/users/TestUser01/points

One of the processes by hand, beside these or instead of one that was killed (SCHEDULER_PORT=0 and WORKER_PORT=0 take free ports):

  export DATABASE_URL=${databaseUrl} AMQP_URL=${amqpUrl}
  SCHEDULER_PORT=0 ${bun} run scheduler.ts
  WORKER_PORT=0 ${bun} run worker.ts

Ctrl-C stops all that this has started.
`);
    await aborted(signal);
    return 0;
  },
);
