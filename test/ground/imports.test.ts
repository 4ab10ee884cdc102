import { expect, test } from "bun:test";
import { globSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { temporaryFolder } from "../harness/temporary_folder.ts";

// Which folder may import which: biome.json. Here is what Biome cannot express.
const ROOT = join(import.meta.dir, "..", "..");
const IMPORT = /(?:\bfrom\s+|^import\s+|\bimport\(\s*|\brequire\(\s*)"([^"]+)"/gm;

/** Which files may know a package. */
const PACKAGES: [name: RegExp, files: RegExp][] = [
  [/^(elysia|@elysiajs)(\/|$)/, /^(api|lib\/http\/\w+|lib\/\w+\/\w+_routes)\.ts$/],
  [/^amqplib(\/|$)/, /^lib\/(amqp|hints|queue|queue_declaration)\.ts$/],
  [
    /^(drizzle-orm|mysql2)(\/|$)/,
    /(\/dev\/.*|\/(schema|database|migrate|repair)|_(errors|session|repository|queries|check))\.ts$/,
  ],
];
const ENVIRONMENT = /\b(Bun|process|import\.meta)\.env\b/;
const MAY_READ_ENVIRONMENT = /^lib\/(config\.ts|cli\/|dev\/)/;

/** What a file imports: packages by name, files by their path from the root. */
function importsOf(path: string, text: string): string[] {
  return [...text.matchAll(IMPORT)].map(([, name = ""]) => name.replace(/^\..*/, join(dirname(path), name)));
}

/** What a file must not know, and knows. */
function forbiddenIn(path: string, text: string): string[] {
  const found = importsOf(path, text).filter((imported) =>
    PACKAGES.some(([name, files]) => name.test(imported) && !files.test(path)),
  );
  if (ENVIRONMENT.test(text) && !MAY_READ_ENVIRONMENT.test(path)) found.push("the environment");
  return found;
}

const paths = globSync(["*.ts", "lib/**/*.ts", "sql/**/*.ts"], { cwd: ROOT });
const files = new Map(paths.map((path) => [path, readFileSync(join(ROOT, path), "utf8")]));

test("only those files know a package, or the environment, that are meant to", () => {
  expect(files.size).toBeGreaterThan(50);
  expect([...files].flatMap(([path, text]) => forbiddenIn(path, text).map((name) => [path, name]))).toEqual(
    [],
  );
});

test("no file imports itself through others", () => {
  const left = new Map([...files].map(([path, text]) => [path, importsOf(path, text)]));
  for (let size = -1; size !== left.size; ) {
    size = left.size;
    for (const [path, imports] of left) if (!imports.some((other) => left.has(other))) left.delete(path);
  }
  expect([...left.keys()]).toEqual([]);
});

const PLANTED = [
  ["lib/points/sums.ts", 'import {\n  createPool,\n  type Pool,\n} from "mysql2/promise";'],
  ["lib/dev/demo.ts", 'const { connect } = await import("amqplib/callback_api");'],
  ["lib/queue.ts", "const url = process.env.AMQP_URL;"],
  ["lib/field.ts", 'import type { Point } from "./points/point.ts";'],
  ["lib/http/listen.ts", 'import "../service/log.ts";'],
  ["lib/service/log.ts", 'import "../points/point.ts";'],
  ["lib/points/point.ts", 'export * from "../reservations/reservation.ts";'],
  ["lib/reservations/bulk.ts", 'import "../accounting/day.ts";'],
  ["lib/accounting/day.ts", 'import "../cli/totals.ts";'],
  ["lib/cli/totals.ts", 'await import("../../api.ts");'],
  ["lib/dev/stack.ts", 'import "../cli/demo.ts";'],
  ["scheduler.ts", 'import "./worker.ts";'],
  ["sql/migrate.ts", 'import "../lib/points/point.ts";'],
] as const;
const ALLOWED = ["lib/accounting/day_check.ts", 'import "../points/point.ts";\nimport "mysql2";'] as const;

test("every planted break of the rules is found, by Biome or above, and nothing else", async () => {
  await using folder = await temporaryFolder();
  const all = [...PLANTED, ALLOWED];
  await Bun.write(`${folder.path}/biome.json`, Bun.file(join(ROOT, "biome.json")));
  for (const [path, text] of all) await Bun.write(`${folder.path}/${path}`, `${text}\n`);
  const lint = ["lint", "--only=style/noRestrictedImports", "--vcs-enabled=false", "--reporter=json"];
  const command = [join(ROOT, "node_modules/.bin/biome"), ...lint];
  const child = Bun.spawn(command, { cwd: folder.path, stderr: "ignore" });
  const { diagnostics } = await child.stdout.json();
  const byBiome = diagnostics.map(({ location }: { location: { path: string } }) => location.path);
  const byTest = all.filter(([path, text]) => forbiddenIn(path, text).length > 0).map(([path]) => path);
  expect(new Set([...byBiome, ...byTest])).toEqual(new Set(PLANTED.map(([path]) => path)));
});
