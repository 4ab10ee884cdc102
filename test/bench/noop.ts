/** The API without a database: the limit that reserving is measured against. Prints its URL. */
import { createApp } from "../../api.ts";
import type { Connection, Database } from "../../lib/database.ts";
import { listen } from "../../lib/http/listen.ts";
import { silent } from "../harness/harness.ts";

const connection = {
  execute: async (_sql: string, [rows]: [unknown[]]) => ({ affectedRows: rows.length }),
} as unknown as Connection;
const database = {
  run: (work: (connection: Connection) => unknown) => work(connection),
} as unknown as Database;
const app = createApp({ database, logger: silent, readiness: { unready: undefined } });
const { url } = listen({
  hostname: "127.0.0.1",
  port: 0,
  logger: silent,
  fetch: (request) => app.fetch(request),
});
console.log(url.href);
