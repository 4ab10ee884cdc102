import { expect, test } from "bun:test";
import { globSync, readFileSync } from "node:fs";
import { dirname, join, normalize } from "node:path";

const ROOT = join(import.meta.dir, "..");
const ENTRIES = ["api.ts", "scheduler.ts", "worker.ts"];

/** What each file of lib/ may import of lib/. */
const ROOMS: Record<string, string[]> = {
  errors: [],
  loop: [],
  input: ["errors"],
  page: ["errors", "input"],
  day: ["errors", "input"],
  point: ["input"],
  reservation: ["errors", "input", "point"],
  bulk: ["errors", "input", "reservation"],
  message: ["errors", "input", "reservation"],
  schema: ["reservation", "point"],
  database: ["errors", "loop", "schema"],
  reservation_repository: ["database", "schema", "reservation"],
  point_repository: ["database", "schema", "point"],
  total_repository: ["database", "schema", "point", "day", "errors"],
  book_repository: ["database", "reservation", "point", "day"],
  history: ["database", "schema", "reservation", "point", "page"],
  queue: ["errors", "message", "loop"],
  config: ["errors", "day"],
  coalesce: ["errors"],
  http: ["errors", "loop"],
  answers: ["day", "schema", "history", "point", "reservation", "reservation_repository"],
  openapi: ["answers", "http", "input"],
  routes: ["answers", "day", "openapi", "bulk", "input", "page", "point", "reservation"],
  service: ["errors", "database", "http", "loop"],
  // What both a process and a command do; as a command each reads settings and opens the database.
  terminal: ["errors"],
  aggregate: ["total_repository", "day", "database", "config", "errors", "terminal"],
  reconcile: [
    "book_repository",
    "point",
    "total_repository",
    "day",
    "database",
    "config",
    "errors",
    "terminal",
  ],
  totals: [
    "total_repository",
    "answers",
    "reservation",
    "schema",
    "day",
    "database",
    "config",
    "errors",
    "terminal",
  ],
};

/** Who may know a package; tests may know every one. */
const PACKAGES: { name: RegExp; may: RegExp }[] = [
  { name: /^(elysia|@elysiajs)(\/|$)/, may: /^api\.ts$/ },
  { name: /^amqplib(\/|$)/, may: /^lib\/queue\.ts$/ },
  { name: /^drizzle-orm(\/|$)/, may: /^(lib\/(schema|database|history|\w+_repository)\.ts|sql\/.*)$/ },
  { name: /^mysql2(\/|$)/, may: /^(lib\/(schema|database|\w+_repository)\.ts|sql\/.*|lib\/dev\/.*)$/ },
];

const IMPORT =
  /(?:^import\s+(?:[^"';]*?\sfrom\s+)?|^export\s+[^"';=]*?\sfrom\s+|\bimport\(\s*|\brequire\(\s*)["']([^"']+)["']/gm;
const ENVIRONMENT = /\b(Bun\.env|process\.env|import\.meta\.env)\b/;

/** What a file imports: packages by name, files by their path from the root. */
function importsOf(path: string, text: string): string[] {
  return [...text.matchAll(IMPORT)].map(([, from = ""]) =>
    from.startsWith(".") ? normalize(join(dirname(path), from)) : from,
  );
}

/** The rules of design.md, "Rooms", that a file breaks. */
function brokenRules(path: string, text: string): string[] {
  if (path.startsWith("test/")) return [];
  const imports = importsOf(path, text);
  const isDev = path.startsWith("lib/dev/");
  const broken: string[] = [];
  for (const imported of imports) {
    const rule = PACKAGES.find(({ name }) => name.test(imported));
    if (rule && !rule.may.test(path)) broken.push(`${path} must not know the package ${imported}`);
    if (ENTRIES.includes(imported)) broken.push(`${path} must not import the entry ${imported}`);
    if (imported.startsWith("test/")) broken.push(`${path} must not import a test: ${imported}`);
    if (imported.startsWith("lib/dev/") && !isDev) broken.push(`${path} must not import ${imported}`);
  }
  const [, room] = /^lib\/(\w+)\.ts$/.exec(path) ?? [];
  if (room) {
    const allowed = ROOMS[room]?.map((name) => `lib/${name}.ts`);
    if (!allowed) broken.push(`${path} has no room in this test: say what it may import`);
    const ours = imports.filter((imported) => /^(lib|sql)\/|^\w+\.ts$/.test(imported));
    for (const imported of ours.filter((name) => !allowed?.includes(name))) {
      broken.push(`${path} must not import ${imported}`);
    }
  }
  const [importable = ""] = text.split("if (import.meta.main)");
  if (!isDev && ENVIRONMENT.test(path === "lib/config.ts" ? "" : importable)) {
    broken.push(`${path} must not read the environment where it is imported`);
  }
  return broken;
}

test("every file keeps to its room: the imports that design.md allows, and no other", () => {
  const paths = globSync(["*.ts", "lib/**/*.ts", "sql/**/*.ts", "test/**/*.ts"], { cwd: ROOT });
  const found = paths.map((path) => path.replaceAll("\\", "/"));
  for (const path of [...ENTRIES, ...Object.keys(ROOMS).map((name) => `lib/${name}.ts`), "sql/migrate.ts"]) {
    expect(found).toContain(path);
  }
  expect(found.flatMap((path) => brokenRules(path, readFileSync(join(ROOT, path), "utf8")))).toEqual([]);
});

test("importsOf() finds every import of a real file", () => {
  const imports = importsOf("scheduler.ts", readFileSync(join(ROOT, "scheduler.ts"), "utf8"));
  expect(imports).toContain("pino");
  expect(imports).toContain("lib/queue.ts");
  expect(imports).toContain("lib/reservation_repository.ts");
  expect(imports).toContain("sql/migrate.ts");
});

test.each([
  ["worker.ts", `import { Elysia } from "elysia";`],
  ["worker.ts", `import type { Channel } from 'amqplib';`],
  ["lib/service.ts", `import {\n  createPool,\n  type Pool,\n} from "mysql2/promise";`],
  ["lib/message.ts", `import { sql } from "drizzle-orm";`],
  ["lib/dev/demo.ts", `import { sql } from "drizzle-orm";`],
  ["lib/dev/demo.ts", `import { connect } from "amqplib/callback_api";`],
  ["lib/dev/demo.ts", `import { createApp } from "../../api.ts";`],
  ["api.ts", `import { scanAndPublish } from "./scheduler.ts";`],
  ["api.ts", `const { scanAndPublish } = await import("./scheduler.ts");`],
  ["sql/migrate.ts", `import "../worker.ts";`],
  ["api.ts", `import { findServerBinaries } from "./lib/dev/servers.ts";`],
  ["lib/queue.ts", `export { until } from "../test/harness.ts";`],
  ["lib/errors.ts", `import { sleep } from "./loop.ts";`],
  ["lib/loop.ts", `import type { DomainError } from "./errors.ts";`],
  ["lib/queue.ts", `export * from "./database.ts";`],
  ["lib/database.ts", `import { migrate } from "../sql/migrate.ts";`],
  ["lib/point_repository.ts", `const queue = require("./queue.ts");`],
  ["lib/newcomer.ts", "export const one = 1;"],
  ["lib/queue.ts", "const url = process.env.AMQP_URL;"],
  ["worker.ts", "const url = Bun.env.AMQP_URL;\nif (import.meta.main) run(Bun.env);"],
])("a planted break of the rules in %s is found (%#)", (path, text) => {
  expect(brokenRules(path, text)).toHaveLength(1);
});

test.each([
  ["worker.ts", `import { openQueue } from "./lib/queue.ts";\nif (import.meta.main) run(Bun.env);`],
  ["lib/dev/services.ts", `import { createConnection } from "mysql2/promise";\nrun(process.env.PATH);`],
  ["lib/queue.ts", `import { connect } from "amqplib";\nimport { sleep } from "./loop.ts";`],
  ["lib/errors.ts", `throw new Error("Cannot take it from 'worker.ts'");`],
])("what the rules allow in %s is let through (%#)", (path, text) => {
  expect(brokenRules(path, text)).toEqual([]);
});
