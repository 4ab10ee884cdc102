/** What the fault run and the bench share: their options, and how they say how far they are. */
import { InvalidArgumentError } from "commander";
import { Settings } from "../../lib/config.ts";

/** Parses the value of an option that is a whole number of at least `minimum`. */
export function wholeNumber(minimum: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (Number.isSafeInteger(value) && value >= minimum) return value;
    throw new InvalidArgumentError(`It must be a whole number from ${minimum}.`);
  };
}

/** Parses the value of an option that lists names with commas between them. */
export function someOf(names: readonly string[]): (text: string) => string[] {
  return (text) => {
    const wanted = text.split(",");
    const unknown = wanted.filter((name) => !names.includes(name));
    if (unknown.length === 0) return wanted;
    throw new InvalidArgumentError(`Unknown: ${unknown.join(", ")}. It must be some of ${names.join(", ")}.`);
  };
}

/** The settings of the environment that are handed on to processes, e.g. `LEASE_MS=15000`: all but addresses. */
export function settingsGiven(): Record<string, string> {
  const names = Object.keys(Settings.properties).filter((name) => !/URL$|PORT$|^HOST$|^QUEUE$/.test(name));
  return Object.fromEntries(names.flatMap((name) => (Bun.env[name] ? [[name, Bun.env[name]]] : [])));
}

/** Prints a line with the seconds since the start. */
export function progress(what: string): void {
  console.error(`${String(Math.round(performance.now() / 1_000)).padStart(5)} s  ${what}`);
}
