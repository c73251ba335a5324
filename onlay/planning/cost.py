"""What a run costs: seconds, times GPUs, times a dated price.

Offers for the same card differ by a factor of three to five, so a cost is given as the cheapest and the dearest that are
known, and names where the cheapest was seen and when.
"""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass

from onlay.planning.devices import GpuGroup, Offer, OfferKind

KINDS: tuple[OfferKind, ...] = ("on-demand", "spot")
OLD_DAYS = 180
"""A price that is older says so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bill:
    """Of one kind of offer, on-demand or spot."""

    usd: float
    """At the cheapest offer."""
    most_usd: float
    """At the dearest."""
    usd_per_hour: float
    """Of all GPUs together, at the cheapest offer."""
    provider: str
    """Of the cheapest."""
    date: str
    """When it was seen, ISO 8601."""
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    gpu: str
    count: int
    seconds: float
    on_demand: Bill | None
    """None: no dated price is known."""
    spot: Bill | None
    notes: tuple[str, ...]
    """What is not known, and what is old."""

    @property
    def usd(self) -> float | None:
        """On demand, at the cheapest offer; None where no price is known."""
        return None if self.on_demand is None else self.on_demand.usd


def cost_of(seconds: float, *, group: GpuGroup, today: datetime.date | None = None) -> Cost:
    """The cost of holding the GPUs for `seconds`, on demand and spot.

    Only offers that can be had for that many GPUs count.  `today` (default: now) decides which prices are old.
    Raises ValueError for seconds that are negative or not finite.
    """
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"seconds = {seconds} is not a time")
    bills = {kind: _bill(seconds, group, kind) for kind in KINDS}
    missing = [kind for kind, bill in bills.items() if bill is None]
    notes = []
    if missing:
        notes.append(
            f"no dated {' or '.join(missing)} price of {group.name} is known; $ONLAY_HOME/gpus.yaml can give one"
        )
    for kind, bill in bills.items():
        if bill is not None:
            days = ((today or datetime.date.today()) - datetime.date.fromisoformat(bill.date)).days
            notes += [f"the {kind} price is {days} days old"] if days > OLD_DAYS else []
    return Cost(
        gpu=group.gpu.name, count=group.count, seconds=seconds, on_demand=bills["on-demand"], spot=bills["spot"],
        notes=tuple(notes),
    )  # fmt: skip


def _bill(seconds: float, group: GpuGroup, kind: OfferKind) -> Bill | None:
    offers = [offer for offer in group.gpu.offers if offer.kind == kind and offer.least_count <= group.count]
    if not offers:
        return None
    hours = seconds / 3600 * group.count

    def price(offer: Offer) -> float:
        return offer.usd_per_hour

    cheapest, dearest = min(offers, key=price), max(offers, key=price)
    return Bill(
        usd=hours * cheapest.usd_per_hour,
        most_usd=hours * dearest.usd_per_hour,
        usd_per_hour=group.count * cheapest.usd_per_hour,
        provider=cheapest.provider,
        date=cheapest.date.isoformat(),
        source=cheapest.source,
    )
