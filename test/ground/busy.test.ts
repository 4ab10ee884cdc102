import { expect, test } from "bun:test";
import { BUSY, openUntilFree } from "../../lib/busy.ts";
import { OverloadError } from "../../lib/coalesce.ts";

test("openUntilFree() repeats work until it is not busy, and gives its result", async () => {
  const untilFree = openUntilFree();
  const results = [BUSY, BUSY, "done", "again"];
  expect(await untilFree(async () => results.shift())).toBe("done");
  expect(results).toEqual(["again"]);
});

test("openUntilFree() gives up after its time, and says so", async () => {
  const untilFree = openUntilFree({ maxWaitMs: 1 });
  const work = untilFree(async () => BUSY);
  await expect(work).rejects.toThrow(
    "Cannot wait for more than 1 ms for what another transaction has locked",
  );
  await expect(work).rejects.toBeInstanceOf(OverloadError);
});

test("openUntilFree() lets only so many wait, and all that need not", async () => {
  const untilFree = openUntilFree({ maxWaiting: 1 });
  let isFree = false;
  const attempt = async () => (isFree ? "done" : BUSY);
  const first = untilFree(attempt);
  await expect(untilFree(attempt)).rejects.toThrow("Cannot let more than 1 wait");
  expect(await untilFree(async () => 7)).toBe(7);
  isFree = true;
  expect(await first).toBe("done");
});

test("openUntilFree() passes on what the work throws, and lets the next one wait", async () => {
  const untilFree = openUntilFree({ maxWaiting: 1 });
  for (let time = 0; time < 2; time++) {
    let calls = 0;
    const work = untilFree(async () => {
      if (++calls === 1) return BUSY;
      throw new Error("broken");
    });
    await expect(work).rejects.toThrow("broken");
  }
});
