"""Seconds times GPUs times a dated price, and what is said where there is none."""

from __future__ import annotations

import datetime

import pytest

from onlay.planning.cost import cost_of
from onlay.planning.devices import Gpu, GpuGroup, Offer, find_gpu, read_gpus

TODAY = datetime.date(2026, 11, 22)


def offer(provider: str, usd: float, *, kind: str = "on-demand", day: datetime.date = TODAY, least: int = 1) -> Offer:
    return Offer.model_validate(
        {"provider": provider, "usd_per_hour": usd, "kind": kind, "date": day, "source": "here", "least_count": least}
    )


def group(*offers: Offer, count: int = 1) -> GpuGroup:
    gpu = Gpu.model_validate(
        {
            "name": "Card", "memory_mib": 8192, "compute_capability": (8, 0), "tflops": 100.0, "bandwidth_gb_s": 500.0,
            "class": "ampere", "offers": offers,
        }
    )  # fmt: skip
    return GpuGroup(gpu=gpu, count=count)


def test_the_cheapest_and_the_dearest_of_each_kind() -> None:
    offers = (offer("a", 3.0), offer("b", 2.0), offer("c", 5.0), offer("d", 1.0, kind="spot"))
    cost = cost_of(1800, group=group(*offers, count=4), today=TODAY)
    assert cost.on_demand is not None
    assert (cost.on_demand.usd, cost.on_demand.most_usd) == (4.0, 10.0)
    assert (cost.on_demand.provider, cost.on_demand.usd_per_hour, cost.on_demand.date) == ("b", 8.0, "2026-11-22")
    assert cost.spot is not None
    assert (cost.spot.usd, cost.spot.provider) == (2.0, "d")
    assert cost.usd == 4.0
    assert cost.notes == ()


def test_an_offer_for_eight_is_no_offer_for_one() -> None:
    offers = (offer("eight", 1.0, least=8), offer("one", 2.0))
    one, eight = (cost_of(3600, group=group(*offers, count=count), today=TODAY) for count in (1, 8))
    assert one.usd == 2.0
    assert eight.usd == 8.0
    assert one.on_demand is not None
    assert one.on_demand.most_usd == 2.0


def test_no_price_is_said_and_not_invented() -> None:
    cost = cost_of(3600, group=group(), today=TODAY)
    assert (cost.usd, cost.on_demand, cost.spot) == (None, None, None)
    assert cost.notes == ("no dated on-demand or spot price of Card is known; $ONLAY_HOME/gpus.yaml can give one",)


def test_an_old_price_says_so() -> None:
    cost = cost_of(60, group=group(offer("a", 1.0, day=datetime.date(2026, 1, 1))), today=TODAY)
    assert "the on-demand price is 325 days old" in cost.notes


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_what_is_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="is not a time"):
        cost_of(seconds, group=group())


def test_the_table_as_it_comes() -> None:
    cost = cost_of(3600, group=find_gpu("8xh200", gpus=read_gpus()), today=TODAY)
    assert cost.on_demand is not None
    assert cost.usd == pytest.approx(8 * 3.59)
    assert cost.on_demand.most_usd == pytest.approx(8 * 5.0)
