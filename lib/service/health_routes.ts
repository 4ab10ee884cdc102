import { Elysia } from "elysia";
import type { Database } from "../database.ts";
import { answer, describe, Messages, refusal } from "../http/describe.ts";
import { isReadyInTime, notReady } from "./health.ts";
import { pingDatabase } from "./wait_for_database.ts";

/** `GET /`, `GET /health` and `GET /ready`. */
export function healthRoutes({ database }: { database: Database }) {
  return new Elysia()
    .get("/", ok, HEALTH)
    .get("/health", ok, HEALTH)
    .get(
      "/ready",
      async () => ((await isReadyInTime(() => pingDatabase(database).then(() => true))) ? ok() : notReady()),
      READY,
    );
}

function ok(): Response {
  return Response.json({ messages: ["ok"] });
}

const HEALTH = describe({
  summary: "Check that the process runs",
  description: "Answers as long as the process runs, even if MySQL is unavailable.",
  answers: { 200: answer(Messages, "The process runs", { alive: { answer: { messages: ["ok"] } } }) },
  refusals: {},
});

const READY = describe({
  summary: "Check that the process can serve requests",
  description: "Waits at most 2 seconds for an answer from MySQL.",
  answers: { 200: answer(Messages, "MySQL answers", { ready: { answer: { messages: ["ok"] } } }) },
  refusals: { 503: refusal("MySQL does not answer") },
});
