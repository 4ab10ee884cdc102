/** The recipe of a private server. */

/** The folder of a server, and the function that receives its messages. */
export interface ServerOptions {
  folder: string;
  say: (line: string) => void;
  /** Variables of MySQL's environment, in addition to the usual ones. Read at each start. */
  mysqlEnv?: Record<string, string> | undefined;
}

/** The differences between the two servers. */
export interface Recipe {
  name: "MySQL" | "RabbitMQ";
  portCount: number;
  /** Matches the command line of the main process. */
  main: RegExp;
  url(port: number): string;
  answers(port: number): Promise<boolean>;
  /** Makes the data folder if necessary, and returns the command that starts the server. */
  prepare(
    ports: number[],
    signal?: AbortSignal,
  ): Promise<{ command: string[]; env?: Record<string, string> }>;
}
