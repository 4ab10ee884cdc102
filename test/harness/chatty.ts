// A process with a log, for tests: each line of its input is a number of lines that it logs, 1 KB each. At the end of the
// input it logs a last line, and exits with 7.
import { openLogger } from "../../lib/log.ts";

const logger = openLogger("chatty", "info");
const padding = "x".repeat(1_000);
let number = 0;

for await (const line of console) {
  for (const end = number + Number(line); number < end; ) logger.info({ number: ++number, padding }, "line");
  process.stderr.write(`${JSON.stringify({ logged: number })}\n`);
}
logger.fatal("last");
process.exit(7);
