import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

/** An empty folder, which goes with everything in it: `await using`. */
export async function temporaryFolder(): Promise<{ path: string } & AsyncDisposable> {
  const path = await mkdtemp(join(tmpdir(), "pointservice-test-"));
  return { path, [Symbol.asyncDispose]: () => rm(path, { recursive: true }) };
}
