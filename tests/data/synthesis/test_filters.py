from __future__ import annotations

import pytest

from onlay.data.audit.texts import check_texts
from onlay.data.read import Conversation, Turn
from onlay.data.synthesis.filters import OF_THE_AUDIT, REASONS, Filter, answer_refusal
from onlay.data.synthesis.prompts import Written
from onlay.data.synthesis.seeds import Task
from onlay.evaluation.overlap import longest_common, rouge_l
from onlay.evaluation.text import words

SEEDS = [
    Task(instruction="Why does the river run under the old bridge?", input="", answer="x", place="s:1"),
    Task(instruction="Translate the sentence into French.", input="The boat waits.", answer="x", place="s:2"),
]


def make(*more: Task, most_alike: float = 0.7) -> Filter:
    return Filter([*SEEDS, *more], words=words, longest_common=longest_common, most_alike=most_alike)


@pytest.mark.parametrize(
    ("instruction", "input", "reason"),
    [
        ("Name three green boats.", "", None),
        ("Go away now", "", "too_short"),
        ("word " * 151, "", "too_long"),
        ("- Name three green boats.", "", "starts_oddly"),
        ("¿Cómo se llama este río verde?", "", None),
        ("请 把 这句话 翻译 成 英文", "", None),
        ("“Quoted” words begin this one.", "", None),
        ("Draw a green boat, please.", "", "beyond_text"),
        ("Describe the image of a boat.", "", "beyond_text"),
        ("Withdraw the imagery of boats.", "", None),
        ("translate the SENTENCE into French", "the boat waits", "duplicate"),
        ("Translate the sentence into French.", "Another boat waits.", "not_novel"),
        ("Why does the river run over the old bridge?", "", "not_novel"),
        ("Name three broken \ufffd boats.", "", "broken_encoding"),
    ],
)
def test_tasks_are_refused_for_a_reason(instruction: str, input: str, reason: str | None) -> None:
    found, alike = make().refusal(Written(instruction.strip(), input))
    assert found == reason
    assert set(alike) == ({"alike", "nearest"} if reason in (None, "not_novel") else set())


def test_the_limit_of_likeness_is_inclusive_and_what_was_added_counts() -> None:
    one, other = "one two three four five six seven eight nine ten", "one two three four five six seven a b c"
    assert rouge_l(one, other) == pytest.approx(0.7)
    known = make()
    assert known.refusal(Written(other, ""))[0] is None
    known.add(Written(one, ""), place="made:1")
    assert known.refusal(Written(other, "")) == ("not_novel", {"alike": 0.7, "nearest": "made:1"})
    looser = make(most_alike=0.71)
    looser.add(Written(one, ""), place="made:1")
    assert looser.refusal(Written(other, ""))[0] is None


def test_the_nearest_is_rouge_ls() -> None:
    asked = ["Why does the boat run under the bridge?", "Translate this boat into French now.", "nothing at all here"]
    for text in asked:
        every = {task.place: rouge_l(text, task.instruction) for task in SEEDS}
        alike, place = make().nearest(text)
        assert alike == pytest.approx(max(every.values()))
        assert every.get(place, 0.0) == pytest.approx(alike)


def test_limits_widen_to_what_the_seeds_do() -> None:
    known = make(
        Task(instruction="Go.", input="", answer="x", place="s:3"),
        Task(instruction="word " * 200, input="", answer="x", place="s:4"),
        Task(instruction="Draw it with letters.", input="", answer="x", place="s:5"),
    )
    assert known.refusal(Written("Stop.", ""))[0] is None
    assert known.refusal(Written("other " * 199 + "end", ""))[0] is None
    assert known.refusal(Written("Draw three green boats with words", ""))[0] is None
    assert known.refusal(Written("Show the image of three boats", ""))[0] == "beyond_text"


@pytest.mark.parametrize(
    ("answer", "cut", "reason"),
    [
        ("The Nile.", False, None),
        ("+", False, None),
        ("...", False, "empty_answer"),
        ("", False, "empty_answer"),
        ("The Nile is", True, "answer_cut_off"),
        ("name a river", False, "answer_is_prompt"),
        ("IN AFRICA!", False, "answer_is_prompt"),
        ("TODO", False, "placeholder_answer"),
        ("I'm sorry, but I cannot help with that.", False, "refusals"),
        ("the boat waits here " * 60, False, "repetition"),
    ],
)
def test_answers_are_refused_for_a_reason(answer: str, cut: bool, reason: str | None) -> None:
    written = Written("Name a river.", "In Africa")
    row = Conversation((Turn("user", "Name a river."), Turn("assistant", answer)))
    assert answer_refusal(written, answer, cut=cut, codes=check_texts(row, terms=None)) == reason


def test_every_reason_has_words() -> None:
    assert set(OF_THE_AUDIT) <= set(REASONS)
