"""What the past of a household adds up to at a point in time: the numbers of the raw table `tabular`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from instructue_feast.datasets.rfm import Float, Int, Ledger

# E = events, S = snapshots

_DAY = 86_400
CAMPAIGN_TYPES = ("Type A", "Type B", "Type C")


@dataclass(frozen=True, slots=True, kw_only=True)
class LineFacts:
    """Purchase lines: household number, second, and what each is worth to the sums. All `[E]`."""

    user: Int
    time: Int
    paid: Float
    saved: Float
    private: npt.NDArray[np.bool_]
    first_of_basket: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignFacts:
    """Campaigns received or coupons redeemed: household number, second, type, and the second a campaign ends."""

    user: Int
    time: Int
    kind: npt.NDArray[np.object_]
    ends: Int

    def of(self, kind: str) -> CampaignFacts:
        """Those of one type."""
        mine = self.kind == kind
        return CampaignFacts(user=self.user[mine], time=self.time[mine], kind=self.kind[mine], ends=self.ends[mine])


def snapshot_numbers(
    user: Int,
    now: Int,
    lines: LineFacts,
    promoted: tuple[Int, Int],
    received: CampaignFacts,
    redeemed: CampaignFacts,
) -> dict[str, Float]:
    """Recency, frequency, spend and marketing figures of S (household, time) pairs; nothing at or after a time counts.

    Args:
        user: `[S]` household numbers.
        now: `[S]` seconds since the epoch.
        lines: Purchase lines.
        promoted: Household number and second of each line bought while promoted.
        received: Campaigns received.
        redeemed: Coupons redeemed.

    Returns:
        `[S]` numbers by column; NaN where there is nothing to divide by.
    """
    spend, savings = (Ledger.of(lines.user, lines.time, value) for value in (lines.paid, lines.saved))
    items, own_brand = Ledger.of(lines.user, lines.time), Ledger.of(lines.user, lines.time, lines.private.astype(float))
    visits = Ledger.of(lines.user[lines.first_of_basket], lines.time[lines.first_of_basket])
    offers, coupons, mail = Ledger.of(*promoted), Ledger.of(redeemed.user, redeemed.time), _ledger(received)
    total, baskets, bought = spend.before(user, now), visits.before(user, now), items.before(user, now)
    bought_90d, spend_90d, saved_90d = (one.before(user, now, 90) for one in (items, spend, savings))
    visits_90d, spend_180d, visits_180d = (
        visits.before(user, now, 90), spend.before(user, now, 180), visits.before(user, now, 180),
    )  # fmt: skip
    first, last = visits.first(user, now), visits.last(user, now)
    columns = {
        "recency_days": (now - last) / _DAY,
        "tenure_days": (now - first) / _DAY,
        "days_between_visits": _ratio((last - first) / _DAY, baskets - 1),
        "visits_14d": visits.before(user, now, 14),
        "visits_30d": visits.before(user, now, 30),
        "visits_90d": visits_90d,
        "visits_180d": visits_180d,
        "baskets_total": baskets,
        "visits_trend_30d": _ratio(3 * visits.before(user, now, 30), visits_90d),
        "visits_trend_90d": _ratio(visits_90d, visits_180d - visits_90d),
        "spend_30d": spend.before(user, now, 30),
        "spend_90d": spend_90d,
        "spend_180d": spend_180d,
        "spend_total": total,
        "spend_trend_30d": _ratio(3 * spend.before(user, now, 30), spend_90d),
        "spend_trend_90d": _ratio(spend_90d, spend_180d - spend_90d),
        "avg_basket": _ratio(total, baskets),
        "avg_basket_90d": _ratio(spend_90d, visits_90d),
        "lines_per_basket": _ratio(bought, baskets),
        "price_per_line": _ratio(total, bought),
        "discount_share": _ratio(savings.before(user, now), total + savings.before(user, now)),
        "discount_share_90d": _ratio(saved_90d, spend_90d + saved_90d),
        "private_share": _ratio(own_brand.before(user, now), bought),
        "private_share_90d": _ratio(own_brand.before(user, now, 90), bought_90d),
        "promoted_share": _ratio(offers.before(user, now), bought),
        "promoted_share_90d": _ratio(offers.before(user, now, 90), bought_90d),
        "redemptions_30d": coupons.before(user, now, 30),
        "redemptions_90d": coupons.before(user, now, 90),
        "redemptions_total": coupons.before(user, now),
        "campaigns_total": mail.before(user, now),
    }
    for kind in CAMPAIGN_TYPES:
        word = kind.lower().replace(" ", "_")
        own = received.of(kind)
        ended = Ledger.of(own.user, own.ends)
        columns[f"received_{word}"] = _ledger(own).before(user, now)
        columns[f"running_{word}"] = columns[f"received_{word}"] - ended.before(user, now)
        columns[f"redeemed_{word}"] = _ledger(redeemed.of(kind)).before(user, now)
    return columns


def _ledger(facts: CampaignFacts) -> Ledger:
    return Ledger.of(facts.user, facts.time)


def _ratio(above: Float, below: Float) -> Float:
    """NaN where there is nothing to divide by."""
    return np.asarray(np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0), np.float64)
