"""The scores of generated answers, and of labels, against expected ones.

Each is one `Score` in SCORES, of one of three kinds:

    binary   yes or no for each row; the value is the share of yes
    mean     a number for each row; the value is their mean
    corpus   from statistics that add up over rows (BLEU, chrF, macro-F1); the value is no mean of rows

All three are told by rows' statistics, so that `compare.py` resamples each exactly: sum the statistics of the drawn rows,
then take the value of the sum.  A row that lacks what a score needs is none of the score's rows; it is never a zero.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onlay.errors import RecipeError
from onlay.evaluation import overlap, structure
from onlay.evaluation.text import f1_words, label_of, words

Kind = Literal["binary", "mean", "corpus"]
Unit = Literal["share", "points", "nats"]
HEALTH = ("repetition", "loop", "no_stop")
"""Scores of an answer by itself: whether it says things once, and ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One answer and what it is held against."""

    answer: str
    expected: str
    stopped: bool | None = None
    """`Answer.stopped` of the engine; None where it is not known."""
    schema: Mapping[str, Any] | None = None
    """JSON schema for this answer."""
    pattern: str | None = None
    """Regular expression for regex_match."""
    place: str = ""
    """`file:row`, for errors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What a number means: all that comparing two systems needs to know of it."""

    name: str
    kind: Kind
    unit: Unit = "share"
    """share: 0..1, differences told in points; points: 0..100 already; nats: a token's."""
    higher_is_better: bool = True
    total: Callable[[np.ndarray], np.ndarray] | None = None
    """Corpus: sums of statistics (K, S) -> values (K,)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerScore(Score):
    """A score that is computed from answers."""

    needs: str
    """What a row must have, in words; `applies` checks it, on what is expected and never on the answer."""
    applies: Callable[[Row], bool]
    row: Callable[[Row], float]
    """The number of one row; for a corpus score its likeness for one row, which finds the worst ones."""
    statistics: Callable[[Sequence[Row]], np.ndarray] | None = None
    """Corpus: (rows, S) float64 that add up."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """One score of one system."""

    score: Score
    values: np.ndarray
    """(n,) float64, every row's number; NaN where the row lacks what the score needs."""
    statistics: np.ndarray
    """(n, S) float64, what adds up over rows; for binary and mean the value itself and 1."""

    @property
    def rows(self) -> int:
        """Rows that have what the score needs."""
        return int(np.isfinite(self.values).sum())

    @property
    def value(self) -> float | None:
        """The score over its rows; None without any."""
        some = np.isfinite(self.values)
        return float(self.totals(self.statistics[some].sum(0)[None])[0]) if some.any() else None

    def totals(self, sums: np.ndarray) -> np.ndarray:
        """Sums of rows' statistics (K, S) -> the score of each (K,)."""
        found: np.ndarray = sums[:, 0] / sums[:, 1] if self.score.total is None else self.score.total(sums)
        return found


def measure(name: str, rows: Sequence[Row]) -> Measured:
    """One of SCORES over a system's rows.  Raises RecipeError for an unknown score and an unusable pattern, DataError for an
    unusable schema."""
    score = find_score(name)
    used = [score.applies(row) for row in rows]
    values = [score.row(row) if use else None for row, use in zip(rows, used, strict=True)]
    if score.statistics is None or not any(used):
        return measured(score, values)
    some = score.statistics([row for row, use in zip(rows, used, strict=True) if use])
    statistics = np.zeros((len(rows), some.shape[1]))
    statistics[np.flatnonzero(used)] = some
    return Measured(score=score, values=_numbers(values), statistics=statistics)


def measured(score: Score, values: Sequence[float | None]) -> Measured:
    """A binary or mean score whose numbers are known already, row by row; None where a row has none."""
    numbers = _numbers(values)
    there = np.isfinite(numbers)
    return Measured(score=score, values=numbers, statistics=np.stack([np.where(there, numbers, 0.0), there * 1.0], 1))


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def find_score(name: str) -> AnswerScore:
    """Raises RecipeError for a name that is none of SCORES."""
    if name not in SCORES:
        near = difflib.get_close_matches(name, SCORES, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise RecipeError(f"{name} is not a score.", f"{hint}There are: {', '.join(SCORES)}.")
    return SCORES[name]


# ------------------------------------------------------------------------------------------------------- the scores


def _always(row: Row) -> bool:
    return True


def _has_text(row: Row) -> bool:
    return bool(row.expected.strip())


def _has_words(row: Row) -> bool:
    return bool(words(row.expected))


def _has_f1_words(row: Row) -> bool:
    return not row.expected.strip() or bool(f1_words(row.expected))


def _has_json(row: Row) -> bool:
    return structure.is_json(row.expected)


def _has_schema(row: Row) -> bool:
    return row.schema is not None


def _has_calls(row: Row) -> bool:
    return bool(structure.tool_calls(row.expected))


def _has_pattern(row: Row) -> bool:
    if row.pattern is None:
        return False
    return not structure.has_groups(row.pattern) or structure.last_match(row.expected, row.pattern) is not None


def _has_number(row: Row) -> bool:
    return structure.final_number(row.expected) is not None


def _has_end(row: Row) -> bool:
    return row.stopped is not None


def _exact_match(row: Row) -> float:
    return float(row.answer.strip() == row.expected.strip())


def _token_f1(row: Row) -> float:
    return overlap.token_f1(row.answer, row.expected)


def _rouge1(row: Row) -> float:
    return overlap.rouge_n(row.answer, row.expected, n=1)


def _rouge2(row: Row) -> float:
    return overlap.rouge_n(row.answer, row.expected, n=2)


def _rouge_l(row: Row) -> float:
    return overlap.rouge_l(row.answer, row.expected)


def _bleu(row: Row) -> float:
    return overlap.sentence_score(row.answer, row.expected, metric="bleu")


def _chrf(row: Row) -> float:
    return overlap.sentence_score(row.answer, row.expected, metric="chrf")


def _bleu_statistics(rows: Sequence[Row]) -> np.ndarray:
    return overlap.corpus_statistics([row.answer for row in rows], [row.expected for row in rows], metric="bleu")


def _chrf_statistics(rows: Sequence[Row]) -> np.ndarray:
    return overlap.corpus_statistics([row.answer for row in rows], [row.expected for row in rows], metric="chrf")


def _bleu_total(sums: np.ndarray) -> np.ndarray:
    return overlap.corpus_scores(sums, metric="bleu")


def _chrf_total(sums: np.ndarray) -> np.ndarray:
    return overlap.corpus_scores(sums, metric="chrf")


def _valid_json(row: Row) -> float:
    return float(structure.is_json(row.answer))


def _json_schema_match(row: Row) -> float:
    assert row.schema is not None
    return float(structure.fits_schema(row.answer, row.schema, place=row.place))


def _json_equal(row: Row) -> float:
    return float(structure.json_equal(row.answer, row.expected))


def _tool_call_match(row: Row) -> float:
    return float(structure.same_calls(row.answer, row.expected))


def _regex_match(row: Row) -> float:
    assert row.pattern is not None
    found = structure.last_match(row.answer, row.pattern)
    if not structure.has_groups(row.pattern):
        return float(found is not None)
    return float(found is not None and found == structure.last_match(row.expected, row.pattern))


def _number_match(row: Row) -> float:
    return float(structure.final_number(row.answer) == structure.final_number(row.expected))


def _same_label(row: Row) -> float:
    return float(label_of(row.answer) == label_of(row.expected))


def _label_statistics(rows: Sequence[Row]) -> np.ndarray:
    """(rows, 3 L): for each of the L labels expected anywhere, whether the row hits it, says it, expects it.

    An answer that is none of them is a miss for the expected one, and no label of its own."""
    columns = {label: i for i, label in enumerate(sorted({label_of(row.expected) for row in rows}))}
    found = np.zeros((len(rows), 3, len(columns)))
    for i, row in enumerate(rows):
        said, right = columns.get(label_of(row.answer)), columns[label_of(row.expected)]
        found[i, 2, right] = 1
        if said is not None:
            found[i, 1, said] = 1
            found[i, 0, said] = said == right
    return found.reshape(len(rows), -1)


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    """(K, 3 L) -> (K,): mean F1 over the labels that are said or expected at all."""
    hits, said, wanted = np.moveaxis(sums.reshape(len(sums), 3, -1), 1, 0)
    times = said + wanted
    mean: np.ndarray = (2 * hits / np.maximum(times, 1)).sum(1) / np.maximum((times > 0).sum(1), 1)
    return mean


def _repetition(row: Row) -> float:
    return overlap.repetition(row.answer)


def _loop(row: Row) -> float:
    return float(overlap.ends_in_loop(row.answer))


def _no_stop(row: Row) -> float:
    return float(row.stopped is False)


_ANY, _TEXT, _WORDS = "nothing", "an expected answer", "an expected answer with words"
_LABEL = "an expected answer that is a label"
_ALL = (
    AnswerScore(name="exact_match", kind="binary", needs=_ANY, applies=_always, row=_exact_match),
    AnswerScore(name="token_f1", kind="mean", needs="an expected answer with words, or an empty one", applies=_has_f1_words, row=_token_f1),
    AnswerScore(name="rouge1", kind="mean", needs=_WORDS, applies=_has_words, row=_rouge1),
    AnswerScore(name="rouge2", kind="mean", needs=_WORDS, applies=_has_words, row=_rouge2),
    AnswerScore(name="rougeL", kind="mean", needs=_WORDS, applies=_has_words, row=_rouge_l),
    AnswerScore(name="bleu", kind="corpus", unit="points", needs=_TEXT, applies=_has_text, row=_bleu,
          statistics=_bleu_statistics, total=_bleu_total),
    AnswerScore(name="chrf", kind="corpus", unit="points", needs=_TEXT, applies=_has_text, row=_chrf,
          statistics=_chrf_statistics, total=_chrf_total),
    AnswerScore(name="valid_json", kind="binary", needs="an expected answer that is a JSON object or list", applies=_has_json, row=_valid_json),
    AnswerScore(name="json_schema_match", kind="binary", needs="a JSON schema", applies=_has_schema, row=_json_schema_match),
    AnswerScore(name="json_equal", kind="binary", needs="an expected answer that is a JSON object or list", applies=_has_json, row=_json_equal),
    AnswerScore(name="tool_call_match", kind="binary", needs="an expected answer with tool calls", applies=_has_calls, row=_tool_call_match),
    AnswerScore(name="regex_match", kind="binary", needs="a pattern, which the expected answer must match if it has groups",
          applies=_has_pattern, row=_regex_match),
    AnswerScore(name="number_match", kind="binary", needs="an expected answer with a number", applies=_has_number, row=_number_match),
    AnswerScore(name="label_accuracy", kind="binary", needs=_LABEL, applies=_has_text, row=_same_label),
    AnswerScore(name="macro_f1", kind="corpus", needs=_LABEL, applies=_has_text, row=_same_label,
          statistics=_label_statistics, total=_macro_f1),
    AnswerScore(name="repetition", kind="mean", needs=_ANY, applies=_always, row=_repetition, higher_is_better=False),
    AnswerScore(name="loop", kind="binary", needs=_ANY, applies=_always, row=_loop, higher_is_better=False),
    AnswerScore(name="no_stop", kind="binary", needs="the engine's word on how the answer ended", applies=_has_end, row=_no_stop,
          higher_is_better=False),
)  # fmt: skip
SCORES = {score.name: score for score in _ALL}


# ------------------------------------------------------------------------------------------- of whole lists at a time


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers equal to what was expected, apart from white space at the ends.  Raises ValueError when empty."""
    share = measure("exact_match", _rows(answers, expected)).value
    if share is None:
        raise ValueError("no rows to score")
    return share


def valid_json(answers: Sequence[str], expected: Sequence[str]) -> float | None:
    """Among rows whose expected answer is a JSON object or list, the share whose answer is too; None when there are none."""
    return measure("valid_json", _rows(answers, expected)).value


def _rows(answers: Sequence[str], expected: Sequence[str]) -> list[Row]:
    return [Row(answer=answer, expected=right) for answer, right in zip(answers, expected, strict=True)]


def label_scores(predicted: Sequence[int], expected: Sequence[int]) -> dict[str, float]:
    """Of one label a row: rows, accuracy, majority_accuracy and macro_f1.  Raises ValueError when empty.

    `majority_accuracy` is what always saying the rows' most frequent label would reach.  `macro_f1` is the mean of
    F1 = 2 hits / (times predicted + times expected) over the labels that are predicted or expected at all.
    """
    if not expected:
        raise ValueError("no rows to score")
    hits = Counter(right for guess, right in zip(predicted, expected, strict=True) if guess == right)
    times, wanted = Counter(predicted), Counter(expected)
    f1 = [2 * hits[label] / (times[label] + wanted[label]) for label in times.keys() | wanted.keys()]
    rows = len(expected)
    return {
        "rows": float(rows),
        "accuracy": sum(hits.values()) / rows,
        "majority_accuracy": max(wanted.values()) / rows,
        "macro_f1": math.fsum(f1) / len(f1),
    }
