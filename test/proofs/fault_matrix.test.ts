import { expect, test } from "bun:test";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";

/** A row for each fault: its number, and the tests that show what happens. */
function readMatrix(): { number: number; tests: { path: string; title: string }[] }[] {
  const text = readFileSync(join(import.meta.dir, "fault_matrix.md"), "utf8");
  return [...text.matchAll(/^\| (\d+) \|.*\| (.+) \|$/gm)].map(([, number, tests = ""]) => ({
    number: Number(number),
    tests: [...tests.split("<br>")].map((shown) => {
      const [path = "", title = ""] = shown.split(/: (.*)/);
      return { path: join(import.meta.dir, "..", path), title };
    }),
  }));
}

/** The faults that are not listed are those of hostile clients. */
const NUMBERS = [...Array.from({ length: 50 }, (_, index) => index + 1), 55];

/** Whether a title ends with the fault's number: `(fault 9)`, or `(faults 9, 10)`. */
function isNamed(title: string, number: number): boolean {
  const [, numbers = ""] = /\(faults? ([\d, ]+)\)$/.exec(title) ?? [];
  return numbers.split(", ").includes(String(number));
}

test("every fault is shown by tests that exist, and whose titles name it", () => {
  const matrix = readMatrix();
  expect(matrix.map(({ number }) => number)).toEqual(NUMBERS);
  const missing = matrix.flatMap(({ number, tests }) =>
    tests.filter(({ path, title }) => {
      const text = existsSync(path) ? readFileSync(path, "utf8") : "";
      const isThere = ['"', "`"].some((quote) => text.includes(quote + title + quote));
      return !isThere || !isNamed(title, number);
    }),
  );
  expect(missing).toEqual([]);
});
