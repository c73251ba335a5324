from __future__ import annotations

import pytest

from onlay.evaluation.scores import exact_match, label_scores, valid_json


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
