from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from onlay.errors import DataError, OutputError
from onlay.evaluation.blind import (
    HOW,
    Choice,
    Pair,
    ask_pairs,
    draw_pairs,
    judged_by_person,
    question,
    read_choices,
)
from tests.evaluation.reports import answer_row


def rows(count: int, same: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    return [
        answer_row(number, answers={"base": "bad" if number not in same else "good ", "adapter": "good"})
        for number in range(count)
    ]


def draw(given: list[dict[str, Any]], **changes: Any) -> list[Pair]:
    return draw_pairs(given, **({"system": "adapter", "against": "base", "seed": 0} | changes))


def typist(*words: str) -> Callable[[str], str]:
    """Types one word after another, then ends the input."""
    left = iter(words)

    def ask(text: str) -> str:
        word = next(left, None)
        if word is None:
            raise EOFError
        return word

    return ask


def prefers_good(text: str) -> str:
    return "a" if "A:\ngood" in text else "b"


def chosen(choice: str, *, row: int = 0, again: bool = False, first: str = "adapter") -> Choice:
    second = "base" if first == "adapter" else "adapter"
    return Choice(row=row, place="x:1", again=again, first=first, second=second, digest="d", choice=choice)


def test_the_same_seed_draws_the_same_and_another_seed_another_order() -> None:
    assert draw(rows(20)) == draw(rows(20))
    assert [pair.row for pair in draw(rows(20))] != [pair.row for pair in draw(rows(20), seed=1)]
    assert sorted(pair.row for pair in draw(rows(20))) == list(range(20))


@pytest.mark.parametrize("count", [1, 2, 20, 21])
def test_each_system_is_first_in_half_of_the_rows(count: int) -> None:
    first = [pair.first for pair in draw(rows(count))]
    assert abs(first.count("adapter") - first.count("base")) <= 1


def test_the_first_place_says_nothing_about_the_system() -> None:
    """Over many seeds each row has each order equally often: 400 fair coins are within 5 deviations of half."""
    ours = sum(draw(rows(5), seed=seed)[0].first == "adapter" for seed in range(400))
    assert abs(ours - 200) < 50


def test_no_more_rows_than_asked_and_some_again_the_other_way_round() -> None:
    pairs = draw(rows(20, same=(3,)), most=10, again=4)
    once, later = [pair for pair in pairs if not pair.again], [pair for pair in pairs if pair.again]
    assert len(once) == 10 and len(later) == 4 and pairs == once + later
    by_row = {pair.row: pair for pair in once}
    for pair in later:
        before = by_row[pair.row]
        assert (pair.first, pair.second, pair.answers) == (before.second, before.first, before.answers[::-1])
        assert pair.digest == before.digest and not pair.same


def test_a_row_without_an_answer_is_named() -> None:
    with pytest.raises(
        DataError, match=r"support.jsonl:1: no answer of 'live'; there are answers of adapter, base"
    ) as error:
        draw(rows(1), against="live")
    assert "Name two of those" in error.value.remedy


def test_a_question_names_no_system_and_cannot_move_the_cursor() -> None:
    row = answer_row(0, answers={"base": "\x1b[2Jred\r\u202eden", "adapter": "one\n\ttwo"})
    text = question(draw([row])[0], number=3, total=40)
    assert "base" not in text and "adapter" not in text and not set(text) & set("\x1b\r\u202e")
    for told in ("3 of 40", "Question 0?", "Open the settings", "A:\n", "B:\n", "one\n\ttwo", HOW):
        assert told in text
    assert "Open the settings" not in question(draw([row])[0], number=1, total=1, reference=False)


def test_a_person_who_knows_good_from_bad_decides_every_row(tmp_path: Path) -> None:
    path = tmp_path / "new" / "choices.jsonl"
    choices = ask_pairs(draw(rows(8), again=3), path=path, ask=prefers_good)
    judged = judged_by_person(choices, system="adapter", against="base")
    assert (judged.rows, judged.wins, judged.losses, judged.ties, judged.consistency) == (8, 8, 0, 0, 1.0)
    assert judged.judge == "person" and judged.p_value == 2 / 2**8
    assert read_choices(path) == choices and len(choices) == 11


def test_a_person_who_always_types_a_shows_it(tmp_path: Path) -> None:
    choices = ask_pairs(draw(rows(8), again=8), path=tmp_path / "c.jsonl", ask=lambda text: "A ")
    judged = judged_by_person(choices, system="adapter", against="base")
    assert (judged.first_slot_wins, judged.consistency, judged.ties, judged.p_value) == (1.0, 0.0, 8, 1.0)


def test_equal_answers_are_ties_and_are_not_asked(tmp_path: Path) -> None:
    asked: list[str] = []

    def ask(text: str) -> str:
        asked.append(text)
        return prefers_good(text)

    choices = ask_pairs(draw(rows(4, same=(0, 2))), path=tmp_path / "c.jsonl", ask=ask)
    assert len(asked) == 2 and "1 of 2" in asked[0] and "2 of 2" in asked[1]
    assert sorted(choice.row for choice in choices if choice.choice == "same") == [0, 2]
    judged = judged_by_person(choices, system="adapter", against="base")
    assert (judged.rows, judged.wins, judged.ties) == (4, 2, 2)


def test_other_words_are_asked_again_and_every_word_is_understood(tmp_path: Path) -> None:
    seen: list[str] = []
    words = iter(["both", "", "b", "=", "TIE", "t", "s", "skip"])

    def ask(text: str) -> str:
        seen.append(text)
        return next(words)

    choices = ask_pairs(draw(rows(6)), path=tmp_path / "c.jsonl", ask=ask)
    assert [choice.choice for choice in choices] == ["b", "tie", "tie", "tie", "skip", "skip"]
    assert seen[1] == seen[2] == HOW
    assert judged_by_person(choices, system="adapter", against="base").rows == 4


@pytest.mark.parametrize("end", [["q"], []])
def test_it_can_be_left_and_taken_up_again(tmp_path: Path, end: list[str]) -> None:
    path = tmp_path / "c.jsonl"
    pairs = draw(rows(5))
    assert len(ask_pairs(pairs, path=path, ask=typist("a", "b", *end))) == 2
    before = path.read_bytes()
    seen: list[str] = []

    def ask(text: str) -> str:
        seen.append(text)
        return "tie"

    choices = ask_pairs(pairs, path=path, ask=ask)
    assert [choice.choice for choice in choices] == ["a", "b", "tie", "tie", "tie"]
    assert len(seen) == 3 and "3 of 5" in seen[0]
    assert path.read_bytes().startswith(before)


def test_every_choice_is_on_disk_before_the_next_question(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    counts: list[int] = []

    def ask(text: str) -> str:
        counts.append(len(read_choices(path)))
        if len(counts) == 3:
            raise KeyboardInterrupt
        return "a"

    with pytest.raises(KeyboardInterrupt):
        ask_pairs(draw(rows(5)), path=path, ask=ask)
    assert counts == [0, 1, 2] and len(read_choices(path)) == 2


def test_a_line_that_was_being_written_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    pairs = draw(rows(3))
    ask_pairs(pairs, path=path, ask=typist("a", "b"))
    path.write_bytes(path.read_bytes()[:-5])
    assert len(read_choices(path)) == 1
    choices = ask_pairs(pairs, path=path, ask=typist("tie", "tie"))
    assert [choice.choice for choice in choices] == ["a", "tie", "tie"]
    assert read_choices(path) == choices


def test_choices_about_other_answers_or_systems_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    given = rows(2)
    ask_pairs(draw(given), path=path, ask=typist("a", "b"))
    changed = [dict(row, answers={**row["answers"], "base": "something else"}) for row in given]
    with pytest.raises(OutputError, match="whose answers have changed since"):
        ask_pairs(draw(changed), path=path, ask=typist())
    others = [dict(row, answers={"live": "bad", "adapter": "good"}) for row in given]
    with pytest.raises(OutputError, match="choices between adapter and base, not adapter and live"):
        ask_pairs(draw(others, against="live"), path=path, ask=typist())


@pytest.mark.parametrize(
    "line", ["not json", "[]", '{"row": 1}', json.dumps({"surplus": 1}), json.dumps(asdict(chosen("c")))]
)
def test_a_line_that_is_not_a_choice_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(OutputError, match=r"c\.jsonl:1 is not a choice"):
        ask_pairs(draw(rows(1)), path=path, ask=typist())


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="could not be written"):
        ask_pairs(draw(rows(1)), path=tmp_path / "taken" / "c.jsonl", ask=typist("a"))


def test_a_pair_asked_twice_counts_once_and_disagreement_is_a_tie() -> None:
    choices = [
        chosen("a", row=0), chosen("b", row=0, again=True, first="base"),  # the adapter both times
        chosen("a", row=1), chosen("a", row=1, again=True, first="base"),  # the first both times
        chosen("tie", row=2), chosen("tie", row=2, again=True, first="base"),
        chosen("b", row=3), chosen("skip", row=3, again=True, first="base"),
        chosen("skip", row=4), chosen("same", row=5),
    ]  # fmt: skip
    judged = judged_by_person(choices, system="adapter", against="base")
    assert (judged.rows, judged.wins, judged.losses, judged.ties) == (5, 1, 1, 3)
    assert judged.consistency == pytest.approx(2 / 3)
    assert judged.first_slot_wins == pytest.approx(3 / 5)


def test_what_was_not_asked_is_not_claimed() -> None:
    judged = judged_by_person([chosen("a")], system="adapter", against="base")
    assert judged.consistency is None and judged.first_slot_wins == 1.0
    nothing = judged_by_person([], system="adapter", against="base")
    assert (nothing.rows, nothing.first_slot_wins, nothing.p_value) == (0, None, 1.0)
