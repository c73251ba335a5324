from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onlay.data.synthesis.seeds import Task, read_seeds
from onlay.errors import DataError
from onlay.recipe import DataSection


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: str, **fields: Any) -> Any:
    return read_seeds(path, DataSection(train=path, **fields))


def test_self_instructs_own_form(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.jsonl",
        {"id": "seed_0", "instruction": " Count. ", "instances": [{"input": "a b", "output": "2"}, {"input": "", "output": "0"}]},
    )  # fmt: skip
    found = read(path)
    assert found.tasks == (
        Task(instruction="Count.", input="a b", answer="2", place=f"{path}:1"),
        Task(instruction="Count.", input="", answer="0", place=f"{path}:1"),
    )
    assert len(found.digest) == 64
    assert found.notes == ("2 seed tasks are few: what is made will stay close to them; 100 or more vary it",)


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, ("Add.", "1 1", "2")),
        ({"instruction": "Add.", "context": "1 1", "response": "2"}, ("Add.", "1 1", "2")),
        ({"prompt": "Add 1 1", "completion": "2"}, ("Add 1 1", "", "2")),
        ({"question": "1 + 1?", "answer": "2"}, ("1 + 1?", "", "2")),
        (
            {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]},
            ("1 + 1?", "", "2"),
        ),
        ({"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]}, ("1 + 1?", "", "2")),
        ({"text": "I like it", "label_text": "good"}, ("I like it", "", "good")),
    ],
)
def test_every_format_with_a_prompt_and_an_answer(tmp_path: Path, row: dict[str, Any], task: tuple[str, ...]) -> None:
    [found] = read(write(tmp_path / "s.jsonl", row)).tasks
    assert (found.instruction, found.input, found.answer) == task


def test_named_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", {"frage": "1 + 1?", "antwort": "2"})
    assert read(path, prompt_field="frage", answer_field="antwort").tasks[0].answer == "2"


def test_what_is_not_used_is_told(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, user, answer]},
        {"messages": [user, answer, user, answer]},
        {"messages": [answer, user]},
    ] + [{"messages": [user, answer]}] * 8
    found = read(write(tmp_path / "s.jsonl", *rows))
    assert len(found.tasks) == 10
    assert [note.split(" have")[0].split(" are")[0] for note in found.notes] == [
        "1 seed row",
        "1 seed row",
        "1 seed row",
    ]
    assert any("system message" in note for note in found.notes)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "holds no rows"),
        ([{"text": "only text"}], "a seed task needs a question and an answer"),
        ([{"instruction": "a", "instances": []}], "field instances: it is an empty list"),
        ([{"instruction": "a", "instances": [5]}], r"field instances\[0\]: it is a number"),
        ([{"instruction": "a", "instances": [{"input": "x"}]}], "field output: missing"),
        ([{"instruction": "a", "instances": [{"output": "x"}]}, {"instruction": "b"}], "field instances: it is null"),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "no row with a question and an answer"),
        ([{"prompt": "a", "completion": " "}], "field completion: it is empty"),
    ],
)
def test_errors_name_the_place(tmp_path: Path, rows: list[dict[str, Any]], problem: str) -> None:
    path = write(tmp_path / "s.jsonl", *rows)
    with pytest.raises(DataError, match=problem) as error:
        read(path)
    assert path in error.value.problem and error.value.remedy


def test_the_seeds_of_self_instruct(data_folder: Path) -> None:
    found = read(str(data_folder / "self_instruct" / "seed_tasks.jsonl"))
    assert len(found.tasks) == 175 and found.notes == ()
    assert found.tasks[1].input == "Night : Day :: Right : Left"
    assert all(task.instruction and task.answer for task in found.tasks)
