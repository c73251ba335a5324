from __future__ import annotations

import math

import numpy as np
import pytest

from onlay.errors import DataError, RecipeError
from onlay.evaluation.scores import (
    SCORES,
    Row,
    Score,
    exact_match,
    find_score,
    label_scores,
    measure,
    measured,
    valid_json,
)


def test_exact_match_is_the_share_of_equal_answers() -> None:
    assert exact_match(["a", "b", "c", "d"], ["a", "x", "c", "D"]) == 0.5
    assert exact_match([" a\n"], ["a"]) == 1.0
    assert exact_match(["a b"], ["a  b"]) == 0.0
    assert exact_match([""], [""]) == 1.0


def test_valid_json_looks_at_rows_that_ask_for_json() -> None:
    expected = ['{"a": 1}', "[1]", "words", "5", '"text"']
    assert valid_json(['{"b": 2}', "[1", "{", "x", "y"], expected) == 0.5
    assert valid_json(["[]", "{}", "", "", ""], expected) == 1.0
    # A number is JSON, but not what a tool call is.
    assert valid_json(["5", "null", "", "", ""], expected) == 0.0
    assert valid_json(["a"], ["words"]) is None
    assert valid_json([], []) is None


def test_unequal_or_no_rows_are_errors() -> None:
    with pytest.raises(ValueError, match="no rows"):
        exact_match([], [])
    with pytest.raises(ValueError, match="longer"):
        exact_match(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="longer"):
        valid_json(["a"], ["{}", "[]"])


def test_label_scores() -> None:
    scores = label_scores([0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 2])
    # Label 0: 2 of 4 said, 3 asked; 1: 1 of 2 said, 2 asked; 2: never said.
    assert scores == {"rows": 6.0, "accuracy": 0.5, "majority_accuracy": 0.5, "macro_f1": (4 / 7 + 1 / 2 + 0) / 3}
    assert label_scores([1, 1], [1, 1]) == {"rows": 2.0, "accuracy": 1.0, "majority_accuracy": 1.0, "macro_f1": 1.0}
    assert label_scores([3], [1])["macro_f1"] == 0.0
    with pytest.raises(ValueError, match="no rows"):
        label_scores([], [])
    with pytest.raises(ValueError, match="shorter"):
        label_scores([1, 1], [1])


CASES = {
    # (answer, expected, other fields): what the row is worth; None where it lacks what the score needs
    "exact_match": [(("a ", "a"), 1), (("A", "a"), 0), (("", ""), 1)],
    "token_f1": [(("The cat.", "cat"), 1), (("dog", "cat"), 0), (("x", "!"), None), (("", ""), 1)],
    "rouge1": [(("a b", "b a"), 1), (("a", "?"), None), (("", "a"), 0)],
    "rouge2": [(("a b", "b a"), 0), (("a b", "a b"), 1)],
    "rougeL": [(("a b", "a b"), 1), (("", ""), None)],
    "bleu": [(("the cat sat on it", "the cat sat on it"), 100), (("x", ""), None)],
    "chrf": [(("the cat", "the cat"), 100), (("", "cat"), 0), (("x", " "), None)],
    "valid_json": [(("[]", "{}"), 1), (("x", "{}"), 0), (("{}", "x"), None)],
    "json_equal": [(('{"a":1}', '{"a": 1.0}'), 1), (("{}", "[]"), 0), (("{}", "x"), None)],
    "tool_call_match": [(('{"name":"a","arguments":{}}',) * 2, 1), (("", '{"name":"a","arguments":{}}'), 0), (("", "{}"), None)],
    "number_match": [(("so 72.0", "#### 72"), 1), (("so 71", "#### 72"), 0), (("none", "72"), 0), (("72", "none"), None)],
    "label_accuracy": [(("Yes.", "yes"), 1), (("no", "yes"), 0), (("no", ""), None)],
    "macro_f1": [(("yes", "yes"), 1), (("no", "yes"), 0), (("", " "), None)],
    "repetition": [(("a b c d a b c d", "x"), 0.2), (("", "x"), 0)],
    "loop": [(("so " * 20, "x"), 1), (("so", "x"), 0)],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rows(name: str) -> None:
    rows = [Row(answer=answer, expected=expected) for (answer, expected), _ in CASES[name]]
    worth = [value for _, value in CASES[name]]
    found = measure(name, rows)
    np.testing.assert_allclose(found.values, [math.nan if value is None else value for value in worth])
    assert found.rows == sum(value is not None for value in worth)
    if SCORES[name].kind != "corpus":
        counted = [value for value in worth if value is not None]
        assert found.value == pytest.approx(sum(counted) / len(counted))


def test_rows_that_bring_what_a_score_needs() -> None:
    schema = {"type": "array"}
    rows = [
        Row(answer="[]", expected="", schema=schema),
        Row(answer="{}", expected="", schema=schema),
        Row(answer="[]", expected=""),
    ]
    assert measure("json_schema_match", rows).value == 0.5
    assert measure("json_schema_match", rows).rows == 2
    grouped, plain = r"Answer: (\w)", r"^ID-\d+$"
    rows = [
        Row(answer="Answer: B", expected="So. Answer: B", pattern=grouped), Row(answer="Answer: A", expected="Answer: B", pattern=grouped),
        Row(answer="B", expected="Answer: B", pattern=grouped), Row(answer="Answer: B", expected="B", pattern=grouped),
        Row(answer="ID-7", expected="anything", pattern=plain), Row(answer="7", expected="ID-7", pattern=plain), Row(answer="x", expected="x"),
    ]  # fmt: skip
    np.testing.assert_array_equal(measure("regex_match", rows).values, [1, 0, 0, math.nan, 1, 0, math.nan])
    rows = [Row(answer="", expected="", stopped=stopped) for stopped in (True, False, None)]
    np.testing.assert_array_equal(measure("no_stop", rows).values, [0, 1, math.nan])


def test_every_score_is_tested_here() -> None:
    assert set(SCORES) == set(CASES) | {"json_schema_match", "regex_match", "no_stop"}
    assert [name for name, score in SCORES.items() if not score.higher_is_better] == ["repetition", "loop", "no_stop"]


def test_macro_f1_is_that_of_label_scores() -> None:
    names = ["zero", "one", "two"]
    predicted, expected = [0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 2]
    rows = [Row(answer=names[p], expected=names[e]) for p, e in zip(predicted, expected, strict=True)]
    scores = label_scores(predicted, expected)
    assert measure("macro_f1", rows).value == pytest.approx(scores["macro_f1"])
    assert measure("label_accuracy", rows).value == pytest.approx(scores["accuracy"])


def test_an_answer_that_is_no_label_is_a_miss_and_no_label_of_its_own() -> None:
    rows = [Row(answer="yes", expected="yes"), Row(answer="who knows", expected="no"), Row(answer="no", expected="no")]
    assert measure("macro_f1", rows).value == pytest.approx((1 + 2 / 3) / 2)


def test_no_row_has_what_the_score_needs() -> None:
    for name in SCORES:
        found = measure(name, [])
        assert found.value is None and found.rows == 0
    assert measure("bleu", [Row(answer="x", expected="")]).value is None


def test_numbers_known_already() -> None:
    found = measured(Score(name="accuracy", kind="binary"), [1, None, 0, 0])
    assert found.rows == 3 and found.value == pytest.approx(1 / 3)


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(RecipeError, match=r"rouge_1 is not a score.\nDid you mean rouge1\?"):
        find_score("rouge_1")
    with pytest.raises(DataError, match=r"data\.jsonl:3"):
        measure("json_schema_match", [Row(answer="{}", expected="", schema={"type": 5}, place="data.jsonl:3")])
    with pytest.raises(RecipeError, match="regular expression"):
        measure("regex_match", [Row(answer="", expected="", pattern="(")])
