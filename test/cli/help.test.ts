import { expect, setDefaultTimeout, test } from "bun:test";
import { runCommand } from "../harness/command.ts";

// What every command has in common.

setDefaultTimeout(60_000);

test.concurrent.each(["aggregate", "totals", "reconcile", "migrate", "services", "dev", "demo"])(
  "%s --help says how it is used and what its exit codes mean, and exits 0",
  async (name) => {
    const { code, stdout, stderr } = await runCommand(name, { args: ["--help"] });
    expect([code, stderr]).toEqual([0, ""]);
    expect(stdout).toContain(`Usage: bun run ${name}`);
    expect(stdout).toMatch(
      /\nExit codes: 0 if done, (1 if .*, )?2 for wrong options, 3 if it could not run\.\n/,
    );
  },
);

test.concurrent.each<[string, string[], string]>([
  ["aggregate", ["--form"], "unknown option '--form'"],
  ["aggregate", ["2026-03-01"], "too many arguments"],
  ["aggregate", ["--from", "2026-02-31", "--to", "2026-03-01"], 'from 1970 to 9999: received "2026-02-31"'],
  ["aggregate", ["--from", "2026-03-01"], "--from and --to must be given together"],
  ["aggregate", ["--from", "2026-03-02", "--to", "2026-03-01"], "--from must not be after --to"],
  ["aggregate", ["--rebuild", "--from", "2026-03-02", "--to", "2026-03-02"], "--rebuild"],
  ["totals", ["--day"], "unknown option '--day'"],
  ["totals", ["--from", "2026-02-30"], 'from 1970 to 9999: received "2026-02-30"'],
  ["totals", ["--campaign", "a b"], "campaign must be 1 to 64 of"],
  ["reconcile", ["--fix"], "unknown option '--fix'"],
  ["migrate", ["--wait", "0"], "It must be a whole number from 1 to 86400"],
])("%s %j exits 2, and says what is wrong", async (name, args, reason) => {
  const { code, stdout, stderr } = await runCommand(name, { args });
  expect([code, stdout]).toEqual([2, ""]);
  expect(stderr).toContain(reason);
});

test.concurrent.each([
  ["aggregate", []],
  ["totals", []],
  // 1 says that there are differences, or that the tables are not up to date.
  ["reconcile", ["--full"]],
  ["migrate", ["--check"]],
])("%s %j exits 3 if MySQL does not answer, and shows no password", async (name, args) => {
  const env = { DATABASE_URL: "mysql://u:S3cret@127.0.0.1:1/d" };
  const ended = await runCommand(name, { args, env });
  expect([ended.code, ended.stdout]).toEqual([3, ""]);
  expect(ended.stderr).toStartWith("Cannot ");
  expect(ended.stderr).not.toContain("S3cret");
});
