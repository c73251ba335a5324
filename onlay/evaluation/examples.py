"""Rows side by side: which ones to show."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onlay.records import Report

KINDS = {
    True: {"fixed": "fixed", "broken": "broken", "neither": "both wrong", "both": "both right"},
    False: {"fixed": "better", "broken": "worse", "neither": "the same"},
}
"""Names of the kinds of rows, for yes/no scores and for others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """The score that sorts rows into kinds, and between which systems."""

    score: str
    system: str
    against: str | None
    """None when only one system answered."""
    higher_is_better: bool
    yes_no: bool
    """Every row's score is 0 or 1."""

    def kind(self, row: Mapping[str, Any]) -> str | None:
        """fixed, broken, neither or both; None for a row without the score."""
        ours, theirs = self._worth(row, self.system), self._worth(row, self.against or self.system)
        if ours is None or theirs is None:
            return None
        if ours != theirs:
            return "fixed" if ours > theirs else "broken"
        return "both" if self.yes_no and ours == (1.0 if self.higher_is_better else 0.0) else "neither"

    def gain(self, row: Mapping[str, Any]) -> float:
        """How much the row's answer gained or lost, of rows that have a kind."""
        ours, theirs = self._worth(row, self.system), self._worth(row, self.against or self.system)
        assert ours is not None and theirs is not None
        return abs(ours - theirs)

    def _worth(self, row: Mapping[str, Any], system: str) -> float | None:
        """The larger the better."""
        value = row["scores"].get(system, {}).get(self.score)
        return None if value is None else value if self.higher_is_better else -value


def measure_of(report: Report, rows: Sequence[Mapping[str, Any]]) -> Measure | None:
    """By the first yes/no score that the report compares, or else the first score; against the base where it answered."""
    answered = {system for row in rows for system in row["answers"]}
    if report.system not in answered:
        return None
    directions = {one.score: one.higher_is_better for one in report.comparisons}
    scores = list(directions) or list(report.scores.get(report.system, {}))
    values = {score: [given[score] for row in rows for given in row["scores"].values() if given.get(score) is not None] for score in scores}  # fmt: skip
    scores = [score for score in scores if values[score]]
    if not scores:
        return None
    yes_no = [score for score in scores if set(values[score]) <= {0.0, 1.0}]
    score = (yes_no or scores)[0]
    others = [one.against for one in report.comparisons if one.against in answered] or sorted(
        answered - {report.system}
    )
    against = "base" if "base" in others else next(iter(others), None)
    return Measure(
        score=score,
        system=report.system,
        against=against,
        higher_is_better=directions.get(score, True),
        yes_no=score in yes_no,
    )


def choose(
    rows: Sequence[Mapping[str, Any]], *, measure: Measure | None, most: int
) -> tuple[list[tuple[str, Mapping[str, Any]]], dict[str, int]]:
    """(kind, row) of at most `most` rows, and how many rows there are of each kind, shown or not.

    Fixed, broken and neither in turn, so that each has its share; those with the largest change first, then in the file's
    order.  Rows that both systems got right fill what is left, and those without the score stand last, of kind `unscored`.
    """
    found: dict[str, list[Mapping[str, Any]]] = {"fixed": [], "broken": [], "neither": [], "both": [], "unscored": []}
    for row in rows:
        found[(measure.kind(row) if measure else None) or "unscored"].append(row)
    counts = {kind: len(given) for kind, given in found.items() if given}
    for kind in ("fixed", "broken"):
        if measure is not None:
            found[kind].sort(key=measure.gain, reverse=True)
    told = ("fixed", "broken", "neither")
    turns = itertools.zip_longest(*([(kind, row) for row in found[kind]] for kind in told))
    first = [one for turn in turns for one in turn if one is not None]
    rest = [(kind, row) for kind in ("both", "unscored") for row in found[kind]]
    return (first + rest)[:most], counts
