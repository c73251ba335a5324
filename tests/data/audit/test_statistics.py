"""Distributions add up, whatever the numbers; outliers are the planted ones."""

from __future__ import annotations

import numpy as np
import pytest

from onlay.data.audit.statistics import distribution_of, length_distributions, length_outliers, short_answers
from onlay.data.rows import RowTable


def table_of(prompts: np.ndarray, answers: np.ndarray) -> RowTable:
    n = len(prompts)
    keys = np.arange(n, dtype=np.uint64)
    return RowTable(
        source=np.zeros(n, dtype=np.uint16), number=np.arange(1, n + 1), prompt_key=keys, loose_prompt_key=keys,
        answer_key=keys, row_key=keys, prompt_characters=prompts.astype(np.int32),
        answer_characters=answers.astype(np.int32), domain=np.full(n, -1, dtype=np.int32), domains=(),
    )  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [
        [5], [0, 0, 0], [1, 2, 3], list(range(500)), [0.1, 0.2, 0.95], [10] * 99 + [1_000_000], [0] * 99 + [1_000_000],
        [1e-9, 1e9], [3.5] * 10,
    ],
)  # fmt: skip
def test_every_number_is_in_a_bar(values: list[float]) -> None:
    found = distribution_of(np.array(values), name="n", unit="u")
    assert found is not None
    assert sum(found.counts) == found.count == len(values)
    assert len(found.edges) == len(found.counts) + 1
    assert found.edges == sorted(found.edges)
    assert found.edges[0] <= found.least <= found.p05 <= found.median <= found.p95 <= found.most <= found.edges[-1]
    assert found.mean == pytest.approx(np.mean(values))


def test_a_few_rows_far_out_do_not_put_the_others_into_one_bar() -> None:
    lengths = np.append(np.random.default_rng(0).integers(100, 400, 1000), [2_000_000])
    found = distribution_of(lengths, name="n", unit="u")
    assert found is not None
    assert sum(count > 0 for count in found.counts) > 3


def test_no_numbers_have_no_distribution() -> None:
    assert distribution_of(np.zeros(0), name="n", unit="u") is None
    assert length_distributions(table_of(np.zeros(0), np.zeros(0))) == []


def test_documents_have_no_answers() -> None:
    names = [one.name for one in length_distributions(table_of(np.array([10, 20]), np.zeros(2)))]
    assert names == ["prompt_characters"]


def test_outliers_are_the_planted_rows() -> None:
    rng = np.random.default_rng(1)
    prompts, answers = rng.integers(100, 300, 400), rng.integers(200, 500, 400)
    answers[[7, 300]] = 60_000
    answers[[11, 50]] = 2
    table = table_of(prompts, answers)
    assert length_outliers(table).tolist() == [7, 300]
    assert short_answers(table).tolist() == [11, 50]


def test_equal_lengths_and_few_rows_have_no_outliers() -> None:
    same = table_of(np.full(100, 50), np.append(np.full(99, 50), 70))
    assert not len(length_outliers(same))
    few = table_of(np.array([10, 10, 9000]), np.array([10, 10, 10]))
    assert not len(length_outliers(few))
