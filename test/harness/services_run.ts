import { chmodSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

export const SERVICES = join(import.meta.dir, "../../lib/cli/services.ts");
export const FIXTURE = join(import.meta.dir, "services_fixture.ts");

/** Starts a file with these words, without the servers of this test. `await using` ends it. */
export function startRun(args: string[], env: Record<string, string | undefined> = {}) {
  const { DATABASE_URL: _, AMQP_URL: __, ...inherited } = process.env;
  const run = Bun.spawn([process.execPath, ...args], {
    env: { ...inherited, ...env },
    stdin: "pipe",
    stdout: "pipe",
    stderr: "pipe",
  });
  return {
    process: run,
    /** The first line of standard output, parsed. */
    async answer<T>(): Promise<T> {
      let text = "";
      for await (const chunk of run.stdout.pipeThrough(new TextDecoderStream())) {
        text += chunk;
        if (text.includes("\n")) break;
      }
      if (text === "") throw new Error(`No answer: ${await run.stderr.text()}`);
      return JSON.parse(text.slice(0, text.indexOf("\n")));
    },
    /** Closes its standard input, and waits for its end. */
    end() {
      run.stdin.end();
      return run.exited;
    },
    async [Symbol.asyncDispose]() {
      run.kill("SIGKILL");
      await run.exited;
    },
  };
}

/** Makes a program `docker` of a shell script; gives the PATH that has it first. */
export function fakeDocker(folder: string, script: string): string {
  const bin = join(folder, "bin");
  mkdirSync(bin, { recursive: true });
  writeFileSync(join(bin, "docker"), `#!/bin/sh\n${script}\n`);
  chmodSync(join(bin, "docker"), 0o755);
  return `${bin}:${process.env.PATH}`;
}

/** Processes with this text on their command line or in their environment: what is left of a test. Linux only. */
export function processesWith(text: string): string[] {
  if (process.platform !== "linux") return [];
  return readdirSync("/proc").filter((pid) => {
    if (!/^\d+$/.test(pid) || pid === String(process.pid)) return false;
    try {
      return ["cmdline", "environ"].some((file) =>
        readFileSync(`/proc/${pid}/${file}`, "utf8").includes(text),
      );
    } catch {
      return false;
    }
  });
}
