/** What a server of ours is made from. */

/** Where a server lives, and who hears of it. */
export interface ServerOptions {
  folder: string;
  say: (line: string) => void;
}

/** What differs between the two servers. */
export interface Recipe {
  name: "MySQL" | "RabbitMQ";
  portCount: number;
  /** Matches the command line of the main process. */
  main: RegExp;
  url(port: number): string;
  answers(port: number): Promise<boolean>;
  /** Makes the data folder if need be, and says how to start the server on it. */
  prepare(
    ports: number[],
    signal?: AbortSignal,
  ): Promise<{ command: string[]; env?: Record<string, string> }>;
}
