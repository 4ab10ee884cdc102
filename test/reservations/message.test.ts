import { describe, expect, test } from "bun:test";
import {
  decodeHint,
  decodeMessage,
  encodeHint,
  encodeMessage,
  MAX_MESSAGE_RESERVATIONS,
} from "../../lib/reservations/message.ts";
import { newReservation, type Reservation } from "../../lib/reservations/reservation.ts";
import { refusalOf } from "../harness/refusal.ts";

const PLAIN = {
  reservation_id: "01890a5d-ac96-774b-bcce-b302099a8057",
  user_id: "TestUser01",
  point_amount: 100,
  idempotency_key: "order-42",
};

function reservations(count: number): Reservation[] {
  return Array.from({ length: count }, (_, index) =>
    newReservation({
      user_id: `user${index}`,
      point_amount: index + 1,
      execute_at: "2029-02-22T22:59:00+09:00",
      idempotency_key: String(index).padStart(100, "k"),
    }),
  );
}

function asMessages(list: readonly Reservation[]) {
  return list.map(({ id, userId, pointAmount, idempotencyKey }) => ({
    reservation_id: id,
    user_id: userId,
    point_amount: pointAmount,
    idempotency_key: idempotencyKey,
  }));
}

function bytes(value: unknown): Buffer {
  return Buffer.from(JSON.stringify(value));
}

function messageOf(content: Uint8Array): string {
  const { code, message } = refusalOf(() => decodeMessage(content));
  expect(code).toBe("UNREADABLE_MESSAGE");
  return message;
}

test("encodeMessage() writes the four fields: a plain object for one, an array in order for more", () => {
  const list = reservations(3);
  expect(encodeMessage(list.slice(0, 1)).toString()).toBe(JSON.stringify(asMessages(list)[0]));
  expect(encodeMessage(list).toString()).toBe(JSON.stringify(asMessages(list)));
});

describe("decodeMessage()", () => {
  test.each([1, 2, MAX_MESSAGE_RESERVATIONS])("reads what encodeMessage() writes for %d", (count) => {
    const list = reservations(count);
    expect(decodeMessage(encodeMessage(list))).toEqual(asMessages(list));
  });

  test("reads an array of one, and fields that it does not know", () => {
    expect(decodeMessage(bytes([{ ...PLAIN, more: 1 }]))).toMatchObject([PLAIN]);
  });

  test.each<[string, Uint8Array]>([
    ["nothing", new Uint8Array()],
    ["garbage bytes", new Uint8Array([0x00, 0xff, 0x17, 0x2a])],
    ["half a message", bytes(PLAIN).subarray(0, 40)],
    ["two objects", Buffer.concat([bytes(PLAIN), bytes(PLAIN)])],
    ["UTF-16", Buffer.from(JSON.stringify(PLAIN), "utf16le")],
    // Without a strict decoder the bad byte would become U+FFFD, and the message another one.
    ["invalid UTF-8", Buffer.from(bytes(PLAIN).toString().replace("order-42", "order-\xff"), "latin1")],
  ])("refuses %s", (_, content) => {
    expect(messageOf(content)).toBe(
      `Cannot read the message as it must be JSON in UTF-8: received ${content.byteLength} bytes of something else`,
    );
  });

  test.each<[string, unknown]>([
    ["null", null],
    ["an empty object", {}],
    ["an empty array", []],
    ["an array with one wrong item", [PLAIN, { ...PLAIN, user_id: 1 }]],
    ["no reservation_id", { ...PLAIN, reservation_id: undefined }],
    ["a reservation_id that is a number", { ...PLAIN, reservation_id: 1 }],
    ["a reservation_id that is too long", { ...PLAIN, reservation_id: `${PLAIN.reservation_id}0` }],
    ["a point_amount with a fraction", { ...PLAIN, point_amount: 1.5 }],
    ["no idempotency_key", { ...PLAIN, idempotency_key: null }],
    ["one more than the most", Array(MAX_MESSAGE_RESERVATIONS + 1).fill(PLAIN)],
  ])("refuses the wrong shape: %s", (_, value) => {
    expect(messageOf(bytes(value))).toStartWith(
      "Cannot read the message as it must be an object with reservation_id",
    );
  });

  test("refuses an id that is not a UUID", () => {
    for (const reservation_id of ["", "1", "x".repeat(36), "' or 1=1 --"]) {
      expect(messageOf(bytes([PLAIN, { ...PLAIN, reservation_id }]))).toBe(
        "Cannot read the message as it must carry UUIDs: reservation_id of item 1 is not one",
      );
    }
  });

  test("refuses more than 1 MiB, and reads exactly 1 MiB", () => {
    const mebibyte = 1024 * 1024;
    const full = Buffer.alloc(mebibyte, " ");
    bytes(PLAIN).copy(full);
    expect(decodeMessage(full)).toEqual([PLAIN]);
    expect(messageOf(Buffer.concat([full, Buffer.from(" ")]))).toBe(
      `Cannot read the message as it must not be larger than ${mebibyte} bytes: received ${mebibyte + 1}`,
    );
  });

  test("does not show the content, which nobody vouches for", () => {
    const secret = "s3cret";
    const contents = [
      { ...PLAIN, user_id: [secret] },
      { ...PLAIN, reservation_id: secret },
    ].map(bytes);
    for (const content of [Buffer.from(secret), ...contents]) {
      expect(messageOf(content)).not.toContain(secret);
    }
  });
});

test("decodeHint() reads what encodeHint() writes, to the millisecond, and nothing else", () => {
  const time = new Date("2029-02-22T13:59:00.123Z");
  expect(decodeHint(encodeHint(time))).toEqual(time);
  const long = `{"execute_at":"2029-02-22T13:59:00Z"}${" ".repeat(100)}`;
  const others = [
    "",
    "null",
    "[]",
    "{}",
    "{",
    '{"execute_at":1}',
    '{"execute_at":"2029-02-30T00:00:00Z"}',
    long,
  ];
  expect(others.filter((text) => decodeHint(Buffer.from(text)))).toEqual([]);
});
