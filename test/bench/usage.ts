import { readFileSync } from "node:fs";
import { AMQP_URL, DATABASE_URL } from "../harness/harness.ts";
import { listenerOf } from "../harness/listener.ts";
import type { Pipeline } from "../harness/pipeline.ts";

/** What a process used: the most memory that it held, and the time of all its cores. */
export interface Usage {
  rssMb: number;
  cpuS: number;
}

/** By kind of process: of several ones the largest memory and the sum of times. Linux only. */
export type Usages = Map<string, Usage>;

/** Clock ticks a second in `/proc/PID/stat`, on every Linux that Bun runs on. */
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

/** Starts to measure. The function that it returns tells what a pipeline's processes and the servers have used since. */
export function startUsage(): (services: Pipeline["services"]) => Usages {
  const servers = Object.entries({ MySQL: DATABASE_URL, RabbitMQ: AMQP_URL }).map(([name, url]) => {
    const pid = listenerOf(url) ?? 0;
    return { name, pid, before: usageOf(pid)?.cpuS ?? 0 };
  });
  return (services) => {
    const usages: Usages = new Map();
    for (const { entry, service } of services) {
      const usage = usageOf(service.pid);
      const { rssMb = 0, cpuS = 0 } = usages.get(entry) ?? {};
      if (usage) usages.set(entry, { rssMb: Math.max(rssMb, usage.rssMb), cpuS: cpuS + usage.cpuS });
    }
    for (const { name, pid, before } of servers) {
      const usage = usageOf(pid);
      if (usage) usages.set(name, { ...usage, cpuS: usage.cpuS - before });
    }
    return usages;
  };
}
