from __future__ import annotations

import pytest

from onlay.evaluation.scores import exact_match, valid_json


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
