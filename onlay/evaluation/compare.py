"""Two systems on the same rows: is the difference more than chance?

Both answered every row, so rows that are hard for both cancel out: everything here works on pairs.

    interval   95 %, percentile bootstrap: rows are drawn with replacement, each pair as a whole, and the score of the draw
               is computed anew from the rows' statistics (BLEU and macro-F1 are no means of rows)
    p-value    were it chance which of the two gave which answer of a pair, how often would they differ as much?  For yes/no
               scores counted exactly (McNemar), of the rows that only one got right; else by draws that swap pairs at random
               (approximate randomization).  Unlike a bootstrap's, this p-value keeps its word with 20 rows too.

A percentile interval is too short when rows are few, since a draw varies by (n - 1) / n of what it should and the spread is
itself estimated.  Its tails are therefore cut where Student's t would cut them (the "expanded percentile" of Hesterberg
2015, arXiv:1411.5279); at 1,000 rows it is the plain one.

Sources.  McNemar 1947, exact form; paired bootstrap: Koehn 2004; approximate randomization: Noreen 1989, Riezler and
Maxwell 2005; power of McNemar's test: Connor 1987, with a correction for continuity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from onlay.evaluation.scores import Kind, Measured, Score, Unit
from onlay.records import Comparison

RESAMPLES = 4000
LEVEL = 0.05
POWER = 0.8
PRIOR_DISCORDANT = 0.2
"""Before training: the share of rows taken to be right with one system only."""
PRIOR_DEVIATION = 0.3
"""Before training: the standard deviation over rows of the difference of a score in 0..1."""
DRAWN_AT_ONCE = 4_000_000
"""Row numbers of one chunk of draws: 32 MB."""


def compare(
    ours: Measured, theirs: Measured, *, system: str, against: str, seed: int = 0, resamples: int = RESAMPLES
) -> Comparison | None:
    """`ours` against `theirs` over the rows that both have; None where those are fewer than two.

    The two must be of one score and the same rows in the same order; ValueError otherwise.
    """
    score = ours.score
    if score.name != theirs.score.name or ours.statistics.shape != theirs.statistics.shape:
        raise ValueError(f"{score.name} of {len(ours.values)} rows against {theirs.score.name} of {len(theirs.values)}")
    both = np.isfinite(ours.values) & np.isfinite(theirs.values)
    rows = int(both.sum())
    if rows < 2:
        return None
    pair = ours.statistics[both], theirs.statistics[both]
    value, other = (float(ours.totals(statistics.sum(0)[None])[0]) for statistics in pair)
    drawn = _differences(ours, *pair, seed=seed, resamples=resamples)
    low, high = _interval(drawn, rows)
    if score.kind == "binary":
        gains = ours.values[both] - theirs.values[both]
        p_value = sign_test(int((gains > 0).sum()), int((gains < 0).sum()))
    else:
        p_value = _p_value(ours, *pair, seed=seed, resamples=resamples)
    return Comparison(
        score=score.name, system=system, against=against, rows=rows, value=value, other=other, difference=value - other,
        low=low, high=high, p_value=p_value, higher_is_better=score.higher_is_better,
        verdict=verdict(score, value - other, low=low, high=high, p_value=p_value),
    )  # fmt: skip


def _differences(measured: Measured, ours: np.ndarray, theirs: np.ndarray, *, seed: int, resamples: int) -> np.ndarray:
    """(resamples,) differences of the score between the systems, each over rows drawn with replacement."""
    rows, width = ours.shape
    draw = np.random.default_rng(seed)
    statistics = np.concatenate([ours, theirs], 1)
    found = []
    chunk = max(1, DRAWN_AT_ONCE // rows)
    for start in range(0, resamples, chunk):
        draws = min(chunk, resamples - start)
        # How often each draw takes each row: one product with the statistics then sums all draws.
        cells = draw.integers(rows, size=(draws, rows)) + np.arange(draws)[:, None] * rows
        times = np.bincount(cells.ravel(), minlength=draws * rows).reshape(draws, rows)
        sums = times.astype(np.float64) @ statistics
        found.append(measured.totals(sums[:, :width]) - measured.totals(sums[:, width:]))
    return np.concatenate(found)


def _interval(drawn: np.ndarray, rows: int) -> tuple[float, float]:
    tail = NormalDist().cdf(-math.sqrt(rows / (rows - 1)) * t_quantile(1 - LEVEL / 2, rows - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def _p_value(measured: Measured, ours: np.ndarray, theirs: np.ndarray, *, seed: int, resamples: int) -> float:
    """How often swapping pairs at random makes a difference as large; the rows as they are count as one of the draws."""
    rows = len(ours)
    draw = np.random.default_rng([seed, 1])
    sums, change = (ours.sum(0), theirs.sum(0)), theirs - ours
    observed = abs(float(measured.totals(sums[0][None])[0] - measured.totals(sums[1][None])[0]))
    as_large = 0
    chunk = max(1, DRAWN_AT_ONCE // rows)
    for start in range(0, resamples, chunk):
        swapped = (
            draw.integers(2, size=(min(chunk, resamples - start), rows), dtype=np.int8).astype(np.float64) @ change
        )
        found = measured.totals(sums[0] + swapped) - measured.totals(sums[1] - swapped)
        # A little less counts as equal: the same rows summed in another order.
        as_large += int((np.abs(found) >= observed * (1 - 1e-9)).sum())
    return (as_large + 1) / (resamples + 1)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value of `wins` against `losses` where each is as likely: McNemar's test, given the rows that only
    one system got right."""
    both = wins + losses
    tail, term = 0, 1  # term: both over k
    for k in range(min(wins, losses) + 1):
        tail += term
        term = term * (both - k) // (k + 1)
    return min(1.0, 2 * tail / (1 << both))


# ------------------------------------------------------------------------------------------------------------ in words


def verdict(score: Score, difference: float, *, low: float, high: float, p_value: float) -> str:
    """Such as `better by 12.4 points, 95 % 9.1 to 15.8`; better or worse only where p < 0.05."""
    unit = score.unit
    if p_value < LEVEL and difference != 0:
        better = (difference > 0) == score.higher_is_better
        if difference < 0:
            low, high = -high, -low
        return (
            f"{'better' if better else 'worse'} by {_number(abs(difference), unit)} {_name(unit)}, "
            f"95 % {_number(low, unit)} to {_number(high, unit)}"
        )
    words = f"no difference shown: {_signed(difference, unit)} {_name(unit)}, 95 % {_number(low, unit)} to {_number(high, unit)}"
    # The test decides: the exact one asks for a little more than the interval does.
    return words if low <= 0 <= high else f"{words}, p {p_value:.2g}"


def told_size(score: Score, difference: float) -> str:
    """The size of a difference, such as `12.4 points`."""
    return f"{_number(abs(difference), score.unit)} {_name(score.unit)}"


def _number(value: float, unit: Unit) -> str:
    text = {"share": f"{100 * value:.1f}", "points": f"{value:.1f}", "nats": f"{value:.3f}"}[unit]
    return text.lstrip("-") if float(text) == 0 else text


def _signed(value: float, unit: Unit) -> str:
    text = _number(value, unit)
    return text if text.startswith("-") or float(text) == 0 else f"+{text}"


def _name(unit: Unit) -> str:
    return "nats a token" if unit == "nats" else "points"


# ------------------------------------------------------------------------------------------ what rows and seeds can show


def smallest_difference(score: Score, *, rows: int, spread: float | None = None) -> float | None:
    """The least true difference that `rows` rows show (p < 0.05, two-sided) in four trials of five, in the score's own unit.

    `spread` is what `spread_of` finds; before training it is a prior: PRIOR_DISCORDANT for yes/no scores, PRIOR_DEVIATION
    else (times 100 for scores of 0..100).  None where so few rows show nothing at all, not even the largest difference that the
    score can have; ValueError for nats without a spread.
    """
    if spread is None:
        if score.unit == "nats":
            raise ValueError("nats have no bound, so their spread must be given")
        prior = PRIOR_DISCORDANT if score.kind == "binary" else PRIOR_DEVIATION
        spread = prior * (100 if score.unit == "points" else 1)
    least, largest = _least(score.kind, rows, spread), {"share": 1.0, "points": 100.0}.get(score.unit, math.inf)
    return least if least is not None and least <= largest else None


def _least(kind: Kind, rows: int, spread: float) -> float | None:
    if rows < 2:
        return None
    enough = NormalDist().inv_cdf(POWER)
    if kind != "binary":
        return (t_quantile(1 - LEVEL / 2, rows - 1) + enough) * spread / math.sqrt(rows)
    low, high = 0.0, 1.0
    if mcnemar_power(rows, high, discordant=spread) < POWER or sign_test(rows, 0) >= LEVEL:
        return None
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if mcnemar_power(rows, middle, discordant=spread) >= POWER else (middle, high)
    return high


def mcnemar_power(rows: int, difference: float, *, discordant: float) -> float:
    """How often exact McNemar shows a true difference of two shares, where `discordant` of the rows (at least the difference
    itself) are right with one system only.  Normal approximation with the correction for continuity."""
    discordant = max(discordant, difference)
    needed = NormalDist().inv_cdf(1 - LEVEL / 2) * math.sqrt(discordant)
    deviation = math.sqrt(max(discordant - difference**2, 1e-12))
    return NormalDist().cdf((math.sqrt(rows) * (difference - 1 / rows) - needed) / deviation)


def spread_of(ours: Measured, theirs: Measured, *, seed: int = 0, resamples: int = RESAMPLES) -> float | None:
    """What the detectable difference depends on: for yes/no scores the share of rows that only one system got right, else
    the standard deviation of the difference, for one row.  None where both have fewer than two rows."""
    both = np.isfinite(ours.values) & np.isfinite(theirs.values)
    rows = int(both.sum())
    if rows < 2:
        return None
    if ours.score.kind == "binary":
        return float((ours.values[both] != theirs.values[both]).mean())
    if ours.score.kind == "mean":
        return float((ours.values[both] - theirs.values[both]).std(ddof=1))
    drawn = _differences(ours, ours.statistics[both], theirs.statistics[both], seed=seed, resamples=resamples)
    return float(drawn.std()) * math.sqrt(rows * rows / (rows - 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Seeds:
    """A gain over runs that differ in the seed alone."""

    seeds: int
    mean: float
    standard_error: float
    """Of the mean, over seeds."""
    low: float
    high: float
    """95 %, Student's t."""
    p_value: float
    verdict: str


def combine_seeds(score: Score, gains: Sequence[float]) -> Seeds:
    """The gain apart from the luck of the seed: `gains` are one run's each, in the score's own unit.  ValueError for fewer
    than two: one run says nothing about the others."""
    count = len(gains)
    if count < 2:
        raise ValueError("seeds are compared from two on")
    mean = math.fsum(gains) / count
    error = math.sqrt(math.fsum((gain - mean) ** 2 for gain in gains) / (count - 1) / count)
    reach = t_quantile(1 - LEVEL / 2, count - 1) * error
    low, high = mean - reach, mean + reach
    p_value = 2 * t_cdf(-abs(mean) / error, count - 1) if error else float(mean == 0)
    words = verdict(score, mean, low=low, high=high, p_value=p_value)
    return Seeds(
        seeds=count,
        mean=mean,
        standard_error=error,
        low=low,
        high=high,
        p_value=p_value,
        verdict=f"{words}, over {count} seeds",
    )


def t_cdf(t: float, degrees: int) -> float:
    """Student's t distribution for whole degrees of freedom, exactly (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term = total = (cosine if odd else 1.0) * (degrees > 1)
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    inner = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return max(0.0, 0.5 + inner / 2)


def t_quantile(share: float, degrees: int) -> float:
    """The t below which `share` (above a half) of the distribution lies."""
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < share:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if t_cdf(middle, degrees) >= share else (middle, high)
    return high
