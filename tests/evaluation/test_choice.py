from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from onlay.evaluation.choice import choose_scores
from onlay.evaluation.scores import Row

LONG = "The shutters go up at a quarter to three in the morning."
CALL = '{"name": "visit", "arguments": {"day": "Monday"}}'


def chosen(expected: Sequence[str], **fields: Any) -> tuple[str, ...]:
    return choose_scores([Row(answer="", expected=text, **fields) for text in expected])


@pytest.mark.parametrize(
    ("expected", "scores"),
    [
        ([], ("exact_match",)),
        ([LONG] * 10, ("exact_match", "rougeL", "chrf")),
        (["今天我们去北京看长城"] * 3, ("exact_match", "rougeL", "chrf")),
        ([f"It is {name}" for name in "abcdefgh"], ("exact_match", "token_f1")),
        (["card lost", "transfer", "card lost", "transfer"], ("exact_match", "label_accuracy", "macro_f1")),
        (["always the same"] * 5, ("exact_match", "token_f1")),  # one label is none
        ([CALL] * 5, ("exact_match", "valid_json", "tool_call_match")),
        (['{"total": 3}'] * 5, ("exact_match", "valid_json", "json_equal")),
        (["3 + 4 = 7\n#### 7"] * 5, ("exact_match", "number_match")),
        (["7", "$1,200", "-3.5"], ("exact_match", "number_match")),
        ([LONG] * 5 + [CALL] * 5, ("exact_match", "rougeL", "chrf", "valid_json", "tool_call_match")),
        ([LONG] * 19 + [CALL], ("exact_match", "rougeL", "chrf")),  # one of twenty is none of the task
        (["yes", "no"] * 5 + [CALL] * 5, ("exact_match", "token_f1", "valid_json", "tool_call_match")),
    ],
)
def test_the_choice(expected: list[str], scores: tuple[str, ...]) -> None:
    assert chosen(expected) == scores


def test_what_rows_bring_is_used() -> None:
    assert "json_schema_match" in chosen(["{}"] * 3, schema={"type": "object"})
    assert "regex_match" in chosen([LONG] * 3, pattern="shutters")
