"""`evaluate`: is it better than the base, and may it ship.  `compare`: which of two does a person find better."""

from __future__ import annotations

import json
import math
import random
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay import ledger
from onlay.errors import DataError, OutputError
from onlay.recipe import LIMIT_GATES
from onlay.records import Judged, Report, Run, SeedGain, write_whole
from onlay.stages.events import Loading, silent
from onlay.stages.events import Report as Tell
from onlay.stages.subjects import Subject, find_subject
from onlay.stages.training import train

if TYPE_CHECKING:
    from onlay.data.read import Conversation, Document
    from onlay.evaluation.findings import Findings
    from onlay.evaluation.measuring import Material, Measurements
    from onlay.evaluation.systems import Bench, System

REPORT_FOLDER = "report"
MOST_PASSAGES = 1000
"""Held-out examples whose likelihood is measured, evenly spread over all of them."""
SPARE_TOKENS = 8
MOST_FAILURES = 100
"""Rows of failures.jsonl."""


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
    found, measurements, material, systems, left_out = _measure(subject, report=report)
    gains = _over_seeds(subject, found, seeds=seeds, overrides=overrides, data=data, report=report)
    command = ["onlay", "evaluate", str(what)]
    command += [part for other in others for part in ("--with", str(other))] + (["--data", data] if data else [])
    command += [part for override in overrides for part in ("--set", override)]
    command += ["--seeds", str(seeds)] if seeds > 1 else []
    made = _conclude(
        subject, found, measurements, material, systems, left_out=left_out, gains=gains, folder=folder,
        seconds=time.perf_counter() - began, command=shlex.join(command),
    )  # fmt: skip
    _write(made, found, subject, folder)
    ledger.append(made, folder)
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
    _schema(subject)
    endpoint = _endpoint(subject)
    if endpoint is not None:
        list(endpoint.ask(()))  # Nothing is asked, but a missing key shows.
    if evaluation.tasks:
        from onlay.evaluation.harness import run_tasks

        path = Path(evaluation.tasks_path) if evaluation.tasks_path else None
        run_tasks(evaluation.tasks, systems={}, include_path=path)  # Nobody is asked, but an unknown task shows.


def _schema(subject: Subject) -> dict[str, Any] | None:
    path = subject.recipe.evaluation.json_schema
    if path is None:
        return None
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"evaluation.json_schema = {path} is no file with a JSON schema: {error}.", "Correct the file or the path."
        ) from None


def _endpoint(subject: Subject) -> Any:
    from onlay.evaluation.endpoint import Endpoint

    evaluation = subject.recipe.evaluation
    if evaluation.judge_url is None:
        return None
    assert evaluation.judge_model is not None
    return Endpoint(base_url=evaluation.judge_url, model=evaluation.judge_model, key_variable=evaluation.judge_key)


# ------------------------------------------------------------------------------------------------------------ measure


def _measure(
    subject: Subject, *, report: Tell
) -> tuple[Findings, Measurements, Material, list[System], dict[str, int]]:
    rows, _, _ = subject.rows()
    general = _general_material(subject)
    # What imports torch comes after what can be wrong.
    from onlay.evaluation.findings import Asked, find
    from onlay.evaluation.measuring import Measurements, measure_systems

    measurements, material = Measurements(), None
    systems: list[System] = []
    left_out: dict[str, int] = {}
    for bench, mine in subject.benches(report=report):
        if material is None:
            material = _material(subject, bench, mine, rows, left_out, general)
        mine = _with_shots(subject, bench, mine, material)
        measure_systems(
            bench, mine, material, measurements, judged=subject.judged,
            tell=lambda what, done, total: report(Loading(what, done, total)),
        )  # fmt: skip
        systems += mine
    assert material is not None
    evaluation = subject.recipe.evaluation
    scores = None if evaluation.scores == "auto" else evaluation.scores
    asked = Asked(
        scores=scores, gated=[name for name in subject.gates if name not in LIMIT_GATES], schema=_schema(subject),
        pattern=evaluation.pattern, seed=subject.recipe.training.seed,
    )  # fmt: skip
    return find(material, measurements, judged=subject.judged, asked=asked), measurements, material, systems, left_out


def _general_material(subject: Subject) -> dict[str, Any]:
    """Texts, checks and prompts: bundled ones and the user's files, read before anything is loaded."""
    from onlay.evaluation.general import read_checks, read_passages
    from onlay.evaluation.safety import read_prompts

    evaluation = subject.recipe.evaluation
    texts = {"general": [passage.text for passage in read_passages()]}
    texts |= {path: [passage.text for passage in read_passages(path)] for path in evaluation.general}
    checks = {"general checks": read_checks()} | {path: read_checks(path) for path in evaluation.checks}
    prompts = [*read_prompts(), *(prompt for path in evaluation.safety for prompt in read_prompts(path))]
    for path, rows in (texts | checks).items():
        if len(rows) < 2:
            raise DataError(
                f"{path} holds one row, and a comparison needs two or more.",
                "Cut it into pieces: in a .txt file by blank lines.",
            )
    return {"texts": texts, "checks": checks, "prompts": prompts}


def _material(
    subject: Subject,
    bench: Bench,
    systems: Sequence[System],
    rows: Sequence[Conversation | Document],
    left_out: dict[str, int],
    general: dict[str, Any],
) -> Material:
    from onlay.data.read import Conversation
    from onlay.evaluation.measuring import Material
    from onlay.evaluation.systems import questions_of
    from onlay.generation.engine import Sampling

    evaluation = subject.recipe.evaluation
    talks = [row for row in rows if isinstance(row, Conversation)]
    questions = questions_of(talks, template=bench.template)
    _count(left_out, "rows that do not end with an answer", len(talks) - len(questions))
    longest = max((len(bench.tokenizer(one.expected)["input_ids"]) for one in questions), default=0)
    new_tokens = evaluation.max_new_tokens or math.ceil(1.5 * longest) + SPARE_TOKENS
    fits = bench.room([one for one in systems if not one.shots], questions, new_tokens=new_tokens)
    _count(left_out, f"rows whose prompt and {new_tokens} new tokens pass the context", fits.count(False))
    questions = [question for question, fit in zip(questions, fits, strict=True) if fit]
    chosen = _spread(questions, evaluation.answer_rows)
    _count(left_out, f"rows beyond evaluation.answer_rows = {evaluation.answer_rows}", len(questions) - len(chosen))
    if talks and not chosen:
        raise DataError(
            f"None of the {len(talks):,} rows can be asked: {_told(left_out)}.",
            "Lower evaluation.max_new_tokens, or give other rows with --data.",
        )
    sampling = Sampling(
        max_new_tokens=new_tokens, temperature=evaluation.temperature, seed=subject.recipe.training.seed
    )  # fmt: skip
    return Material(
        questions=chosen, longest_expected_tokens=longest,
        held_out=_held_out(subject, bench, rows, left_out), sampling=sampling,
        system_message=subject.recipe.data.system, tasks=evaluation.tasks,
        tasks_path=Path(evaluation.tasks_path) if evaluation.tasks_path else None,
        timed="latency_ms" in subject.gates, **general,
    )  # fmt: skip


def _held_out(subject: Subject, bench: Bench, rows: Sequence[Any], left_out: dict[str, int]) -> list[tuple[Any, Any]]:
    """Token ids and trained flags: as they were prepared for training, or of the rows given."""
    from onlay.data.build import open_split

    if subject.data is None and subject.dataset is not None:
        split = open_split(subject.dataset, "evaluation")
        _count(
            left_out, f"examples beyond {MOST_PASSAGES:,}, for their likelihood,", max(0, len(split) - MOST_PASSAGES)
        )
        return [split.example(index) for index in _spread(range(len(split)), MOST_PASSAGES)]
    context = bench.context_tokens
    encoded = bench.template.encode_batch(_spread(rows, MOST_PASSAGES))
    fitting = [(one.ids, one.trained) for one in encoded if context is None or len(one.ids) <= context]
    _count(left_out, f"rows beyond {MOST_PASSAGES:,}, for their likelihood,", max(0, len(rows) - MOST_PASSAGES))
    _count(left_out, "rows longer than the context, for their likelihood,", len(encoded) - len(fitting))
    return fitting


def _with_shots(subject: Subject, bench: Bench, systems: Sequence[System], material: Material) -> list[System]:
    """The few-shot baseline gets its examples: drawn from the training rows by the seed, as many as fit."""
    if not any(system.name == "few-shot" for system in systems):
        return list(systems)
    rows = subject.shot_rows(material.questions)
    count = subject.recipe.evaluation.shots
    drawn = random.Random(subject.recipe.training.seed).sample(rows, min(count, len(rows)))
    shots = bench.shots_that_fit(drawn, material.questions, new_tokens=material.sampling.max_new_tokens)
    told = f"the base with {len(shots)} examples in context"
    return [replace(system, shots=shots, told=told) if system.name == "few-shot" else system for system in systems]


def _spread(rows: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the rows, evenly spread, in order."""
    if len(rows) <= most:
        return list(rows)
    return [rows[i * len(rows) // most] for i in range(most)]


def _count(left_out: dict[str, int], why: str, count: int) -> None:
    if count:
        left_out[why] = count


def _told(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {why}" for why, count in left_out.items()) or "there are none"


# -------------------------------------------------------------------------------------------------------------- seeds


def _over_seeds(
    subject: Subject, found: Findings, *, seeds: int, overrides: Sequence[str], data: str | None,
    report: Tell,
) -> list[SeedGain]:  # fmt: skip
    """Trains and evaluates what is missing of `seeds` runs, and tells the gain apart from the luck of the seed."""
    if seeds < 2:
        return []
    from onlay.evaluation.compare import combine_seeds
    from onlay.evaluation.scores import SCORES

    assert subject.run is not None
    first = subject.recipe.training.seed
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
        mine, *_ = _measure(again, report=report)
        every[str(seed)] = {(one.score, one.against): one.difference for one in mine.comparisons}
    gains = []
    for score, against in every[str(first)]:
        values = {seed: found[score, against] for seed, found in every.items() if (score, against) in found}
        if len(values) < 2 or score not in SCORES:
            continue
        one = combine_seeds(SCORES[score], list(values.values()))
        gains.append(SeedGain(
            score=score, against=against, gains=values, mean=one.mean, standard_error=one.standard_error, low=one.low,
            high=one.high, verdict=one.verdict,
        ))  # fmt: skip
    return gains


# ------------------------------------------------------------------------------------------------------------ conclude


def _conclude(
    subject: Subject, found: Findings, measurements: Measurements, material: Material, systems: Sequence[System], *,
    left_out: dict[str, int], gains: list[SeedGain], folder: Path, seconds: float, command: str,
) -> Report:  # fmt: skip
    from onlay.evaluation.causes import likely_causes
    from onlay.evaluation.gates import Found, check_gates, decide
    from onlay.model.stack import describe_stack

    recipe, run, dataset = subject.recipe, subject.run, subject.dataset
    assert measurements.device is not None
    trained = dataset.splits["train"].rows if dataset is not None else None
    against = Found(
        comparisons=found.comparisons, forgetting=found.forgetting, safety=found.safety,
        latency_ms=measurements.latency_ms, trained_rows=trained,
    )  # fmt: skip
    gates = check_gates(subject.gates, against)
    notes = [*found.notes, *(f"{count:,} {why} were not asked." for why, count in left_out.items())]
    if not material.questions:
        notes.append("No row asks anything, so nothing was answered, scored or judged.")
    notes += [f"The gates were edited after training began: {edit}." for edit in subject.gate_edits]
    notes += [f"Over seeds: {one.score} against {one.against} is {one.verdict}." for one in gains]
    decision = decide(gates=gates, found=against, smallest_difference=found.smallest_difference, notes=notes)
    _, source, digest = subject.rows()
    facts = subject.facts
    sources = {"recipe": recipe.digest, "data": digest}
    if run is not None and dataset is not None and facts is not None:
        sources |= {"run": run.digest, "dataset": dataset.digest, "model": facts.digest}
    rates = found.scores.get(subject.judged, {})
    return Report(
        sources=sources, path=str(folder), system=subject.judged,
        systems={system.name: system.told for system in systems}, base=subject.section.base,
        base_revision=facts.revision if facts is not None else subject.section.revision, data=source, data_digest=digest,
        rows=len(material.questions), left_out=left_out, scores=found.scores, comparisons=found.comparisons,
        smallest_difference=found.smallest_difference, likelihood=found.likelihood, forgetting=found.forgetting,
        safety=found.safety, judged=_judge(subject, found, folder, systems), seeds=gains,
        latency_ms=measurements.latency_ms, gates=gates, gate_edits=subject.gate_edits, verdict=decision.verdict,
        reasons=decision.reasons, risks=decision.risks, failures=_failures(found, subject.judged),
        likely_causes=likely_causes(rates, _evidence(subject, material)), notes=measurements.notes,
        seconds=round(seconds, 2), environment=describe_stack(measurements.device) | {"command": command},
    )  # fmt: skip


def _failures(found: Findings, judged: str) -> int:
    """Rows that `_write` will write into failures.jsonl."""
    known = [row["scores"][judged][found.main] for row in found.answers if row["expected"]]
    failed: int = sum(value is not None and value < _best(found) for value in known)
    return min(MOST_FAILURES, failed)


def _best(found: Findings) -> float:
    return 100.0 if found.main_score.unit == "points" else 1.0


def _evidence(subject: Subject, material: Material) -> Any:
    """What a run's records and rows say about why answers might loop or not stop."""
    import numpy as np

    from onlay.data.build import open_split
    from onlay.evaluation.causes import Evidence

    ends, examples, duplicates, losses = None, None, None, ()
    epochs, dropout = None, getattr(subject.recipe.adapter, "dropout", None)
    if subject.run is not None and subject.dataset is not None:
        split = open_split(subject.dataset, "train")
        stops = np.array(subject.dataset.stop_token_ids)
        examples, seen, repeated, ends = len(split), set(), 0, 0
        for index in range(examples):
            ids, flags = split.example(index)
            ends += bool(np.isin(ids[flags], stops).any())
            key = ids.tobytes()
            repeated += key in seen
            seen.add(key)
        duplicates = repeated / max(1, examples)
        losses = tuple(
            event["loss"] for event in _metrics(subject) if event["event"] == "evaluation" and event["step"] > 0
        )
        epochs = subject.run.steps * subject.recipe.training.batch_size / max(1, examples)
    return Evidence(
        end_tokens_trained=ends, trained_examples=examples, epochs=epochs, held_out_losses=losses,
        duplicate_share=duplicates, dropout=dropout, temperature=material.sampling.temperature,
        repetition_penalty=material.sampling.repetition_penalty, max_new_tokens=material.sampling.max_new_tokens,
        longest_expected_tokens=material.longest_expected_tokens,
    )  # fmt: skip


def _metrics(subject: Subject) -> list[dict[str, Any]]:
    from onlay.training.metrics_log import read_metrics

    path = subject.folder / "metrics.jsonl"
    return list(read_metrics(path)) if subject.run is not None and path.is_file() else []


def _judge(subject: Subject, found: Findings, folder: Path, systems: Sequence[System]) -> list[Judged]:
    from onlay.evaluation.judge import CRITERIA, Pair, judge_pairs

    endpoint = _endpoint(subject)
    if endpoint is None or not found.answers:
        return []
    judged = []
    for system in systems:
        if system.name == subject.judged:
            continue
        pairs = [
            Pair(
                prompt=[{"role": turn["role"], "content": turn.get("content") or ""} for turn in row["prompt"]],
                answer=row["answers"][subject.judged], other=row["answers"][system.name], expected=row["expected"] or None,
            )
            for row in found.answers
        ]  # fmt: skip
        done = judge_pairs(
            pairs, ask=endpoint.ask, judge=endpoint.name, system=subject.judged, against=system.name,
            criteria=subject.recipe.evaluation.judge_criteria or CRITERIA,
            cache=ledger.home() / "judge" / "replies.jsonl",
        )  # fmt: skip
        judged.append(done.record)
    return judged


def _write(made: Report, found: Findings, subject: Subject, folder: Path) -> None:
    """The report's folder, complete before it takes its name; an earlier report there makes room."""
    from onlay.evaluation.failures import write_failures
    from onlay.evaluation.page import write_page

    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}.", "Choose another --output.") from None
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.answers)
    write_whole(unfinished / "answers.jsonl", lines)
    write_whole(unfinished / "failures.jsonl", "")
    if found.answers:
        against = "base" if "base" in made.systems and made.system != "base" else None
        write_failures(
            unfinished / "failures.jsonl", found.answers, system=made.system, score=found.main, against=against,
            limit=MOST_FAILURES, good=_best(found),
        )  # fmt: skip
    write_page(made, folder=unfinished, answers=found.answers, metrics=_metrics(subject))
    made.save(unfinished)
    if folder.exists():
        earlier = folder.with_name(f".{folder.name}.earlier")
        shutil.rmtree(earlier, ignore_errors=True)
        folder.rename(earlier)
        unfinished.rename(folder)
        shutil.rmtree(earlier)
    else:
        unfinished.rename(folder)


# ------------------------------------------------------------------------------------------------------------- compare


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

    `what`: a run with a report, or a report's folder.  Choices go to choices.jsonl there at once, so it can be interrupted.
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
    pairs = draw_pairs(answers, system=made.system, against=against, seed=seed, most=rows, again=again)
    choices = ask_pairs(pairs, path=folder.parent / f"choices-{made.system}-{against}.jsonl", ask=ask)
    chosen = {(choice.row, choice.again) for choice in choices}
    left = sum((pair.row, pair.again) not in chosen for pair in pairs)
    return judged_by_person(choices, system=made.system, against=against), left
