import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { cp, mkdtemp, readdir, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createConnection } from "mysql2/promise";
import { DatabaseError } from "../lib/database.ts";
import { freePorts } from "../lib/dev/servers.ts";
import { DomainError } from "../lib/errors.ts";
import { checkSchema, migrate } from "../sql/migrate.ts";
import { createTestDatabase, startService, type TestDatabase, until } from "./harness.ts";

const ROOT = join(import.meta.dir, "..");
const SQL = join(ROOT, "sql");
const OURS = (await readdir(SQL)).filter((name) => name.endsWith(".sql")).sort();

let scratch: string;
beforeAll(async () => {
  scratch = await mkdtemp(join(tmpdir(), "pointservice-sql-"));
});
afterAll(() => rm(scratch, { recursive: true }));

/** A folder with these files. */
async function folderOf(files: Record<string, string>, { ours = false } = {}): Promise<string> {
  const folder = await mkdtemp(join(scratch, "folder-"));
  if (ours) for (const name of OURS) await cp(join(SQL, name), join(folder, name));
  for (const [name, sql] of Object.entries(files)) await writeFile(join(folder, name), sql);
  return folder;
}

/** The name of the file that comes `ahead` files after ours. */
function numbered(ahead: number, what: string): string {
  return `${String(OURS.length + ahead).padStart(4, "0")}_${what}.sql`;
}

/** Gives `work` a database that nobody has migrated. */
async function withEmptyDatabase(work: (db: TestDatabase) => Promise<void>): Promise<void> {
  const db = await createTestDatabase({ migrated: false });
  await work(db).finally(() => db.drop());
}

async function runMigrate(url: string, ...args: string[]) {
  const child = Bun.spawn([process.execPath, "sql/migrate.ts", ...args], {
    cwd: ROOT,
    env: { PATH: Bun.env.PATH, DATABASE_URL: url },
    stdout: "pipe",
    stderr: "pipe",
  });
  const [stdout, stderr, exitCode] = await Promise.all([
    child.stdout.text(),
    child.stderr.text(),
    child.exited,
  ]);
  return { stdout, stderr, exitCode };
}

async function tablesOf({ query }: TestDatabase): Promise<string[]> {
  const rows = await query<{ name: string }>(
    "select table_name as name from information_schema.tables where table_schema = database() order by 1",
  );
  return rows.map(({ name }) => name);
}

function appliedOf({ query }: TestDatabase) {
  return query<{ name: string; finished: number }>(
    "select name, finished_at is not null finished from schema_migrations order by name",
  );
}

async function schemaErrorOf(work: Promise<void>): Promise<string> {
  const error = await work.then(
    () => undefined,
    (thrown) => thrown,
  );
  expect(error).toBeInstanceOf(DomainError);
  expect(error.code).toBe("SCHEMA");
  return error.message;
}

const TABLES = ["point_reservations", "point_root", "point_transactions", "schema_migrations"];

describe("migrate()", () => {
  test(
    "run by ten processes at once runs each file once, and all ten exit 0",
    () =>
      withEmptyDatabase(async (db) => {
        const runs = await Promise.all(Array.from({ length: 10 }, () => runMigrate(db.url)));
        expect(runs.map(({ exitCode, stderr }) => ({ exitCode, stderr }))).toEqual(
          Array.from({ length: 10 }, () => ({ exitCode: 0, stderr: "" })),
        );
        const said = runs.flatMap(({ stdout }) => stdout.trim().split("\n"));
        for (const name of OURS) expect(said.filter((line) => line === `Running ${name}`)).toHaveLength(1);
        expect(said.filter((line) => line === "The schema is up to date")).toHaveLength(1);
        expect(said.filter((line) => line === "The schema was up to date already")).toHaveLength(9);
        expect(await appliedOf(db)).toEqual(OURS.map((name) => ({ name, finished: 1 })));
        expect(await tablesOf(db)).toEqual(TABLES);
      }),
    60_000,
  );

  test("applies new files in their order: the second one needs the column of the first one", () =>
    withEmptyDatabase(async (db) => {
      await migrate(db.url);
      await db.query("insert into point_root (user_id, point_num) values ('a', 5)");
      const folder = await folderOf(
        {
          [numbered(2, "fill_note")]: "update point_root set note = concat('has ', point_num);",
          [numbered(1, "add_note")]:
            "alter table point_root add column note varchar(20) null;\nalter table point_root modify column note varchar(30) null;",
        },
        { ours: true },
      );
      const said: string[] = [];
      await migrate(db.url, { folder, say: (line) => said.push(line) });
      expect(said).toEqual([
        `Running ${numbered(1, "add_note")}`,
        `Running ${numbered(2, "fill_note")}`,
        "The schema is up to date",
      ]);
      expect(await db.query("select note from point_root")).toEqual([{ note: "has 5" }]);
      await checkSchema(db.database, folder);
    }));

  test("refuses a file that was changed after it had run, and names it", () =>
    withEmptyDatabase(async (db) => {
      await migrate(db.url, { folder: await folderOf({ "0001_a.sql": "create table a (id int);" }) });
      const folder = await folderOf({
        "0001_a.sql": "create table a (id bigint);",
        "0002_b.sql": "create table b (id int);",
      });
      const message =
        "Cannot go on as 0001_a.sql was changed after it had run: restore it, and put the change in a new file";
      expect(await schemaErrorOf(migrate(db.url, { folder }))).toBe(message);
      expect(await schemaErrorOf(checkSchema(db.database, folder))).toBe(message);
      expect(await tablesOf(db)).toEqual(["a", "schema_migrations"]);
    }));

  test("says what MySQL says of a file that it refuses, and runs the mended file", () =>
    withEmptyDatabase(async (db) => {
      const broken = await folderOf({ "0001_a.sql": "create tabel a (id int);" });
      expect(await schemaErrorOf(migrate(db.url, { folder: broken }))).toMatch(
        /^Cannot run 0001_a\.sql: .*near 'tabel a.*Mend the file and run it again$/,
      );
      const mended = await folderOf({ "0001_a.sql": "create table a (id int);" });
      await migrate(db.url, { folder: mended });
      await checkSchema(db.database, mended);
      expect(await tablesOf(db)).toEqual(["a", "schema_migrations"]);
    }));

  test("takes a file with CRLF, as some checkouts write it, for the same", () =>
    withEmptyDatabase(async (db) => {
      const sql = "create table a (id int);\ncreate table b (id int);\n";
      await migrate(db.url, { folder: await folderOf({ "0001_a.sql": sql }) });
      const folder = await folderOf({ "0001_a.sql": sql.replaceAll("\n", "\r\n") });
      await migrate(db.url, { folder });
      await checkSchema(db.database, folder);
    }));

  test.each([
    [["0002_late.sql"], "0002_late.sql"],
    [["0001_a.sql", "0003_gap.sql"], "0003_gap.sql"],
    [["0001_a.sql", "0001_b.sql"], "0001_b.sql"],
    [["first.sql"], "first.sql"],
  ])("refuses the numbers of %j, and names the file", (names, culprit) =>
    withEmptyDatabase(async (db) => {
      const folder = await folderOf(Object.fromEntries(names.map((name) => [name, "select 1;"])));
      expect(await schemaErrorOf(migrate(db.url, { folder }))).toBe(
        `Cannot order the migrations as their numbers must be 0001_, 0002_ …: ${culprit}`,
      );
      expect(await tablesOf(db)).toEqual([]);
    }),
  );

  test(
    "runs a file again that lost its connection half-way",
    () =>
      withEmptyDatabase(async (db) => {
        const first = { "0001_blocked.sql": "create table if not exists blocked (id int);" };
        await migrate(db.url, { folder: await folderOf(first) });
        const folder = await folderOf({
          ...first,
          "0002_halves.sql": [
            "create table if not exists first_half (id int);",
            "alter table blocked comment = 'changed';",
            "create table if not exists second_half (id int);",
          ].join("\n"),
        });
        await killAtAlter(db, folder);
        expect(await tablesOf(db)).toEqual(["blocked", "first_half", "schema_migrations"]);
        expect(await appliedOf(db)).toEqual([
          { name: "0001_blocked.sql", finished: 1 },
          { name: "0002_halves.sql", finished: 0 },
        ]);
        expect(await schemaErrorOf(checkSchema(db.database, folder))).toContain(": 0002_halves.sql must run");

        const said: string[] = [];
        await migrate(db.url, { folder, say: (line) => said.push(line) });
        expect(said[0]).toBe("Running 0002_halves.sql again, as it was interrupted");
        expect(await tablesOf(db)).toEqual(["blocked", "first_half", "schema_migrations", "second_half"]);
        await checkSchema(db.database, folder);
      }),
    30_000,
  );

  test("runs our own files again where a crash left some of their tables", () =>
    withEmptyDatabase(async (db) => {
      await migrate(db.url);
      await db.query("update schema_migrations set finished_at = null");
      await db.query("drop table point_transactions");
      await migrate(db.url);
      expect(await tablesOf(db)).toEqual(TABLES);
      await checkSchema(db.database);
    }));

  test("refuses and names another program's tables, and makes none beside them", () =>
    withEmptyDatabase(async (db) => {
      await db.query("create table point_root (theirs int)");
      const { exitCode, stderr } = await runMigrate(db.url);
      expect(exitCode).toBe(1);
      expect(stderr).toBe(
        "Cannot run 0001_points.sql as the database holds tables that it would create: point_root. Use an empty database, or rename them\n",
      );
      expect(await tablesOf(db)).toEqual(["point_root", "schema_migrations"]);
    }));
});

describe("bun run migrate", () => {
  test("says in one line that MySQL is not there, and exits 1", async () => {
    const { exitCode, stdout, stderr } = await runMigrate(
      `mysql://u:s3cret@127.0.0.1:${await freePorts(1)}/d`,
    );
    expect({ exitCode, stdout }).toEqual({ exitCode: 1, stdout: "" });
    expect(stderr).toMatch(
      /^Cannot migrate: MySQL failed with ECONNREFUSED: connect ECONNREFUSED [\d.:]+\n$/,
    );
  });

  test.each([
    [
      "",
      "Cannot start as DATABASE_URL must be like mysql://user:password@host:3306/database: it is not set\n",
    ],
    [
      "postgres://u:s3cret@h/d",
      "Cannot start as DATABASE_URL must be like mysql://user:password@host:3306/database: received postgres://…@h/d\n",
    ],
  ])("says in one line what is wrong with DATABASE_URL=%p", async (url, line) => {
    expect(await runMigrate(url)).toEqual({ exitCode: 1, stdout: "", stderr: line });
  });

  test.each([["--chek"], ["--help"], ["--check now"]])("refuses the words %p and changes nothing", (words) =>
    withEmptyDatabase(async (db) => {
      const { exitCode, stdout, stderr } = await runMigrate(db.url, ...words.split(" "));
      expect({ exitCode, stdout }).toEqual({ exitCode: 2, stdout: "" });
      expect(stderr).toStartWith("Usage: bun sql/migrate.ts [--check]");
      expect(await tablesOf(db)).toEqual([]);
    }),
  );

  test(
    "--check changes nothing, says which command mends it, and exits 0 only on an up-to-date schema",
    () =>
      withEmptyDatabase(async (db) => {
        const before = await runMigrate(db.url, "--check");
        expect(before).toEqual({
          exitCode: 1,
          stdout: "",
          stderr: `The schema is behind: ${OURS.join(", ")} must run. Run \`bun run migrate\` with this DATABASE_URL\n`,
        });
        expect(await tablesOf(db)).toEqual([]);
        await migrate(db.url);
        expect(await runMigrate(db.url, "--check")).toEqual({
          exitCode: 0,
          stdout: "The schema is up to date\n",
          stderr: "",
        });
      }),
    20_000,
  );
});

describe("checkSchema()", () => {
  test("accepts a schema that is ahead: while a new version rolls out, the old one still runs", () =>
    withEmptyDatabase(async (db) => {
      const ahead = await folderOf(
        { [numbered(1, "later")]: "create table later (id int);" },
        { ours: true },
      );
      await migrate(db.url, { folder: ahead });
      await checkSchema(db.database);
    }));

  test("refuses a schema that lacks the newest file only, and names just that", () =>
    withEmptyDatabase(async (db) => {
      await migrate(db.url);
      const ahead = await folderOf(
        { [numbered(1, "later")]: "create table later (id int);" },
        { ours: true },
      );
      expect(await schemaErrorOf(checkSchema(db.database, ahead))).toStartWith(
        `The schema is behind: ${numbered(1, "later")} must run.`,
      );
    }));

  test.each(["api", "scheduler", "worker"] as const)(
    "keeps %s from starting on a schema that is behind: exit 1, and the command that mends it",
    (entry) =>
      withEmptyDatabase(async (db) => {
        const service = await startService(entry, { DATABASE_URL: db.url }, { waitForPort: false });
        expect(await service.exited).toBe(1);
        const fatal = await until("the reason is logged", () =>
          service.log().find(({ level }) => level === "fatal"),
        );
        expect(fatal.msg).toBe(
          `The schema is behind: ${OURS.join(", ")} must run. Run \`bun run migrate\` with this DATABASE_URL`,
        );
        expect(fatal.error).toBeUndefined();
      }),
    20_000,
  );
});

/** Runs `migrate()` until its `alter table blocked` waits for a lock, and kills its connection there. */
async function killAtAlter({ url, query, name }: TestDatabase, folder: string): Promise<void> {
  const reader = await createConnection({ uri: url });
  try {
    // An open transaction that has read a table keeps every `alter table` of it waiting.
    await reader.query("begin");
    await reader.query("select * from blocked");
    const interrupted = migrate(url, { folder }).catch((thrown) => thrown);
    const { id } = await until("the `alter table` waits", async () => {
      const [waiting] = await query<{ id: number }>(
        "select id from information_schema.processlist where db = ? and state = 'Waiting for table metadata lock'",
        [name],
      );
      return waiting;
    });
    await query(`kill ${id}`);
    expect(await interrupted).toBeInstanceOf(DatabaseError);
  } finally {
    await reader.end();
  }
}
