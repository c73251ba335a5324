from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from onlay.console.evaluation import report_view
from onlay.records import Report
from tests.evaluation.reports import bare_report, comparison, full_report


def shown(report: Report, *, run: str | None = None, width: int = 120) -> str:
    console = Console(file=StringIO(), width=width, force_terminal=False)
    console.print(report_view(report, run=run))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 140])
def test_verdict_numbers_gates_risks_and_causes(width: int) -> None:
    report = full_report()
    text = shown(report, width=width)
    assert text.startswith("DO NOT SHIP  adapter on 300 rows of support.jsonl")
    flat = " ".join(text.split())
    for told in [*report.reasons, *report.risks, *report.likely_causes]:
        assert told in flat
    line = next(line for line in text.splitlines() if "exact match  " in line and "base" in line)
    assert line.split() == ["▲", "exact", "match", "base", "71.3", "%", "58.9", "%", "+12.4", "+9.1", "to", "+15.8"]
    assert any("nats per token ↓" in line and "▼" in line for line in text.splitlines())
    assert text.count("  passed  ") == 2 and text.count("  failed  ") == 2 and "not measured" in text
    assert all(len(line) <= width for line in text.splitlines())


def test_what_to_do_next() -> None:
    gates = full_report().gates[:1]
    ship = full_report(verdict="ship", gates=gates)
    assert "Next: onlay register runs/support --name NAME" in shown(ship, run="runs/support")
    assert "onlay register" not in shown(ship)
    stop = shown(full_report(), run="runs/support")
    assert "onlay register" not in stop and "The 50 worst rows" in stop and "evaluation/failures.jsonl" in stop
    assert "failures.jsonl" not in shown(full_report(failures=0))


def test_how_many_answers_are_concerned_is_no_cause() -> None:
    text = shown(full_report())
    assert "\n  6% of the answers end in a loop" in text
    assert "\n  1. Too many epochs" in text and "\n  2. Duplicate rows" in text and "\n  3. " not in text


def test_one_system_shows_its_likelihood() -> None:
    of_base, _, _, of_adapter = full_report().likelihood
    lines = shown(bare_report(likelihood=[of_base, of_adapter], scores={})).splitlines()
    [line] = [line for line in lines if line.startswith("held out")]
    assert line.split() == ["held", "out", "21,480", "1.8420", "6.31", "0.6644"]
    assert any("nats per token" in line and "perplexity" in line for line in lines)
    assert not [line for line in lines if line.startswith("general")]  # the adapter's
    assert shown(bare_report(rows=1)).startswith("NO GATES  base on 1 row of")


def test_one_system_shows_its_scores() -> None:
    text = shown(bare_report())
    assert text.startswith("NO GATES") and "exact match" in text and "50.0 %" in text and "out/report.html" in text
    assert "exact match" not in shown(bare_report(scores={}))


def test_markup_in_names_is_text() -> None:
    one = comparison("[red]x[/]", against="[/bold]")
    report = full_report(comparisons=[one], reasons=["[bold]"], risks=["[/]"], data="[x]")
    text = shown(report)
    for told in ("[red]x[/]", "[/bold]", "[bold]", "[/]", "[x]"):
        assert told in text
