import { afterAll, describe, expect, test } from "bun:test";
import { validate } from "uuid";
import { openTestDatabase } from "../harness/database.ts";
import { uniqueName } from "../harness/harness.ts";
import { startService } from "../harness/processes.ts";
import { appOn, bodyOf, expectProblem, post, type Send } from "../http/client.ts";

const db = await openTestDatabase();
const app = appOn(db.database);
const api = await startService("api", { DATABASE_URL: db.url });
afterAll(() => api.kill("SIGKILL"));
const sendToProcess: Send = (path, init) => fetch(`${api.url}${path}`, init);

async function reserve(fields: Record<string, unknown>, send = app.send) {
  const response = await send("/point/reserve", post(bodyOf(fields)));
  const { status, headers } = response;
  const [replayed, location] = [headers.get("idempotent-replayed"), headers.get("location")];
  return { status, replayed, location, body: (await response.json()) as Record<string, string> };
}

describe("POST /point/reserve", () => {
  test("answers 201 with id, status and UTC time, and the URL of the details; the row is committed", async () => {
    const key = uniqueName("key");
    const { body, ...rest } = await reserve({ idempotency_key: key });
    const id = body.reservation_id;
    expect(validate(id)).toBe(true);
    expect(rest).toEqual({ status: 201, replayed: null, location: `/point/reservations/${id}` });
    const time = "2029-02-22T13:59:00.000Z";
    expect(body).toEqual({ reservation_id: expect.any(String), status: "PENDING", execute_at: time });
    const rows = await db.query(
      `select user_id, point_amount, status, idempotency_key, cast(execute_at as char) at, cast(scan_at as char) scan
       from point_reservations where id = ?`,
      [id],
    );
    const utc = "2029-02-22 13:59:00.000";
    const content = { user_id: "TestUser01", point_amount: 100, idempotency_key: key };
    expect(rows).toEqual([{ ...content, status: "PENDING", at: utc, scan: utc }]);
  });

  test("answers the same key and content with the first answer, whatever has happened since", async () => {
    const fields = { idempotency_key: uniqueName("key") };
    const first = await reserve(fields);
    for (const status of ["PENDING", "PROCESSING", "DONE"]) {
      await db.query(
        "update point_reservations set status = ?, scan_at = if(status = 'DONE', null, scan_at) where id = ?",
        [status, first.body.reservation_id],
      );
      const again = await reserve({ ...fields, execute_at: "2029-02-22T13:59:00Z" });
      expect(again).toEqual({ ...first, replayed: "true" });
    }
  });

  test("answers the same key with other content with 422, and then the first with the first answer (fault 3)", async () => {
    const fields = { idempotency_key: uniqueName("key") };
    const first = await reserve(fields);
    const init = post(bodyOf({ ...fields, point_amount: 101 }));
    await expectProblem(await app.send("/point/reserve", init), 422, [
      "idempotency key is used with other content",
    ]);
    expect(await reserve(fields)).toEqual({ ...first, replayed: "true" });
  });

  test("makes one reservation of ten requests with one key, at once to two processes (fault 2)", async () => {
    const fields = { idempotency_key: uniqueName("key") };
    const answers = await Promise.all(
      Array.from({ length: 10 }, (_, index) => reserve(fields, index % 2 ? app.send : sendToProcess)),
    );
    const [{ body, location } = {}] = answers;
    expect(answers.map(({ replayed }) => replayed).toSorted()).toEqual([null, ...Array(9).fill("true")]);
    for (const answer of answers) expect(answer).toMatchObject({ status: 201, body, location } as object);
  });

  test("makes one reservation of each request without a key, 1,000 at once", async () => {
    const amounts = Array.from({ length: 1_000 }, (_, index) => index + 1);
    const answers = await Promise.all(
      amounts.map(async (point_amount) => {
        const { body } = await reserve({ user_id: "Many", point_amount }, sendToProcess);
        return { id: body.reservation_id, point_amount };
      }),
    );
    const rows = await db.query<{ id: string }>(
      "select id, point_amount from point_reservations where user_id = 'Many' order by point_amount",
    );
    expect(rows).toEqual(answers as never);
  }, 20_000);
});
