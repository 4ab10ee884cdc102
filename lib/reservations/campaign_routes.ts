import { type Static, Type } from "@sinclair/typebox";
import { Elysia } from "elysia";
import { limitConcurrency } from "../coalesce.ts";
import type { Database } from "../database.ts";
import { type DomainError, notFound } from "../errors.ts";
import { objectSchema } from "../field.ts";
import { answer, describe, refusal, refused, UNAVAILABLE } from "../http/describe.ts";
import { campaignField, parseCampaign } from "./reservation.ts";
import { type CampaignCounts, cancelCampaign } from "./reservation_repository.ts";

/** The maximum number of campaigns that are cancelled at once. */
const MAX_CAMPAIGNS = 2;
/** How long one request may cancel a campaign, in milliseconds: it must answer before clients time out. */
const CAMPAIGN_MS = 20_000;

/** `POST /point/campaigns/{campaign}/cancel`. */
export function campaignRoutes({ database }: { database: Database }) {
  const takeCampaign = limitConcurrency(MAX_CAMPAIGNS, "campaigns to cancel");
  return new Elysia().post(
    "/point/campaigns/:campaign/cancel",
    async ({ params }) => {
      const campaign = parseCampaign(params.campaign);
      const untilMs = performance.now() + CAMPAIGN_MS;
      const counts = await takeCampaign(() => cancelCampaign(database, campaign, { untilMs }));
      if (Object.values(counts).every((count) => count === 0)) throw unknownCampaign(campaign);
      return Response.json(cancelledOf(campaign, counts));
    },
    CANCEL_CAMPAIGN,
  );
}

const CampaignCancelled = Type.Object({
  campaign: campaignField.schema,
  cancelled: Type.Integer({ description: "reservations that are CANCELLED now" }),
  granted: Type.Integer({ description: "reservations that are DONE; they stay granted" }),
  failed: Type.Integer({ description: "reservations that are FAILED; only a retry can still grant them" }),
  open: Type.Integer({
    description: "reservations that are still PENDING or PROCESSING: send the same request again",
  }),
});

function cancelledOf(campaign: string, counts: CampaignCounts): Static<typeof CampaignCancelled> {
  return { campaign, ...counts };
}

function unknownCampaign(campaign: string): DomainError {
  return notFound("campaign not found", `no reservation has the campaign ${campaign}`);
}

const CANCEL_CAMPAIGN = describe({
  summary: "Cancel a campaign",
  description:
    "Cancels all open reservations of the campaign (PENDING or PROCESSING), 1,000 at a time, then counts all its reservations by state. It stops after 20 seconds: if `open` is not 0, send the same request again. A FAILED reservation stays FAILED. Reservations that are made during the request may be missed.",
  params: objectSchema({ campaign: campaignField }),
  answers: {
    200: answer(CampaignCancelled, "The number of reservations in each state", {
      "one of five was granted": {
        params: { campaign: "summer-2029" },
        answer: cancelledOf("summer-2029", { cancelled: 3, granted: 1, failed: 1, open: 0 }),
      },
    }),
  },
  refusals: {
    400: refusal("The campaign breaks a rule", {
      "a blank": refused({ params: { campaign: "summer 2029" } }, ({ params }) =>
        parseCampaign(params.campaign),
      ),
    }),
    404: refusal("No reservation has this campaign", {
      unknown: { params: { campaign: "winter-1999" }, error: unknownCampaign("winter-1999") },
    }),
    ...UNAVAILABLE,
  },
});
