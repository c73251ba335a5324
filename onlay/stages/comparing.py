"""`compare`: which of two systems' answers does a person find better."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from onlay.errors import OutputError
from onlay.records import Judged, Report
from onlay.stages.reports import REPORT_FOLDER


def compare(
    what: str | Path,
    *,
    against: str = "base",
    rows: int | None = None,
    again: int = 0,
    seed: int = 0,
    ask: Callable[[str], str],
) -> tuple[Judged, int]:
    """A person's choice between two systems' answers of a report, in random order, unnamed; and how many rows are open.

    `what`: a run with a report, or a report's folder.  Choices go to
    choices-FOLDER-SYSTEM-OTHER.jsonl beside the report's folder (FOLDER is its name) at once, so it can be interrupted.
    """
    from onlay.evaluation.blind import ask_pairs, draw_pairs, judged_by_person

    folder = Path(what) if (Path(what) / "report.json").is_file() else Path(what) / REPORT_FOLDER
    if not (folder / "answers.jsonl").is_file():
        raise OutputError(f"{what} has no answers to compare yet.", f"onlay evaluate {what}")
    made = Report.load(folder)
    if against not in made.systems or against == made.system:
        names = ", ".join(name for name in made.systems if name != made.system) or "none"
        raise OutputError(f"--against {against} did not answer in {folder}.", f"There: {names}.")
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    if not answers:
        raise OutputError(
            f"{folder} has no answers to compare: no row asked anything.", f"Its losses: {folder / 'report.html'}"
        )
    path = folder.parent / f"choices-{folder.resolve().name}-{made.system}-{against}.jsonl"
    pairs = draw_pairs(answers, system=made.system, against=against, seed=seed, most=rows, again=again)
    choices = ask_pairs(pairs, path=path, ask=ask)
    chosen = {(choice.row, choice.again) for choice in choices}
    left = sum((pair.row, pair.again) not in chosen for pair in pairs)
    return judged_by_person(choices, system=made.system, against=against), left
