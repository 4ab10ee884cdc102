import { describe, expect, test } from "bun:test";
import type { Connection } from "../../lib/database.ts";
import { type DatabaseError, type DatabaseErrorKind, databaseErrorOf } from "../../lib/database_errors.ts";
import { openTestDatabase } from "../harness/database.ts";
import { errorOf } from "../harness/harness.ts";

const db = await openTestDatabase();
const isMariaDb = (await db.query<{ version: string }>("select version() version"))[0]?.version.includes(
  "Maria",
);

/** Takes minutes; unlike BENCHMARK(), it ends with an error if it is interrupted. */
const ENDLESS = `count(*) from information_schema.columns a, information_schema.columns b, information_schema.columns c`;

/** What the server answers to a statement that is refused. */
function refusal(sql: string, values?: unknown[]): Promise<DatabaseError> {
  return errorOf(db.database.run(({ select }) => select(sql, values)));
}

/** Lets the server refuse a statement with this number. */
function signal(errno: number, sqlState: string): Promise<DatabaseError> {
  return refusal(`signal sqlstate '${sqlState}' set mysql_errno = ${errno}, message_text = 'S3cret text'`);
}

describe("databaseErrorOf() decides by the number:", () => {
  test.each<[errno: number, sqlState: string, reason: string, what: string]>([
    [1040, "08004", "MySQL has no connection left", "too many connections"],
    [1226, "42000", "the account has reached a limit of MySQL", "a limit of the account"],
    [1044, "42000", "MySQL refuses the account", "no right to the database"],
    [1045, "28000", "MySQL refuses the account", "a wrong password"],
    [1142, "42000", "a right on MySQL is missing", "no right to a table"],
    [1227, "42000", "a right on MySQL is missing", "no right to do that"],
    [1146, "42S02", "a table is missing", "a table that is gone"],
    [1114, "HY000", "the disk of MySQL is full or fails", "a full table"],
    [1038, "HY001", "MySQL is out of memory", "no memory to sort"],
    [1053, "08S01", "MySQL is shutting down", "a server that ends"],
    [1290, "HY000", "MySQL is read-only", "read_only"],
    [1792, "25006", "MySQL is read-only", "a transaction that is read-only"],
    [1836, "HY000", "MySQL is read-only", "innodb_read_only"],
    [1820, "HY000", "the password for MySQL has expired", "an expired password, in the sandbox"],
    [1862, "HY000", "the password for MySQL has expired", "an expired password, at the login"],
    [3032, "HY000", "MySQL is offline", "offline_mode"],
    [3118, "HY000", "MySQL has locked the account", "a locked account of MySQL"],
    [4151, "HY000", "MySQL has locked the account", "a locked account of MariaDB"],
    [1317, "70100", "MySQL interrupted a statement", "a statement that was killed"],
    [1969, "70100", "MySQL interrupted a statement", "max_statement_time of MariaDB"],
    [3024, "HY000", "MySQL interrupted a statement", "max_execution_time of MySQL"],
    [1598, "HY000", "the binary log of MySQL refuses writes", "binlog_format of MariaDB"],
    [1665, "HY000", "the binary log of MySQL refuses writes", "binlog_format of MySQL"],
    [9001, "HY000", "the proxy has no MySQL", "a proxy without a backend"],
    [1105, "HY000", "MySQL failed with error 1105", "an unknown error"],
    [1194, "HY000", "MySQL failed with error 1194", "a broken table"],
    [31_234, "HY000", "MySQL failed with error 31234", "a number that nobody knows"],
  ])("%d (%s) is an outage: %s, %s (fault 44)", async (errno, sqlState, reason) => {
    const error = await signal(errno, sqlState);
    expect([error.kind, error.isOutage, error.reason]).toEqual(["unavailable", true, reason]);
    expect(error.message).toMatch(
      new RegExp(`^MySQL failed with (\\w+ \\(${errno}\\)|error ${errno}): S3cret text`),
    );
  });

  test.each<[errno: number, sqlState: string, kind: DatabaseErrorKind, what: string]>([
    [1927, "70100", "lost", "a session that MariaDB has killed"],
    [4031, "HY000", "lost", "a session that was idle for too long"],
    [1213, "40001", "deadlock", "a deadlock"],
    [1020, "HY000", "deadlock", "a record of MariaDB that has changed"],
    [31_234, "40001", "deadlock", "a rollback that nobody knows"],
    [1205, "HY000", "lock_timeout", "a lock wait"],
    [3572, "HY000", "lock_timeout", "NOWAIT"],
    [1062, "23000", "duplicate", "a duplicate"],
    [1264, "22003", "out_of_range", "a value out of range"],
    [1690, "22003", "out_of_range", "a sum out of range"],
    [1064, "42000", "other", "the syntax"],
    [1054, "42S22", "other", "a column that is gone"],
    [1406, "22001", "other", "a value that is too long"],
    [1366, "HY000", "other", "a wrong value, for MySQL"],
    [1300, "HY000", "other", "invalid characters"],
    [1364, "HY000", "other", "a value that is missing"],
    [1048, "23000", "other", "a NULL"],
    [1452, "23000", "other", "a foreign key"],
    [3819, "HY000", "other", "a check of MySQL"],
    [4025, "23000", "other", "a check of MariaDB"],
    [1175, "HY000", "other", "safe updates"],
    [1197, "HY000", "other", "a transaction that is too large for the binary log"],
    [1644, "HY000", "other", "a trigger that refuses"],
    [31_234, "45000", "other", "a trigger that refuses with a number of its own"],
    [31_234, "22P99", "other", "a value, by a number that nobody knows"],
  ])("%d (%s) is no outage, or passes: %s, %s; its text is not shown", async (errno, sqlState, kind) => {
    // Not through a pool: it would try again what may pass.
    const thrown = await db.database.run(async ({ select }) => {
      const sql = `signal sqlstate '${sqlState}' set mysql_errno = ${errno}, message_text = 'S3cret text'`;
      return select(sql).catch((error) => error);
    });
    const error = databaseErrorOf(thrown) as DatabaseError;
    expect([error.kind, error.isOutage]).toEqual([kind, kind === "lost"]);
    expect(error.message).toMatch(new RegExp(`^MySQL failed with (\\w+ \\(${errno}\\)|error ${errno})$`));
    expect(error.reason).not.toContain("S3cret");
  });

  test("a name is shown only if both servers mean the same by the number", async () => {
    expect((await signal(1290, "HY000")).message).toStartWith(
      "MySQL failed with ER_OPTION_PREVENTS_STATEMENT (1290)",
    );
    expect((await signal(4151, "HY000")).message).toStartWith("MySQL failed with error 4151:");
  });

  test("a text is cut, so that no answer of a server can flood a log", () => {
    const fields = { errno: 9001, sqlState: "HY000", code: undefined };
    const error = databaseErrorOf(Object.assign(new Error("x".repeat(10_000)), fields));
    expect((error as DatabaseError).message.length).toBeLessThan(400);
  });
});

describe("databaseErrorOf() calls what a real server answers to an invalid row or statement its fault:", () => {
  const INSERT = "insert into point_root (user_id, point_num) values (?, ?)";
  test.each<[string, string, unknown[]]>([
    ["text that is too long", INSERT, ["x".repeat(21), 1]],
    ["no number", INSERT, ["a", "many"]],
    ["no value", INSERT, ["a", null]],
    ["a column without a value", "insert into point_root (point_num) values (1)", []],
    ["a broken check", INSERT, ["a", -1]],
    ["invalid characters", "insert into point_root (user_id, point_num) values (_utf8mb4 x'fffe', 1)", []],
    ["no time", "insert into point_root (user_id, created_at) values ('a', '2026-02-31 00:00:00')", []],
    ["an unknown column", "select gone from point_root", []],
    ["an unknown function", "select gone(1)", []],
    ["several rows for one", "select (select user_id from point_root union select 'a' union select 'b')", []],
    [
      "collations that do not fit",
      "select _utf8mb4'a' collate utf8mb4_bin = _utf8mb4'b' collate utf8mb4_general_ci",
      [],
    ],
    ["a variable that is read-only", "set @@global.version = 'x'", []],
    ["no such variable", "set gone = 1", []],
    ["a trigger that refuses", "signal sqlstate '45000' set message_text = 'S3cret'", []],
  ])("%s", async (_, sql, values) => {
    const error = await refusal(sql, values);
    expect([error.kind, error.message]).toEqual([
      "other",
      expect.stringMatching(/^MySQL failed with [\w ()]+$/),
    ]);
  });

  test.each<[string, string, (connection: Connection) => Promise<unknown>]>([
    [
      "a statement that takes too long",
      "MySQL interrupted a statement",
      ({ select }) =>
        select(
          isMariaDb
            ? `set statement max_statement_time = 0.05 for select ${ENDLESS}`
            : `select /*+ max_execution_time(50) */ ${ENDLESS}`,
        ),
    ],
    [
      "a statement that was killed",
      "MySQL interrupted a statement",
      async ({ select }) => {
        const [me] = await select<{ id: number }>("select connection_id() id");
        const killed = select(`select ${ENDLESS}`);
        await Promise.all([killed, db.query("do sleep(0.2)").then(() => db.query(`kill query ${me?.id}`))]);
      },
    ],
    [
      "a write in a transaction that is read-only",
      "MySQL is read-only",
      async ({ execute }) => {
        await execute("start transaction read only");
        await execute(INSERT, ["a", 1]);
      },
    ],
  ])("but not %s: %s", async (_, reason, work) => {
    const error = await errorOf(db.database.run(work));
    expect([error.kind, error.reason]).toEqual(["unavailable", reason]);
  });
});
