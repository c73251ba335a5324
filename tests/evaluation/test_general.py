from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from onlay.errors import DataError, ProofError
from onlay.evaluation.general import Check, answer_checks, check_context, check_scores, read_checks, read_passages


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_bundled_text_is_as_documented() -> None:
    passages = read_passages()
    size = sum(len(passage.text.encode()) for passage in passages)
    assert len(passages) >= 60 and 30_000 <= size <= 60_000
    assert len({passage.text for passage in passages}) == len(passages)
    assert {"en", "de", "fr", "es", "ru", "zh"} == {passage.language for passage in passages}
    assert {"science", "history", "everyday", "dialogue", "code", "list"} <= {passage.kind for passage in passages}


def test_the_bundled_checks_are_fair() -> None:
    checks = read_checks()
    assert len(checks) >= 150
    assert len({(check.question, check.choices) for check in checks}) == len(checks)
    assert {c.kind for c in checks} == {"common_sense", "grammar", "arithmetic", "copying", "facts", "reading"}
    # Every place is right as often as every other, so that always choosing one place is guessing.
    for size in {len(check.choices) for check in checks}:
        places = Counter(check.answer for check in checks if len(check.choices) == size)
        assert len(places) == size and max(places.values()) - min(places.values()) <= 1


def test_arithmetic_of_the_bundled_checks_is_right() -> None:
    found = 0
    for check in read_checks():
        words = check.question.removeprefix("What is ").removesuffix("?").split()
        if check.kind == "arithmetic" and len(words) == 3 and words[1] in "+-*":
            a, b = int(words[0]), int(words[2])
            assert check.choices[check.answer] == str({"+": a + b, "-": a - b, "*": a * b}[words[1]])
            found += 1
        if check.kind == "copying" and "exactly: " in check.question:
            assert check.choices[check.answer] == check.question.partition("exactly: ")[2]
            found += 1
    assert found > 30


def check(*choices: str, answer: int = 0, kind: str = "k") -> Check:
    return Check("Why?", choices, answer, kind, "f:1")


def scorer(values: dict[str, float], seen: list[tuple[str, str]] | None = None) -> Any:
    def score(pairs: Sequence[tuple[str, str]]) -> list[float]:
        if seen is not None:
            seen.extend(pairs)
        return [values[continuation] for _, continuation in pairs]

    return score


def test_choices_are_compared_by_character() -> None:
    checks = [check("ab", "abcdefgh", answer=1)]
    seen: list[tuple[str, str]] = []
    (result,) = answer_checks(checks, score_continuations=scorer({" ab": -2.0, " abcdefgh": -4.0}, seen))
    # -2 / 2 = -1 against -4 / 8 = -0.5; the plain sums say the other one.
    assert (result.chosen, result.right) == (1, True)
    assert (result.chosen_by_sum, result.right_by_sum) == (0, False)
    assert result.log_probabilities == (-2.0, -4.0)
    assert seen == [("Question: Why?\nAnswer:", " ab"), ("Question: Why?\nAnswer:", " abcdefgh")]
    assert check_context(checks[0]) == "Question: Why?\nAnswer:"


def test_equal_choices_go_to_the_first_and_nothing_is_right_by_accident() -> None:
    checks = [check("aa", "bb", answer=place) for place in (0, 1)]
    results = answer_checks(checks, score_continuations=lambda pairs: [-1.0] * len(pairs))
    assert [result.right for result in results] == [True, False]


def test_scores_count_each_kind() -> None:
    checks = [check("a", "b", kind="x"), check("c", "d", "e", "f", kind="y"), check("g", "h", answer=1, kind="x")]
    values = {f" {letter}": -float(place) for place, letter in enumerate("abcdefgh", 1)}
    scores = check_scores(checks, answer_checks(checks, score_continuations=scorer(values)))
    assert (scores.rows, scores.accuracy, scores.accuracy_by_sum) == (3, 2 / 3, 2 / 3)
    assert scores.chance == pytest.approx((0.5 + 0.25 + 0.5) / 3)
    assert scores.by_kind == {"x": (2, 0.5), "y": (1, 1.0)}
    with pytest.raises(ValueError, match="no checks"):
        check_scores([], [])


def test_broken_numbers_are_errors() -> None:
    with pytest.raises(ProofError, match="f:1"):
        answer_checks([check("a", "b")], score_continuations=lambda pairs: [math.nan, -1.0])
    with pytest.raises(ValueError, match="1 scores for 2"):
        answer_checks([check("a", "b")], score_continuations=lambda pairs: [-1.0])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"choices": ["a", "b"], "answer": 0}, "field question: it is missing"),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, "field question: it is empty"),
        ({"question": "q", "answer": 0}, "field choices: it is missing"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "two or more"),
        ({"question": "q", "choices": ["a", 2], "answer": 0}, r"choices\[1\]: it is a number"),
        ({"question": "q", "choices": ["a", ""], "answer": 0}, r"choices\[1\]: it is empty"),
        ({"question": "q", "choices": ["a", "a"], "answer": 0}, "two of them are the same"),
        ({"question": "q", "choices": ["a", "b"]}, "field answer: missing is outside 0..1"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "2 is outside 0..1"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "True is outside"),
        ({"question": "q", "choices": ["a", "b"], "answer": "b"}, "'b' is outside"),
        ({"question": "q", "choices": ["a", "b"], "answer": 0, "kidn": "x"}, "kidn is none of"),
    ],
)
def test_wrong_checks_name_file_row_and_field(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    path = write(tmp_path / "checks.jsonl", {"question": "q", "choices": ["a", "b"], "answer": 1}, row)
    with pytest.raises(DataError, match=says) as error:
        read_checks(path)
    assert f"{path}:2" in error.value.problem


def test_users_text_may_be_rows_or_paragraphs(tmp_path: Path) -> None:
    rows = read_passages(write(tmp_path / "own.jsonl", {"text": "one"}, {"text": "two", "kind": "k"}))
    assert [(p.text, p.kind, p.place) for p in rows] == [
        ("one", "", f"{tmp_path / 'own.jsonl'}:1"),
        ("two", "k", f"{tmp_path / 'own.jsonl'}:2"),
    ]
    (tmp_path / "own.txt").write_text("first\nsecond line\n\n  \nlast ü\n", encoding="utf-8")
    pieces = read_passages(tmp_path / "own.txt")
    assert [(p.text, p.place.rpartition(":")[2]) for p in pieces] == [("first\nsecond line", "1"), ("last ü", "5")]
    with pytest.raises(DataError, match=r"own.jsonl:1, field text: it is empty"):
        read_passages(write(tmp_path / "own.jsonl", {"text": " "}))
    with pytest.raises(DataError, match="txet is none of"):
        read_passages(write(tmp_path / "own.jsonl", {"text": "a", "txet": "b"}))
