import { expect, test } from "bun:test";
import { openPace } from "../../lib/reservations/pace.ts";
import { openWaitingRoom, type WaitingRoom } from "../../lib/reservations/waiting_room.ts";
import { until } from "../harness/harness.ts";

/** Runs a room until `work` ends; records what it passes on. What is in `held` stays held. */
async function whileRunning(
  room: WaitingRoom,
  work: (state: { passed: string[][]; held: Map<string, string> }) => Promise<void>,
) {
  const stop = new AbortController();
  const state = { passed: [] as string[][], held: new Map<string, string>() };
  async function grant(ids: string[]) {
    state.passed.push(ids);
    for (const id of ids) {
      const heldId = state.held.get(id);
      if (heldId !== undefined) room.put(heldId, id);
    }
  }
  const running = room.run({ grant, maxBatch: 3, signal: stop.signal });
  await work(state).finally(() => stop.abort());
  await running;
}

test("openWaitingRoom() tries one reservation of what is held, and all once it is free, up to its batch", async () => {
  const room = openWaitingRoom();
  await whileRunning(room, async ({ passed, held }) => {
    for (const id of ["a", "b", "c", "d", "e"]) {
      held.set(id, "Locked");
      room.put("Locked", id);
    }
    await until("it was tried several times", () => passed.length >= 4);
    expect(passed.every((ids) => ids.length === 1)).toBe(true);
    held.clear();
    passed.length = 0;
    await until("all are passed on", () => passed.flat().length === 5);
    expect(passed.map(({ length }) => length)).toEqual([1, 3, 1]);
    expect(new Set(passed.flat())).toEqual(new Set(["a", "b", "c", "d", "e"]));
  });
  expect(room.join({ id: "f", userId: "Locked" })).toBe(false);
});

test("openWaitingRoom() lets only those join who need what is held, each once", async () => {
  const room = openWaitingRoom();
  room.put("Locked", "a");
  room.put("b", "b");
  expect(room.join({ id: "a", userId: "Locked" })).toBe(true);
  expect(room.join({ id: "c", userId: "Locked" })).toBe(true);
  expect(room.join({ id: "b", userId: "Free" })).toBe(true);
  expect(room.join({ id: "d", userId: "Free" })).toBe(false);
  await whileRunning(room, async ({ passed }) => {
    await until("all are passed on", () => passed.flat().length >= 3);
    expect(passed.flat().toSorted()).toEqual(["a", "b", "c"]);
  });
});

test("openWaitingRoom() has a limit, and leaves what does not fit to its lease", async () => {
  let full = 0;
  const room = openWaitingRoom({
    size: 2,
    onFull: (count) => {
      full += count;
    },
  });
  for (const id of ["a", "b", "b", "c"]) room.put("Locked", id);
  expect(room.join({ id: "d", userId: "Locked" })).toBe(true);
  expect(full).toBe(2);
  await whileRunning(room, async ({ passed }) => {
    await until("all are passed on", () => passed.flat().length === 2);
    // There is room again.
    room.put("Locked", "c");
    await until("this one, too", () => passed.flat().length === 3);
  });
  expect(full).toBe(2);
});

test("openWaitingRoom() gives each of many that are held its turn", async () => {
  const room = openWaitingRoom();
  await whileRunning(room, async ({ passed, held }) => {
    for (let user = 0; user < 20; user++) {
      held.set(`id${user}`, `User${user}`);
      room.put(`User${user}`, `id${user}`);
    }
    await until("each was tried twice", () => {
      const counts = Map.groupBy(passed.flat(), (id) => id);
      return counts.size === 20 && [...counts.values()].every(({ length }) => length >= 2);
    });
  });
});

test("openWaitingRoom() keeps what could not be tried", async () => {
  const room = openWaitingRoom();
  room.put("Locked", "a");
  const stop = new AbortController();
  let calls = 0;
  const running = room.run({
    maxBatch: 1,
    signal: stop.signal,
    async grant() {
      if (++calls === 1) throw new Error("MySQL is away");
      stop.abort();
    },
  });
  await running;
  expect(calls).toBe(2);
});

test("openPace() allows a batch several times the usual time, within limits", () => {
  const pace = openPace();
  expect(pace.stallMs()).toBe(500);
  for (let batch = 0; batch < 100; batch++) pace.record(10);
  expect(pace.stallMs()).toBe(200);
  // Nothing was locked: MySQL is slow.
  pace.record(400, { isStalled: true });
  expect(pace.stallMs()).toBe(1_600);
  pace.record(9_000, { isStalled: true });
  expect(pace.stallMs()).toBe(5_000);
  expect(pace.isCareful()).toBe(false);
  pace.beCareful();
  expect(pace.isCareful()).toBe(true);
});
