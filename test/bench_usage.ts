import { readFileSync } from "node:fs";
import { AMQP_URL, DATABASE_URL } from "./harness.ts";
import { listenerOf } from "./listener.ts";
import type { Pipeline } from "./pipeline.ts";

/** What a process used: the most memory that it held, and the time of all its cores. */
export interface Usage {
  rssMb: number;
  cpuS: number;
}

/** Of a part of the bench, by process; several of one kind are the largest memory and the sum of times. Linux only. */
export type Usages = Map<string, Usage>;

/** Clock ticks a second of `/proc/PID/stat`, on every Linux that Bun runs on. */
const TICKS = 100;

function usageOf(pid: number): Usage | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    // The name, in parentheses, may hold spaces.
    const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
    const peak = /VmHWM:\s+(\d+) kB/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1];
    return { rssMb: Number(peak) / 1_024, cpuS: (Number(fields[11]) + Number(fields[12])) / TICKS };
  } catch {
    return undefined;
  }
}

const SERVERS = { MySQL: DATABASE_URL, RabbitMQ: AMQP_URL };

/** Begins to count; the function that it returns says what was used since, by the processes of a pipeline and the servers. */
export function startUsage(): (services: Pipeline["services"]) => Usages {
  const pids = Object.entries(SERVERS).map(([name, url]) => ({ name, pid: listenerOf(url) ?? 0 }));
  const before = pids.map(({ pid }) => usageOf(pid));
  return (services) => {
    const usages: Usages = new Map();
    for (const { entry, service } of services) {
      const usage = usageOf(service.pid);
      const { rssMb = 0, cpuS = 0 } = usages.get(entry) ?? {};
      if (usage) usages.set(entry, { rssMb: Math.max(rssMb, usage.rssMb), cpuS: cpuS + usage.cpuS });
    }
    for (const [index, { name, pid }] of pids.entries()) {
      const usage = usageOf(pid);
      if (usage) usages.set(name, { ...usage, cpuS: usage.cpuS - (before[index]?.cpuS ?? 0) });
    }
    return usages;
  };
}
