import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { cp, readdir, readFile, rename, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { createConnection } from "mysql2/promise";
import type { DatabaseError } from "../../lib/database_errors.ts";
import { DomainError } from "../../lib/errors.ts";
import { checkSchema, migrate } from "../../sql/migrate.ts";
import { runCommand } from "../harness/command.ts";
import { createTestDatabase, type TestDatabase, untilRunning } from "../harness/database.ts";
import { until } from "../harness/harness.ts";
import { startProxy } from "../harness/proxy.ts";
import { temporaryFolder } from "../harness/temporary_folder.ts";

setDefaultTimeout(60_000);

const SQL = join(import.meta.dir, "..", "..", "sql");
const OURS = (await readdir(SQL)).filter((name) => name.endsWith(".sql")).sort();

/** A database that nobody has migrated, and an empty folder; both go with `await using`. */
async function openEmpty() {
  const { drop, ...db } = await createTestDatabase({ migrated: false });
  const folder = await temporaryFolder();
  const said: string[] = [];
  return {
    db,
    folder: folder.path,
    /** The lines that the last run has printed. */
    said,
    /** Writes files into the folder, and runs what is there. */
    async migrate(files: Record<string, string>, { url = db.url, waitMs = 600_000 } = {}) {
      for (const [name, sql] of Object.entries(files)) await writeFile(join(folder.path, name), sql);
      said.length = 0;
      await migrate(url, { folder: folder.path, waitMs, say: (line) => said.push(line) });
    },
    async [Symbol.asyncDispose]() {
      await drop();
      await folder[Symbol.asyncDispose]();
    },
  };
}

/** The name of the file that comes `ahead` files after ours. */
function numbered(ahead: number, what: string): string {
  return `${String(OURS.length + ahead).padStart(4, "0")}_${what}.sql`;
}

async function copyOurs(folder: string): Promise<void> {
  for (const name of OURS) await cp(join(SQL, name), join(folder, name));
}

async function tablesOf({ query }: Pick<TestDatabase, "query">): Promise<string[]> {
  const rows = await query<{ name: string }>(
    "select table_name as name from information_schema.tables where table_schema = database() order by 1",
  );
  return rows.map(({ name }) => name);
}

/** What the tables are, and what is in them from the beginning. */
async function contentOf({ query }: TestDatabase): Promise<unknown[]> {
  const content: unknown[] = [];
  for (const table of await tablesOf({ query })) {
    content.push(await query(`show create table ${table}`));
    if (table !== "schema_migrations") content.push(await query(`select * from ${table}`));
  }
  content.push(await query("select name, checksum, finished_at is not null finished from schema_migrations"));
  return content;
}

/** The sentence with which the schema must be refused. */
async function refusalOf(work: Promise<void>): Promise<string> {
  const error: unknown = await work.then(
    () => undefined,
    (thrown) => thrown,
  );
  expect(error).toBeInstanceOf(DomainError);
  expect((error as DomainError).code).toBe("SCHEMA");
  return (error as DomainError).message;
}

describe("migrate()", () => {
  test("run by ten processes at once runs each file once, and all ten exit 0", async () => {
    await using empty = await openEmpty();
    const env = { DATABASE_URL: empty.db.url };
    const runs = await Promise.all(Array.from({ length: 10 }, () => runCommand("migrate", { env })));
    expect(runs.map(({ code, stderr }) => ({ code, stderr }))).toEqual(
      Array(10).fill({ code: 0, stderr: "" }),
    );
    const lines = runs.flatMap(({ stdout }) => stdout.trim().split("\n"));
    // On a busy machine, some wait for longer than a second.
    const said = lines.filter((line) => !/^(Waiting for a lock|To see) /.test(line));
    expect(said.toSorted()).toEqual([
      ...OURS.map((name) => `Running ${name}`),
      "The schema is up to date",
      ...Array(9).fill("The schema was up to date already"),
    ]);
    await checkSchema(empty.db.database);
  });

  test("killed at one statement after the other, and run again each time, ends as if nobody had killed it", async () => {
    await using whole = await openEmpty();
    await migrate(whole.db.url);
    await using empty = await openEmpty();
    await using proxy = await startProxy(empty.db.url);
    const said: string[] = [];
    const states: string[] = [];
    for (let nth = 1; ; nth++) {
      // Its own statements have names; those of a file begin with a word.
      let left = nth;
      const test = (text: string) => /^(\/\*|create|insert|alter)/.test(text) && --left === 0;
      proxy.trap({ command: { test }, moment: "answered", spring: () => proxy.cut() });
      const run = migrate(proxy.url, { say: (line) => said.push(line) });
      const error = await run.catch((thrown: DatabaseError) => thrown);
      if (!error) break;
      expect(error.kind).toBe("lost");
      const checked = checkSchema(empty.db.database);
      states.push(
        await checked.then(
          () => "up to date",
          ({ message }) => message.split(":")[0],
        ),
      );
    }
    expect([...new Set(states)]).toEqual(["The schema is behind", "up to date"]);
    const statements = (await readFile(join(SQL, "0001_points.sql"), "utf8")).match(/;$/gm) ?? [];
    expect(states.length).toBeGreaterThan(statements.length);
    expect([...new Set(said)]).toEqual([
      "Running 0001_points.sql",
      "Running 0001_points.sql again, as it was interrupted",
      "The schema was up to date already",
    ]);
    expect(await contentOf(empty.db)).toEqual(await contentOf(whole.db));
  });

  test("skips what an interrupted run has created, added or dropped before", async () => {
    await using empty = await openEmpty();
    const alter = "alter table a";
    await empty.migrate({
      "0001_a.sql": "create table a (id int, old int, key a_old (old), constraint positive check (id > 0));",
      "0002_b.sql": [
        "create table b (id int)",
        ...[
          `${alter} add column c int`,
          `${alter} add key a_c (c)`,
          `${alter} add constraint small check (c < 9)`,
        ],
        ...[`${alter} drop key a_old`, `${alter} drop column old`, `${alter} drop constraint positive`],
        "drop table b;\n",
      ].join(";\n"),
    });
    const before = await contentOf(empty.db);
    await empty.db.query("update schema_migrations set finished_at = null where name = '0002_b.sql'");
    await empty.migrate({});
    expect(empty.said).toEqual([
      "Running 0002_b.sql again, as it was interrupted",
      "The schema is up to date",
    ]);
    expect(await contentOf(empty.db)).toEqual(before);
  });

  test("applies new files in their order, to a database that is in use", async () => {
    await using empty = await openEmpty();
    await migrate(empty.db.url);
    await empty.db.query("insert into point_root (user_id, point_num) values ('a', 5)");
    await copyOurs(empty.folder);
    await empty.migrate({
      [numbered(2, "fill_note")]: "update point_root set note = concat('has ', point_num);",
      [numbered(1, "add_note")]: "alter table point_root add column note varchar(20) null;",
    });
    expect(empty.said).toEqual([
      `Running ${numbered(1, "add_note")}`,
      `Running ${numbered(2, "fill_note")}`,
      "The schema is up to date",
    ]);
    expect(await empty.db.query("select note from point_root")).toEqual([{ note: "has 5" }]);
    await checkSchema(empty.db.database, empty.folder);
  });

  test("refuses a file that was changed after it had run, and names it; checkSchema() does, too", async () => {
    await using empty = await openEmpty();
    await empty.migrate({ "0001_a.sql": "create table a (id int);" });
    const changed = { "0001_a.sql": "create table a (id bigint);", "0002_b.sql": "create table b (id int);" };
    const message =
      "Cannot use 0001_a.sql as it has run on this database, and its statements were changed since: restore the file, and put the change in a new file";
    expect(await refusalOf(empty.migrate(changed))).toBe(message);
    expect(await refusalOf(checkSchema(empty.db.database, empty.folder))).toBe(message);
    expect(await tablesOf(empty.db)).toEqual(["a", "schema_migrations"]);
  });

  test.each([
    ["the line ends of some checkouts", (sql: string) => sql.replaceAll("\n", "\r\n")],
    ["another comment", (sql: string) => sql.replace("-- b", "-- more; about b\n  -- and c")],
    ["other indentation", (sql: string) => sql.replaceAll("  ", "\t")],
  ])("takes a file with %s for the same", async (_, rewrite) => {
    await using empty = await openEmpty();
    const sql = "create table a (\n  id int,\n  -- b\n  b int\n);\ncreate table c (id int);\n";
    await empty.migrate({ "0001_a.sql": sql });
    await empty.migrate({ "0001_a.sql": rewrite(sql) });
    expect(empty.said).toEqual(["The schema was up to date already"]);
    await checkSchema(empty.db.database, empty.folder);
  });

  test("says what MySQL says of a file that it refuses, and runs the file once it is fixed", async () => {
    await using empty = await openEmpty();
    expect(await refusalOf(empty.migrate({ "0001_a.sql": "create tabel a (id int);" }))).toMatch(
      /^Cannot run 0001_a\.sql: .*near 'tabel a.*Fix the file and run it again$/,
    );
    await empty.migrate({ "0001_a.sql": "create table a (id int);" });
    await checkSchema(empty.db.database, empty.folder);
    expect(await tablesOf(empty.db)).toEqual(["a", "schema_migrations"]);
  });

  test.each([
    [["0002_late.sql"], "0002_late.sql"],
    [["0001_a.sql", "0003_gap.sql"], "0003_gap.sql"],
    [["0001_a.sql", "0001_b.sql"], "0001_b.sql"],
    [["first.sql"], "first.sql"],
  ])("refuses the numbers of %j, and names the file", async (names, culprit) => {
    await using empty = await openEmpty();
    const files = Object.fromEntries(names.map((name) => [name, "select 1;"]));
    expect(await refusalOf(empty.migrate(files))).toBe(
      `Cannot order the migrations as their numbers must be 0001_, 0002_ …: ${culprit}`,
    );
    expect(await tablesOf(empty.db)).toEqual([]);
  });

  test("refuses and names another program's tables, and makes none beside them", async () => {
    await using empty = await openEmpty();
    await empty.db.query("create table point_root (theirs int)");
    const { code, stderr } = await runCommand("migrate", { env: { DATABASE_URL: empty.db.url } });
    expect([code, stderr]).toEqual([
      3,
      "Cannot run 0001_points.sql as the database holds tables that it would create: point_root. Use an empty database, or rename them\n",
    ]);
    expect(await tablesOf(empty.db)).toEqual(["point_root", "schema_migrations"]);
  });

  test("refuses a database of the unreleased files in one line, and says what to do; checkSchema() does, too", async () => {
    await using empty = await openEmpty();
    const line =
      "Cannot use this database as it was made by SQL files that were never released: create an empty database, point DATABASE_URL at it and run `bun run migrate`";
    await empty.migrate({
      "0001_points.sql": "create table point_root (user_id int);",
      "0002_changes_and_campaigns.sql": "select 2;",
    });
    expect(await refusalOf(migrate(empty.db.url))).toBe(line);
    expect(await refusalOf(checkSchema(empty.db.database))).toBe(line);
    // A file of the same number had another name.
    await rename(
      join(empty.folder, "0002_changes_and_campaigns.sql"),
      join(empty.folder, "0002_changes.sql"),
    );
    expect(await refusalOf(empty.migrate({}))).toBe(line);
    expect(await tablesOf(empty.db)).toEqual(["point_root", "schema_migrations"]);
  });
});

describe("migrate() beside connections that hold a lock", () => {
  const ALTER = "/* alter_a */ alter table a add column note int";

  /** A database with the table `a`, and a connection that holds a lock, as a backup does. */
  async function openHeld(hold = "select * from a") {
    const empty = await openEmpty();
    await empty.migrate({ "0001_a.sql": "create table a (id int primary key, v int);" });
    await empty.db.query("insert into a values (1, 1)");
    const holder = await createConnection({ uri: empty.db.url });
    await holder.query("set session transaction isolation level repeatable read");
    await holder.query("start transaction with consistent snapshot");
    await holder.query(hold);
    return {
      ...empty,
      id: holder.threadId,
      release: () => holder.query("rollback"),
      async [Symbol.asyncDispose]() {
        holder.destroy();
        await empty[Symbol.asyncDispose]();
      },
    };
  }

  test("lets traffic pass between its tries, says who holds the lock, and runs once it is free (fault 41)", async () => {
    await using held = await openHeld();
    const run = held.migrate({ "0002_b.sql": `${ALTER};` });
    const waiting = await until("it says that it waits", () =>
      held.said.find((line) => line.startsWith("Waiting for a lock (0 s of 600 s): ")),
    );
    expect(waiting).toContain(`: 0002_b.sql: ${ALTER}. `);
    expect(waiting).toContain(` connection ${held.id} (pointservice@`);
    expect(held.said).toContainEqual(expect.stringMatching(/^To see .*: select \* from \w+_schema\./));
    // It queues behind the ALTER TABLE, and passes when that gives way: in time for one that waits less than 3 s.
    await untilRunning(held.db, "alter_a");
    await held.db.database.run(async ({ execute }) => {
      await execute("set lock_wait_timeout = 3");
      await execute("update a set v = 2");
    });
    expect(await held.db.query("select * from a")).toEqual([{ id: 1, v: 2 }]);
    await held.release();
    await run;
    expect(await held.db.query("select * from a")).toEqual([{ id: 1, v: 2, note: null }]);
    expect(held.said.at(-1)).toBe("The schema is up to date");
  });

  test("gives up after waitMs, says what state is left, and the next run finishes", async () => {
    await using held = await openHeld();
    const two = { "0002_b.sql": `create table b (id int);\n${ALTER};` };
    const refusal = await refusalOf(held.migrate(two, { waitMs: 1_000 }));
    expect(refusal).toStartWith(`Cannot migrate as a lock was not free within 1 s: 0002_b.sql: ${ALTER}. `);
    expect(refusal).toContain(` connection ${held.id} (pointservice@`);
    expect(refusal).toEndWith(
      ". The statements before it are done: the next run of `bun run migrate` skips them",
    );
    expect(await tablesOf(held.db)).toEqual(["a", "b", "schema_migrations"]);
    await held.release();
    await held.migrate({});
    expect(held.said).toEqual([
      "Running 0002_b.sql again, as it was interrupted",
      "The schema is up to date",
    ]);
    expect(await held.db.query("select * from a")).toEqual([{ id: 1, v: 1, note: null }]);
  });

  test("waits for a row that somebody has locked", async () => {
    await using held = await openHeld("select * from a for update");
    const run = held.migrate({ "0002_b.sql": "update a set v = v + 1;" });
    await until("it says that it waits", () => held.said.find((line) => line.includes(": update a set v")));
    await held.release();
    await run;
    expect(await held.db.query("select * from a")).toEqual([{ id: 1, v: 2 }]);
  });

  test("`bun run migrate --wait 1` waits a second for another migration, names its connection, and exits 3", async () => {
    await using held = await openHeld();
    const run = held.migrate({ "0002_b.sql": `${ALTER};` });
    await untilRunning(held.db, "alter_a");
    const env = { DATABASE_URL: held.db.url };
    const { code, stdout, stderr } = await runCommand("migrate", { args: ["--wait", "1"], env });
    expect(code).toBe(3);
    const what = "another migration of this database runs. Held by connection \\d+";
    expect(stdout).toMatch(
      new RegExp(
        `^Waiting for a lock \\(0 s of 1 s\\): ${what}\nTo see what it does: show full processlist\n$`,
      ),
    );
    expect(stderr).toMatch(
      new RegExp(
        `^Cannot migrate as a lock was not free within 1 s: ${what}\\. .*\\. This run has changed nothing\n$`,
      ),
    );
    await held.release();
    await run;
  });
});

describe("checkSchema()", () => {
  test("accepts a schema that is ahead: while a new version rolls out, the old one still runs", async () => {
    await using empty = await openEmpty();
    await copyOurs(empty.folder);
    await empty.migrate({ [numbered(1, "later")]: "create table later (id int);" });
    await checkSchema(empty.db.database);
  });

  test("refuses a schema that lacks the newest file only, and names just that", async () => {
    await using empty = await openEmpty();
    await migrate(empty.db.url);
    await copyOurs(empty.folder);
    await writeFile(join(empty.folder, numbered(1, "later")), "create table later (id int);");
    expect(await refusalOf(checkSchema(empty.db.database, empty.folder))).toBe(
      `The schema is behind: ${numbered(1, "later")} must run. Run \`bun run migrate\` with this DATABASE_URL`,
    );
  });
});

describe("bun run migrate", () => {
  const RULE = "Cannot start as DATABASE_URL must be like mysql://user:password@host:3306/database";

  test.each([
    [
      "mysql://u:s3cret@127.0.0.1:1/d",
      "Cannot migrate: MySQL failed with ECONNREFUSED: connect ECONNREFUSED 127.0.0.1:1",
    ],
    ["", `${RULE}: it is not set`],
    ["postgres://u:s3cret@h/d", `${RULE}: received postgres://…@h/d`],
  ])("with DATABASE_URL=%p says in one line what is wrong, without the password", async (url, line) => {
    const ended = await runCommand("migrate", { env: { DATABASE_URL: url } });
    expect(ended).toEqual({ code: 3, stdout: "", stderr: `${line}\n` });
  });

  test("--check changes nothing, says which command helps, and exits 0 only on an up-to-date schema", async () => {
    await using empty = await openEmpty();
    const check = () => runCommand("migrate", { args: ["--check"], env: { DATABASE_URL: empty.db.url } });
    expect(await check()).toEqual({
      code: 1,
      stdout: "",
      stderr: `The schema is behind: ${OURS.join(", ")} must run. Run \`bun run migrate\` with this DATABASE_URL\n`,
    });
    expect(await tablesOf(empty.db)).toEqual([]);
    await migrate(empty.db.url);
    expect(await check()).toEqual({ code: 0, stdout: "The schema is up to date\n", stderr: "" });
  });
});
