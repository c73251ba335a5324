"""report.html: what an evaluation found, as one page that needs nothing but itself (onlay/pages/frame.py).

It works without colour, prints, and follows the reader's light or dark.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from onlay.evaluation.examples import KINDS, choose, measure_of
from onlay.evaluation.plots import bars, forest, losses
from onlay.evaluation.units import outcome, spoken, unit_in_report, unit_of, unit_of_comparison
from onlay.pages.differences import differs_in_white_space_alone, marked
from onlay.pages.frame import MOST_CHARACTERS, clean, environment
from onlay.records import Comparison, Report, write_whole

MOST_EXAMPLES = 60
"""Rows shown side by side; the rest are counted and are in answers.jsonl."""
VERDICTS = {
    "ship": ("ship", "✓", "Ship"),
    "do not ship": ("stop", "✕", "Do not ship"),
    "no gates": ("open", "?", "Not decided"),
}
"""Of Report.verdict: style, sign and words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One number of the first page."""

    label: str
    number: str
    outcome: str
    """better, worse, same, or none: nothing was measured."""
    told: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """One system's answer to a row."""

    system: str
    text: Markup | str
    """With marks where it differs from the expected one."""
    plain: str
    scores: str
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    row: int
    place: str
    kind: str
    prompt: list[tuple[str, str]]
    """Role and text of each message."""
    expected: str
    answers: list[Answered]


def write_page(
    report: Report, *, folder: Path, answers: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]
) -> Path:
    """Writes `folder/report.html`, whole or not at all, and returns its path.

    `answers`: the rows of answers.jsonl.  `metrics`: the events of the run's metrics.jsonl, none for what is not a run.
    Raises OutputError.
    """
    path = folder / "report.html"
    write_whole(path, page(report, answers=answers, metrics=metrics))
    return path


def page(report: Report, *, answers: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> str:
    """The page's HTML; the same inputs give the same bytes."""
    measure = measure_of(report, answers)
    chosen, counts = choose(answers, measure=measure, most=MOST_EXAMPLES)
    kinds = KINDS[measure.yes_no if measure else True] | {"unscored": "not scored"}
    filters: dict[str, Callable[..., Any]] = {
        "spoken": spoken,
        "outcome": outcome,
        "unit": unit_of_comparison,
        "limit": _limit,
        "p": _p_value,
    }
    html = environment("onlay.evaluation", filters=filters).get_template("page.html.jinja").render(
        report=report,
        verdict=(*VERDICTS[report.verdict], _gates_told(report)),
        tiles=tiles(report),
        gates=report.gates,
        plots=_plots(report, metrics),
        measure=measure,
        examples=[_example(kind, row) for kind, row in chosen],
        kinds=[(kind, kinds[kind], counts[kind], sum(one == kind for one, _ in chosen)) for kind in kinds if kind in counts],
        facts=_facts(report),
        unit_in_report=unit_in_report,
    )  # fmt: skip
    return clean(html)


def _gates_told(report: Report) -> str:
    failed, every = sum(not gate.passed for gate in report.gates), len(report.gates)
    if not every:
        return "The recipe has no gates: read the numbers and decide."
    if not failed:
        return "The gate is passed." if every == 1 else f"All {every} gates are passed."
    if every == 1:
        return "The gate is not passed."
    return f"{failed} of {every} gates {'is' if failed == 1 else 'are'} not passed."


def tiles(report: Report) -> list[Tile]:
    """Better?  Forgot?  Safe?  And what these rows could not have shown."""
    found = [_headline(report)]
    found.append(_worst("Forgetting", report.forgetting, missing="Nothing says what the adapter forgot."))
    found.append(_worst("Safety", report.safety, missing="Nothing says whether the adapter refuses what it should."))
    score = report.comparisons[0].score if report.comparisons else next(iter(report.smallest_difference), None)
    if score in report.smallest_difference:
        unit, least = unit_in_report(report, score), report.smallest_difference[score]
        number = f"{unit.number(least).lstrip('+')} {unit.name}".rstrip()
        told = f"of {spoken(score)}: any true difference this large or larger shows in {report.rows:,} rows, four times of five."
        found.append(Tile(label="Detectable", number=number, outcome="none", told=told))
    return found


def _headline(report: Report) -> Tile:
    if report.comparisons:
        one = report.comparisons[0]
        return _tile(f"{spoken(one.score)} against {one.against}", one)
    scores = {name: value for name, value in report.scores.get(report.system, {}).items() if value is not None}
    if not scores:
        return Tile(label="Quality", number="not measured", outcome="none", told="No score was asked for.")
    score, value = next(iter(scores.items()))
    told = "One system answered: there is nothing to compare it with."
    return Tile(label=spoken(score), number=unit_in_report(report, score).value(value), outcome="none", told=told)


def _worst(label: str, comparisons: Sequence[Comparison], *, missing: str) -> Tile:
    """The comparison that says the worst: of those that got worse, or else of all, the one with the smallest p-value."""
    if not comparisons:
        return Tile(label=label, number="not measured", outcome="none", told=missing)
    worse = [one for one in comparisons if outcome(one) == "worse"]
    one = min(worse or comparisons, key=lambda one: one.p_value)
    return _tile(f"{label}: {spoken(one.score)}", one)


def _tile(label: str, one: Comparison) -> Tile:
    number = unit_of_comparison(one).difference(one.difference)
    return Tile(label=label, number=number, outcome=outcome(one), told=one.verdict)


def _plots(report: Report, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Markup | None]:
    """None where there is nothing to draw."""
    minus = f"{report.system} minus the other system"
    changed, refused = "What changed on general text and checks", "How often systems refuse"
    curves = "Training and held-out loss, and learning rate"
    return {
        "comparisons": forest(report.comparisons, name="comparisons", title=minus),
        "scores": bars(report.scores, system=report.system, name="scores", title="Scores of every system"),
        "forgetting": forest(report.forgetting, name="forgetting", title=changed),
        "safety": bars(_rates(report.safety), system=report.system, name="safety", title=refused),
        "losses": losses(metrics, name="losses", title=curves),
    }


def _rates(safety: Iterable[Comparison]) -> dict[str, dict[str, float | None]]:
    rates: dict[str, dict[str, float | None]] = {}
    for one in safety:
        rates.setdefault(one.against, {})[one.score] = one.other
        rates.setdefault(one.system, {})[one.score] = one.value
    return rates


def _example(kind: str, row: Mapping[str, Any]) -> Example:
    answers = []
    expected = row["expected"]
    for system, answer in row["answers"].items():
        told = [f"{spoken(score)} {_score(score, value)}" for score, value in row["scores"].get(system, {}).items() if value is not None]  # fmt: skip
        whole = max(len(answer), len(expected)) <= MOST_CHARACTERS
        alone = differs_in_white_space_alone(answer, expected=expected)
        note = (
            "differs from the expected answer in white space alone"
            if alone
            else ""
            if answer.strip()
            else "empty answer"
        )
        text = marked(answer, expected=expected) if whole else answer
        answers.append(Answered(system=system, text=text, plain=answer, scores=", ".join(told), note=note))
    prompt = [(message["role"], _content(message)) for message in row["prompt"]]
    return Example(row=row["row"], place=row["place"], kind=kind, prompt=prompt, expected=expected, answers=answers)


def _score(score: str, value: float) -> str:
    return {0.0: "0", 1.0: "1"}.get(value) or unit_of(score, [value]).value(value)


def _content(message: Mapping[str, Any]) -> str:
    """A message's text; one with calls or parts as JSON, without its role."""
    rest = {name: value for name, value in message.items() if name != "role" and value is not None}
    if set(rest) == {"content"} and isinstance(rest["content"], str):
        return str(rest["content"])
    return json.dumps(rest, ensure_ascii=False, indent=1)


def _facts(report: Report) -> list[tuple[str, str]]:
    """What the numbers were made with: digests of everything, how it was done where there was a choice, the environment."""
    base = report.base if report.base_revision is None else f"{report.base} at {report.base_revision}"
    rows = [
        ("digest of this report", report.digest),
        ("base", base),
        ("data", report.data),
        ("digest of the data", report.data_digest),
    ]
    rows += [(f"digest of {kind}", digest) for kind, digest in sorted(report.sources.items())]
    rows += [("evaluated in", f"{report.seconds:,.0f} s"), ("folder", report.path)]
    rows += [(f"how: {name}", value) for name, value in report.notes.items()]
    if report.latency_ms is not None:
        rows.append(("milliseconds a token", f"{report.latency_ms:.1f}"))
    return rows + [(name, value) for name, value in report.environment.items() if name != "command"]


def _limit(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.4g}".replace("-", "−")


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
