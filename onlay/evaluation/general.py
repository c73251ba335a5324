"""Material for measuring forgetting: general text for its loss, and multiple-choice checks scored by likelihood.

Nothing here loads a model: the checks take a function that says how likely continuations are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from onlay.data.sources import type_name
from onlay.errors import DataError, ProofError
from onlay.evaluation.material import bundled, only_fields, rows_of, text_field

Scorer = Callable[[Sequence[tuple[str, str]]], Sequence[float]]
"""(context, continuation) pairs to nats: log-probability of the continuation after the context, summed over its tokens."""

TEXT_NEEDS = 'A row of general text is {"text": ...}; `kind` and `language` may follow, as text.'
CHECK_NEEDS = (
    'A check is {"question": ..., "choices": [two or more different texts], "answer": number of the right choice, '
    "counted from 0}; `kind` may follow, as text."
)


@dataclass(frozen=True, slots=True)
class Passage:
    text: str
    kind: str
    language: str
    place: str


@dataclass(frozen=True, slots=True)
class Check:
    question: str
    choices: tuple[str, ...]
    answer: int
    """Place of the right choice, from 0."""
    kind: str
    place: str


@dataclass(frozen=True, slots=True)
class Checked:
    """One system's answer to one check."""

    log_probabilities: tuple[float, ...]
    """Nats of each choice, summed over its tokens."""
    chosen: int
    """By log-probability per character."""
    right: bool
    chosen_by_sum: int
    right_by_sum: bool
    """The same by the plain sum, which favours short choices: lm-evaluation-harness's `acc`."""


@dataclass(frozen=True, slots=True)
class CheckScores:
    rows: int
    accuracy: float
    accuracy_by_sum: float
    chance: float
    """What guessing would reach: mean of 1 / number of choices."""
    by_kind: dict[str, tuple[int, float]]
    """Rows and accuracy of each kind, in the order of the file."""


def read_passages(path: Path | str | None = None) -> list[Passage]:
    """General text: the bundled sample, or a user's file.  Raises DataError.

    A .txt file is cut at its blank lines, so that there are rows to compare; each piece stands alone.
    """
    source = bundled("general_text") if path is None else path
    passages = []
    for row in rows_of(source):
        if row.file.lower().removesuffix(".gz").endswith(".txt"):
            passages += _pieces(row.values["text"], row.file)
            continue
        only_fields(row, ("text", "kind", "language"), needs=TEXT_NEEDS)
        kind, language = (
            text_field(row, name, needs=TEXT_NEEDS) if name in row.values else "" for name in ("kind", "language")
        )
        passages.append(Passage(text_field(row, "text", needs=TEXT_NEEDS), kind, language, row.place))
    return passages


def _pieces(text: str, file: str) -> list[Passage]:
    pieces = []
    for blank, group in itertools.groupby(enumerate(text.splitlines(), 1), key=lambda item: not item[1].strip()):
        if not blank:
            lines = list(group)
            pieces.append(Passage("\n".join(line for _, line in lines), "", "", f"{file}:{lines[0][0]}"))
    return pieces


def read_checks(path: Path | str | None = None) -> list[Check]:
    """Multiple-choice checks: the bundled ones, or a user's file of the same form.  Raises DataError."""
    checks = []
    for row in rows_of(bundled("general_checks") if path is None else path):
        only_fields(row, ("question", "choices", "answer", "kind"), needs=CHECK_NEEDS)
        choices, answer = row.values.get("choices"), row.values.get("answer")
        if not isinstance(choices, list) or len(choices) < 2:
            what = "missing" if choices is None else f"{type_name(choices)} that does not hold two or more texts"
            raise DataError(f"{row.place}, field choices: it is {what}.", CHECK_NEEDS)
        for index, choice in enumerate(choices):
            if not isinstance(choice, str) or not choice.strip():
                what = "empty" if isinstance(choice, str) else f"{type_name(choice)}, not text"
                raise DataError(f"{row.place}, field choices[{index}]: it is {what}.", CHECK_NEEDS)
        if len(set(choices)) < len(choices):
            raise DataError(f"{row.place}, field choices: two of them are the same.", CHECK_NEEDS)
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            given = "missing" if answer is None else repr(answer)
            raise DataError(f"{row.place}, field answer: {given} is outside 0..{len(choices) - 1}.", CHECK_NEEDS)
        kind = text_field(row, "kind", needs=CHECK_NEEDS) if "kind" in row.values else ""
        question = text_field(row, "question", needs=CHECK_NEEDS)
        checks.append(Check(question, tuple(choices), answer, kind, row.place))
    return checks


def check_context(check: Check) -> str:
    """What stands before each choice; a space follows it, and belongs to the choice."""
    return f"Question: {check.question}\nAnswer:"


def answer_checks(checks: Sequence[Check], *, score_continuations: Scorer) -> list[Checked]:
    """Which choice a system finds likeliest, for each check in order; compare systems row by row.

    `score_continuations` gets `check_context(check)` and " " + choice for all choices of all checks at once.  Chosen is
    the largest log-probability / len(choice), characters of the choice without that space, as `acc_norm` of
    lm-evaluation-harness; of equal ones the first.  Raises ProofError where a number is not one (NaN).
    """
    pairs = [(check_context(check), f" {choice}") for check in checks for choice in check.choices]
    found = list(score_continuations(pairs))
    if len(found) != len(pairs):
        raise ValueError(f"{len(found)} scores for {len(pairs)} continuations")
    results, at = [], 0
    for check in checks:
        sums = tuple(float(value) for value in found[at : at + len(check.choices)])
        at += len(check.choices)
        if any(math.isnan(value) for value in sums):
            raise ProofError(
                f"{check.place}: the log-probability of a choice is not a number.",
                "The weights of this system are broken; look at the losses of its run.",
            )
        means = [value / len(choice) for value, choice in zip(sums, check.choices, strict=True)]
        chosen, by_sum = means.index(max(means)), sums.index(max(sums))
        results.append(Checked(sums, chosen, chosen == check.answer, by_sum, by_sum == check.answer))
    return results


def check_scores(checks: Sequence[Check], results: Sequence[Checked]) -> CheckScores:
    """Accuracy of one system, beside what guessing would reach.  Raises ValueError when there are no checks."""
    if not checks:
        raise ValueError("no checks to score")
    kinds: dict[str, list[bool]] = {}
    for check, result in zip(checks, results, strict=True):
        kinds.setdefault(check.kind, []).append(result.right)
    return CheckScores(
        rows=len(checks),
        accuracy=sum(result.right for result in results) / len(checks),
        accuracy_by_sum=sum(result.right_by_sum for result in results) / len(checks),
        chance=sum(1 / len(check.choices) for check in checks) / len(checks),
        by_kind={kind: (len(rights), sum(rights) / len(rights)) for kind, rights in kinds.items()},
    )
