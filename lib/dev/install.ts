/** Installs MySQL and RabbitMQ with apt-get, without starting a service of the machine. */
import { existsSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { findMysqld, findRabbitmq } from "./binaries.ts";
import type { ServicesOptions } from "./clone.ts";
import { withLock } from "./lock.ts";
import { type CommandResult, runCommand, whileSaying } from "./processes.ts";
import { findServerBinaries } from "./servers.ts";

const APT_WITHIN_MS = 5 * 60_000;
const POLICY_FILE = "/usr/sbin/policy-rc.d";
const POLICY =
  "#!/bin/sh\n# pointservice: no service starts while `bun run services` installs packages\nexit 101\n";

/** Whether servers are missing, or a killed run has left its policy file, which must be removed after apt-get. */
export function mustInstall(): boolean {
  return !findServerBinaries() || (process.getuid?.() === 0 && isOurPolicy());
}

/** Installs missing servers, as root on Debian or Ubuntu, without starting a service of the machine. */
export async function install({ say, signal }: ServicesOptions): Promise<void> {
  const missing = [findMysqld() ? "" : "mysqld or mariadbd", findRabbitmq() ? "" : "rabbitmq-server"];
  if (process.getuid?.() !== 0 || !Bun.which("apt-get")) {
    throw new Error(`No DATABASE_URL and AMQP_URL, no Docker engine with the compose plugin, and no ${missing.filter(Boolean).join(", no ")} on this machine. One of these helps:
  - set DATABASE_URL=mysql://user:password@host:3306/database and AMQP_URL=amqp://user:password@host:5672
  - start Docker
  - install mysqld or mariadbd, and rabbitmq-server (as root on Debian or Ubuntu, this command installs them; on macOS: brew install mariadb rabbitmq)`);
  }
  say("no Docker engine, and not both servers on this machine: installing MariaDB and RabbitMQ with apt-get");
  // One run at a time on the whole machine: otherwise one run could remove the policy file that another still needs.
  await withLock(
    "/run/pointservice-install.sqlite",
    async () => {
      if (mustInstall()) await installPackages({ say, signal });
    },
    {
      say,
      signal,
      waiting: "waiting for another run that installs them",
      deadlineMs: 2 * APT_WITHIN_MS,
    },
  );
  if (!findServerBinaries())
    throw new Error("apt-get has finished, but mysqld or rabbitmq-server is still missing");
}

/**
 * Installs one package that has no service, as root on Debian or Ubuntu.
 *
 * @returns whether it could
 */
export async function installPackage(name: string, { say, signal }: ServicesOptions): Promise<boolean> {
  if (process.getuid?.() !== 0 || !Bun.which("apt-get")) return false;
  say(`apt-get install ${name}`);
  const apt = openApt(signal);
  const installIt = () => apt(["install", "--no-install-recommends", name]);
  if ((await installIt()).code === 0) return true;
  // Without package lists apt-get knows no package.
  await apt(["update"]);
  return (await installIt()).code === 0;
}

/** Runs apt-get; waits while another program holds its lock, for a few minutes in all. */
function openApt(signal: AbortSignal | undefined) {
  const giveUpAt = Date.now() + APT_WITHIN_MS;
  return async (args: string[]): Promise<CommandResult> => {
    const command = [
      "apt-get",
      "-y",
      "-q",
      "-o",
      "DPkg::Lock::Timeout=60",
      "-o",
      "Acquire::Retries=3",
      ...args,
    ];
    const env = { ...process.env, DEBIAN_FRONTEND: "noninteractive", LC_ALL: "C" };
    for (;;) {
      // On SIGINT apt-get finishes the current package: if killed, it would leave a half-installed one.
      const result = await runCommand(command, { env, signal, abortWith: "SIGINT" });
      signal?.throwIfAborted();
      const locked = /could not get lock|unable to (lock|acquire)/i.test(result.output);
      if (result.code === 0 || !locked || Date.now() > giveUpAt) return result;
      await sleep(2_000);
    }
  };
}

async function installPackages({ say, signal }: ServicesOptions): Promise<void> {
  const apt = openApt(signal);
  const updated = await whileSaying("still updating the package lists", say, () => apt(["update"]));
  const packages: string[] = [];
  if (!findMysqld()) packages.push(...(await mysqlPackages()));
  const newRabbitmq = !findRabbitmq();
  if (newRabbitmq) packages.push("rabbitmq-server");
  say(["apt-get install", ...packages].join(" "));

  const ours = writePolicy();
  try {
    const done = await whileSaying("still installing", say, () =>
      apt(["install", "--no-install-recommends", ...packages]),
    );
    if (done.code !== 0) {
      const output = updated.code === 0 ? done.output : `${updated.output}\n${done.output}`;
      throw new Error(`apt-get install failed:\n${output.trim().split("\n").slice(-20).join("\n")}`);
    }
  } finally {
    if (ours) rmSync(POLICY_FILE, { force: true });
  }
  // The package has enabled its service, which would start at the next boot.
  if (newRabbitmq && Bun.which("systemctl")) await runCommand(["systemctl", "disable", "rabbitmq-server"]);
}

/** The server without its service, and the tools that `mariadb-install-db` needs; older releases have the version in the name. */
async function mysqlPackages(): Promise<string[]> {
  for (const version of ["", "-10.6", "-10.5"]) {
    const packages = [`mariadb-server-core${version}`, `mariadb-client-core${version}`];
    if ((await runCommand(["apt-cache", "madison", ...packages])).stdout.trim() !== "") return packages;
  }
  return ["mysql-server-core"];
}

/** Prevents packages from starting their services (see invoke-rc.d(8)). @returns whether this run must remove the file */
function writePolicy(): boolean {
  try {
    writeFileSync(POLICY_FILE, POLICY, { flag: "wx", mode: 0o755 });
    return true;
  } catch {
    return isOurPolicy();
  }
}

function isOurPolicy(): boolean {
  return existsSync(POLICY_FILE) && readFileSync(POLICY_FILE, "utf8") === POLICY;
}
