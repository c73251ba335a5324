"""Distributions of lengths, and the rows that lie outside them."""

from __future__ import annotations

import numpy as np

from onlay.data.rows import RowTable
from onlay.records import Distribution

BARS = 40
SPREADS = 3.0
"""A row is an outlier when it lies this many times the middle half's width outside it, on a scale of ratios."""
LEAST_SPREAD = 0.35
"""In logarithms: where all rows are about equally long, one of twice the length is nothing to tell."""
LEAST_ROWS = 20
"""Fewer rows have no outliers: their quartiles say little."""


def distribution_of(values: np.ndarray, *, name: str, unit: str) -> Distribution | None:
    """Histogram and summary of N finite numbers; None where there are none.  Bars grow in width where lengths spread far."""
    if not len(values):
        return None
    numbers = np.asarray(values, dtype=np.float64)
    least, p05, median, p95, most = (float(value) for value in np.quantile(numbers, [0.0, 0.05, 0.5, 0.95, 1.0]))
    edges = _edges(least, p95, most, whole=bool((numbers == np.rint(numbers)).all()))
    counts, _ = np.histogram(numbers, edges)
    return Distribution(
        name=name, unit=unit, count=len(numbers), least=least, p05=p05, median=median, mean=float(numbers.mean()), p95=p95,
        most=most, edges=[float(edge) for edge in edges], counts=[int(count) for count in counts],
    )  # fmt: skip


def _edges(least: float, p95: float, most: float, *, whole: bool) -> np.ndarray:
    if most <= least:
        return np.array([least, least + 1.0])
    if most > 10 * max(p95, 1e-9) and least > 0:  # A few rows far out: equal bars would put all the others into one.
        edges = np.geomspace(least, most, BARS + 1)
        edges[0], edges[-1] = least, most  # As rounding may have moved them inwards.
        return edges
    if whole and most - least < BARS:
        return np.arange(least, most + 2.0)
    return np.linspace(least, most, BARS + 1)


def length_distributions(table: RowTable) -> list[Distribution]:
    """Of prompts and answers in characters, and of the answer's length beside its prompt's."""
    prompts, answers = table.prompt_characters, table.answer_characters
    asked = (prompts > 0) & (answers > 0)
    found = (
        distribution_of(prompts[prompts > 0], name="prompt_characters", unit="characters"),
        distribution_of(answers[answers > 0], name="answer_characters", unit="characters"),
        distribution_of(answers[asked] / prompts[asked], name="answer_to_prompt", unit="ratio"),
    )
    return [one for one in found if one is not None]


def length_outliers(table: RowTable) -> np.ndarray:
    """(K,) int64: rows far longer than the others; sorted."""
    length = table.prompt_characters.astype(np.int64) + table.answer_characters
    return _outside(np.log(np.maximum(length, 1)), above=True)


def short_answers(table: RowTable) -> np.ndarray:
    """(K,) int64: rows whose answer is far shorter, beside its prompt and by itself, than the others; sorted."""
    rows = np.flatnonzero((table.prompt_characters > 0) & (table.answer_characters > 0))
    answers = np.log(table.answer_characters[rows])
    ratio = answers - np.log(table.prompt_characters[rows])
    return np.asarray(rows[np.intersect1d(_outside(ratio, above=False), _outside(answers, above=False))])


def _outside(values: np.ndarray, *, above: bool) -> np.ndarray:
    """Tukey's far fences (three times the middle half's width beyond it), on one side."""
    if len(values) < LEAST_ROWS:
        return np.zeros(0, dtype=np.int64)
    low, high = np.quantile(values, [0.25, 0.75])
    width = SPREADS * max(high - low, LEAST_SPREAD)
    return np.flatnonzero(values > high + width if above else values < low - width)
