"""How a score is told: its unit, and what a difference of it means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from onlay.records import Comparison, Report

SIGNIFICANT = 0.05
"""A difference with a larger p-value is not told as one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """What stands behind a score's number, and behind a difference of it."""

    name: str
    """Of a difference: points, nats, bits, or empty."""
    sign: str
    """Behind a value: ` %` or empty."""
    factor: float
    """From the stored number to the one that is told."""
    digits: int

    def value(self, value: float | None) -> str:
        """Such as `71.3 %`; `–` for a score that no row has."""
        return "–" if value is None else f"{value * self.factor:,.{self.digits}f}{self.sign}"

    def number(self, difference: float) -> str:
        """A difference without its unit, such as `+12.4`; a minus sign, not a hyphen."""
        told = f"{difference * self.factor:+,.{self.digits}f}"
        # -0.04 points would be told as -0.0.
        return told.lstrip("+-") if float(told.replace(",", "")) == 0 else told.replace("-", "−")

    def difference(self, difference: float) -> str:
        """Such as `+12.4 points`."""
        return f"{self.number(difference)} {self.name}".rstrip()


SHARE = Unit(name="points", sign=" %", factor=100.0, digits=1)
PLAIN = Unit(name="", sign="", factor=1.0, digits=3)
UNITS = {
    "bleu": Unit(name="points", sign="", factor=1.0, digits=1),
    "chrf": Unit(name="points", sign="", factor=1.0, digits=1),
    "nats_per_token": Unit(name="nats", sign="", factor=1.0, digits=3),
    "bits_per_byte": Unit(name="bits", sign="", factor=1.0, digits=3),
    "perplexity": PLAIN,
}
"""Scores that are not shares of one."""


def unit_of(score: str, values: Iterable[float | None]) -> Unit:
    """`values`: all that is known of the score.  One that is not in UNITS is a share where all of them lie in 0..1.

    What follows a name in parentheses, as in `nats_per_token (letters.txt)`, says what it was measured on.
    """
    name = score.partition(" (")[0]
    if name in UNITS:
        return UNITS[name]
    return SHARE if all(value is None or 0.0 <= value <= 1.0 for value in values) else PLAIN


def unit_of_comparison(comparison: Comparison) -> Unit:
    return unit_of(comparison.score, (comparison.value, comparison.other))


def unit_in_report(report: Report, score: str) -> Unit:
    return unit_of(score, (scores.get(score) for scores in report.scores.values()))


def outcome(comparison: Comparison) -> str:
    """better, worse, or same: no difference that chance would not make."""
    if comparison.p_value >= SIGNIFICANT or comparison.difference == 0:
        return "same"
    return "better" if (comparison.difference > 0) == comparison.higher_is_better else "worse"


def spoken(name: str) -> str:
    """A score's name as a person writes it: `exact_match` is `exact match`."""
    return name.replace("_", " ")
