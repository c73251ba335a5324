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
from onlay.data.synthesis.replies import Replies, Reply, check_writable
from onlay.data.synthesis.rounds import DRY_ROUNDS, REQUESTS_A_ROUND, Asking, Made, Settings, make_rows
from onlay.data.synthesis.seeds import Seeds, Task
from onlay.errors import DataError, OutputError, SetupError
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


def grade(prompt: str) -> Reply:
    return Reply(["no word", '{"score": 3}', '{"score": 5}'][next(digits(prompt)) % 3], False)


def mixed(prompt: str) -> Reply:
    """Good tasks, of which some have no room and some poor answers."""
    if prompt.startswith("Answer the last") and next(digits(prompt)) % 3 == 0:
        return Reply("", False)
    reply = good_reply(prompt)
    if prompt.startswith("Below"):
        return Reply(reply.text.replace("Input: boat", "Input: " + "boat " * 300), False)
    return reply


def test_what_is_refused_comes_in_the_order_of_the_tasks_however_many_rows_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "part").mkdir()
    whole = make(tmp_path / "whole", Voice(mixed, room=1300), rows=25, judge=Voice(grade))
    assert {"no_room", "empty_answer", "judged_low", "judge_unreadable"} <= set(whole.reasons)
    for rows in (1, 3, 10, 25):
        made = make(tmp_path / "part", Voice(mixed, room=1300), rows=rows, judge=Voice(grade))
        assert len(made.rows) == rows
    for name in ("out.jsonl", "rejected.jsonl"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("step", ["Below", "Answer the last", "You grade"])
def test_a_prompt_that_the_server_refuses_is_counted_and_kept(tmp_path: Path, step: str) -> None:
    refused: list[str] = []

    def reply(prompt: str) -> Reply:
        if prompt.startswith(step) and next(digits(prompt)) % 4 == 0:
            refused.append(prompt)
            return Reply("", False, "HTTP 400")
        return good_reply(prompt)

    made = make(tmp_path, Voice(reply), judge=Voice(reply))
    assert len(made.rows) == 30 and made.reasons["refused_by_server"] == len(refused) > 0
    told = [one["provenance"] for one in made.rejected if one["reason"] == "refused_by_server"]
    assert {one["status"] for one in told} == {"HTTP 400"}
    # Nothing is asked again, and the same is made.
    before = (tmp_path / "rejected.jsonl").read_bytes()
    again = make(tmp_path, Voice(most=0), judge=Voice(most=0))
    assert again.rows == made.rows and (tmp_path / "rejected.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("step", "what"), [("Below", "tasks"), ("Answer the last", "answers"), ("You grade", "grades")]
)
def test_a_server_that_refuses_everything_ends_it_and_none_of_it_is_kept(tmp_path: Path, step: str, what: str) -> None:
    def reply(prompt: str) -> Reply:
        return Reply("", False, "HTTP 400") if prompt.startswith(step) else good_reply(prompt)

    with pytest.raises(SetupError, match=rf"Every one of \d+ requests for {what} was refused: HTTP 400"):
        make(tmp_path, Voice(reply), judge=Voice(reply))
    kept = lines(tmp_path / "replies.jsonl") if step != "Below" else []
    assert (tmp_path / "replies.jsonl").exists() == bool(kept) and not any("refused" in line for line in kept)
    # Set right, it goes on.
    assert len(make(tmp_path, Voice(), judge=Voice()).rows) == 30


def test_one_refused_prompt_alone_does_not_block(tmp_path: Path) -> None:
    refused: list[str] = []

    def reply(prompt: str) -> Reply:
        if prompt.startswith("Answer the last") and not refused:
            refused.append(prompt)
            return Reply("", False, "HTTP 413")
        return good_reply(prompt)

    made = make(tmp_path, Voice(reply), rows=1)
    assert len(made.rows) == 1 and made.reasons["refused_by_server"] == 1


def test_the_nearest_task_can_be_found(tmp_path: Path) -> None:
    made = make(tmp_path, Voice(mixed, room=1300), rows=60, most_alike=0.8)
    keys = {
        f"{one['provenance']['request']}/{one['provenance']['task']}"
        for one in made.rejected
        if "task" in one["provenance"]
    }
    seeds = {task.place for task in SEEDS.tasks}
    nearest = [row["provenance"]["nearest"] for row in made.rows]
    assert {name.partition(":")[0] for name in nearest} >= {"made"}
    for number, (row, name) in enumerate(zip(made.rows, nearest, strict=True)):
        assert name in seeds or name in keys or 1 <= int(name.removeprefix("made:")) <= number
        if name.startswith("made:"):
            texts = [words(one["instruction"]) for one in (row, made.rows[int(name.removeprefix("made:")) - 1])]
            alike = 2 * longest_common(*texts) / sum(map(len, texts))
            assert row["provenance"]["alike"] == pytest.approx(alike, abs=1e-4)


def test_a_place_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.jsonl").mkdir()
    for path in (tmp_path / "file" / "out.jsonl", tmp_path / "folder.jsonl"):
        with pytest.raises(OutputError, match="cannot be written") as error:
            check_writable(path)
        assert "--output" in error.value.remedy
    good = tmp_path / "new" / "out.jsonl"
    check_writable(good)
    assert list(good.parent.iterdir()) == []
