import { join } from "node:path";

const ROOT = join(import.meta.dir, "..", "..");

export interface Ended {
  code: number;
  stdout: string;
  stderr: string;
}

/** Runs a command of lib/cli/ as an operator does, and waits for its end. */
export async function runCommand(
  name: string,
  { args = [], env = {} }: { args?: readonly string[]; env?: Record<string, string> } = {},
): Promise<Ended> {
  const child = Bun.spawn([process.execPath, `lib/cli/${name}.ts`, ...args], {
    cwd: ROOT,
    env: { ...Bun.env, ...env },
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
  });
  const [code, stdout, stderr] = await Promise.all([child.exited, child.stdout.text(), child.stderr.text()]);
  return { code, stdout, stderr };
}
