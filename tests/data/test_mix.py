"""How often rows train: exact totals, drawn by the seed from what the rows hold."""

from __future__ import annotations

import numpy as np
import pytest

from onlay.data.mix import balance, general_total, rank_rows, spread
from onlay.errors import DataError
from tests.data.tables import Made, singles, table_of


@pytest.mark.parametrize(("rows", "total"), [(10, 25), (10, 10), (10, 3), (1, 7), (7, 0), (1000, 1500)])
def test_totals_are_exact_and_no_row_is_used_twice_more_than_another(rows: int, total: int) -> None:
    times = spread(rank_rows(table_of(singles(rows)), seed=1), total=total)
    assert times.sum() == total
    assert times.max() - times.min() <= 1


def test_what_is_drawn_hangs_on_the_rows_and_the_seed_alone() -> None:
    rows = singles(50)
    times = spread(rank_rows(table_of(rows), seed=1), total=75)
    order = np.random.default_rng(0).permutation(50)
    assert (spread(rank_rows(table_of([rows[i] for i in order]), seed=1), total=75) == times[order]).all()
    assert (spread(rank_rows(table_of(rows), seed=2), total=75) != times).any()


def test_draws_are_even() -> None:
    """Every row is drawn about equally often over seeds: 200 seeds, half of the rows each."""
    rows = table_of(singles(40))
    drawn = sum(spread(rank_rows(rows, seed=seed), total=20) for seed in range(200))
    assert abs(drawn - 100).max() < 40, "six standard deviations of a fair draw"


@pytest.mark.parametrize(("train", "share"), [(95, 0.05), (1000, 0.1), (7, 0.5), (3, 0.05)])
def test_the_share_is_of_the_result(train: int, share: float) -> None:
    total = general_total(train, share=share)
    assert total >= 1
    assert total == 1 or abs(total / (train + total) - share) <= 0.5 / (train + total) + 1e-9


def balanced(counts: dict[str | None, int], how: str, cap: float | None = None) -> dict[str | None, int]:
    rows = [Made(f"{name} {i}", domain=name) for name, count in counts.items() for i in range(count)]
    table = table_of(rows)
    goes = balance(table, np.ones(len(rows), bool), rank_rows(table, seed=0), how=how, domain_cap=cap)
    left: dict[str | None, int] = dict.fromkeys(counts, 0)
    for row, gone in zip(rows, goes, strict=True):
        left[row.domain] += not gone
    return left


def test_equal_domains() -> None:
    assert balanced({"a": 50, "b": 20, "c": 30}, "equal") == {"a": 20, "b": 20, "c": 20}
    assert balanced({"a": 50, None: 20}, "equal") == {"a": 20, None: 20}, "rows without a domain are one together"


@pytest.mark.parametrize("cap", [0.34, 0.4, 0.5, 0.7, 0.99])
@pytest.mark.parametrize(
    "counts", [{"a": 100, "b": 10, "c": 10}, {"a": 100, "b": 100, "c": 3}, {"a": 10, "b": 11, "c": 12, "d": 2}]
)
def test_no_domain_has_more_than_the_cap_and_no_row_goes_for_nothing(counts: dict[str | None, int], cap: float) -> None:
    left = balanced(counts, "cap", cap)
    most = max(left.values())
    assert most <= cap * sum(left.values()) + 1e-9 or most == min(counts.values())
    assert all(left[name] == min(count, most) for name, count in counts.items())
    more = {name: min(count, most + 1) for name, count in counts.items()}
    assert more == left or max(more.values()) > cap * sum(more.values()), "one more row of each would still fit"


def test_a_cap_that_cannot_hold_is_refused() -> None:
    with pytest.raises(DataError, match="the rows have 2 domains") as caught:
        balanced({"a": 5, "b": 5}, "cap", 0.3)
    assert "0.5 or more" in caught.value.remedy
    with pytest.raises(DataError, match="no training row has a domain"):
        balanced({None: 5}, "equal")
