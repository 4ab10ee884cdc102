import { describe, expect, test } from "bun:test";
import { DomainError } from "../lib/errors.ts";
import {
  decodeHint,
  decodeMessage,
  encodeHint,
  encodeMessage,
  MAX_MESSAGE_RESERVATIONS,
} from "../lib/message.ts";
import { newReservation, type Reservation } from "../lib/reservation.ts";

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

function refusalOf(content: Uint8Array): string {
  try {
    decodeMessage(content);
  } catch (error) {
    expect(error).toBeInstanceOf(DomainError);
    expect((error as DomainError).code).toBe("UNREADABLE_MESSAGE");
    return (error as DomainError).message;
  }
  throw new Error("It was read");
}

describe("encodeMessage()", () => {
  test("writes a plain object for one reservation", () => {
    const list = reservations(1);
    const [only] = asMessages(list);
    expect(JSON.parse(encodeMessage(list).toString())).toEqual(only);
  });

  test("writes an array for more, in their order", () => {
    const list = reservations(3);
    expect(JSON.parse(encodeMessage(list).toString())).toEqual(asMessages(list));
  });

  test("writes the four fields only", () => {
    const [one] = reservations(1);
    if (!one) throw new Error("no reservation");
    expect(Object.keys(JSON.parse(encodeMessage([one]).toString()))).toEqual([
      "reservation_id",
      "user_id",
      "point_amount",
      "idempotency_key",
    ]);
  });
});

describe("decodeMessage() reads", () => {
  test.each([[1], [2], [500], [MAX_MESSAGE_RESERVATIONS]])(
    "what encodeMessage() wrote for %d, with the longest keys",
    (count) => {
      const list = reservations(count);
      expect(decodeMessage(encodeMessage(list))).toEqual(asMessages(list));
    },
  );

  test("an array of one", () => {
    expect(decodeMessage(bytes([PLAIN]))).toEqual([PLAIN]);
  });
});

describe("decodeMessage() refuses", () => {
  test.each<[string, Uint8Array]>([
    ["nothing", new Uint8Array()],
    ["garbage bytes", new Uint8Array([0x00, 0xff, 0x17, 0x2a])],
    ["half a message", bytes(PLAIN).subarray(0, 40)],
    ["text", Buffer.from("hello")],
    ["two objects", Buffer.concat([bytes(PLAIN), bytes(PLAIN)])],
    ["UTF-16", Buffer.from(JSON.stringify(PLAIN), "utf16le")],
    // Without a strict decoder the bad byte would become U+FFFD, and the message another one.
    [
      "invalid UTF-8 within a string",
      Buffer.from(bytes(PLAIN).toString().replace("order-42", "order-\xff"), "latin1"),
    ],
  ])("%s", (_, content) => {
    expect(refusalOf(content)).toBe(
      `Cannot read the message as it must be JSON in UTF-8: received ${content.byteLength} bytes that are not`,
    );
  });

  test.each<[string, unknown]>([
    ["null", null],
    ["a number", 1],
    ["a string", "01890a5d-ac96-774b-bcce-b302099a8057"],
    ["an empty object", {}],
    ["an empty array", []],
    ["an array in an array", [[PLAIN]]],
    ["an array with one wrong item", [PLAIN, { ...PLAIN, user_id: 1 }]],
    ["no reservation_id", { ...PLAIN, reservation_id: undefined }],
    ["a reservation_id that is a number", { ...PLAIN, reservation_id: 1 }],
    ["a reservation_id that is too long", { ...PLAIN, reservation_id: `${PLAIN.reservation_id}0` }],
    ["no user_id", { ...PLAIN, user_id: undefined }],
    ["a point_amount with a fraction", { ...PLAIN, point_amount: 1.5 }],
    ["a point_amount that is a string", { ...PLAIN, point_amount: "100" }],
    ["no idempotency_key", { ...PLAIN, idempotency_key: null }],
    ["one more than the most", Array.from({ length: MAX_MESSAGE_RESERVATIONS + 1 }, () => PLAIN)],
  ])("the wrong shape: %s", (_, value) => {
    expect(refusalOf(bytes(value))).toStartWith(
      "Cannot read the message as it must be an object with reservation_id",
    );
  });

  test.each([[""], ["1"], ["x".repeat(36)], ["' or 1=1 --"]])(
    "an id that is no UUID: %p",
    (reservation_id) => {
      expect(refusalOf(bytes([PLAIN, { ...PLAIN, reservation_id }]))).toBe(
        "Cannot read the message as it must carry UUIDs: reservation_id of item 1 is none",
      );
    },
  );

  test("more than 1 MiB, and takes exactly 1 MiB", () => {
    const mebibyte = 1024 * 1024;
    const padding = mebibyte - bytes(PLAIN).byteLength;
    const full = Buffer.concat([bytes(PLAIN), Buffer.alloc(padding, " ")]);
    expect(decodeMessage(full)).toEqual([PLAIN]);
    expect(refusalOf(Buffer.concat([full, Buffer.from(" ")]))).toBe(
      `Cannot read the message as it must not be larger than ${mebibyte} bytes: received ${mebibyte + 1}`,
    );
  });

  test("without showing the content, which nobody vouches for", () => {
    const secret = "s3cret";
    expect(refusalOf(Buffer.from(secret))).not.toContain(secret);
    expect(refusalOf(bytes({ ...PLAIN, user_id: [secret] }))).not.toContain(secret);
    expect(refusalOf(bytes({ ...PLAIN, reservation_id: secret }))).not.toContain(secret);
  });
});

describe("decodeHint()", () => {
  test("reads what encodeHint() writes, to the millisecond", () => {
    const time = new Date("2029-02-22T13:59:00.123Z");
    expect(decodeHint(encodeHint(time))).toEqual(time);
  });

  test.each([
    [""],
    ["null"],
    ["[]"],
    ["{}"],
    ["{"],
    ['{"execute_at":1}'],
    ['{"execute_at":"2029-02-30T00:00:00Z"}'],
    [`{"execute_at":"2029-02-22T13:59:00Z"}${" ".repeat(100)}`],
  ])("takes %j for none", (text) => {
    expect(decodeHint(Buffer.from(text))).toBeUndefined();
  });
});
