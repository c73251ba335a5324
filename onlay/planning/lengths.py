"""How long the rows are, and the steps and micro-batches that they make: from a histogram, or from a mean alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from onlay.planning.speed import MicroBatch

SPREAD = 0.6
"""Of the logarithm of a length, where only the mean is declared: that of instruction data sets (GSM8K 0.4, Alpaca 0.7)."""
QUANTILES = 64
SAMPLED_STEPS = 12
"""Drawn to see how a step is cut."""
Pack = Callable[[Sequence[int], int], list[list[int]]]
"""Lengths and the most tokens of a group, to indices in groups: onlay.data.pack.plan_micro_batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens of a row to how many rows have as many."""

    counts: Mapping[int, int]
    told: str
    """Where they come from, in words."""

    @property
    def rows(self) -> int:
        return sum(self.counts.values())

    @property
    def tokens(self) -> int:
        return sum(length * count for length, count in self.counts.items())

    @property
    def mean(self) -> float:
        return self.tokens / self.rows

    @property
    def longest(self) -> int:
        return max(self.counts)

    def steps(self, *, rows_a_step: int, count: int = SAMPLED_STEPS, seed: int = 0) -> list[list[int]]:
        """Lengths of the rows of some steps, drawn as they are shuffled; each row as likely as another."""
        draw = random.Random(seed)
        lengths, weights = list(self.counts), list(self.counts.values())
        if self.rows <= rows_a_step * count:
            every = [length for length, number in self.counts.items() for _ in range(number)]
            draw.shuffle(every)
            whole = [every[i % len(every)] for i in range(max(rows_a_step, len(every)))]
            return [whole[i : i + rows_a_step] for i in range(0, len(whole) - rows_a_step + 1, rows_a_step)]
        return [draw.choices(lengths, weights, k=rows_a_step) for _ in range(count)]


def measured_lengths(lengths: Iterable[int], *, told: str, most_tokens: int | None = None) -> Lengths:
    """Of rows that were looked at; longer ones than `most_tokens` count as that long."""
    counts = Counter(max(1, length if most_tokens is None else min(length, most_tokens)) for length in lengths)
    return Lengths(counts=dict(sorted(counts.items())), told=told)


def declared_lengths(rows: int, mean_tokens: float, *, most_tokens: int | None = None) -> Lengths:
    """Rows of this mean whose logarithms are normally distributed, as those of conversations are, about."""
    normal = NormalDist(0.0, SPREAD)
    drawn = [normal.inv_cdf((number + 0.5) / QUANTILES) for number in range(QUANTILES)]
    factors = [2.718281828459045**value for value in drawn]
    scale = mean_tokens * QUANTILES / sum(factors)
    counts: Counter[int] = Counter()
    for number, factor in enumerate(factors):
        length = max(1, round(factor * scale))
        length = length if most_tokens is None else min(length, most_tokens)
        counts[length] += rows * (number + 1) // QUANTILES - rows * number // QUANTILES
    found = Lengths(counts={length: count for length, count in sorted(counts.items()) if count}, told="")
    told = f"{rows:,} rows of {mean_tokens:,.0f} tokens on average, declared; their spread is assumed"
    if most_tokens is not None and any(factor * scale > most_tokens + 0.5 for factor in factors):
        told += f"; longer ones count as {most_tokens:,} tokens, which leaves {found.mean:,.0f} on average"
    return replace(found, told=told)


def cut_steps(
    steps: Sequence[Sequence[int]], *, budget_tokens: int, gpus: int, pack: Pack, padded: bool = False
) -> list[list[MicroBatch]]:
    """Each step's micro-batches on the first GPU: every `gpus`-th row is its own.  Padded rows are all as long as the longest."""
    found = []
    for step in steps:
        mine = list(step)[::gpus]
        groups = pack(mine, budget_tokens)
        cut = [[mine[i] for i in group] for group in groups]
        found.append([MicroBatch(lengths=(max(one),) * len(one) if padded else tuple(one)) for one in cut])
    return found


def equal_rows(rows: int, tokens: int) -> Lengths:
    """Rows of one length."""
    return Lengths(counts={tokens: rows}, told=f"{rows:,} rows of {tokens:,} tokens")
