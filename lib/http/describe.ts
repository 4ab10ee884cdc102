import { type TNever, type TObject, type TSchema, type TUnknown, Type } from "@sinclair/typebox";
import { DomainError, explain } from "../errors.ts";
import { idempotencyKeyField, objectSchema, optional } from "../field.ts";
import { titleOf } from "./problem.ts";

// The description of a route: for /openapi, and for the types of a client.

export const Time = Type.String({ format: "date-time", description: "RFC 3339 in UTC, with milliseconds" });
export const Uuid = Type.String({ format: "uuid" });
export const Messages = Type.Object({ messages: Type.Array(Type.String()) });

/** A value that may be null. */
export function orNull<T extends TSchema>(schema: T, description: string) {
  return Type.Union([schema, Type.Null()], { description });
}

export const NextCursor = orNull(
  Type.String(),
  "the value of `cursor` for the next page; null on the last page",
);

/** An error as RFC 9457 defines it. */
export const Problem = Type.Object({
  type: Type.String({ examples: ["about:blank"] }),
  title: Type.String(),
  status: Type.Integer({ description: "the HTTP status" }),
  detail: Type.String({ description: "for people: what failed, which rule and which value" }),
  errors: Type.Array(Type.String(), {
    description: "one sentence per broken rule; these sentences are stable",
  }),
  request_id: Type.Optional(Type.String({ description: "also in the log and in the header X-Request-Id" })),
});

/** A value that has the schema's type after it is written as JSON: times may be `Date`s. */
export type Outgoing<T> = T extends string
  ? string extends T
    ? T | Date
    : T
  : T extends object
    ? { [Field in keyof T]: Outgoing<T[Field]> }
    : T;

/** A complete request. */
export interface ExampleRequest {
  params?: Record<string, string>;
  query?: Record<string, string | number>;
  headers?: Record<string, string>;
  body?: unknown;
}

/** A request and the body of its answer. */
export interface Example extends ExampleRequest {
  answer: unknown;
}

/** One answer of a route: its schema, and examples of requests that get it. */
export interface Answer<Schema extends TSchema = TSchema> {
  schema: Schema;
  description: string;
  /** Descriptions of its headers, by name. */
  headers?: Record<string, string>;
  examples: Record<string, Example>;
  /** Another media type of the same answer, chosen by the header Accept. */
  alsoAs?: string;
}

/** Describes an answer. */
export function answer<Schema extends TSchema>(
  schema: Schema,
  description: string,
  examples: Record<string, Example> = {},
): Answer<Schema> {
  return { schema, description, examples };
}

/** A request that is refused, and the error that refuses it. */
export interface RefusedExample extends ExampleRequest {
  error: DomainError;
}

/** One refusal of a route. */
export interface Refusal<Schema extends TSchema = TSchema> extends Omit<Answer<Schema>, "examples"> {
  examples: Record<string, RefusedExample>;
}

/** Describes a problem that a route returns. */
export function refusal(
  description: string,
  examples?: Record<string, RefusedExample>,
): Refusal<typeof Problem>;
export function refusal<Schema extends TSchema>(
  description: string,
  examples: Record<string, RefusedExample>,
  schema: Schema,
): Refusal<Schema>;
export function refusal(
  description: string,
  examples: Record<string, RefusedExample> = {},
  schema: TSchema = Problem,
): Refusal {
  return { schema, description, examples };
}

/** An example of a refusal. Running the route's own rule on the request gives the error. */
export function refused<Request extends ExampleRequest>(
  request: Request,
  rule: (request: Request) => unknown,
): RefusedExample {
  try {
    rule(request);
  } catch (error) {
    if (error instanceof DomainError) return { ...request, error };
    throw error;
  }
  throw new Error(`An example breaks no rule: ${JSON.stringify(request)}`);
}

/** The refusals that any route may return. */
export const UNAVAILABLE = {
  500: {
    ...refusal("An unexpected error"),
    headers: { "X-Request-Id": "the id of the error in the log" },
  },
  503: {
    ...refusal(
      "MySQL does not answer, or too many requests are waiting. Send the same request again after the time in Retry-After; with an idempotency key it has no second effect",
    ),
    headers: { "Retry-After": "seconds to wait", "X-Request-Id": "the id of the error in the log" },
  },
};

/** The refusals of a body that is not JSON. */
export const NO_JSON = {
  408: refusal("The body did not arrive within 10 seconds"),
  415: refusal("The body is not application/json in UTF-8, or it is compressed"),
};

/** The refusals of a body. */
export const NO_BODY = { ...NO_JSON, 413: refusal("The body is larger than 64 KiB") };

/** The header of an answer to a request that was sent before. */
export const REPLAYED = {
  "Idempotent-Replayed": "`true` if the same request was sent before; otherwise left out",
};

/** The header that shows whether the same request was sent before. */
export function replayed(outcome: string): Record<string, string> {
  return outcome === "replayed" ? { "idempotent-replayed": "true" } : {};
}

export interface RouteDescription<
  Params extends TObject,
  Query extends TObject,
  Body extends TObject,
  Answers extends Record<number, Answer>,
  Refusals extends Record<number, Refusal>,
> {
  summary: string;
  description: string;
  params?: Params;
  query?: Query;
  body?: Body;
  /** Whether the route accepts the header `Idempotency-Key`. */
  takesKey?: boolean;
  answers: Answers;
  refusals: Refusals;
}

const KEY_HEADER = objectSchema({ "idempotency-key": optional(idempotencyKeyField) });

/**
 * Makes the description for OpenAPI and the types of a client. The routes parse their input themselves, since each rule of a
 * field has its own sentence; the description shows the schemas of the same fields.
 */
export function describe<
  Answers extends Record<number, Answer>,
  Refusals extends Record<number, Refusal>,
  Params extends TObject = TObject<Record<never, never>>,
  Query extends TObject = TObject<Record<never, never>>,
  Body extends TObject = never,
>(route: RouteDescription<Params, Query, Body, Answers, Refusals>) {
  const { summary, description, params, query, body, takesKey = false } = route;
  const answers = { ...route.answers, ...problemsOf(route.refusals) };
  const examples = Object.values(answers).flatMap((one) => Object.entries(one.examples));
  const parameters = [
    ...parametersOf("path", params, examples),
    ...parametersOf("query", query, examples),
    ...(takesKey ? parametersOf("header", KEY_HEADER, examples) : []),
  ];
  const bodies = valuesOf(examples, (one) => one.body);
  const detail = {
    summary,
    description,
    ...(parameters.length > 0 && { parameters }),
    ...(body && {
      requestBody: {
        required: true,
        content: { "application/json": { schema: body, ...(bodies && { examples: bodies }) } },
      },
    }),
    responses: Object.fromEntries(
      Object.entries(answers).map(([status, { schema, description, headers, examples, alsoAs }]) => {
        const type = Number(status) < 400 ? "application/json" : "application/problem+json";
        const shown = valuesOf(Object.entries(examples), (one) => one.answer);
        const content = {
          [type]: { schema, ...(shown && { examples: shown }) },
          ...(alsoAs && { [alsoAs]: { schema: { type: "string" } } }),
        };
        return [status, { description, ...(headers && { headers: headersOf(headers) }), content }];
      }),
    ),
  };
  // With these schemas, Elysia would validate with its own sentences. Without any schema of the path's parameters, its plugin
  // would replace all parameters by bare names.
  return { parse: "none", detail, ...(params && { params: Type.Any() }) } as unknown as {
    detail: object;
    params: Params;
    query: Query;
    // With a body of `never`, every client would have to send one.
    body: [Body] extends [never] ? TUnknown : Body;
    response: SchemasOf<Answers> & SchemasOf<Refusals> & Omit<NeverAnswered, keyof Answers | keyof Refusals>;
  };
}

/** What Elysia would add to a client's types: the handler's `Response` as a 200, and its own validation as a 422. */
type NeverAnswered = { 200: TNever; 422: TNever };

type SchemasOf<Answers> = {
  [Status in keyof Answers]: Answers[Status] extends { schema: infer Schema } ? Schema : never;
};

/** Refusals as answers. */
function problemsOf(refusals: Record<number, Refusal>): Record<number, Answer> {
  return Object.fromEntries(
    Object.entries(refusals).map(([status, { examples, ...refusal }]) => {
      const answered = Object.entries(examples).map(([name, { error, ...request }]) => {
        const errors = error.brokenRules.map(({ sentence }) => sentence);
        const problem = { type: "about:blank", title: titleOf(Number(status)), status: Number(status) };
        return [name, { ...request, answer: { ...problem, detail: explain(error), errors, ...error.facts } }];
      });
      return [status, { ...refusal, examples: Object.fromEntries(answered) }];
    }),
  );
}

function headersOf(headers: Record<string, string>) {
  return Object.fromEntries(
    Object.entries(headers).map(([name, description]) => [name, { description, schema: { type: "string" } }]),
  );
}

type NamedExample = readonly [name: string, example: Example];

function parametersOf(
  place: "path" | "query" | "header",
  schema: TObject | undefined,
  examples: NamedExample[],
) {
  const source = { path: "params", query: "query", header: "headers" } as const;
  return Object.entries(schema?.properties ?? {}).map(([name, property]) => {
    const shown = valuesOf(examples, (one) => one[source[place]]?.[name]);
    return {
      name: place === "header" ? "Idempotency-Key" : name,
      in: place,
      required: schema?.required?.includes(name) ?? false,
      ...(property.description && { description: property.description }),
      schema: property,
      ...(shown && { examples: shown }),
    };
  });
}

/** Named values as OpenAPI lists them; undefined if there are none. */
function valuesOf(examples: readonly NamedExample[], pick: (example: Example) => unknown) {
  const shown = examples
    .map(([name, example]) => [name, pick(example)] as const)
    .filter(([, value]) => value !== undefined);
  return shown.length > 0 ? Object.fromEntries(shown.map(([name, value]) => [name, { value }])) : undefined;
}
