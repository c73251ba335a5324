"""`evaluate`: is it better than the base, and may it ship."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from onlay import ledger
from onlay.errors import OutputError
from onlay.records import Report, Run, SeedGain
from onlay.stages.events import Report as Tell
from onlay.stages.events import silent
from onlay.stages.measurement import measure_subject, schema_of
from onlay.stages.reporting import (
    conclude,
    endpoint_of,
    judge_answers,
    unfinished_report,
    write_answers,
    write_report,
)
from onlay.stages.reports import REPORT_FOLDER
from onlay.stages.subjects import Subject, find_subject
from onlay.stages.training import train

if TYPE_CHECKING:
    from onlay.evaluation.findings import Findings


def evaluate(
    what: str | Path,
    *,
    others: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    data: str | None = None,
    seeds: int = 1,
    output: str | Path | None = None,
    report: Tell = silent,
) -> Report:
    """Compares a run's adapter with its base and other baselines, and says whether its gates are passed.

    `what`: a run folder, an adapter folder, a registered version, or a model (these three need `data`).  `others`: more
    adapters for the same base, evaluated in the same load.  `data`: rows in place of the run's own held-out ones.
    `overrides` are of the sections evaluation and release.  `seeds`: so many runs of the recipe that differ in nothing but
    the seed; those that are missing are trained.  Writes report.json, report.html, answers.jsonl and failures.jsonl into
    `output` (default: RUN/report).  Raises OnlayError.
    """
    began = time.perf_counter()
    subject = find_subject(what, others=others, overrides=overrides, data=data, report=report)
    folder = Path(output) if output is not None else subject.folder / REPORT_FOLDER
    _check_before(subject, folder, seeds=seeds)
    command = ["onlay", "evaluate", str(what)]
    command += [part for other in others for part in ("--with", str(other))] + (["--data", data] if data else [])
    command += [part for override in overrides for part in ("--set", override)]
    command += ["--seeds", str(seeds)] if seeds > 1 else []
    with unfinished_report(folder, tell=report) as unfinished:
        measured = measure_subject(subject, report=report, keep=lambda rows: write_answers(unfinished, rows))
        gains, trained = _over_seeds(
            subject, measured.found, seeds=seeds, overrides=overrides, data=data, report=report
        )  # fmt: skip
        measured = replace(measured, trained=measured.trained or trained)
        judged, failure = judge_answers(subject, measured)
        made = conclude(
            subject, measured, judged=judged, judge_failure=failure, gains=gains, folder=folder,
            seconds=time.perf_counter() - began, command=shlex.join(command),
        )  # fmt: skip
        write_report(made, measured.found, subject, unfinished=unfinished, folder=folder)
    ledger.append(made, folder)
    if failure is not None:
        raise failure  # What was measured is kept, and says so.
    return made


def _check_before(subject: Subject, folder: Path, *, seeds: int) -> None:
    """What can be wrong is told before anything large is loaded."""
    from onlay.evaluation.gates import check_gate_names
    from onlay.evaluation.scores import find_score

    evaluation = subject.recipe.evaluation
    check_gate_names(subject.gates)
    for name in evaluation.scores if evaluation.scores != "auto" else ():
        find_score(name)
    kept = folder.exists() and not (folder / "report.json").is_file()
    if kept and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists already and holds no report.", "Choose another --output.")
    if seeds > 1 and subject.run is None:
        raise OutputError(
            f"--seeds {seeds} trains runs of a recipe, and {subject.what} is no run.", "Give a run folder."
        )
    schema_of(subject)
    endpoint = endpoint_of(subject)
    if endpoint is not None:
        list(endpoint.ask(()))  # Nothing is asked, but a missing key shows.
    if evaluation.tasks:
        from onlay.evaluation.harness import run_tasks

        path = Path(evaluation.tasks_path) if evaluation.tasks_path else None
        run_tasks(evaluation.tasks, systems={}, include_path=path)  # Nobody is asked, but an unknown task shows.


def _over_seeds(
    subject: Subject, found: Findings, *, seeds: int, overrides: Sequence[str], data: str | None,
    report: Tell,
) -> tuple[list[SeedGain], str | None]:  # fmt: skip
    """Trains and evaluates what is missing of `seeds` runs, and tells the gain apart from the luck of the seed.

    Also why no gate may pass on it: rows given with `data` may be held out by one seed and trained on by the next.
    """
    if seeds < 2:
        return [], None
    from onlay.evaluation.compare import combine_seeds
    from onlay.evaluation.scores import SCORES

    assert subject.run is not None
    first = subject.recipe.training.seed
    trained: str | None = None
    every = {str(first): {(one.score, one.against): one.difference for one in found.comparisons}}
    for seed in range(first + 1, first + seeds):
        folder = subject.folder / "seeds" / str(seed)
        training = subject.recipe.training.model_copy(update={"seed": seed, "output": str(folder)})
        unfinished = (folder / "run.json").is_file() and Run.load(folder).status != "finished"
        if unfinished:
            train(resume=folder, report=report)
        elif not (folder / "run.json").is_file():
            report(f"training with seed {seed}")
            train(subject.recipe.model_copy(update={"training": training}), report=report)
        # Each seed holds out other rows, so each run is asked its own.
        again = find_subject(folder, others=(), overrides=overrides, data=data, report=report)
        mine = measure_subject(again, report=report)
        every[str(seed)] = {(one.score, one.against): one.difference for one in mine.found.comparisons}
        if mine.trained is not None:
            trained = trained or f"with seed {seed} {mine.trained}"
    gains = []
    for score, against in every[str(first)]:
        values = {seed: found[score, against] for seed, found in every.items() if (score, against) in found}
        if len(values) < 2 or score not in SCORES:
            continue
        one = combine_seeds(SCORES[score], list(values.values()))
        gains.append(SeedGain(
            score=score, against=against, gains=values, mean=one.mean, standard_error=one.standard_error, low=one.low,
            high=one.high, p_value=one.p_value, verdict=one.verdict,
        ))  # fmt: skip
    return gains, trained
