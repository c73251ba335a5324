"""The charts of an audit's page, from the record alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from onlay.pages.charts import Bar, bar_rows, histogram, number
from onlay.pages.drawing import Drawing
from onlay.records import Distribution, Finding

MOST_BARS = 24
"""Of one chart: the largest; the others are one bar together, and all of them are in the table below it."""
SIGNS = {"error": "✕", "warning": "▲", "note": "○"}
"""Of severities, so that colour is not the only thing that tells them apart."""
UNITS = {"share": ("% of the row", 100.0), "ratio": ("times the prompt", 1.0)}
"""What stands below a histogram, and what its numbers are multiplied with; others stand as they are."""
NAMES = {
    "prompt_characters": "Prompts",
    "answer_characters": "Answers",
    "row_characters": "Rows",
    "tokens": "Rows",
    "row_tokens": "Rows",
    "prompt_tokens": "Prompts",
    "answer_tokens": "Answers",
    "answer_to_prompt": "Answers beside their prompts",
    "trained_share": "Tokens that train",
    "cluster_rows": "Rows in a cluster of duplicates",
    "base_loss": "Loss of the base on the answers",
}
"""Of distributions; others are named as the record names them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    name: str
    told: str
    """Its numbers in words; of a chart with all its numbers in it, empty."""
    drawing: Markup


def spoken(name: str) -> str:
    """`prompt_characters` is `prompt characters`."""
    return name.replace("_", " ")


def share(part: float, whole: float) -> str:
    """Such as `12.3 %`; nothing that is there is told as 0."""
    if not whole:
        return "–"
    value = 100 * part / whole
    return "< 0.1 %" if 0 < value < 0.05 else "> 99.9 %" if 99.95 <= value < 100 else f"{value:.1f} %"


def findings_chart(findings: Sequence[Finding]) -> Markup | None:
    """A bar for every finding that names rows, as long as their count; None where none does."""
    findings = [one for one in findings if one.rows]
    if not findings:
        return None
    drawing = Drawing(name="findings-chart", height=4)
    bars = [
        Bar(
            label=spoken(one.code), value=one.count, told=f"{one.count:,} {SIGNS[one.severity]}",
            said=f"{one.severity}: {one.count:,} {one.message}", style=f"bar {one.severity}",
        )
        for one in findings
    ]  # fmt: skip
    bar_rows(drawing, bars, most=max([one.count for one in findings]) or 1)
    drawing.height += 4
    told = "; ".join(f"{one.severity}: {spoken(one.code)} {one.count:,}" for one in findings)
    return drawing.svg("Findings by count", told + ".")


def counts_chart(counts: Mapping[str, int], *, whole: int, name: str, title: str) -> Markup | None:
    """A bar for each value, the most frequent first, with its share of `whole`; None where nothing was counted."""
    ordered = ranked(counts)
    if not ordered:
        return None
    shown, rest = ordered[:MOST_BARS], ordered[MOST_BARS:]
    if len(rest) == 1:
        shown, rest = ordered, []
    drawing = Drawing(name=name, height=4)
    bars = [_count_bar(value, count, whole=whole) for value, count in shown]
    if rest:
        bars.append(_count_bar(f"{len(rest):,} others together", sum(count for _, count in rest), whole=whole))
    bar_rows(drawing, bars, most=max([bar.value or 0 for bar in bars]) or 1)
    drawing.height += 4
    told = ", ".join(f"{bar.label} {bar.told}" for bar in bars)
    return drawing.svg(title, told + ".")


def _count_bar(value: str, count: int, *, whole: int) -> Bar:
    told = f"{count:,}  ({share(count, whole)})"
    return Bar(label=" ".join(value.split()) or "(empty)", value=count, told=told, said=f"{value}: {told}")


def ranked(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """The most frequent first, then by name."""
    return sorted(counts.items(), key=lambda one: (-one[1], one[0]))


def figures(distributions: Iterable[Distribution]) -> list[Figure]:
    """A histogram for each distribution that counted something."""
    made = []
    for one in distributions:
        unit, factor = UNITS.get(one.unit, (one.unit, 1.0))
        title = f"{NAMES.get(one.name, spoken(one.name).capitalize())}, {unit}"
        told = _told(one, factor=factor)
        drawing = histogram(
            one.edges, one.counts, name="histogram-" + re.sub(r"\W", "-", one.name), title=title, told=f"{title}: {told}",
            unit=unit, factor=factor, marks={"median": one.median}, single=one.edges[-1] >= one.most + 0.5,
        )  # fmt: skip
        if drawing is not None:
            made.append(Figure(name=title, told=told, drawing=drawing))
    return made


def _told(one: Distribution, *, factor: float) -> str:
    numbers = (one.median, one.mean, one.p05, one.p95, one.least, one.most)
    median, mean, low, high, least, most = (number(value * factor) for value in numbers)
    return f"{one.count:,} counted, median {median}, mean {mean}, nine of ten from {low} to {high}, all from {least} to {most}"


def trained_chart(tokens: int, trained: int) -> Markup:
    """How many of the tokens train, and how many only give context."""
    drawing = Drawing(name="trained-chart", height=4)
    parts = {"train": (trained, "bar ours"), "give context": (tokens - trained, "bar")}
    bars = [
        Bar(
            label=label, value=count, told=f"{count:,}  ({share(count, tokens)})", said=f"{label}: {count:,} tokens", style=style
        )
        for label, (count, style) in parts.items()
    ]  # fmt: skip
    bar_rows(drawing, bars, most=tokens or 1)
    return drawing.svg("Tokens", f"{trained:,} of {tokens:,} tokens train.")
