"""Scores of generated answers against expected ones."""

from __future__ import annotations

import json
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
