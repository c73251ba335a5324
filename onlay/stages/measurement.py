"""What `evaluate` asks, and of whom: questions, texts, checks and prompts, put to every system of a subject."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay.errors import DataError
from onlay.recipe import LIMIT_GATES
from onlay.stages.contamination import find_trained
from onlay.stages.events import Loading
from onlay.stages.events import Report as Tell
from onlay.stages.subjects import Subject

if TYPE_CHECKING:
    from onlay.data.read import Conversation, Document
    from onlay.evaluation.findings import Findings
    from onlay.evaluation.measuring import Material, Measurements
    from onlay.evaluation.systems import Bench, System

MOST_PASSAGES = 1000
"""Held-out examples whose likelihood is measured, evenly spread over all of them."""
SPARE_TOKENS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """All that was asked of a subject, and what it comes to."""

    found: Findings
    measurements: Measurements
    material: Material
    systems: list[System]
    left_out: dict[str, int]
    """Why to how many rows were not asked."""
    trained: str | None
    """Why these rows let no gate pass: some were trained on, or that could not be checked."""


def measure_subject(
    subject: Subject, *, report: Tell, keep: Callable[[list[dict[str, Any]]], None] | None = None
) -> Measured:
    """Asks everything.  `keep` gets the answers as soon as they are there, as rows of answers.jsonl without scores."""
    rows, _, _ = subject.rows()
    trained = None
    if subject.judged != "base":  # Of a model as it is nobody here knows what it was trained on.
        trained = find_trained(rows, records=subject.records, own=subject.data is None, data=subject.data)
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
        # Answers first and apart: what is measured after them may fail, and must not cost them.
        answers = replace(material, prompts=(), held_out=(), texts={}, checks={}, tasks=())
        for part in (answers, replace(material, questions=(), timed=False)):
            measure_systems(
                bench, mine, part, measurements, judged=subject.judged,
                tell=lambda what, done, total: report(Loading(what, done, total)),
            )  # fmt: skip
            if part is answers and part.questions and keep is not None:
                keep(_answered(part, measurements))
        systems += mine
    assert material is not None
    evaluation = subject.recipe.evaluation
    scores = None if evaluation.scores == "auto" else evaluation.scores
    asked = Asked(
        scores=scores, gated=[name for name in subject.gates if name not in LIMIT_GATES], schema=schema_of(subject),
        pattern=evaluation.pattern, seed=subject.recipe.training.seed,
    )  # fmt: skip
    found = find(material, measurements, judged=subject.judged, asked=asked)
    return Measured(
        found=found, measurements=measurements, material=material, systems=systems, left_out=left_out, trained=trained
    )  # fmt: skip


def _answered(material: Material, measurements: Measurements) -> list[dict[str, Any]]:
    """Rows of answers.jsonl that have no scores yet."""
    from onlay.data.split import message_of

    return [
        {
            "row": i, "place": question.place, "prompt": [message_of(turn) for turn in question.turns],
            **({"tools": list(question.tools)} if question.tools else {}),
            "expected": question.expected, "answers": {name: said[i].text for name, said in measurements.said.items()},
        }
        for i, question in enumerate(material.questions)
    ]  # fmt: skip


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
    from onlay.data.split import open_split

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


def schema_of(subject: Subject) -> dict[str, Any] | None:
    path = subject.recipe.evaluation.json_schema
    if path is None:
        return None
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"evaluation.json_schema = {path} is no file with a JSON schema: {error}.", "Correct the file or the path."
        ) from None
