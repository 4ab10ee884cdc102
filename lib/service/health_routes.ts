import { Elysia } from "elysia";
import { answer, describe, Messages, refusal } from "../http/describe.ts";
import { answerOk, answerReady } from "./health.ts";
import type { Readiness } from "./readiness.ts";

/** `GET /`, `GET /health` and `GET /ready`. */
export function healthRoutes({ readiness }: { readiness: Readiness }) {
  return new Elysia()
    .get("/", answerOk, HEALTH)
    .get("/health", answerOk, HEALTH)
    .get("/ready", () => answerReady(readiness), READY);
}

const HEALTH = describe({
  summary: "Check that the process runs",
  description: "Answers as long as the process runs, even if MySQL is unavailable.",
  answers: { 200: answer(Messages, "The process runs", { alive: { answer: { messages: ["ok"] } } }) },
  refusals: {},
});

const READY = describe({
  summary: "Check that the process can serve requests",
  description:
    "Every second, the process tries whether MySQL takes the writes that requests need, and a commit. It is ready if that has succeeded within the last 4 seconds, and if it is not stopping.",
  answers: { 200: answer(Messages, "The process is ready", { ready: { answer: { messages: ["ok"] } } }) },
  refusals: {
    503: {
      ...refusal("It is not ready; `detail` has the reason, and since when"),
      headers: { "Retry-After": "seconds to wait" },
    },
  },
});
