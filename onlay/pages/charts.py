"""Charts that more than one page draws: rows of bars, histograms."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from onlay.pages.drawing import HALF, LABELS, NUMBERS, WIDTH, Drawing, Scale, decimals, ticks

PLOT_HEIGHT = 132
"""Of the bars of a histogram."""
LEFT = 46
"""Of a histogram: room for the numbers of its counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One row of a chart of bars."""

    label: str
    value: float | None
    """None has no length."""
    told: str
    """Beside the bar."""
    said: str
    """When pointed at."""
    style: str = "bar"


def bar_rows(drawing: Drawing, bars: Iterable[Bar], *, most: float) -> None:
    """Adds a row for each bar below what is drawn; `most` is the value of a bar of full length."""
    # A bar begins at 0: one of a negative number would say the opposite, so it has no length, and its number beside it.
    scale = Scale(low=0.0, high=most, start=LABELS, end=WIDTH - NUMBERS)
    for bar in bars:
        y = drawing.height
        drawing.text(LABELS - 12, y + 14, bar.label, anchor="end", most=LABELS - 14)
        width = 0.0 if bar.value is None else scale(max(0.0, bar.value)) - LABELS
        form = '<g class="{}"><title>{}</title><rect x="{}" y="{:.1f}" width="{:.1f}" height="13" rx="2"/></g>'
        drawing.parts.append(Markup(form).format(bar.style, bar.said, LABELS, y + 3.5, width))
        drawing.text(LABELS + width + 8, y + 14, bar.told, style="number")
        drawing.height += 20


def histogram(
    edges: Sequence[float], counts: Sequence[int], *, name: str, title: str, told: str, unit: str,
    factor: float = 1.0, marks: Mapping[str, float] | None = None, single: bool = False,
) -> Markup | None:  # fmt: skip
    """`counts[i]` values lie within `edges[i]..edges[i + 1]`; `single`: all of them are `edges[i]`.

    `unit` stands below, `marks` are lines with their names; numbers are told times `factor`.  All bars are equally wide on the
    page, so that those of a logarithmic or uneven scale can be read; the numbers below are theirs.  None when nothing was
    counted.
    """
    if not any(counts):
        return None
    drawing = Drawing(name=name, width=HALF, height=PLOT_HEIGHT + 64)
    y = Scale(low=0.0, high=float(max(counts)), start=PLOT_HEIGHT + 18, end=18)
    x = Scale(low=0.0, high=float(len(counts)), start=LEFT, end=HALF - 8)
    axis = _Axis(edges=edges, x=x, shift=0.5 if single else 0.0, factor=factor)
    for value in ticks(y.low, y.high, most=4):
        if abs(value - round(value)) < 1e-9:  # Counts have no fractions.
            drawing.line(x.start, y(value), x.end, y(value), style="grid")
            drawing.text(x.start - 6, y(value) + 4, _brief(value), style="muted", anchor="end")
    for place, count in enumerate(counts):
        if count:
            _bar(drawing, count, place=place, x=x, y=y, said=f"{count:,} {axis.range_of(place, single=single)} {unit}")
    _edge_numbers(drawing, axis, y=y.start)
    below = unit if axis.even else f"{unit}, on a scale that is not even"
    drawing.text((x.start + x.end) / 2, y.start + 36, below, style="muted", anchor="middle")
    for label, value in (marks or {}).items():
        at = axis(value)
        drawing.line(at, y.end - 4, at, y.start, style="mark-line")
        side = "end" if at > (x.start + x.end) / 2 else "start"
        drawing.text(at + (-5 if side == "end" else 5), y.end - 6, f"{label} {number(value * factor)}", style="number", anchor=side)  # fmt: skip
    return drawing.svg(title, told)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Axis:
    """Values to pixels, on a scale whose steps are the edges of equally wide bars."""

    edges: Sequence[float]
    x: Scale
    shift: float
    """In bars: a value of its own stands in the middle of its bar."""
    factor: float

    @property
    def even(self) -> bool:
        widths = [b - a for a, b in itertools.pairwise(self.edges)]
        return max(widths) - min(widths) <= 1e-6 * max(1.0, abs(self.edges[-1]))

    def __call__(self, value: float) -> float:
        edges = self.edges
        bar = min(max(bisect.bisect_right(edges, value) - 1, 0), len(edges) - 2)
        width = edges[bar + 1] - edges[bar]
        within = min(max((value - edges[bar]) / width, 0.0), 1.0) if width else 0.5
        return self.x(min(bar + within + self.shift, len(edges) - 1))

    def range_of(self, place: int, *, single: bool) -> str:
        low, high = (number(edge * self.factor) for edge in self.edges[place : place + 2])
        return f"of {low}" if single else f"from {low} to {high}"


def _bar(drawing: Drawing, count: int, *, place: int, x: Scale, y: Scale, said: str) -> None:
    left, right = x(place), x(place + 1)
    # One among many thousands would be lower than anything that can be seen.
    height = max(1.0, y.start - y(count))
    form = '<g class="bar"><title>{}</title><rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/></g>'
    drawn = Markup(form).format(said, left + 0.5, y.start - height, max(1.0, right - left - 1), height)
    drawing.parts.append(drawn)


def _edge_numbers(drawing: Drawing, axis: _Axis, *, y: float) -> None:
    """Round numbers below where bars are equally wide in their unit, else the edges of some bars."""
    edges, factor = axis.edges, axis.factor
    if axis.even and not axis.shift and edges[-1] > edges[0]:
        values = [value / factor for value in ticks(edges[0] * factor, edges[-1] * factor)]
        digits = decimals([value * factor for value in values])
        told = [number(value * factor, digits=digits) for value in values]
    else:
        known = edges[:-1] if axis.shift else edges
        values = [*known[:: -(-len(known) // 5)]]
        told = [number(value * factor) for value in values]
    for value, text in zip(values, told, strict=True):
        at = axis(value)
        drawing.line(at, y, at, y + 4, style="axis")
        drawing.text(at, y + 18, text, style="muted", anchor="middle")
    drawing.line(axis.x.start, y, axis.x.end, y, style="axis")


def _brief(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= 10 * size:
            return f"{value / size:,.0f}{letter}"
    return f"{value:,.0f}"


def number(value: float, *, digits: int | None = None) -> str:
    """As short as it can be told: no decimals from 100 on."""
    if digits is None:
        digits = 0 if abs(value) >= 100 or abs(value - round(value)) < 1e-9 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}".replace("-", "−")
