"""From what was measured to a Report and its folder."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay import ledger
from onlay.errors import OnlayError, OutputError
from onlay.records import Comparison, Judged, Report, SeedGain, write_whole
from onlay.stages.contamination import hold_back
from onlay.stages.events import Report as Tell
from onlay.stages.measurement import Measured
from onlay.stages.subjects import Subject

if TYPE_CHECKING:
    from onlay.data.split import Split
    from onlay.evaluation.endpoint import Endpoint
    from onlay.evaluation.findings import Findings
    from onlay.evaluation.measuring import Material

MOST_FAILURES = 100
"""Rows of failures.jsonl."""


def endpoint_of(subject: Subject) -> Endpoint | None:
    from onlay.evaluation.endpoint import Endpoint

    evaluation = subject.recipe.evaluation
    if evaluation.judge_url is None:
        return None
    assert evaluation.judge_model is not None
    return Endpoint(base_url=evaluation.judge_url, model=evaluation.judge_model, key_variable=evaluation.judge_key)


def conclude(
    subject: Subject, measured: Measured, *, judged: list[Judged], judge_failure: OnlayError | None,
    gains: list[SeedGain], folder: Path, seconds: float, command: str,
) -> Report:  # fmt: skip
    """The Report: gates held against what was found, the verdict, and what could still be wrong."""
    from onlay.evaluation.causes import is_problem, likely_causes
    from onlay.evaluation.gates import Found, check_gates, decide
    from onlay.model.stack import describe_stack

    recipe, run, dataset = subject.recipe, subject.run, subject.dataset
    found, measurements, material = measured.found, measured.measurements, measured.material
    systems, left_out = measured.systems, measured.left_out
    assert measurements.device is not None
    trained = dataset.splits["train"].rows if dataset is not None else None
    against = Found(
        comparisons=_over_seeds(found.comparisons, gains), forgetting=found.forgetting, safety=found.safety,
        latency_ms=measurements.latency_ms, trained_rows=trained,
    )  # fmt: skip
    gates = hold_back(check_gates(subject.gates, against), measured.trained)
    notes = [f"{measured.trained[:1].upper()}{measured.trained[1:]}."] if measured.trained is not None else []
    notes += [*found.notes, *(f"{count:,} {why} were not asked." for why, count in left_out.items())]
    if not material.questions:
        notes.append("No row asks anything, so nothing was answered, scored or judged.")
    notes += [f"The judge failed: {judge_failure.problem}"] if judge_failure is not None else []
    notes += [f"The gates were edited after training began: {edit}." for edit in subject.gate_edits]
    notes += [f"Over seeds: {one.score} against {one.against} is {one.verdict}." for one in gains]
    decision = decide(gates=gates, found=against, smallest_difference=found.smallest_difference, notes=notes)
    _, source, digest = subject.rows()
    facts = subject.facts
    sources = {"recipe": recipe.digest, "data": digest}
    if run is not None and dataset is not None and facts is not None:
        sources |= {"run": run.digest, "dataset": dataset.digest, "model": facts.digest}
    sources |= {"weights": subject.weights} if subject.weights is not None else {}
    rates = found.scores.get(subject.judged, {})
    return Report(
        sources=sources, path=str(folder), system=subject.judged,
        systems={system.name: system.told for system in systems}, base=subject.section.base,
        base_revision=facts.revision if facts is not None else subject.section.revision, data=source, data_digest=digest,
        rows=len(material.questions), left_out=left_out, scores=found.scores, comparisons=found.comparisons,
        smallest_difference=found.smallest_difference, likelihood=found.likelihood, forgetting=found.forgetting,
        safety=found.safety, judged=judged, seeds=gains,
        latency_ms=measurements.latency_ms, gates=gates, gate_edits=subject.gate_edits, verdict=decision.verdict,
        reasons=decision.reasons, risks=decision.risks, failures=_failures(found, subject.judged),
        likely_causes=likely_causes(rates, _evidence(subject, material)) if is_problem(rates) else [], notes=measurements.notes,
        seconds=round(seconds, 2), environment=describe_stack(measurements.device) | {"command": command},
    )  # fmt: skip


def _over_seeds(comparisons: Sequence[Comparison], gains: Sequence[SeedGain]) -> list[Comparison]:
    """With several seeds gates judge the gain over them, not that of the run which happens to be the first."""
    known = {(one.score, one.against): one for one in gains}
    found = []
    for one in comparisons:
        over = known.get((one.score, one.against))
        if over is not None:
            one = one.model_copy(
                update={
                    "difference": over.mean, "low": over.low, "high": over.high, "p_value": over.p_value,
                    "verdict": over.verdict,
                }
            )  # fmt: skip
        found.append(one)
    return found


def _failures(found: Findings, judged: str) -> int:
    """Rows that `write_report` will write into failures.jsonl."""
    known = [row["scores"][judged][found.main] for row in found.answers if row["expected"]]
    failed: int = sum(value is not None and value < _best(found) for value in known)
    return min(MOST_FAILURES, failed)


def _best(found: Findings) -> float:
    return 100.0 if found.main_score.unit == "points" else 1.0


def _evidence(subject: Subject, material: Material) -> Any:
    """What a run's records and rows say about why answers might loop or not stop."""
    from onlay.data.split import open_split
    from onlay.evaluation.causes import Evidence

    ends, examples, duplicates, repeats, losses = None, None, None, None, ()
    epochs, dropout = None, getattr(subject.recipe.adapter, "dropout", None)
    if subject.run is not None and subject.dataset is not None:
        split = open_split(subject.dataset, "train")
        examples = len(split)
        ends = _trained_ends(split, subject.dataset.stop_token_ids)
        duplicates, repeats = _repetitions(split)
        losses = tuple(
            event["loss"] for event in _metrics(subject) if event["event"] == "evaluation" and event["step"] > 0
        )
        epochs = subject.run.steps * subject.recipe.training.batch_size / max(1, examples)
    return Evidence(
        end_tokens_trained=ends, trained_examples=examples, epochs=epochs, held_out_losses=losses,
        duplicate_share=duplicates, most_repeats=repeats, dropout=dropout, temperature=material.sampling.temperature,
        repetition_penalty=material.sampling.repetition_penalty, max_new_tokens=material.sampling.max_new_tokens,
        longest_expected_tokens=material.longest_expected_tokens,
    )  # fmt: skip


def _trained_ends(split: Split, stop_token_ids: Sequence[int]) -> int:
    """Examples that train a token that ends an answer."""
    import numpy as np

    stops = np.array(stop_token_ids)
    examples = map(split.example, range(len(split)))
    return sum(bool(np.isin(ids[flags], stops).any()) for ids, flags in examples)


def _repetitions(split: Split) -> tuple[float, int]:
    """Share of the training rows that repeat another row, and how often an epoch trains the one that it trains most often.

    Examples with the same tokens from the same place are one row that a weight (or the general share) repeats.
    """
    of_row = Counter((split.example(index)[0].tobytes(), split.place(index)) for index in range(len(split)))
    different = {tokens for tokens, _ in of_row}
    return (len(of_row) - len(different)) / max(1, len(of_row)), max(of_row.values(), default=1)


def _metrics(subject: Subject) -> list[dict[str, Any]]:
    from onlay.training.metrics_log import read_metrics

    path = subject.folder / "metrics.jsonl"
    return list(read_metrics(path)) if subject.run is not None and path.is_file() else []


def judge_answers(subject: Subject, measured: Measured) -> tuple[list[Judged], OnlayError | None]:
    """The judge's choice between the judged system and each other one; and what it failed with, which must not cost the
    answers: replies that came are kept, and asking again goes on from there."""
    from onlay.evaluation.judge import CRITERIA, Pair, judge_pairs

    endpoint, answers = endpoint_of(subject), measured.found.answers
    judged: list[Judged] = []
    if endpoint is None or not answers:
        return judged, None
    for system in measured.systems:
        if system.name == subject.judged:
            continue
        pairs = [
            Pair(
                prompt=[{"role": turn["role"], "content": turn.get("content") or ""} for turn in row["prompt"]],
                answer=row["answers"][subject.judged], other=row["answers"][system.name], expected=row["expected"] or None,
            )
            for row in answers
        ]  # fmt: skip
        try:
            done = judge_pairs(
                pairs, ask=endpoint.ask, judge=endpoint.name, system=subject.judged, against=system.name,
                criteria=subject.recipe.evaluation.judge_criteria or CRITERIA,
                cache=ledger.home() / "judge" / "replies.jsonl",
            )  # fmt: skip
        except OnlayError as error:
            return judged, error
        judged.append(done.record)
    return judged, None


@contextmanager
def unfinished_report(folder: Path, *, tell: Tell) -> Iterator[Path]:
    """A folder beside `folder`, made before anything is measured, so that one that cannot be written costs no work.

    What fails before there are answers leaves nothing; after that the folder stays, and is said, until the next evaluation
    into the same place.  Raises OutputError where it cannot be made.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    new = [path for path in unfinished.parents if not path.exists()]
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_whole(unfinished / ".writable", "\n")  # A full disk may have room for a folder.
        (unfinished / ".writable").unlink()
    except (OSError, OutputError) as error:
        _remove(unfinished, new)
        why = error.strerror if isinstance(error, OSError) else error.problem
        raise OutputError(
            f"{folder} cannot be written: {why}.", "Choose another --output, or free disk space."
        ) from None
    answers = unfinished / "answers.jsonl"
    try:
        yield unfinished
    except OnlayError as error:
        if answers.is_file():
            error.remedy = f"{error.remedy} The answers so far are in {answers}."
        raise
    finally:  # It has another name by now, unless something failed or was interrupted.
        if answers.is_file():
            tell(f"the answers so far are in {answers}")
        else:
            _remove(unfinished, new)


def _remove(unfinished: Path, parents: Sequence[Path]) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)
    for path in parents:  # Those that were made with it, the innermost first.
        with suppress(OSError):
            path.rmdir()


def write_answers(unfinished: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_whole(unfinished / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_report(made: Report, found: Findings, subject: Subject, *, unfinished: Path, folder: Path) -> None:
    """The report's folder, complete before it takes its name; an earlier report there makes room."""
    from onlay.evaluation.failures import write_failures
    from onlay.evaluation.page import write_page

    write_answers(unfinished, found.answers)
    write_whole(unfinished / "failures.jsonl", "")
    if found.answers:
        against = "base" if "base" in made.systems and made.system != "base" else None
        write_failures(
            unfinished / "failures.jsonl", found.answers, system=made.system, score=found.main, against=against,
            limit=MOST_FAILURES, good=_best(found),
        )  # fmt: skip
    write_page(made, folder=unfinished, answers=found.answers, metrics=_metrics(subject))
    made.save(unfinished)
    try:
        if folder.exists():
            earlier = folder.with_name(f".{folder.name}.earlier")
            shutil.rmtree(earlier, ignore_errors=True)
            folder.rename(earlier)
            unfinished.rename(folder)
            shutil.rmtree(earlier)
        else:
            unfinished.rename(folder)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error.strerror}.", "Correct its rights, or choose another --output."
        ) from None
