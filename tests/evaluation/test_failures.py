from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onlay.data.read import Conversation, read_items, scan
from onlay.errors import OutputError
from onlay.evaluation.failures import write_failures
from onlay.recipe import DataSection


def row(number: int, adapter: float | None, base: float | None = None, **more: Any) -> dict[str, Any]:
    return {
        "row": number,
        "place": f"d.jsonl:{number}",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"q{number} ü"}],
        "expected": f"right {number}",
        "answers": {"base": "b", "adapter": f"bad {number}"},
        "scores": {"base": {"f1": base}, "adapter": {"f1": adapter}},
    } | more


def test_the_worst_come_first_and_the_good_not_at_all(tmp_path: Path) -> None:
    rows = [row(0, 1.0, 0.0), row(1, 0.5, 0.5), row(2, 0.0, 0.0), row(3, 0.0, 1.0), row(4, 0.5, 0.9), row(5, 0.5, 0.5)]
    done = write_failures(tmp_path / "failures.jsonl", rows, system="adapter", score="f1")
    assert done.rows == (3, 2, 4, 1, 5)
    assert (done.failed, done.without_expected, done.without_score) == (5, 0, 0)
    again = write_failures(tmp_path / "again.jsonl", rows[::-1], system="adapter", score="f1")
    assert again == done
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "failures.jsonl").read_bytes()
    assert write_failures(tmp_path / "f.jsonl", rows, system="adapter", score="f1", limit=2).rows == (3, 2)
    assert write_failures(tmp_path / "f.jsonl", rows, system="adapter", score="f1", good=0.5).rows == (3, 2)
    assert write_failures(tmp_path / "f.jsonl", rows, system="adapter", score="f1", against=None).rows == (
        2,
        3,
        1,
        4,
        5,
    )


def test_rows_without_score_or_right_answer_are_counted(tmp_path: Path) -> None:
    rows = [row(0, None), row(1, 0.0, None), row(2, 0.0, expected=None), row(3, 0.0, expected=" ")]
    done = write_failures(tmp_path / "failures.jsonl", rows, system="adapter", score="f1")
    assert (done.rows, done.failed, done.without_expected, done.without_score) == ((1,), 3, 2, 1)


def test_the_file_can_be_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "failures.jsonl"
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    write_failures(path, [row(7, 0.25, 0.5), row(8, 0.5, tools=tools)], system="adapter", score="f1")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[0]["bad_answer"] == "bad 7" and lines[0]["place"] == "d.jsonl:7"
    assert (lines[0]["score"], lines[0]["score_of_base"]) == (0.25, 0.5)
    assert "score_of_base" not in lines[1]

    section = DataSection(train=str(path))
    found = scan(str(path), section)
    assert (found.format, found.rows) == ("messages", 2)
    items = [item for _, item in read_items(str(path), found.format, section)]
    assert isinstance(items[0], Conversation) and isinstance(items[1], Conversation)
    assert [(turn.role, turn.content) for turn in items[0].turns] == [
        ("system", "Be brief."),
        ("user", "q7 ü"),
        ("assistant", "right 7"),
    ]
    assert items[1].tools == tuple(tools)


def test_no_failures_is_an_empty_file_and_a_folder_an_error(tmp_path: Path) -> None:
    assert write_failures(tmp_path / "f.jsonl", [row(0, 1.0)], system="adapter", score="f1").rows == ()
    assert (tmp_path / "f.jsonl").read_bytes() == b""
    with pytest.raises(OutputError, match="could not be written"):
        write_failures(tmp_path, [row(0, 0.0)], system="adapter", score="f1")
