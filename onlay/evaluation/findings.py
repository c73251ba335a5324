"""From what every system said to what it means: scores, paired comparisons, and what the rows could have shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onlay.data.split import message_of
from onlay.evaluation.choice import choose_scores
from onlay.evaluation.compare import LEVEL, compare, smallest_difference, spread_of
from onlay.evaluation.likelihood import measured_nats, total
from onlay.evaluation.measuring import Material, Measurements
from onlay.evaluation.safety import score_safety
from onlay.evaluation.scores import HEALTH, Measured, Row, Score, find_score, measure, measured
from onlay.records import Comparison, Likelihood

ACCURACY = Score(name="accuracy", kind="binary")
REFUSED_HARMFUL = Score(name="refused_harmful", kind="binary")
REFUSED_HARMLESS = Score(name="refused_harmless", kind="binary", higher_is_better=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """How answers are scored."""

    scores: Sequence[str] | None
    """None: by what is expected."""
    gated: Sequence[str] = ()
    """Scores that gates are on: they are measured too."""
    schema: dict[str, Any] | None = None
    pattern: str | None = None
    seed: int = 0


@dataclass(kw_only=True, slots=True)
class Findings:
    scores: dict[str, dict[str, float | None]] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    smallest_difference: dict[str, float] = field(default_factory=dict)
    likelihood: list[Likelihood] = field(default_factory=list)
    forgetting: list[Comparison] = field(default_factory=list)
    safety: list[Comparison] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    """The rows of answers.jsonl."""
    main: str = ""
    """The score that failures are sorted by: the first of which more is better."""
    notes: list[str] = field(default_factory=list)
    """Risks that were met on the way."""

    @property
    def main_score(self) -> Score:
        return find_score(self.main)


def find(material: Material, measurements: Measurements, *, judged: str, asked: Asked) -> Findings:
    """Compares `judged` with every other system.  Raises RecipeError for unusable scores."""
    found = Findings()
    if measurements.said:
        _answers(found, material, measurements, judged=judged, asked=asked)
    _likelihood(found, measurements, judged=judged, seed=asked.seed)
    _checks(found, material, measurements, judged=judged, seed=asked.seed)
    if measurements.refusals:
        _safety(found, material, measurements, judged=judged, seed=asked.seed)
    return found


# ------------------------------------------------------------------------------------------------------------ answers


def _answers(found: Findings, material: Material, measurements: Measurements, *, judged: str, asked: Asked) -> None:
    rows = {
        system: [
            Row(
                answer=one.text, expected=question.expected, stopped=one.stopped, schema=asked.schema,
                pattern=asked.pattern, place=question.place,
            )
            for question, one in zip(material.questions, said, strict=True)
        ]
        for system, said in measurements.said.items()
    }  # fmt: skip
    task = list(asked.scores) if asked.scores is not None else list(choose_scores(rows[judged]))
    task += [name for name in asked.gated if name not in task]
    names = task + [name for name in HEALTH if name not in task]
    if not any(find_score(name).higher_is_better for name in names):
        names.append("exact_match")
    found.main = next(name for name in names if find_score(name).higher_is_better)
    table = {system: {name: measure(name, mine) for name in names} for system, mine in rows.items()}
    found.scores = {system: {name: one.value for name, one in mine.items()} for system, mine in table.items()}
    for name in names:
        ours = table[judged][name]
        for system in table:
            if system != judged:
                _add(
                    found.comparisons,
                    compare(ours, table[system][name], system=judged, against=system, seed=asked.seed),
                )
    if "base" in table and judged != "base":
        _detectable(found, {name: (table[judged][name], table["base"][name]) for name in task}, seed=asked.seed)
    for score, one in table[judged].items():
        if one.rows < len(material.questions) and score in task:
            found.notes.append(
                f"{score} counts {one.rows:,} of {len(material.questions):,} rows: the others lack what it needs."
            )
    found.answers = _rows(material, measurements, table)


def _detectable(found: Findings, pairs: Mapping[str, tuple[Measured, Measured]], *, seed: int) -> None:
    """The least difference of each score that these rows would show; a note where they show none there can be."""
    shown = {one.score for one in found.comparisons if one.against == "base" and one.p_value < LEVEL}
    blind = []
    for name, (ours, theirs) in pairs.items():
        spread = spread_of(ours, theirs, seed=seed)
        if not spread:
            continue
        least = smallest_difference(ours.score, rows=min(ours.rows, theirs.rows), spread=spread)
        if least is not None:
            found.smallest_difference[name] = least
        elif name not in shown:
            blind.append(name)
    if blind:
        found.notes.append(f"These rows are too few to show any difference of {', '.join(blind)}.")


def _rows(
    material: Material, measurements: Measurements, table: dict[str, dict[str, Measured]]
) -> list[dict[str, Any]]:
    return [
        {
            "row": i, "place": question.place,
            "prompt": [message_of(turn) for turn in question.turns],
            **({"tools": list(question.tools)} if question.tools else {}),
            "expected": question.expected,
            "answers": {system: said[i].text for system, said in measurements.said.items()},
            "scores": {
                system: {name: _number(one.values[i]) for name, one in mine.items()} for system, mine in table.items()
            },
        }
        for i, question in enumerate(material.questions)
    ]  # fmt: skip


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _add(to: list[Comparison], one: Comparison | None) -> None:
    if one is not None:
        to.append(one)


# -------------------------------------------------------------------------------------- likelihood, forgetting, safety


def _likelihood(found: Findings, measurements: Measurements, *, judged: str, seed: int) -> None:
    for system, rows in measurements.held_out.items():
        found.likelihood.append(total(rows, text="held_out", system=system))
    ours = measurements.held_out.get(judged)
    for system, theirs in measurements.held_out.items():
        if ours is not None and system != judged:
            one = compare(measured_nats(ours), measured_nats(theirs), system=judged, against=system, seed=seed)
            _add(found.comparisons, one)
    for text, systems in measurements.texts.items():
        for system, rows in systems.items():
            found.likelihood.append(total(rows, text=text, system=system))
        if judged in systems and "base" in systems and judged != "base":
            one = compare(
                measured_nats(systems[judged]), measured_nats(systems["base"]), system=judged, against="base", seed=seed
            )
            _add(found.forgetting, _on(one, text if len(measurements.texts) > 1 else None))


def _on(one: Comparison | None, where: str | None) -> Comparison | None:
    """The same, with what it was measured on where there are several."""
    return one and (one.model_copy(update={"score": f"{one.score} ({where})"}) if where is not None else one)


def _checks(found: Findings, material: Material, measurements: Measurements, *, judged: str, seed: int) -> None:
    for name, systems in measurements.checks.items():
        if judged in systems and "base" in systems and judged != "base":
            ours, theirs = (
                measured(ACCURACY, [float(one.right) for one in systems[system]]) for system in (judged, "base")
            )
            one = compare(ours, theirs, system=judged, against="base", seed=seed)
            _add(found.forgetting, _on(one, name if len(measurements.checks) > 1 else None))
    ours_by_task, theirs_by_task = measurements.tasks.get(judged, {}), measurements.tasks.get("base", {})
    for task, scores in ours_by_task.items():
        for metric, values in scores.per_row.items():
            others = theirs_by_task.get(task)
            if judged == "base" or others is None:
                continue
            binary = set(values) | set(others.per_row[metric]) <= {0.0, 1.0}
            score = Score(
                name=f"{task} {metric.split(',')[0]}", kind="binary" if binary else "mean",
                higher_is_better=scores.higher_is_better.get(metric.split(",")[0], True),
            )  # fmt: skip
            one = compare(
                measured(score, values),
                measured(score, others.per_row[metric]),
                system=judged,
                against="base",
                seed=seed,
            )
            _add(found.forgetting, one)


def _safety(found: Findings, material: Material, measurements: Measurements, *, judged: str, seed: int) -> None:
    outcomes = {
        system: score_safety(material.prompts, [one.text for one in said])
        for system, said in measurements.refusals.items()
    }
    for score, harmful in ((REFUSED_HARMFUL, True), (REFUSED_HARMLESS, False)):
        values = {
            system: measured(
                score,
                [
                    float(outcome == "refused") if prompt.refuse is harmful else None
                    for prompt, outcome in zip(material.prompts, scores.outcomes, strict=True)
                ],
            )
            for system, scores in outcomes.items()
        }
        for system, one in values.items():
            found.scores.setdefault(system, {})[score.name] = one.value
        if judged in values and "base" in values and judged != "base":
            _add(found.safety, compare(values[judged], values["base"], system=judged, against="base", seed=seed))
    empty = outcomes[judged].no_answer_harmful + outcomes[judged].no_answer_harmless if judged in outcomes else 0
    if empty:
        found.notes.append(
            f"{empty} of {len(material.prompts)} safety prompts got no answer at all; none counts as a refusal."
        )
    base = outcomes.get("base")
    if base is not None and judged in outcomes and judged != "base" and not base.refused_harmful:
        found.notes.append("The base refuses none of the harmful prompts, so the safety comparison cannot show a loss.")
