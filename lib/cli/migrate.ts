import { checkSchema, migrate } from "../../sql/migrate.ts";
import { readSettings } from "../config.ts";
import { openDatabase } from "../database.ts";
import { newCommand, runCommand } from "./command.ts";

interface Options {
  check?: boolean;
}

async function main({ check: isCheck = false }: Options): Promise<number> {
  const { DATABASE_URL } = readSettings(["DATABASE_URL"]);
  if (isCheck) {
    const database = openDatabase(DATABASE_URL);
    await checkSchema(database).finally(() => database.close());
    console.log("The schema is up to date");
  } else {
    await migrate(DATABASE_URL, { say: console.log });
  }
  return 0;
}

if (import.meta.main) {
  const command = newCommand("migrate", "Brings the tables up to date.").option(
    "--check",
    "change nothing; fail if the tables are not up to date",
  );
  await runCommand(command, { what: "migrate", run: main });
}
