import { runCommand } from "../../lib/dev/processes.ts";
import { environmentOf, listenerOf, rootOf } from "./listener.ts";

/** Variables by which `rabbitmqctl` finds its server. */
const NEEDED = /^(HOME|PATH|LANG|ERL_EPMD_\w+|RABBITMQ_(NODENAME|CONF_ENV_FILE|CONFIG_FILE|MNESIA_BASE))=/;
const RUN = 'exec "$(ls /usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmqctl | head -n 1)" "$@"';

/** Runs the `rabbitmqctl` of the very server, as an operator does; resolves to its output. Linux only. */
export async function rabbitmqctl(amqpUrl: string, ...args: string[]): Promise<string> {
  const pid = listenerOf(amqpUrl);
  if (pid === undefined) throw new Error("RabbitMQ does not run on this machine");
  // A server may live in a root folder of its own.
  const inPlace = [
    "env",
    "-i",
    ...environmentOf(pid).filter((pair) => NEEDED.test(pair)),
    "chroot",
    rootOf(pid) ?? "/",
  ];
  const { code, output } = await runCommand([...inPlace, "sh", "-c", RUN, "sh", "--quiet", ...args], {
    timeoutMs: 60_000,
  });
  if (code !== 0) throw new Error(`rabbitmqctl ${args.join(" ")} ended with ${code}: ${output}`);
  return output;
}
