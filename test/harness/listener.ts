/** Processes of this machine behind a port: Linux only, and only those that this user may see. */
import { readdirSync, readFileSync, readlinkSync } from "node:fs";

/** The process that listens on the port of a URL of this machine, if it can be seen. */
export function listenerOf(url: string): number | undefined {
  const { hostname, port } = new URL(url);
  if (hostname !== "127.0.0.1" && hostname !== "localhost") return undefined;
  const hex = Number(port).toString(16).toUpperCase().padStart(4, "0");
  try {
    const sockets = ["/proc/net/tcp", "/proc/net/tcp6"]
      .flatMap((file) => readFileSync(file, "utf8").split("\n"))
      .map((line) => line.trim().split(/\s+/))
      .filter(([, local, , state]) => local?.endsWith(`:${hex}`) && state === "0A")
      .map((fields) => `socket:[${fields[9]}]`);
    return readdirSync("/proc")
      .filter((name) => /^\d+$/.test(name))
      .map(Number)
      .find((pid) => holdsOneOf(pid, sockets));
  } catch {
    return undefined;
  }
}

function holdsOneOf(pid: number, sockets: readonly string[]): boolean {
  try {
    return readdirSync(`/proc/${pid}/fd`).some((fd) => {
      try {
        return sockets.includes(readlinkSync(`/proc/${pid}/fd/${fd}`));
      } catch {
        return false;
      }
    });
  } catch {
    return false;
  }
}
