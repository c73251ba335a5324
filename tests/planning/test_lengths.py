"""Lengths of rows, measured or declared, and how steps of them are cut."""

from __future__ import annotations

import pytest

from onlay.data.pack import plan_micro_batches
from onlay.planning.lengths import cut_steps, declared_lengths, equal_rows, measured_lengths


def pack(lengths: list[int], budget: int) -> list[list[int]]:
    return plan_micro_batches(lengths, budget_tokens=budget, packed=True)


@pytest.mark.parametrize(("rows", "mean"), [(5000, 300.0), (100, 40.0), (1, 1000.0), (7, 5.0)])
def test_declared_rows_have_their_number_and_mean(rows: int, mean: float) -> None:
    lengths = declared_lengths(rows, mean)
    assert lengths.rows == rows and min(lengths.counts) >= 1
    if rows >= 64:
        assert lengths.mean == pytest.approx(mean, rel=0.03)
        assert lengths.longest > 2 * mean


def test_no_row_is_longer_than_what_is_kept() -> None:
    assert declared_lengths(1000, 300, most_tokens=400).longest == 400
    found = measured_lengths([5, 0, 900, 20, 20], told="x", most_tokens=100)
    assert dict(found.counts) == {1: 1, 5: 1, 20: 2, 100: 1}
    assert (found.rows, found.tokens, found.mean) == (5, 146, 29.2)


def test_steps_hold_rows_as_they_are_and_the_same_each_time() -> None:
    few = measured_lengths(range(1, 11), told="x")
    steps = few.steps(rows_a_step=4)
    assert steps == few.steps(rows_a_step=4) and all(len(step) == 4 for step in steps)
    assert {length for step in steps for length in step} <= set(range(1, 11))
    assert len(equal_rows(3, 50).steps(rows_a_step=8)[0]) == 8  # An epoch's end runs on into the next.
    many = declared_lengths(100_000, 200).steps(rows_a_step=16)
    assert all(len(step) == 16 for step in many) and len(many) > 1


def test_a_step_is_cut_for_each_gpu() -> None:
    steps = [[100, 200, 300, 400]]
    [one] = cut_steps(steps, budget_tokens=600, gpus=1, pack=pack)
    assert sorted(batch.tokens for batch in one) == [400, 600]
    [shared] = cut_steps(steps, budget_tokens=600, gpus=2, pack=pack)
    assert [batch.tokens for batch in shared] == [400]
    [padded] = cut_steps(steps, budget_tokens=10_000, gpus=1, pack=pack, padded=True)
    assert [batch.tokens for batch in padded] == [1600]


def test_a_declared_mean_above_the_cut_says_so() -> None:
    cut = declared_lengths(100, 10_000, most_tokens=4096)
    assert cut.mean < 4096 and f"longer ones count as 4,096 tokens, which leaves {cut.mean:,.0f} on average" in cut.told
    assert "longer" not in declared_lengths(100, 300, most_tokens=4096).told
