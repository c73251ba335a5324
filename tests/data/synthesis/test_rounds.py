from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from onlay.data.read import parse
from onlay.data.sources import read_rows
from onlay.data.synthesis.filters import REASONS
from onlay.data.synthesis.prompts import tasks_prompt
from onlay.data.synthesis.replies import Replies, Reply
from onlay.data.synthesis.rounds import DRY_ROUNDS, REQUESTS_A_ROUND, Asking, Made, Settings, make_rows
from onlay.data.synthesis.seeds import Seeds, Task
from onlay.errors import DataError, OutputError
from onlay.evaluation.overlap import longest_common
from onlay.evaluation.text import words
from onlay.recipe import DataSection

NOUNS = [
    "river",
    "boat",
    "bridge",
    "stone",
    "rain",
    "cloud",
    "meadow",
    "harbour",
    "lantern",
    "orchard",
    "kettle",
    "violin",
    "glacier",
    "pepper",
    "engine",
    "ladder",
]
SEEDS = Seeds(
    tasks=tuple(
        Task(instruction=f"Tell me what a {noun} was for in old days.", input="", answer=f"A {noun} was useful.", place=f"s:{i}")
        for i, noun in enumerate(NOUNS[:10], 1)
    ),
    digest="d" * 64,
    notes=(),
)  # fmt: skip


def digits(text: str) -> Iterator[int]:
    yield from hashlib.sha256(text.encode()).digest()


def good_reply(prompt: str) -> Reply:
    """Tasks, answers and grades as a function of the prompt."""
    if prompt.startswith("You grade"):
        return Reply('{"reason": "r", "score": 5}', False)
    if prompt.startswith("Answer the last"):
        return Reply("It is about " + prompt.rpartition("Task: ")[2].partition("\n")[0], False)
    lines = []
    for place, byte in enumerate(list(digits(prompt))[:8]):
        first, second = NOUNS[byte % 16], NOUNS[byte // 16]
        lines.append(f"Task: {hex(byte)} compare every {first} with one {second}, number {place}\nInput: {second}")
    return Reply("\n\n".join(lines), False)


class Voice:
    """A stand-in for a model; `most` replies, then it breaks."""

    def __init__(
        self, reply: Callable[[str], Reply] = good_reply, *, most: int | None = None, room: int = 10**9
    ) -> None:
        self.reply, self.most, self.room, self.prompts = reply, most, room, list[str]()
        self.temperatures: set[float] = set()
        self.name = "stand-in"

    def ask(self, temperature: float) -> Callable[[Sequence[str]], Iterator[tuple[int, Reply]]]:
        def ask(prompts: Sequence[str]) -> Iterator[tuple[int, Reply]]:
            self.temperatures.add(temperature)
            # Out of order, as they come in from a server.
            for place in reversed(range(len(prompts))):
                if self.most is not None and len(self.prompts) >= self.most:
                    raise KeyboardInterrupt
                self.prompts.append(prompts[place])
                yield place, self.reply(prompts[place])

        return ask

    def fits(self, prompt: str) -> bool:
        return len(prompt) <= self.room


def make(folder: Path, voice: Voice, *, rows: int = 30, judge: Voice | None = None, **settings: Any) -> Made:
    chosen = Settings(**settings)
    replies = Replies(folder / "replies.jsonl", settings={"seed": chosen.seed})
    return make_rows(
        SEEDS, settings=chosen, rows=rows, replies=replies, output=folder / "out.jsonl", rejected=folder / "rejected.jsonl",
        asking=Asking(model=voice, judge=judge, words=words, longest_common=longest_common), tell=lambda made: None,
    )  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_can_be_trained_on_and_say_where_they_come_from(tmp_path: Path) -> None:
    voice = Voice()
    made = make(tmp_path, voice, rows=60)
    rows = lines(tmp_path / "out.jsonl")
    assert rows == made.rows and len(rows) == 60 and made.stopped is None
    assert voice.temperatures == {0.7, 0.0}
    path = str(tmp_path / "out.jsonl")
    for row in read_rows(path, DataSection(train=path)):
        assert parse(row, "alpaca", DataSection(train=path)).turns[1].content.startswith("It is about")  # type: ignore[union-attr]
    places = {task.place for task in SEEDS.tasks} | {f"made:{i}" for i in range(1, 61)}
    for row in rows:
        told = row["provenance"]
        assert row["source"] == "synthetic:stand-in"
        assert set(told["shown"]) <= places and len(told["shown"]) == 8 and len(told["examples"]) == 3
        assert told["request"].split("/")[:2] == ["tasks", str(told["round"])]
        assert (told["seed"], told["temperature"], len(told["template"])) == (0, 0.7, 12)
        assert 0 < told["alike"] < 0.7 and told["nearest"]
    # From the second round on, prompts show what was made as well.
    assert any(
        "made:" in place for row in rows if row["provenance"]["round"] > 1 for place in row["provenance"]["shown"]
    )


def test_every_task_that_was_written_is_a_row_or_is_counted(tmp_path: Path) -> None:
    made = make(tmp_path, Voice(), rows=10_000)
    assert made.stopped == f"{DRY_ROUNDS} rounds in a row brought no new row"
    written = made.rounds * REQUESTS_A_ROUND * 8
    assert len(made.rows) + len(made.rejected) == written
    assert lines(tmp_path / "rejected.jsonl") == made.rejected
    assert sum(made.reasons.values()) == len(made.rejected)
    assert set(made.reasons) <= set(REASONS)
    texts = [row["instruction"] for row in made.rows]
    assert all(
        2 * longest_common(words(a), words(b)) / (len(words(a)) + len(words(b))) < 0.7
        for i, a in enumerate(texts)
        for b in texts[:i]
    )


def test_the_same_seed_makes_the_same_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        make(tmp_path / name, Voice(), seed=seed)
    texts = {name: (tmp_path / name / "out.jsonl").read_text() for name in "abc"}
    assert texts["a"] == texts["b"] != texts["c"]


@pytest.mark.parametrize("most", [0, 1, 7, 8, 9, 20, 31])
def test_an_interrupted_synthesis_goes_on_where_it_stopped(tmp_path: Path, most: int) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "part").mkdir()
    whole = Voice()
    make(tmp_path / "whole", whole)
    first = Voice(most=most)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "part", first)
    assert len(first.prompts) == most
    if most:  # The reply that was being written when the program was killed.
        with (tmp_path / "part" / "replies.jsonl").open("a") as file:
            file.write('{"key": "tasks/1/0", "rep')
    second = Voice()
    make(tmp_path / "part", second)
    for name in ("out.jsonl", "rejected.jsonl"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    third = Voice(most=0)
    make(tmp_path / "part", third)
    # Nothing was asked twice.
    assert sorted(first.prompts + second.prompts) == sorted(whole.prompts)


def test_more_rows_go_on_from_fewer(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "part").mkdir()
    make(tmp_path / "whole", Voice(), rows=40)
    for rows in (5, 20, 40):
        make(tmp_path / "part", Voice(), rows=rows)
        assert len(lines(tmp_path / "part" / "out.jsonl")) == rows
    for name in ("out.jsonl", "rejected.jsonl"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_edited_file_is_not_written_over(tmp_path: Path) -> None:
    make(tmp_path, Voice(), rows=5)
    out = tmp_path / "out.jsonl"
    edited = out.read_text().replace("compare", "weigh", 1)
    out.write_text(edited)
    with pytest.raises(OutputError, match="it was edited since"):
        make(tmp_path, Voice(), rows=20)
    assert out.read_text() == edited


def test_other_settings_are_refused(tmp_path: Path) -> None:
    make(tmp_path, Voice(), rows=5)
    before = (tmp_path / "replies.jsonl").read_bytes()
    with pytest.raises(OutputError, match="was begun with seed = 0, not 3"):
        make(tmp_path, Voice(), rows=5, seed=3)
    assert (tmp_path / "replies.jsonl").read_bytes() == before


@pytest.mark.parametrize(("text", "problem"), [
    ("{}\n", "no file of kept replies"), ("", "no file of kept replies"), ('{"settings": {"seed": 0}}\n5\n', ":2 is no kept reply"),
    ('{"settings": {"seed": 0}}\n{"key": "a", "prompt": "b", "reply": 5, "cut": false}\n', ":2 is no kept reply"),
])  # fmt: skip
def test_a_file_of_something_else_is_told(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "replies.jsonl").write_text(text)
    with pytest.raises(OutputError, match=problem):
        make(tmp_path, Voice())


def test_poor_replies_are_counted_by_reason(tmp_path: Path) -> None:
    replies = iter([
        Reply("no idea", False),
        Reply("Task: Name three green boats in the harbour.\nInput: none\nTask: Name the stone that is the", True),
        Reply("Task: Tell me what a river was for in old days.\nInput: none", False),
        Reply("Task: What does a lantern do at night\ud800?\nInput: none", False),
    ])  # fmt: skip

    def reply(prompt: str) -> Reply:
        if prompt.startswith("Answer the last"):
            return Reply("In the harbour there are", True)
        return next(replies, Reply("", False))

    made = make(tmp_path, Voice(reply))
    assert made.rows == [] and (tmp_path / "out.jsonl").read_text() == ""
    nothing = DRY_ROUNDS * REQUESTS_A_ROUND - 3
    assert made.reasons == {
        "unreadable_reply": nothing, "cut_off": 1, "duplicate": 1, "broken_encoding": 1, "answer_cut_off": 1,
    }  # fmt: skip


def test_a_judge_decides(tmp_path: Path) -> None:
    def grade(prompt: str) -> Reply:
        byte = next(digits(prompt))
        return Reply(["no word", '{"score": 3}', '{"score": 4}', '{"score": 5}'][byte % 4], False)

    judge = Voice(grade)
    judge.name = "judge"
    made = make(tmp_path, Voice(), judge=judge)
    assert len(made.rows) == 30
    assert {row["provenance"]["score"] for row in made.rows} == {4, 5}
    assert {row["provenance"]["judge"] for row in made.rows} == {"judge"}
    graded = [one for one in made.rejected if "score" in one["provenance"]]
    assert {(one["reason"], one["provenance"]["score"]) for one in graded} == {
        ("judged_low", 3),
        ("judge_unreadable", None),
    }
    assert len(judge.prompts) == len(made.rows) + len(graded)
    assert judge.temperatures == {0.0}


def test_prompts_show_as_many_tasks_as_there_is_room_for(tmp_path: Path) -> None:
    voice = Voice(room=len(tasks_prompt(SEEDS.tasks[:5])))
    made = make(tmp_path, voice, rows=5)
    assert max(map(len, voice.prompts)) <= voice.room
    assert made.shortened == made.rounds * REQUESTS_A_ROUND
    assert all(0 < len(row["provenance"]["shown"]) < 8 for row in made.rows)


def test_no_room_at_all_is_told_before_anything_is_asked(tmp_path: Path) -> None:
    voice = Voice(room=300)
    with pytest.raises(DataError, match="not even this one task fits into a prompt beside 1,024 new tokens") as error:
        make(tmp_path, voice)
    assert "--max-new-tokens" in error.value.remedy
    assert voice.prompts == [] and list(tmp_path.iterdir()) == []


def test_a_task_without_room_for_its_answer_is_counted(tmp_path: Path) -> None:
    def reply(prompt: str) -> Reply:
        if prompt.startswith("Below") and next(digits(prompt)) % 2:
            return Reply(f"Task: Count the words of this text, number {prompt[-40:]!r}\nInput: " + "boat " * 300, False)
        return good_reply(prompt)

    made = make(tmp_path, Voice(reply, room=1300), rows=20)
    assert len(made.rows) == 20 and made.reasons["no_room"] > 0
