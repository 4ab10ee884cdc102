import type { Entry } from "../harness/processes.ts";
import type { Reserved } from "./client.ts";
import type { Node } from "./node.ts";
import type { Random } from "./random.ts";
import type { World } from "./world.ts";

/** What a fault is given to strike with. */
export interface Strike {
  world: World;
  /** The process that it strikes, if it strikes one. */
  node: Node;
  /** How long it lasts, in milliseconds. */
  lastsMs: number;
  random: Random;
  /** What clients have reserved so far. */
  reservations: readonly Reserved[];
  /** Whether nothing else is broken meanwhile. */
  isAlone: boolean;
}

/** What the check must know of a fault that has struck. */
export interface Effect {
  /** The users and reservations that it holds. All others must be served in time while it lasts. */
  held?: readonly string[];
  /** How far MySQL's clock is ahead of this machine's while it lasts, in milliseconds; negative if behind. */
  clockOffMs?: number;
}

/** One kind of fault. */
export interface Kind {
  /** The processes that it may strike, one at a time; undefined if it strikes servers, the queue or rows. */
  entries?: readonly Entry[];
  /** Two faults on the same thing never overlap. `process`, `mysql`, `amqp` and `http` are the struck node's. */
  takes: "process" | "mysql" | "amqp" | "http" | "MySQL" | "RabbitMQ" | "queue" | "rows" | "snapshot";
  /** From … to, in milliseconds; `lease`: a little longer than the lease. */
  lasts: readonly [number, number] | "lease";
  /** How often it comes, compared with the others. Default: 2. */
  weight?: number;
  /** Whether it can lose a claim or a message, so that only the end of the lease brings a reservation again. */
  needsLease: boolean;
  /** Whether it needs a server whose clock can be set. */
  needsClock?: boolean;
  /**
   * Breaks something, and mends it before it resolves.
   *
   * @throws {Error} if it could not break anything
   */
  strike(strike: Strike): Promise<Effect> | Promise<void>;
}

/** Breaks something, and mends it when the fault's time is over. */
export function lasting(act: (isBroken: boolean, strike: Strike) => unknown): Kind["strike"] {
  return async (strike) => {
    try {
      await act(true, strike);
      await Bun.sleep(strike.lastsMs);
    } finally {
      await act(false, strike);
    }
  };
}
