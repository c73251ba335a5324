"""The plots of a report.  Shape says what colour says: ▲ better, ▼ worse, ○ no difference shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from onlay.evaluation.units import Unit, outcome, spoken, unit_of, unit_of_comparison
from onlay.pages.charts import Bar, bar_rows
from onlay.pages.drawing import LABELS, NUMBERS, ROW, WIDTH, Drawing, Scale, axis, decimals, ticks
from onlay.records import Comparison

MOST_POINTS = 240
"""A longer loss curve is told by the means of as many equal groups of steps."""


def forest(comparisons: Sequence[Comparison], *, name: str, title: str) -> Markup | None:
    """Differences with their 95 % intervals, one panel for each unit, and the line of no difference.  None of nothing."""
    if not comparisons:
        return None
    drawing = Drawing(name=name)
    groups: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault(unit_of_comparison(comparison).name, []).append(comparison)
    for unit, group in groups.items():
        _forest_panel(drawing, group, unit=unit)
    told = "; ".join(f"{spoken(one.score)}, {one.system} against {one.against}: {one.verdict}" for one in comparisons)
    return drawing.svg(title, told + ".")


def _forest_panel(drawing: Drawing, comparisons: Sequence[Comparison], *, unit: str) -> None:
    top, units = drawing.height + 14, [unit_of_comparison(one) for one in comparisons]
    ends = [value * unit.factor for one, unit in zip(comparisons, units, strict=True) for value in (one.low, one.high, one.difference)]  # fmt: skip
    low, high = min(0.0, *ends), max(0.0, *ends)
    spare = 0.06 * (high - low) or 1.0
    scale = Scale(low=low - spare, high=high + spare, start=LABELS, end=WIDTH - NUMBERS)
    bottom = top + ROW * len(comparisons)
    axis(drawing, scale, top=top, bottom=bottom)
    drawing.line(scale(0), top - 6, scale(0), bottom, style="zero")
    drawing.text((LABELS + WIDTH - NUMBERS) / 2, bottom + 34, f"difference, {unit or 'in the score’s own unit'}", style="muted", anchor="middle")  # fmt: skip
    for place, (one, how) in enumerate(zip(comparisons, units, strict=True)):
        y = top + ROW * (place + 0.5)
        _named(drawing, one, y)
        found, told = outcome(one), f"{how.number(one.low)} to {how.number(one.high)}"
        left, right = scale(one.low * how.factor), scale(one.high * how.factor)
        interval = Markup('<path class="interval" d="M {0:.1f} {2:.1f} H {1:.1f} M {0:.1f} {3:.1f} V {4:.1f} M {1:.1f} {3:.1f} V {4:.1f}"/>')  # fmt: skip
        around = interval.format(left, right, y, y - 4, y + 4)
        said = f"{spoken(one.score)}, {one.system} against {one.against}: {one.verdict}"
        drawing.mark(scale(one.difference * how.factor), y, shape=found, style=found, told=said, around=around)
        drawing.text(WIDTH - NUMBERS + 12, y + 4, f"{how.number(one.difference)}  ({told})", style="number")
    drawing.height = bottom + 44


def _named(drawing: Drawing, one: Comparison, y: float) -> None:
    lower = "" if one.higher_is_better else " ↓"
    drawing.text(LABELS - 12, y + 4, f"{spoken(one.score)}{lower} · {one.against}", anchor="end", most=LABELS - 14)


def bars(scores: Mapping[str, Mapping[str, float | None]], *, system: str, name: str, title: str) -> Markup | None:
    """`scores`: system to score to value.  A group of bars for each score, the judged system's dark.  None of nothing."""
    if not any(scores.values()):
        return None
    drawing = Drawing(name=name, height=4)
    told = []
    for score in dict.fromkeys(score for values in scores.values() for score in values):
        values = {one: given[score] for one, given in scores.items() if score in given}
        unit = unit_of(score, values.values())
        drawing.height += 20
        drawing.text(0, drawing.height, spoken(score), style="strong", most=WIDTH)
        drawing.height += 8
        _bar_group(drawing, values, unit=unit, system=system)
        told.append(f"{spoken(score)}: " + ", ".join(f"{one} {unit.value(value)}" for one, value in values.items()))
    return drawing.svg(title, "; ".join(told) + ".")


def _bar_group(drawing: Drawing, values: Mapping[str, float | None], *, unit: Unit, system: str) -> None:
    known = [value for value in values.values() if value is not None]
    most = 1.0 if unit.sign else max([*known, 0.0]) or 1.0
    rows = [
        Bar(
            label=one,
            value=value,
            told=unit.value(value) if value is not None else "– no row has what it needs",
            said=f"{one}: {unit.value(value)}",
            style="bar ours" if one == system else "bar",
        )
        for one, value in values.items()
    ]
    bar_rows(drawing, rows, most=most)
    drawing.height += 6


def losses(events: Sequence[Mapping[str, Any]], *, name: str, title: str) -> Markup | None:
    """Training loss, held-out loss and learning rate over the steps.  None when no step has a finite loss.

    `events`: lines of metrics.jsonl.  A step that was repeated after a recovery stands more than once; the last counts.
    """
    steps = {event["step"]: event for event in events if event["event"] == "step"}
    train, left_out = _finite({step: event["loss"] for step, event in steps.items()})
    held_out, _ = _finite({event["step"]: event["loss"] for event in events if event["event"] == "evaluation"})
    if not train:
        return None
    rates, _ = _finite({step: event["learning_rate"] for step, event in steps.items()})
    groups = list(_groups(train))
    every = [loss for _, *values in groups for loss in values] + list(held_out.values())
    low, high = min(every), max(every)
    spare = 0.05 * (high - low) or 0.5
    first, last = min([*train, *held_out]), max([*train, *held_out])
    x = Scale(low=first, high=max(last, first + 1), start=52, end=WIDTH - 130)
    drawing = Drawing(name=name, height=384)
    loss = Scale(low=max(0.0, low - spare), high=high + spare, start=250, end=12)
    _frame(drawing, x, loss, what="nats per token", numbered=False)
    _loss_lines(drawing, groups, held_out, x=x, y=loss)
    for event in events:
        if event["event"] == "recovery":
            drawing.line(x(event["step"]), 12, x(event["step"]), 250, style="recovery")
            drawing.text(x(event["step"]) + 4, 22, str(event["reason"]).replace("_", " "), style="muted", most=150)
    rate = Scale(low=0.0, high=max(rates.values(), default=0.0) or 1.0, start=340, end=280)
    _frame(drawing, x, rate, what="learning rate", numbered=True, most=3)
    drawing.path([(x(step), rate(value)) for step, value in sorted(rates.items())], style="rate")
    return drawing.svg(title, _losses_told(train, held_out, left_out))


def _losses_told(train: Mapping[int, float], held_out: Mapping[int, float], left_out: int) -> str:
    told = f"Training loss {train[min(train)]:.3f} at step {min(train)}, {train[max(train)]:.3f} at step {max(train)}"
    if held_out:
        told += f"; held-out loss {held_out[min(held_out)]:.3f} at step {min(held_out)}, {held_out[max(held_out)]:.3f} at step {max(held_out)}"
    if left_out:
        told += f"; {left_out} steps without a finite loss are left out"
    return told + "."


def _finite(values: Mapping[int, float]) -> tuple[dict[int, float], int]:
    """Those that are numbers, and how many are not."""
    kept = {step: value for step, value in values.items() if math.isfinite(value)}
    return kept, len(values) - len(kept)


def _groups(train: Mapping[int, float]) -> Iterator[tuple[int, float, float, float]]:
    """(middle step, mean, least, largest) of at most MOST_POINTS equal groups of steps."""
    ordered = sorted(train.items())
    size = -(-len(ordered) // MOST_POINTS)
    for start in range(0, len(ordered), size):
        group = ordered[start : start + size]
        values = [loss for _, loss in group]
        yield group[len(group) // 2][0], math.fsum(values) / len(values), min(values), max(values)


def _frame(drawing: Drawing, x: Scale, y: Scale, *, what: str, numbered: bool, most: int = 6) -> None:
    """Horizontal lines with their numbers, and the steps below where `numbered`."""
    values = ticks(y.low, y.high, most=most)
    small = values[-1] < 0.01
    digits = decimals(values)
    for value in values:
        drawing.line(x.start, y(value), x.end, y(value), style="grid")
        told = "0" if value == 0 else f"{value:.0e}" if small else f"{value:.{digits}f}"
        drawing.text(x.start - 8, y(value) + 4, told, style="muted", anchor="end")
    drawing.text(x.end + 10, y.end + 12, what, style="muted")
    if numbered:
        for value in dict.fromkeys(round(step) for step in ticks(x.low, x.high)):
            drawing.text(x(value), y.start + 18, f"{value:,}", style="muted", anchor="middle")
        drawing.text((x.start + x.end) / 2, y.start + 36, "step", style="muted", anchor="middle")


def _loss_lines(drawing: Drawing, groups: Sequence[tuple[int, float, float, float]], held_out: Mapping[int, float], *, x: Scale, y: Scale) -> None:  # fmt: skip
    if any(least != largest for _, _, least, largest in groups):
        upper = [(x(step), y(largest)) for step, _, _, largest in groups]
        lower = [(x(step), y(least)) for step, _, least, _ in reversed(groups)]
        drawing.path([*upper, *lower], style="band")
    drawing.path([(x(step), y(mean)) for step, mean, _, _ in groups], style="train")
    ends = [("training", "train", y(groups[-1][1]))]
    if held_out:
        points = sorted(held_out.items())
        drawing.path([(x(step), y(loss)) for step, loss in points], style="held-out")
        for step, loss in points:
            told = f"held-out loss {loss:.4f} at step {step:,}"
            drawing.mark(x(step), y(loss), shape="same", style="held-out", told=told)
        ends.append(("held-out", "held-out", y(points[-1][1])))
    # Labels at the ends of the lines, moved apart where they would cover each other.
    ends.sort(key=lambda end: end[2])
    if len(ends) == 2 and ends[1][2] - ends[0][2] < 16:
        ends[1] = (*ends[1][:2], ends[0][2] + 16)
    for label, style, at in ends:
        drawing.text(x.end + 10, min(at, y.start - 16 * (label != ends[-1][0])) + 4, label, style=f"{style} label")
