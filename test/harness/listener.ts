/** Processes of this machine behind a port: Linux only, and only those that this user may see. */
import { readdirSync, readFileSync, readlinkSync } from "node:fs";

/** The process that listens on the port of a URL of this machine, if it can be seen. */
export function listenerOf(url: string): number | undefined {
  const { hostname, port } = new URL(url);
  if (hostname !== "127.0.0.1" && hostname !== "localhost") return undefined;
  const hex = Number(port).toString(16).toUpperCase().padStart(4, "0");
  const sockets = ["/proc/net/tcp", "/proc/net/tcp6"]
    .flatMap((file) => ifSeen(() => readFileSync(file, "utf8").split("\n")) ?? [])
    .map((line) => line.trim().split(/\s+/))
    .filter(([, local, , state]) => local?.endsWith(`:${hex}`) && state === "0A")
    .map((fields) => `socket:[${fields[9]}]`);
  const pid = ifSeen(() => readdirSync("/proc"))?.find((name) => {
    const files = /^\d+$/.test(name) ? ifSeen(() => readdirSync(`/proc/${name}/fd`)) : undefined;
    return files?.some((fd) => sockets.includes(ifSeen(() => readlinkSync(`/proc/${name}/fd/${fd}`)) ?? ""));
  });
  return pid === undefined ? undefined : Number(pid);
}

/** The environment of a process: `NAME=value` each; empty if it cannot be seen. */
export function environmentOf(pid: number | undefined): string[] {
  return ifSeen(() => readFileSync(`/proc/${pid}/environ`, "utf8").split("\0")) ?? [];
}

/** The root folder of a process, which may not be that of the machine; undefined if it cannot be seen. */
export function rootOf(pid: number | undefined): string | undefined {
  return ifSeen(() => readlinkSync(`/proc/${pid}/root`));
}

/** Undefined for what has gone, or is another user's. */
function ifSeen<T>(read: () => T): T | undefined {
  try {
    return read();
  } catch {
    return undefined;
  }
}
