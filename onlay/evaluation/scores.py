"""Scores of generated answers, and of labels, against expected ones."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers equal to what was expected, apart from white space at the ends.  Raises ValueError when empty."""
    if not expected:
        raise ValueError("no rows to score")
    pairs = zip(answers, expected, strict=True)
    return sum(answer.strip() == right.strip() for answer, right in pairs) / len(expected)


def valid_json(answers: Sequence[str], expected: Sequence[str]) -> float | None:
    """Among rows whose expected answer is a JSON object or list, the share whose answer is too; None when there are none."""
    asked = [answer for answer, right in zip(answers, expected, strict=True) if _is_json(right)]
    return sum(_is_json(answer) for answer in asked) / len(asked) if asked else None


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        return False


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
