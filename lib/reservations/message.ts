import { type Static, Type } from "@sinclair/typebox";
import { TypeCompiler } from "@sinclair/typebox/compiler";
import { validate as validateUuid } from "uuid";
import { DomainError } from "../errors.ts";
import { timeField } from "../field.ts";
import type { Reservation } from "./reservation.ts";

/** The maximum number of reservations in one message. */
export const MAX_MESSAGE_RESERVATIONS = 1_000;
/** The maximum size of a message in bytes: 1,000 reservations with the longest keys take about a quarter of it. */
const MAX_MESSAGE_BYTES = 1024 * 1024;

const MAX_HINT_BYTES = 100;

/** One reservation in a message. The row of `reservation_id` decides all; `user_id` only tells whether its grant can wait. */
const ReservationMessage = Type.Object({
  reservation_id: Type.String({ maxLength: 36 }),
  user_id: Type.String(),
  point_amount: Type.Integer(),
  idempotency_key: Type.String(),
});
export type ReservationMessage = Static<typeof ReservationMessage>;

const Message = TypeCompiler.Compile(
  Type.Union([
    ReservationMessage,
    Type.Array(ReservationMessage, { minItems: 1, maxItems: MAX_MESSAGE_RESERVATIONS }),
  ]),
);

/** Encodes the message for some reservations: a plain object for one, an array for several. */
export function encodeMessage(
  reservations: readonly Pick<Reservation, "id" | "userId" | "pointAmount" | "idempotencyKey">[],
): Buffer {
  const messages: ReservationMessage[] = reservations.map((reservation) => ({
    reservation_id: reservation.id,
    user_id: reservation.userId,
    point_amount: reservation.pointAmount,
    idempotency_key: reservation.idempotencyKey,
  }));
  return Buffer.from(JSON.stringify(messages.length === 1 ? messages[0] : messages));
}

/**
 * Decodes a message from any sender.
 *
 * @throws {DomainError} UNREADABLE_MESSAGE, with the reason and without the content
 */
export function decodeMessage(content: Uint8Array): ReservationMessage[] {
  if (content.byteLength > MAX_MESSAGE_BYTES) {
    throw unreadable(`must not be larger than ${MAX_MESSAGE_BYTES} bytes: received ${content.byteLength}`);
  }
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(content));
  } catch {
    throw unreadable(`must be JSON in UTF-8: received ${content.byteLength} bytes of something else`);
  }
  if (!Message.Check(value)) {
    throw unreadable(
      `must be an object with reservation_id, user_id, point_amount and idempotency_key, or an array of 1 to ${MAX_MESSAGE_RESERVATIONS} of them`,
    );
  }
  const messages = Array.isArray(value) ? value : [value];
  const invalid = messages.findIndex((message) => !validateUuid(message.reservation_id));
  if (invalid >= 0) throw unreadable(`must carry UUIDs: reservation_id of item ${invalid} is not one`);
  return messages;
}

/** Encodes the hint that a reservation is due at a time. */
export function encodeHint(executeAt: Date): Buffer {
  return Buffer.from(JSON.stringify({ execute_at: executeAt.toISOString() }));
}

/** Decodes a hint from any sender; undefined if it is not valid. */
export function decodeHint(content: Buffer): Date | undefined {
  if (content.byteLength > MAX_HINT_BYTES) return undefined;
  try {
    const parsed = timeField.parse(JSON.parse(content.toString()).execute_at, "execute_at");
    return "value" in parsed ? parsed.value : undefined;
  } catch {
    return undefined;
  }
}

function unreadable(rule: string): DomainError {
  return new DomainError("UNREADABLE_MESSAGE", `Cannot read the message as it ${rule}`);
}
