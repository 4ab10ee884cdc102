/** One run of another clone, in a process of its own: `bun test/harness/services_fixture.ts acquire|find|lock PATH`. */
import { withLock } from "../../lib/dev/lock.ts";
import { acquireServices, findRunning } from "../../lib/dev/services.ts";

const [job = "", path = ""] = process.argv.slice(2);
const say = (line: string) => console.error(line);
const answer = (value: unknown) => console.log(JSON.stringify(value));

/** Resolves when whoever started us closes our standard input. */
async function told(): Promise<void> {
  for await (const _ of console) {
  }
}

if (job === "acquire") {
  try {
    const { release, ...services } = await acquireServices({ root: path, say });
    answer(services);
    await told();
    await release();
  } catch (error) {
    answer({ error: error instanceof Error ? error.message : String(error) });
  }
}
if (job === "find") answer((await findRunning({ root: path, say })) ?? null);
if (job === "lock") {
  await withLock(
    path,
    async () => {
      answer("held");
      await told();
    },
    { say, waiting: "waiting" },
  );
}
process.exit(0);
