"""An evaluation in a terminal: the verdict, what decided it, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onlay.evaluation.units import outcome, spoken, unit_in_report, unit_of_comparison
from onlay.records import Comparison, Report

VERDICTS = {"ship": "bold green", "do not ship": "bold red", "no gates": "bold yellow"}
OUTCOMES = {"better": ("▲", "green"), "worse": ("▼", "red"), "same": ("○", "dim")}


def report_view(report: Report, *, run: str | None = None) -> Group:
    """`run`: the run folder that was evaluated, where it is one; it can be registered."""
    return Group(*_parts(report, run))


def _parts(report: Report, run: str | None) -> Iterator[RenderableType]:
    head = f"{report.system} on {report.rows:,} {'row' if report.rows == 1 else 'rows'} of {report.data}"
    yield Text.assemble((report.verdict.upper(), VERDICTS[report.verdict]), "  ", head)
    for reason in report.reasons:
        yield Text(f"  {reason}")
    every = (("scores", report.comparisons), ("forgetting", report.forgetting), ("safety", report.safety))
    compared = [(what, one) for what, comparisons in every for one in comparisons]
    if compared:
        yield Text("")
        yield _comparisons(compared)
    else:
        yield from _scores(report)
        yield from _likelihood(report)
    if report.gates:
        yield Text("")
        yield _gates(report)
    if report.risks:
        yield Text("\nRisks", "bold")
        yield from (Text(f"  {risk}", "yellow") for risk in report.risks)
    if report.likely_causes:
        yield Text("\nLikely causes of repetition and answers that never stop", "bold")
        rates, *causes = report.likely_causes
        yield Text(f"  {rates}")
        yield from (Text(f"  {number}. {cause}") for number, cause in enumerate(causes, start=1))
    yield Text("")
    yield Text(_next(report, run), style="cyan")


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(
            column, justify="right" if column in right else "left", overflow="fold", no_wrap=column in right
        )
    return table


def _comparisons(compared: Sequence[tuple[str, Comparison]]) -> Table:
    right = ("ours", "theirs", "difference", "95 %")
    table = _table("", "score", "against", *right, right=right)
    before = "scores"
    for what, one in compared:
        if what != before:
            table.add_section()
            table.add_row("", Text(what, style="bold"))
        before = what
        unit, (sign, style) = unit_of_comparison(one), OUTCOMES[outcome(one)]
        lower = "" if one.higher_is_better else " ↓"
        interval = f"{unit.number(one.low)} to {unit.number(one.high)}"
        numbers = (unit.value(one.value), unit.value(one.other), unit.number(one.difference), interval)
        table.add_row(Text(sign, style), Text(spoken(one.score) + lower), Text(one.against), *map(Text, numbers))
    return table


def _scores(report: Report) -> Iterator[RenderableType]:
    """Of a single system: there is nothing to compare it with."""
    scores = report.scores.get(report.system, {})
    if scores:
        table = _table("score", "value", right=("value",))
        for score, value in scores.items():
            table.add_row(Text(spoken(score)), unit_in_report(report, score).value(value))
        yield Text("")
        yield table


def _likelihood(report: Report) -> Iterator[RenderableType]:
    mine = [one for one in report.likelihood if one.system == report.system]
    if mine:
        numbers = ("tokens", "nats per token", "perplexity", "bits per byte")
        table = _table("text", *numbers, right=numbers)
        for one in mine:
            perplexity = f"{one.perplexity:,.2f}"
            row = (f"{one.tokens:,}", f"{one.nats_per_token:.4f}", perplexity, f"{one.bits_per_byte:.4f}")
            table.add_row(Text(spoken(one.text)), *row)
        yield Text("")
        yield table


def _gates(report: Report) -> Table:
    table = _table("gate", "limit", "found", "", "reason", right=("limit", "found"))
    for gate in report.gates:
        found = "not measured" if gate.found is None else f"{gate.found:.4g}"
        passed = Text("passed", "green") if gate.passed else Text("failed", "red")
        table.add_row(Text(spoken(gate.name)), f"{gate.limit:.4g}", found, passed, Text(gate.reason))
    return table


def _next(report: Report, run: str | None) -> str:
    page = f"The whole report: {report.path}/report.html"
    if report.verdict == "do not ship" and report.failures:
        return f"{page}\nThe {report.failures:,} worst rows, ready to be corrected and trained on: {report.path}/failures.jsonl"
    if report.verdict == "ship" and run is not None:
        return f"{page}\nNext: onlay register {run} --name NAME"
    return page
