import { checkSchema, migrate, WAIT_MS } from "../../sql/migrate.ts";
import { readSettings } from "../config.ts";
import { openDatabase } from "../database.ts";
import { DomainError } from "../errors.ts";
import { ANSWER_IS_NO, newCommand, print, runCommand, wholeUpTo } from "./command.ts";

interface Options {
  check?: boolean;
  /** In seconds. */
  wait: number;
}

async function main({ check: isCheck = false, wait }: Options): Promise<number> {
  const { DATABASE_URL } = readSettings(["DATABASE_URL"]);
  if (isCheck) {
    const database = openDatabase(DATABASE_URL);
    try {
      await checkSchema(database);
    } catch (error) {
      if (!(error instanceof DomainError && error.code === "SCHEMA")) throw error;
      console.error(error.message);
      return ANSWER_IS_NO;
    } finally {
      await database.close();
    }
    print("The schema is up to date");
  } else {
    await migrate(DATABASE_URL, { waitMs: wait * 1_000, say: print });
  }
  return 0;
}

if (import.meta.main) {
  const command = newCommand("migrate", "Brings the tables up to date.", {
    no: "if the tables are not up to date (--check)",
  })
    .option("--check", "change nothing; say whether the tables are up to date")
    .option(
      "--wait <seconds>",
      "how long to wait for each lock that another connection holds",
      wholeUpTo(86_400),
      WAIT_MS / 1_000,
    );
  await runCommand(command, { what: "migrate", run: main });
}
