/** Preloaded into a process: shifts its clock by `CLOCK_OFF_MS`, which may be negative. */
const offMs = Number(Bun.env.CLOCK_OFF_MS ?? 0);
const RealDate = Date;

class OffDate extends RealDate {
  constructor(...args: unknown[]) {
    if (args.length === 0) super(RealDate.now() + offMs);
    else super(...(args as [number]));
  }

  static override now(): number {
    return RealDate.now() + offMs;
  }
}
globalThis.Date = OffDate as DateConstructor;

export {};
