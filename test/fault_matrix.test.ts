import { expect, test } from "bun:test";
import { globSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";

/** What can go wrong between two steps, and what must happen then. */
interface Fault {
  number: number;
  hits: "api" | "scheduler" | "worker";
  /** Where it hits; `│` is a kill between two steps. */
  where: string;
  must: string;
  /** Why there can be no test of it; else a title of some test begins or ends with `fault` and its number. */
  cannotHappen?: string;
}

const FAULTS: Fault[] = [
  ...faultsOf("api", [
    [1, "INSERT │ 201", "the same request with its key finds the first reservation"],
    [2, "two requests with one key at the same moment", "the unique index lets one reserve"],
    [3, "a key comes again with other content", "422, and nothing is done"],
    [4, "keys or users that differ only in case", "they are two: text is compared byte by byte"],
    [5, "COMMIT │ answer", "the same request again gets the same answer, and changes nothing"],
    [6, "execute_at with milliseconds", "they are kept, and no grant comes within them too early"],
    [7, "a process or a session in another time zone", "times are UTC everywhere"],
    [
      8,
      "points added and taken beside a grant",
      "each change is relative, with its ledger entry, or none is",
    ],
  ]),
  ...faultsOf("scheduler", [
    [9, "PROCESSING │ publish", "the lease ends, and the row is claimed again"],
    [10, "two schedulers look for due rows at once", "each row is one's: the other passes over it"],
    [11, "no confirm comes", "the wait has a deadline, and the row is left to its lease"],
    [12, "a publish fails for its publisher, and has arrived", "never PENDING again; cancelled, it stays so"],
    [13, "the queue is missing", "its message counts as not published, and the queue is made again"],
    [14, "RabbitMQ restarts", "messages are persistent, and leases bring what is lost all the same"],
    [15, "an alarm of RabbitMQ blocks publishing", "no more is claimed than one scan holds"],
    [16, "it is stopped past its lease, then resumed", "what it publishes late changes nothing"],
    [17, "a lease ends while a worker is at the row", "what is over is claimed by nobody, and stays over"],
    [18, "a page of rows that cannot be claimed", "a scan passes over them and takes those behind them"],
    [19, "its host's clock is an hour fast", "the database's clock decides, at claim and at grant"],
    [20, "a cancel meets a claim or a grant", "one conditional UPDATE: exactly one of them wins"],
  ]),
  ...faultsOf("worker", [
    [21, "ledger │ balance", "both or neither: one transaction"],
    [22, "a lock timeout amid a grant", "all of it is rolled back, and comes again"],
    [23, "a deadlock amid a grant", "it starts again from BEGIN"],
    [24, "COMMIT │ ack", "the message comes again, and finds it done"],
    [25, "the answer to a COMMIT is lost", "the row is read again, and is not FAILED"],
    [26, "affectedRows of rows that did not change", "they count as 0: only a change is a change"],
    [27, "a user id that is too long for its column", "it is refused, and not cut to somebody else's"],
    [28, "the ledger has the key with other content", "FAILED with the reason, and in the log as an error"],
    [29, "a balance would be out of range", "FAILED with the reason; the others are granted"],
    [30, "a row fails for a reason of its own", "tried again later and later, then FAILED"],
    [31, "a message that nobody can read", "to the dead letters, and the others are granted"],
    [32, "a message with a forged user or amount", "the row decides"],
    [33, "a late message for a row that is over", "the row stays as it is"],
    [34, "an ack of a connection that is gone", "it is dropped, and the message comes again"],
    [35, "RabbitMQ cancels the consumer", "not ready, and it subscribes again"],
    [36, "SIGTERM in the middle of a grant", "it finishes what it has in hand, and exits 0"],
    [37, "MySQL or the worker is gone before the COMMIT", "no ack; an unknown id is a dead letter"],
  ]),
];

function faultsOf(hits: Fault["hits"], rows: [number, string, string, string?][]): Fault[] {
  return rows.map(([number, where, must, cannotHappen]) => ({
    ...{ number, hits, where, must },
    ...(cannotHappen !== undefined && { cannotHappen }),
  }));
}

/** A string at the place of a title: the first of a call, or the first of a row of a table. */
const TITLE = /[([]\s*(?:"((?:[^"\\\n]|\\.)*)"|`((?:[^`\\]|\\.)*)`)/g;
const NUMBER = /^fault (\d+)\b|\(fault (\d+)\)$|\bfault (\d+)$/;

/** The numbers of faults that the titles in a file carry. */
function numbersIn(text: string): number[] {
  return [...text.matchAll(TITLE)].flatMap(([, quoted, template]) => {
    const [, first, last, bare] = NUMBER.exec(quoted ?? template ?? "") ?? [];
    const number = first ?? last ?? bare;
    return number === undefined ? [] : [Number(number)];
  });
}

/** What is wrong between the faults and the numbers that titles carry, one sentence each. */
function gapsBetween(faults: readonly Fault[], numbers: ReadonlySet<number>): string[] {
  const known = new Set(faults.map(({ number }) => number));
  return [
    ...faults.flatMap(({ number, where, cannotHappen }) => {
      const isTested = numbers.has(number);
      if (isTested && cannotHappen) return [`fault ${number} is tested, and yet cannot happen: ${where}`];
      return isTested || cannotHappen ? [] : [`fault ${number} has neither a test nor a reason: ${where}`];
    }),
    ...[...numbers]
      .filter((number) => !known.has(number))
      .map((number) => `no fault has the number ${number}`),
  ];
}

test("every fault has a test whose title says its number, or a reason why it cannot happen", () => {
  const paths = globSync("*.test.ts", { cwd: import.meta.dir });
  const others = paths.filter((path) => path !== basename(import.meta.path));
  expect(others.length).toBeGreaterThan(20);
  const texts = others.map((path) => readFileSync(join(import.meta.dir, path), "utf8"));
  expect(gapsBetween(FAULTS, new Set(texts.flatMap(numbersIn)))).toEqual([]);
});

test("the faults are numbered from 1 to 37, each once", () => {
  expect(FAULTS.map(({ number }) => number)).toEqual(Array.from({ length: 37 }, (_, index) => index + 1));
});

test("numbersIn() reads titles of tests and of rows, at their beginning or end, and nothing else", () => {
  const text = `
    test("fault 1: a title", () => {});
    test.each([["a row (fault 2)", 1], [
      "another row fault 3", 2]])("%s", () => {});
    test.skipIf(!canRestart)(\n "wrapped (fault 4)", work);
    test(\`of \${name} (fault 5)\`, work);
    test("in the (fault 6) middle", work);
    const other = "no title (fault 7)";
    // a comment (fault 8)
    test("default 9", work);
  `;
  expect(numbersIn(text)).toEqual([1, 2, 3, 4, 5]);
});

test("gapsBetween() names what has neither test nor reason, what has both, and numbers that nobody knows", () => {
  const row = { hits: "api", must: "" } as const;
  const faults: Fault[] = [
    { ...row, number: 1, where: "tested" },
    { ...row, number: 2, where: "impossible", cannotHappen: "there is no such step" },
    { ...row, number: 3, where: "forgotten" },
    { ...row, number: 4, where: "doubtful", cannotHappen: "it does, after all" },
  ];
  expect(gapsBetween(faults, new Set([1, 4, 5]))).toEqual([
    "fault 3 has neither a test nor a reason: forgotten",
    "fault 4 is tested, and yet cannot happen: doubtful",
    "no fault has the number 5",
  ]);
});
