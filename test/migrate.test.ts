import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { cp, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createConnection } from "mysql2/promise";
import { aggregate } from "../lib/aggregate.ts";
import { DatabaseError } from "../lib/database.ts";
import { freePorts } from "../lib/dev/servers.ts";
import { DomainError } from "../lib/errors.ts";
import { compareSums } from "../lib/point_repository.ts";
import { RESERVATION_STATUSES } from "../lib/reservation.ts";
import { claimDue } from "../lib/reservation_repository.ts";
import { checkSchema, migrate } from "../sql/migrate.ts";
import { appOn, post } from "./api_client.ts";
import { createTestDatabase, startService, type TestDatabase, until } from "./harness.ts";
import { processReservations } from "./pipeline.ts";

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

const TABLES = [
  ...[
    "point_aggregation",
    "point_aggregation_turns",
    "point_daily_totals",
    "point_daily_users",
    "point_reconciliations",
    "point_repairs",
  ],
  ...["point_reservations", "point_root", "point_transactions", "schema_migrations"],
];

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
        await killAtAlter(db, { folder, table: "blocked" });
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

/** Runs `migrate()` until its `alter table` of `table` waits for a lock, and kills its connection there. */
async function killAtAlter(
  { url, query, name }: TestDatabase,
  { folder, table }: { folder: string; table: string },
): Promise<void> {
  const reader = await createConnection({ uri: url });
  try {
    // An open transaction that has read a table keeps every `alter table` of it waiting.
    await reader.query("begin");
    await reader.query(`select * from ${table}`);
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
    // The client is told first: a lock that comes free before the statement notices would still let it go on.
    await until("the statement is gone", async () => {
      const [left] = await query("select id from information_schema.processlist where id = ?", [id]);
      return left === undefined;
    });
  } finally {
    await reader.end();
  }
}

const FIRST = "0001_points.sql";
const SECOND = "0002_changes_and_campaigns.sql";
const THIRD = "0003_totals_and_reconciliation.sql";

/** The columns of the first file's tables. */
const OLD_COLUMNS = {
  point_root: "user_id, point_num, created_at, updated_at",
  point_reservations:
    "id, user_id, point_amount, execute_at, status, idempotency_key, scan_at, attempts, last_error, created_at, updated_at",
  point_transactions: "id, idempotency_key, user_id, point_amount, created_at",
};
const NEW_COLUMNS = "campaign, original_point_amount, original_execute_at";

/** The second is what the driver calls MariaDB's number for the first. */
const CHECK_VIOLATED = /ER_CHECK_CONSTRAINT_VIOLATED|ER_INNODB_AUTOEXTEND_SIZE_OUT_OF_RANGE/;

const PAST = "2024-02-29 23:59:59.999";
const FUTURE = "2029-02-22 13:59:00.001";

/** What a user of the first version may have: 20 reservations of each status, and the ledger and balances of what is DONE. */
async function fillFirst({ query }: TestDatabase): Promise<void> {
  const rows = RESERVATION_STATUSES.flatMap((status, place) =>
    Array.from({ length: 20 }, (_, index) => {
      const isOpen = status === "PENDING" || status === "PROCESSING";
      const dueAt = status === "PENDING" && index % 2 === 0 ? FUTURE : PAST;
      return {
        id: idOf(place, index),
        user_id: `User${index % 4}`,
        point_amount: index === 0 ? 2_147_483_647 : 100 + index,
        execute_at: dueAt,
        status,
        idempotency_key: `${status}-${index}`.padEnd(index === 0 ? 100 : 1, "x"),
        scan_at: isOpen ? dueAt : null,
        attempts: place,
        last_error: status === "FAILED" ? "残高 out of range" : null,
        created_at: "2023-12-31 23:59:59.001",
        updated_at: "2024-03-01 00:00:00.123",
      };
    }),
  );
  await query("insert into point_reservations (??) values ?", [
    Object.keys(rows[0] ?? {}),
    rows.map((row) => Object.values(row)),
  ]);
  await query(
    `insert into point_transactions (id, idempotency_key, user_id, point_amount, created_at)
     select concat('f', substring(id, 2)), idempotency_key, user_id, point_amount, '2024-03-01 00:00:00.123'
     from point_reservations where status = 'DONE'`,
  );
  await query(
    `insert into point_root (user_id, point_num, created_at, updated_at)
     select user_id, sum(point_amount), min(created_at), max(created_at) from point_transactions group by user_id`,
  );
}

/** Adds so many that making an index of them takes a while. */
async function insertFiftyThousand({ query }: TestDatabase): Promise<void> {
  await query(`
    insert into point_reservations (id, user_id, point_amount, execute_at, scan_at, idempotency_key)
    with recursive digits (digit) as (select 0 union all select digit + 1 from digits where digit < 9),
    ids (id) as (
      select concat('01a20990-0008-7000-8000-0000000', a.digit, b.digit, c.digit, d.digit, e.digit)
      from digits a, digits b, digits c, digits d, digits e where a.digit < 5
    )
    select id, right(id, 3), 1, '${FUTURE}', '${FUTURE}', id from ids`);
}

function idOf(place: number, index: number): string {
  return `01a20990-000${place}-7000-8000-${String(index).padStart(12, "0")}`;
}

/** All old columns of all rows. */
async function readFirst({ query }: TestDatabase): Promise<Record<string, unknown[]>> {
  const tables: Record<string, unknown[]> = {};
  for (const [table, columns] of Object.entries(OLD_COLUMNS)) {
    tables[table] = await query(`select ${columns} from ${table} order by 1`);
  }
  return tables;
}

async function definitionsOf({ query }: TestDatabase): Promise<Record<string, string>> {
  const definitions: Record<string, string> = {};
  for (const table of Object.keys(OLD_COLUMNS)) {
    const [row] = await query<Record<string, string>>(`show create table ${table}`);
    definitions[table] = row?.["Create Table"] ?? "";
  }
  return definitions;
}

/** A database of the first version, with data: its folder, and the definitions of its tables. */
interface FirstVersion {
  folder: string;
  definitions: Record<string, string>;
}

function withFirst(work: (db: TestDatabase, first: FirstVersion) => Promise<void>): Promise<void> {
  return withEmptyDatabase(async (db) => {
    const folder = await folderOf({ [FIRST]: await readFile(join(SQL, FIRST), "utf8") });
    await migrate(db.url, { folder });
    await fillFirst(db);
    await work(db, { folder, definitions: await definitionsOf(db) });
  });
}

/** The second file's steps: a crash may come between any two of them. */
const STEPS = (await readFile(join(SQL, SECOND), "utf8"))
  .split(/(?<=deallocate prepare migration;)/)
  .slice(0, -1);

describe(SECOND, () => {
  test("changes a database of the first version in place: every value as it was, the new columns null", () =>
    withFirst(async (db, { folder }) => {
      const before = await readFirst(db);
      expect(Object.values(before).map((rows) => rows.length)).toEqual([4, 100, 20]);
      expect(await schemaErrorOf(checkSchema(db.database))).toStartWith(
        `The schema is behind: ${SECOND}, ${THIRD} must run.`,
      );
      await migrate(db.url);
      expect(await readFirst(db)).toEqual(before);
      expect(await db.query(`select distinct ${NEW_COLUMNS} from point_reservations`)).toEqual([
        { campaign: null, original_point_amount: null, original_execute_at: null },
      ]);
      const listed = await db.query(
        "select distinct status, listed_as from point_reservations order by status",
      );
      expect(listed).toEqual(
        RESERVATION_STATUSES.toSorted().map((status) => ({
          status,
          listed_as: status === "PENDING" || status === "PROCESSING" ? "OPEN" : status,
        })),
      );
      await checkSchema(db.database);
      // Processes of the version before may start while the new one rolls out.
      await checkSchema(db.database, folder);
      expect(await compareSums(db.database)).toMatchObject({ agree: true, direct: 0n });
    }));

  test("makes of a filled database the same tables as of an empty one", () =>
    withFirst((filled) =>
      withEmptyDatabase(async (empty) => {
        await migrate(filled.url);
        await migrate(empty.url);
        expect(await definitionsOf(filled)).toEqual(await definitionsOf(empty));
      }),
    ));

  test("lets the program go on with what was there: replay, patch, cancel, grant, add, subtract, lists", () =>
    withFirst(async (db) => {
      await migrate(db.url);
      const { send } = appOn(db.database);
      const json = (body: unknown, method: string) => ({ ...post(body), method });
      const [PENDING, PROCESSING, DONE, FAILED] = [0, 1, 2, 3];

      const first = { user_id: "User1", point_amount: 101, execute_at: "2024-02-29T23:59:59.999Z" };
      for (const status of ["PENDING", "DONE", "CANCELLED"] as const) {
        const replay = await send("/point/reserve", post({ ...first, idempotency_key: `${status}-1` }));
        expect({ status: replay.status, replayed: replay.headers.get("idempotent-replayed") }).toEqual({
          ...{ status: 201, replayed: "true" },
        });
        const id = idOf(RESERVATION_STATUSES.indexOf(status), 1);
        expect(await replay.json()).toMatchObject({ reservation_id: id });
      }
      const other = { ...first, idempotency_key: "DONE-1", campaign: "summer" };
      expect((await send("/point/reserve", post(other))).status).toBe(422);

      const patched = `/point/reservations/${idOf(PENDING, 2)}`;
      const patch = { point_amount: 7, execute_at: "2024-01-01T00:00:00.5Z" };
      const patchAnswer = await send(patched, json(patch, "PATCH"));
      expect(await patchAnswer.json()).toMatchObject({
        ...{ point_amount: 7, original_point_amount: 102 },
        ...{ execute_at: "2024-01-01T00:00:00.500Z", original_execute_at: "2029-02-22T13:59:00.001Z" },
      });
      const asFirst = { user_id: "User2", point_amount: 102, execute_at: "2029-02-22T13:59:00.001Z" };
      const replay = await send("/point/reserve", post({ ...asFirst, idempotency_key: "PENDING-2" }));
      expect(replay.headers.get("idempotent-replayed")).toBe("true");

      const statusOf = async (path: string, method: string) => (await send(path, { method })).status;
      for (const place of [PENDING, PROCESSING]) {
        expect(await statusOf(`/point/reservations/${idOf(place, 3)}`, "DELETE")).toBe(200);
      }
      expect(await statusOf(`/point/reservations/${idOf(DONE, 3)}`, "DELETE")).toBe(409);
      expect(await statusOf(`/point/reservations/${idOf(FAILED, 3)}/retry`, "POST")).toBe(200);

      const claimed = await claimDue(db.database, { limit: 1_000, leaseMs: 60_000 });
      // 9 that are PENDING and due, 19 whose lease is over, the patched one and the one tried again.
      expect(claimed).toHaveLength(30);
      await processReservations([claimed], { database: db.database, maxAttempts: 3 });
      expect(
        await db.query("select status, count(*) n from point_reservations group by status order by status"),
      ).toEqual([
        { status: "CANCELLED", n: 22 },
        { status: "DONE", n: 50 },
        { status: "FAILED", n: 19 },
        { status: "PENDING", n: 9 },
      ]);

      expect((await send("/point/add", json({ user_id: "User1", point_num: 50 }, "PUT"))).status).toBe(200);
      expect((await send("/point/sub", json({ user_id: "User1", point_num: 20 }, "PUT"))).status).toBe(200);
      expect(await compareSums(db.database)).toMatchObject({ agree: true, direct: 30n });

      const listed = await (await send("/users/User3/reserved-points?limit=1000")).json();
      expect((listed as { reserved_points: unknown[] }).reserved_points).toHaveLength(25);
      const { transactions } = (await (await send("/users/User1/transactions")).json()) as {
        transactions: { kind: string; point: number }[];
      };
      expect(transactions.slice(0, 2).map(({ kind, point }) => [kind, point])).toEqual([
        ["sub", -20],
        ["add", 50],
      ]);
      expect(transactions.slice(2).every(({ kind }) => kind === "grant")).toBe(true);
      const [balance] = await db.query("select point_num from point_root where user_id = 'User1'");
      const sum = transactions.reduce((total, { point }) => total + point, 0);
      expect(balance).toEqual({ point_num: sum });
    }));

  test("lets the ledger hold subtractions, and keys of up to 120 characters, in which case still matters", () =>
    withFirst(async (db) => {
      const entryOf = (point_amount: number, idempotency_key: string) => ({
        ...{ id: crypto.randomUUID(), user_id: "User0", point_amount, idempotency_key },
      });
      const insert = (row: object) => db.query("insert into point_transactions set ?", [row]);
      await expect(insert(entryOf(-1, "minus"))).rejects.toThrow(CHECK_VIOLATED);
      await migrate(db.url);
      await insert(entryOf(-1, "minus"));
      await insert(entryOf(1, "k".repeat(120)));
      await expect(insert(entryOf(1, "k".repeat(121)))).rejects.toThrow("ER_DATA_TOO_LONG");
      await insert(entryOf(1, "K".repeat(120)));
    }));

  test.each([
    ["point_reservations", []],
    ["point_transactions", ["point_reservations"]],
  ])(
    "runs again after its connection was lost in an ALTER of %s",
    (table, changed) =>
      withFirst(async (db, { definitions }) => {
        const before = await readFirst(db);
        await killAtAlter(db, { folder: SQL, table });
        const now = await definitionsOf(db);
        expect(Object.keys(now).filter((name) => now[name] !== definitions[name])).toEqual(changed);
        expect(await appliedOf(db)).toEqual([
          { name: FIRST, finished: 1 },
          { name: SECOND, finished: 0 },
        ]);
        await expectRunsAgain(db, before);
      }),
    30_000,
  );

  test.each(STEPS.slice(1).map((_, index) => index + 1))(
    "runs again where only %d of its steps were done",
    (count) =>
      withFirst(async (db, { folder, definitions }) => {
        const before = await readFirst(db);
        const sql = [...STEPS.slice(0, count), "\nalter table point_root drop column no_such_column;\n"].join(
          "",
        );
        await writeFile(join(folder, SECOND), sql);
        expect(await schemaErrorOf(migrate(db.url, { folder }))).toStartWith(`Cannot run ${SECOND}: `);
        expect(await definitionsOf(db)).not.toEqual(definitions);
        await expectRunsAgain(db, before);
      }),
    30_000,
  );

  test("runs again where all of it was done, and only that was not noted", () =>
    withFirst(async (db) => {
      const before = await readFirst(db);
      await migrate(db.url);
      await db.query("update schema_migrations set finished_at = null where name = ?", [SECOND]);
      await expectRunsAgain(db, before);
    }));

  test(
    "keeps nobody waiting: while it runs on 50,000 rows, reservations go on being made and cancelled",
    () =>
      withFirst(async (db) => {
        await insertFiftyThousand(db);
        let isRunning = true;
        const startsAt = performance.now();
        const migrated = migrate(db.url).finally(() => {
          isRunning = false;
        });
        const waits: number[] = [];
        for (let index = 0; isRunning; index++) {
          const startedAt = performance.now();
          const row = [idOf(9, index), "User0", 5, PAST, PAST, `while-${index}`];
          await db.query(
            "insert into point_reservations (id, user_id, point_amount, execute_at, scan_at, idempotency_key) values ?",
            [[row]],
          );
          await db.query("update point_reservations set status = 'CANCELLED', scan_at = null where id = ?", [
            idOf(9, index),
          ]);
          waits.push(performance.now() - startedAt);
        }
        await migrated;
        // Where a table is copied, or locked, one of them waits nearly as long as the file runs.
        expect(Math.max(...waits)).toBeLessThan((performance.now() - startsAt) / 2);
        const listed = await db.query<{ listed_as: string; n: number }>(
          "select listed_as, count(*) n from point_reservations where idempotency_key like 'while-%' group by listed_as",
        );
        expect(listed).toEqual([{ listed_as: "CANCELLED", n: waits.length }]);
      }),
    60_000,
  );

  test("leaves processes of the version before at work: what they insert and change is still right", () =>
    withFirst(async (db) => {
      await migrate(db.url);
      const reserved = [idOf(9, 0), "User0", 5, PAST, PAST, "old-key"];
      for (let again = 0; again < 2; again++) {
        await db.query(
          `insert into point_reservations (id, user_id, point_amount, execute_at, scan_at, idempotency_key)
           values ? on duplicate key update id = id`,
          [[reserved]],
        );
      }
      const [row] = await db.query(`select ${NEW_COLUMNS}, status from point_reservations where id = ?`, [
        idOf(9, 0),
      ]);
      expect(row).toEqual({
        ...{ campaign: null, original_point_amount: null, original_execute_at: null, status: "PENDING" },
      });
      await db.query("update point_reservations set status = 'PROCESSING', scan_at = now(3) where id = ?", [
        idOf(9, 0),
      ]);
      await db.database.transaction(async ({ execute }) => {
        await execute(
          "insert into point_transactions (id, idempotency_key, user_id, point_amount) values ?",
          [[[crypto.randomUUID(), "old-key", "User0", 5]]],
        );
        await execute(
          `insert into point_root (user_id, point_num) values ?
           on duplicate key update point_num = point_num + values(point_num)`,
          [[["User0", 5]]],
        );
        await execute("update point_reservations set status = 'DONE', scan_at = null where id = ?", [
          idOf(9, 0),
        ]);
      });
      expect(await compareSums(db.database)).toMatchObject({ agree: true });
      const story = await appOn(db.database).send(`/point/reservations/${idOf(9, 0)}`);
      expect(await story.json()).toMatchObject({ status: "DONE", campaign: null, point_amount: 5 });
    }));
});

/** The statements of the third file: a crash may come between any two of them. */
const STATEMENTS = (await readFile(join(SQL, THIRD), "utf8")).split(/(?<=;\n)/).slice(0, -1);

describe(THIRD, () => {
  /** A database of the version before, with data. */
  function withSecond(work: (db: TestDatabase, folder: string) => Promise<void>): Promise<void> {
    return withFirst(async (db, { folder }) => {
      await cp(join(SQL, SECOND), join(folder, SECOND));
      await migrate(db.url, { folder });
      await work(db, folder);
    });
  }

  test("has every entry that was there counted, and those that the version before still adds", () =>
    withSecond(async (db) => {
      const before = await readFirst(db);
      await migrate(db.url);
      expect(await readFirst(db)).toEqual(before);
      expect(await aggregate(db.database, { timeZone: "UTC" })).toBe(20);
      await db.query(
        "insert into point_transactions (id, idempotency_key, user_id, point_amount) values (uuid(), 'direct:old', 'User0', 5)",
      );
      expect(await aggregate(db.database, { timeZone: "UTC" })).toBe(1);
      const [sums] = await db.query<{ entries: string; points: string }>(
        "select sum(entries) entries, sum(points) points from point_daily_totals",
      );
      const [ledger] = await db.query<{ points: string }>(
        "select sum(point_amount) points from point_transactions",
      );
      expect(sums).toEqual({ entries: "21", points: ledger?.points as string });
    }));

  test.each(STATEMENTS.slice(1).map((_, index) => index + 1))(
    "runs again where only %d of its statements were done",
    (count) =>
      withSecond(async (db, folder) => {
        const before = await readFirst(db);
        const sql = `${STATEMENTS.slice(0, count).join("")}\nalter table point_root drop column no_such_column;\n`;
        await writeFile(join(folder, THIRD), sql);
        expect(await schemaErrorOf(migrate(db.url, { folder }))).toStartWith(`Cannot run ${THIRD}: `);
        await expectRunsAgain(db, before, THIRD);
      }),
    30_000,
  );

  test("copies no table and keeps nobody waiting: each ALTER of a table that was there says so", () => {
    const alters = STATEMENTS.join("").match(/alter table[\s\S]*?'/g) ?? [];
    expect(alters).toHaveLength(2);
    for (const alter of alters)
      expect(alter).toMatch(/algorithm = instant'|algorithm = inplace, lock = none'/);
  });
});

/** The second file, or another one, not finished so far, comes to its end, on the data as it was. */
async function expectRunsAgain(
  db: TestDatabase,
  before: Record<string, unknown[]>,
  file = SECOND,
): Promise<void> {
  const said: string[] = [];
  await migrate(db.url, { say: (line) => said.push(line) });
  expect(said).toContain(`Running ${file} again, as it was interrupted`);
  expect(await readFirst(db)).toEqual(before);
  await checkSchema(db.database);
  await withEmptyDatabase(async (fresh) => {
    await migrate(fresh.url);
    expect(await definitionsOf(db)).toEqual(await definitionsOf(fresh));
  });
}
