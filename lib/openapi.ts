import { type TNever, type TObject, type TSchema, type TUnknown, Type } from "@sinclair/typebox";
import { Problem } from "./answers.ts";
import { titleOf } from "./http.ts";
import { IdempotencyKey } from "./input.ts";

/** A request that can be sent as it stands, and the body of its answer. */
export interface Example {
  params?: Record<string, string>;
  query?: Record<string, string | number>;
  headers?: Record<string, string>;
  body?: unknown;
  answer: unknown;
}

/** One answer of a route: its schema and requests that get it. */
export interface Answer<Schema extends TSchema = TSchema> {
  schema: Schema;
  description: string;
  /** What its headers say, by name. */
  headers?: Record<string, string>;
  examples: Record<string, Example>;
  /** The media type in which the same comes as text, where the header Accept prefers it. */
  alsoAs?: string;
}

/** Describes an answer. A request and its answer have one name, as OpenAPI wants it. */
export function answer<Schema extends TSchema>(
  schema: Schema,
  description: string,
  examples: Record<string, Example> = {},
): Answer<Schema> {
  return { schema, description, examples };
}

/** One way a route refuses a request. */
export interface Refusal<Schema extends TSchema = TSchema> extends Omit<Answer<Schema>, "examples"> {
  examples: Record<string, RefusedExample>;
}

export interface RefusedExample extends Omit<Example, "answer"> {
  /** The sentences by which a client can tell one problem from another. */
  errors: string[];
  detail: string;
  /** What the problem says beyond RFC 9457. */
  facts?: object;
}

/** Describes a problem that a route answers with. */
export function refusal(
  description: string,
  examples: Record<string, RefusedExample> = {},
): Refusal<typeof Problem> {
  return { schema: Problem, description, examples };
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
  /** Whether the header `Idempotency-Key` counts. */
  takesKey?: boolean;
  answers: Answers;
  refusals: Refusals;
}

const KEY_HEADER = Type.Object({ "idempotency-key": Type.Optional(IdempotencyKey) });

/**
 * Makes of one description what OpenAPI shows and what the types of a client are. At run time the domain checks what
 * comes in, since it has a sentence for each rule: the same schemas are its rules.
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
  // Elysia would check by itself, in sentences of its own, what it is given here. Without any schema of a path's
  // parameters its plugin would put bare names in the place of all parameters.
  return { parse: "none", detail, ...(params && { params: Type.Any() }) } as unknown as {
    detail: object;
    params: Params;
    query: Query;
    // A body of `never` would be demanded of every client.
    body: [Body] extends [never] ? TUnknown : Body;
    response: SchemasOf<Answers> & SchemasOf<Refusals> & Omit<NeverAnswered, keyof Answers | keyof Refusals>;
  };
}

/** What a client would be told otherwise: the handler's `Response` as a 200, and Elysia's own validation as a 422. */
type NeverAnswered = { 200: TNever; 422: TNever };

type SchemasOf<Answers> = {
  [Status in keyof Answers]: Answers[Status] extends { schema: infer Schema } ? Schema : never;
};

/** Refusals as the answers that they are. */
function problemsOf(refusals: Record<number, Refusal>): Record<number, Answer> {
  return Object.fromEntries(
    Object.entries(refusals).map(([status, { examples, ...refusal }]) => {
      const answered = Object.entries(examples).map(([name, { errors, detail, facts, ...request }]) => {
        const problem = { type: "about:blank", title: titleOf(Number(status)), status: Number(status) };
        return [name, { ...request, answer: { ...problem, detail, errors, ...facts } }];
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

/** Named values as OpenAPI lists them; undefined where there are none. */
function valuesOf(examples: readonly NamedExample[], pick: (example: Example) => unknown) {
  const shown = examples
    .map(([name, example]) => [name, pick(example)] as const)
    .filter(([, value]) => value !== undefined);
  return shown.length > 0 ? Object.fromEntries(shown.map(([name, value]) => [name, { value }])) : undefined;
}
