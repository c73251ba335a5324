"""Every format and every kind of bad input: a DataError names file, row and field, in two lines."""

from __future__ import annotations

import gzip
import json
import logging
import os
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onlay.data import json_lists, read
from onlay.data.read import Conversation, Document, ToolCall, Turn, parse, prompt_key, scan
from onlay.data.sources import Reading, Row, read_rows
from onlay.errors import DataError
from onlay.recipe import DataSection

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = os.environ.get("ONLAY_TEST_DATA")
    if not folder:
        pytest.skip("ONLAY_TEST_DATA is not set: the real data files are not tested")
    return Path(folder)


def section(path: Path | str = "unused", **fields: Any) -> DataSection:
    return DataSection(train=str(path), **fields)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parse_one(tmp_path: Path, values: dict[str, Any], **fields: Any) -> Conversation | Document:
    path = write_jsonl(tmp_path / "rows.jsonl", [values])
    row = next(read_rows(str(path), section(path, **fields)))
    return parse(row, read.detect_format([row], section(path, **fields)), section(path, **fields))


def pair(question: str, answer: str) -> tuple[Turn, ...]:
    return (Turn("user", question, trained=False), Turn("assistant", answer))


def untrained(turns: tuple[Turn, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((turn.role, turn.content) for turn in turns)


# ------------------------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize(
    ("values", "fields", "format", "turns"),
    [
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            {},
            "alpaca",
            (("user", "Add\n\n1 2"), ("assistant", "3")),
        ),
        ({"instruction": "Add", "input": "", "output": "3"}, {}, "alpaca", (("user", "Add"), ("assistant", "3"))),
        ({"instruction": "Add", "output": "3"}, {}, "alpaca", (("user", "Add"), ("assistant", "3"))),
        ({"instruction": "A", "context": "C", "response": "R"}, {}, "alpaca", (("user", "A\n\nC"), ("assistant", "R"))),
        ({"prompt": "P", "completion": "C"}, {}, "prompt_completion", (("user", "P"), ("assistant", "C"))),
        ({"prompt": "P", "response": "C"}, {}, "prompt_completion", (("user", "P"), ("assistant", "C"))),
        ({"question": "Q", "answer": "A"}, {}, "prompt_completion", (("user", "Q"), ("assistant", "A"))),
        ({"query": "Q", "response": "A"}, {}, "prompt_completion", (("user", "Q"), ("assistant", "A"))),
        ({"input": "I", "output": "O"}, {}, "prompt_completion", (("user", "I"), ("assistant", "O"))),
        (
            {"Frage": "F", "Antwort": "A"},
            {"prompt_field": "Frage", "answer_field": "Antwort"},
            "prompt_completion",
            (("user", "F"), ("assistant", "A")),
        ),
        (
            {"prompt": "P", "gold": "A"},
            {"answer_field": "gold"},
            "prompt_completion",
            (("user", "P"), ("assistant", "A")),
        ),
        (
            {"prompt": CHAT[:1], "completion": CHAT[1:]},
            {},
            "prompt_completion",
            (("user", "Hi"), ("assistant", "Hello.")),
        ),
        ({"messages": CHAT}, {}, "messages", (("user", "Hi"), ("assistant", "Hello."))),
        ({"messages": json.dumps(CHAT)}, {}, "messages", (("user", "Hi"), ("assistant", "Hello."))),
        ({"talk": CHAT}, {"messages_field": "talk"}, "messages", (("user", "Hi"), ("assistant", "Hello."))),
        (
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "human", "value": "H"},
                    {"from": "gpt", "value": "G"},
                ]
            },
            {},
            "sharegpt",
            (("system", "S"), ("user", "H"), ("assistant", "G")),
        ),
        (
            {"conversation": [{"from": "human", "value": "H"}, {"from": "gpt", "value": "G"}], "system": "S"},
            {},
            "sharegpt",
            (("system", "S"), ("user", "H"), ("assistant", "G")),
        ),
        ({"text": "T", "label": 3}, {}, "classification", (("user", "T"), ("assistant", "3"))),
        ({"text": "T", "label": 3, "label_text": "joy"}, {}, "classification", (("user", "T"), ("assistant", "joy"))),
        (
            {"prompt": "P", "completion": "C"},
            {"system": "S"},
            "prompt_completion",
            (("system", "S"), ("user", "P"), ("assistant", "C")),
        ),
    ],
)
def test_formats_are_found_and_parsed(
    tmp_path: Path, values: dict[str, Any], fields: dict[str, Any], format: str, turns: tuple[tuple[str, str], ...]
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [values])
    found = scan(str(path), section(path, **fields))
    assert (found.format, found.rows) == (format, 1)
    item = parse_one(tmp_path, values, **fields)
    assert isinstance(item, Conversation)
    assert untrained(item.turns) == turns
    assert item.place == f"{path}:1"


def test_plain_text_is_a_document(tmp_path: Path) -> None:
    assert parse_one(tmp_path, {"text": "T", "title": "x"}) == Document("T", f"{tmp_path / 'rows.jsonl'}:1")
    assert parse_one(tmp_path, {"body": "T"}, text_field="body") == Document("T", f"{tmp_path / 'rows.jsonl'}:1")


def test_the_format_of_the_recipe_wins(tmp_path: Path) -> None:
    item = parse_one(tmp_path, {"text": "T", "label": "L"}, format="text")
    assert isinstance(item, Document)
    item = parse_one(
        tmp_path,
        {"utterance": "T", "intent": 4},
        format="classification",
        prompt_field="utterance",
        answer_field="intent",
    )
    assert isinstance(item, Conversation)
    assert untrained(item.turns) == (("user", "T"), ("assistant", "4"))


def test_openai_tool_calls(tmp_path: Path) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        {"role": "assistant", "content": "Two.", "weight": 1},
    ]
    tools = [{"name": "f", "description": "d", "parameters": {}}]
    item = parse_one(tmp_path, {"messages": messages, "tools": json.dumps(tools)})
    assert isinstance(item, Conversation)
    assert item.turns[0].role == "system"
    assert item.turns[1].content == "Hi"
    assert item.turns[1].name == "ann"
    assert item.turns[2].tool_calls == (ToolCall("f", {"x": 1}, "call_1"),)
    assert item.turns[2].content == ""
    assert item.turns[3].tool_call_id == "call_1"
    assert item.tools == ({"type": "function", "function": tools[0]},)


def test_sharegpt_function_calls_and_parts_with_reasoning(tmp_path: Path) -> None:
    item = parse_one(
        tmp_path,
        {
            "conversations": [
                {"from": "human", "value": "H"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": [{"type": "reasoning", "value": "Hm."}, {"type": "text", "value": "Two."}]},
                {"from": "gpt", "value": [{"type": "tool_call", "value": '{"name": "g", "arguments": {}}'}]},
            ]
        },
    )
    assert isinstance(item, Conversation)
    assert [turn.role for turn in item.turns] == ["user", "assistant", "tool", "assistant", "assistant"]
    assert item.turns[1].tool_calls == (ToolCall("f", {"x": 1}),)
    assert (item.turns[3].content, item.turns[3].reasoning) == ("Two.", "Hm.")
    assert item.turns[4].tool_calls == (ToolCall("g", {}),)


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
def test_weight_zero_is_not_trained_and_may_be_empty(tmp_path: Path, key: str) -> None:
    messages = [CHAT[0], {"role": "assistant", "content": "", key: 0.0}, CHAT[0], CHAT[1]]
    item = parse_one(tmp_path, {"messages": messages})
    assert isinstance(item, Conversation)
    assert [turn.trained for turn in item.turns] == [False, False, False, True]


# ---------------------------------------------------------------------------------------------------------- bad input


BAD_ROWS: list[tuple[str, dict[str, Any], Any, str]] = [
    ("not an object", {}, [1, 2], "{file}:2 is a list, not an object"),
    ("missing field", {}, {"prompt": "P"}, "{file}:2, field completion: missing (the row has prompt)"),
    ("null field", {}, {"prompt": "P", "completion": None}, "{file}:2, field completion: null"),
    ("wrong type", {}, {"prompt": "P", "completion": 7}, "{file}:2, field completion: it is a number, not text"),
    ("wrong prompt type", {}, {"prompt": {}, "completion": "C"}, "{file}:2, field prompt: it is an object, not text"),
    ("empty answer", {}, {"prompt": "P", "completion": " \n"}, "{file}:2, field completion: it is empty"),
    ("half a character", {}, {"prompt": "P", "completion": "x\ud83d"}, "field completion: character 2 is half of"),
    ("mixed formats", {}, {"instruction": "I", "output": "O"}, "this row looks like alpaca (instruction, output)"),
    (
        "system of wrong type",
        {},
        {"prompt": "P", "completion": "C", "system": 3},
        "{file}:2, field system: it is a number",
    ),
    ("tools of wrong type", {}, {"prompt": "P", "completion": "C", "tools": "nope"}, "{file}:2, field tools"),
]


@pytest.mark.parametrize(("what", "fields", "bad", "expected"), BAD_ROWS, ids=[row[0] for row in BAD_ROWS])
def test_a_bad_row_is_named(tmp_path: Path, what: str, fields: dict[str, Any], bad: Any, expected: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "P", "completion": "C"}, bad])
    with pytest.raises(DataError) as caught:
        scan(str(path), section(path, **fields))
    assert_two_lines(caught.value, expected.format(file=path))


BAD_MESSAGES: list[tuple[str, Any, str]] = [
    ("no assistant", CHAT[:1], "field messages: it has no assistant turn"),
    ("empty list", [], "field messages: it has no assistant turn"),
    (
        "unknown role",
        [CHAT[0], {"role": "robot", "content": "x"}],
        "field messages[1].role: 'robot' is not a known role",
    ),
    ("no role", [{"content": "x"}], "field messages[0].role: missing"),
    (
        "empty answer",
        [CHAT[0], {"role": "assistant", "content": "  "}],
        "field messages[1].content: the answer is empty",
    ),
    ("null answer", [CHAT[0], {"role": "assistant", "content": None}], "field messages[1].content: missing"),
    ("number", [CHAT[0], {"role": "assistant", "content": 3}], "field messages[1].content: it is a number, not text"),
    ("turn is text", ["hello"], "field messages[0]: it is text, not an object"),
    ("not a list", {"role": "user"}, "field messages: it is an object, not a list"),
    (
        "image",
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, CHAT[1]],
        "a part of type 'image_url'",
    ),
    ("half weight", [CHAT[0], {**CHAT[1], "weight": 0.5}], "field messages[1].weight: 0.5 is neither 0 nor 1"),
    (
        "call without name",
        [CHAT[0], {"role": "assistant", "tool_calls": [{"function": {}}]}],
        "a tool call without a name",
    ),
    (
        "arguments not JSON",
        [CHAT[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}],
        "field messages[1].tool_calls[0].arguments: not a JSON object",
    ),
]


@pytest.mark.parametrize(("what", "messages", "expected"), BAD_MESSAGES, ids=[row[0] for row in BAD_MESSAGES])
def test_a_bad_message_is_named(tmp_path: Path, what: str, messages: Any, expected: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}, {"messages": messages}])
    with pytest.raises(DataError) as caught:
        scan(str(path), section(path))
    assert_two_lines(caught.value, f"{path}:2", expected)


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b'{"prompt": "P", "completion": "C"}\n\n{"prompt": \n', "{file}:3 is not JSON"),
    ("a.jsonl", b"\xff\xfe\n", "{file}:1 is not"),
    ("a.jsonl", b"", "{file} holds no rows"),
    ("a.json", b"[]", "{file} holds no rows"),
    ("a.json", b'[{"prompt": "P"},\n\n {"prompt": P}]', "{file}:3 is not JSON"),
    ("a.json", b'[{"text": "P"}\n', "{file}:2 is not JSON: expected ',' or ']', found the end of the file"),
    ("a.json", b'[{"text": "P"}, 3]', "{file}:2 is a number, not an object"),
    ("a.json", b'{"a": 1,\n "b": [1, [2], 3], "c": []}', "no list of objects (it holds a, b, c)"),
    ("a.json", b'"text"', "not with a list of objects"),
    ("a.csv", b"prompt,completion\nP,C\nP,C,D\n", "{file}:3 has 3 fields; the header has 2"),
    ("a.csv", b"prompt,prompt\nP,C\n", "{file}:1 names the column 'prompt' twice"),
    ("a.csv", b'prompt,completion\n"P,C\n', "{file}:2 is not CSV"),
    ("a.csv", b"prompt,completion\n", "{file} holds no rows"),
    ("a.txt", b" \n", "{file} holds no rows"),
    ("a.txt", b"caf\xe9", "{file} is not UTF-8 text"),
    ("a.parquet", b"not parquet", "{file} cannot be read as Parquet"),
    ("a.jsonl.gz", b"not gzip", "{file} is not a whole gzip file"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "T"}\n' * 1000, mtime=0)[:-20], "{file} is not a whole gzip file"),
    ("a.xlsx", b"PK", "{file} has the suffix .xlsx"),
    ("a.jsonl", b'{"title": "t", "body": "b"}', "{file}:1: no known format has these columns: title, body"),
]


@pytest.mark.parametrize(("name", "content", "expected"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        scan(str(path), section(path))
    assert_two_lines(caught.value, expected.format(file=path))


def test_a_missing_file_gets_near_names(tmp_path: Path) -> None:
    (tmp_path / "support.jsonl").write_text("{}")
    with pytest.raises(DataError) as caught:
        scan(str(tmp_path / "suport.jsonl"), section())
    assert_two_lines(caught.value, "There is no data file", f"Did you mean {tmp_path / 'support.jsonl'}?")
    with pytest.raises(DataError, match="does not exist either"):
        scan(str(tmp_path / "none" / "a.jsonl"), section())
    with pytest.raises(DataError, match="is a folder"):
        scan(str(tmp_path), section())


def test_a_path_into_an_existing_folder_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="There is no data file at data/train"):
        scan("data/train", section())


def assert_two_lines(error: DataError, *parts: str) -> None:
    text = str(error)
    lines = text.split("\n")
    assert len(lines) == 2, text
    assert all(lines), text
    for part in parts:
        assert part in text, text


# ------------------------------------------------------------------------------------------------------------ readers


ROWS = [{"prompt": f'P{i} {{["é', "completion": f"C{i}"} for i in range(50)]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("wrapped", [False, True])
def test_json_arrays_stream_in_chunks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None, wrapped: bool
) -> None:
    monkeypatch.setattr(json_lists, "CHUNK_CHARACTERS", chunk)
    path = tmp_path / "a.json"
    value: Any = {"version": 12.5, "tags": ["x", [1]], "empty": [], "data": ROWS} if wrapped else ROWS
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False), encoding="utf-8")
    rows = list(read_rows(str(path), section()))
    assert [row.values for row in rows] == ROWS
    assert [row.number for row in rows] == list(range(1, 51))


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.json", ROWS)
    assert [row.values for row in read_rows(str(path), section())] == ROWS
    path = write_jsonl(tmp_path / "b.json", [{"messages": CHAT}])
    assert scan(str(path), section()).rows == 1


def test_json_and_jsonl_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    for name, text in (("a.json", json.dumps(ROWS)), ("a.jsonl", "\n".join(map(json.dumps, ROWS)))):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert scan(str(tmp_path / name), section()).rows == 50


def test_csv_numbers_are_lines_and_fields_may_hold_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('question,answer\r\n"two\nlines, one field","a ""b"""\r\n\r\nq,c\r\n', newline="")
    rows = list(read_rows(str(path), section()))
    assert [(row.number, row.values["question"]) for row in rows] == [(2, "two\nlines, one field"), (5, "q")]
    assert rows[0].values["answer"] == 'a "b"'
    assert rows[1].place == f"{path}:5"
    tsv = tmp_path / "a.tsv"
    tsv.write_text("question\tanswer\nq, r\tc\n")
    assert next(read_rows(str(tsv), section())).values == {"question": "q, r", "answer": "c"}


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    assert scan(str(path), section()).rows == 50


def test_parquet_with_nested_messages(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    messages = [
        [{"role": "user", "content": f"Q{i}", "weight": None}, {"role": "assistant", "content": "A", "weight": 1}]
        for i in range(2500)
    ]
    parquet.write_table(pyarrow.table({"messages": messages}), path)
    found = scan(str(path), section())
    assert (found.format, found.rows, len(set(found.prompt_keys.tolist()))) == ("messages", 2500, 2500)
    assert [row.number for row in read_rows(str(path), section(), limit=3)] == [1, 2, 3]


def test_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    found = scan(str(tmp_path / "a.txt"), section())
    assert (found.format, found.rows) == ("text", 1)


def test_limit(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*ROWS, "bad"])
    assert scan(str(path), section(), 10).rows == 10


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = scan("someone/some-set", section("someone/some-set", hub_config="main", hub_split="test"))
    assert (found.rows, found.format) == (50, "prompt_completion")
    assert asked[0] == ("someone/some-set", "main", "test")


def test_hub_errors_have_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    cases = [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."),
            "There is no data set a/b",
        ),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub."), "is gated"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"), "the hub cannot be reached"),
        (
            ValueError("Unknown split \"train\". Should be one of ['test']."),
            "hub_split train) cannot be loaded: Unknown split",
        ),
    ]
    for error, expected in cases:

        def load(*args: Any, error: Exception = error, **kwargs: Any) -> Any:
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(DataError) as caught:
            scan("a/b", section("a/b"))
        assert_two_lines(caught.value, expected)


# --------------------------------------------------------------------------------------------------- scan, keys, cost


def test_prompt_keys_are_equal_where_the_prompt_is() -> None:
    def key(*turns: Turn) -> bytes:
        return prompt_key(Conversation(turns))

    assert key(*pair("a  b\n", "x")) == key(*pair(" a b", "y"))
    assert key(*pair("a", "x")) != key(*pair("b", "x"))
    assert key(Turn("system", "s"), *pair("a", "x")) != key(*pair("a", "x"))
    assert key(*pair("a", "x"), *pair("b", "y")) != key(*pair("a", "z"), *pair("b", "y"))
    assert prompt_key(Document("a b")) == prompt_key(Document("a\nb ")) != prompt_key(Document("a"))
    assert len(prompt_key(Document("a"))) == 8


def test_scan_counts_digests_and_keys(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": p, "completion": "C"} for p in ("a", "b", "a ")])
    found = scan(str(path), section())
    assert found.prompt_keys.dtype == np.uint64
    assert found.prompt_keys.shape == (3,)
    assert found.prompt_keys[0] == found.prompt_keys[2] != found.prompt_keys[1]
    copy = tmp_path / "b.jsonl"
    copy.write_bytes(path.read_bytes())
    assert scan(str(copy), section()).digest == found.digest
    copy.write_bytes(path.read_bytes() + b"\n")
    assert scan(str(copy), section()).digest != found.digest


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_memory_is_bounded(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"big.{suffix}"
    with path.open("w") as out:
        out.write({"jsonl": "", "json": "[", "csv": "prompt,completion\n"}[suffix])
        for i in range(20_000):
            row = {"prompt": f"{i} " + "question " * 40, "completion": "answer " * 40}
            text = f"{row['prompt']},{row['completion']}\n" if suffix == "csv" else json.dumps(row)
            out.write(text if suffix == "csv" else text + "\n" if suffix == "jsonl" else ("," if i else "") + text)
        out.write("]" if suffix == "json" else "")
    assert path.stat().st_size > 12_000_000
    tracemalloc.start()
    found = scan(str(path), section())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.rows == 20_000
    assert peak < 10_000_000, f"{peak} bytes for a file of {path.stat().st_size}"


def test_reading_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "datasets", "pyarrow")
    code = f"import sys, onlay.data.read; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.stdout.strip() == "[]"


# ----------------------------------------------------------------------------------------------------- real material


@pytest.mark.parametrize(
    ("file", "format", "rows"),
    [
        ("instruct_demo/alpaca_en_demo.json", "alpaca", 999),
        ("instruct_demo/identity.json", "alpaca", 91),
        ("instruct_demo/glaive_toolcall_en_demo.json", "sharegpt", 300),
        ("instruct_demo/reason_tool_use_demo_50.jsonl", "messages", 50),
        ("instruct_demo/v1_sft_demo.jsonl", "messages", 500),
        ("instruct_demo/c4_demo.jsonl", "text", 300),
        ("instruct_demo/wiki_demo.txt", "text", 1),
        ("sharegpt/dummy_conversation.json", "sharegpt", 500),
        ("gsm8k/train.jsonl", "prompt_completion", 7473),
    ],
)
def test_real_files(real_data: Path, file: str, format: str, rows: int) -> None:
    path = str(real_data / file)
    found = scan(path, section(path))
    assert (found.format, found.rows) == (format, rows)


def test_real_tool_calls(real_data: Path) -> None:
    for file in ("glaive_toolcall_en_demo.json", "reason_tool_use_demo_50.jsonl"):
        path = str(real_data / "instruct_demo" / file)
        found = scan(path, section(path))
        items = [item for _, item in read.read_items(path, found.format, section(path))]
        turns = [turn for item in items if isinstance(item, Conversation) for turn in item.turns]
        assert sum(len(turn.tool_calls) for turn in turns) >= 50
        assert all(call.name for turn in turns for call in turn.tool_calls)
        assert any(turn.role == "tool" for turn in turns)
        assert any(item.tools for item in items if isinstance(item, Conversation))


def test_real_classification(real_data: Path, tmp_path: Path) -> None:
    pairs = json.loads((real_data / "clinc150" / "data_small.json").read_text())["train"]
    path = write_jsonl(tmp_path / "intents.jsonl", [{"text": text, "label": label} for text, label in pairs])
    found = scan(str(path), section())
    assert (found.format, found.rows) == ("classification", len(pairs))


def test_a_real_file_of_another_shape_says_what_it_holds(real_data: Path) -> None:
    path = str(real_data / "self_instruct" / "user_oriented_instructions.jsonl")
    with pytest.raises(DataError) as caught:
        scan(path, section(path))
    assert_two_lines(caught.value, "id, motivation_app, instruction, instances", "data.prompt_field")


# ---------------------------------------------------------------------------------------------------------- leniency


def leniently(path: Path, **fields: Any) -> tuple[list[int], list[tuple[str | None, int | None]]]:
    """Numbers of the rows that could be read, and (code, row) of what could not."""
    bad: list[DataError] = []
    rows = list(read_rows(str(path), section(path), on_bad=bad.append, **fields))
    return [row.number for row in rows], [(error.code, error.row) for error in bad]


def test_reading_goes_on_after_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "a"}\n{\n\n[1]\n\xff\n{"text": "b"}\n' + b"[" * 100_000 + b'\n{"n": ' + b"9" * 5000 + b"}\n{}"
    )
    assert leniently(path) == (
        [1, 6, 9],
        [("not_json", 2), ("not_an_object", 4), ("not_text", 5), ("not_json", 7), ("not_json", 8)],
    )


def test_reading_goes_on_after_a_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,completion\na,b\nonly one\n"x" y,z\ncaf\xe9,z\n"line\nbreak",c\nd,e\n')
    assert leniently(path) == ([2, 6, 8], [("wrong_field_count", 3), ("not_json", 4), ("not_text", 5)])


def test_reading_goes_on_after_an_element_that_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, 7, {"text": "b"}, null]')
    assert leniently(path) == ([1, 3], [("not_an_object", 2), ("not_an_object", 4)])


@pytest.mark.parametrize(
    ("name", "content", "rows", "ended"),
    [
        ("a.json", b'[{"text": "a"}, {"text": }, {"text": "c"}]', [1], 2),
        ("a.json", b'[{"text": "a"}, {"text": "b"} {"text": "c"}]', [1, 2], 3),
        ("a.json", b'[{"text": "a"}, ' + b"[" * 100_000, [1], 2),
        ("a.json", b'[{"text": "a"}, {"n": ' + b"9" * 5000 + b"}]", [1], 2),
        ("a.csv", b'text\na\n"b\nc\nd\n', [2], 3),
        ("a.csv", b"a,a\n1,2\n", [], 1),
        ("a.txt", b"caf\xe9", [], 1),
        ("a.jsonl.gz", b"not gzip", [], 1),
        ("a.jsonl.gz", gzip.compress(b'{"text": "T"}\n', mtime=0)[:-4], [1], 2),
    ],
)
def test_where_reading_ends_is_told_and_what_came_before_is_kept(
    tmp_path: Path, name: str, content: bytes, rows: list[int], ended: int
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert leniently(path) == (rows, [("reading_ended", ended)])


def test_parquet_keeps_the_rows_around_one_that_is_no_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = pyarrow.array([b"a", b"\xff", b"c"], type=pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    assert leniently(tmp_path / "a.parquet") == ([1, 3], [("not_text", 2)])
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-10])
    assert leniently(tmp_path / "b.parquet") == ([], [("reading_ended", 1)])


def test_what_cannot_be_opened_raises_though_reading_is_lenient(tmp_path: Path) -> None:
    for name in ("missing.jsonl", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(DataError):
            leniently(tmp_path / name)


def test_only_wanted_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{\n{"text": "c"}\n{"text": "d"}\n')
    assert leniently(path, only={3}) == ([3], [])  # The broken line is not even decoded.
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": "b"}, {"text": "c"}]')
    assert leniently(tmp_path / "a.json", only={1, 3}) == ([1, 3], [])


def test_reading_says_how_far_it_is(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 1000}] * 2000)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for one in (path, packed):
        reading = Reading()
        shares = [reading.share for _ in read_rows(str(one), section(one), reading=reading)]
        assert shares == sorted(shares) and 0 < shares[0] <= shares[-1] <= 1
        assert reading.total == one.stat().st_size


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"prompt": "P"}, "missing_field"),
        ({"prompt": "P", "completion": None}, "missing_field"),
        ({"prompt": " ", "completion": "C"}, "empty_field"),
        ({"prompt": "P", "completion": ["x"]}, "wrong_type"),
        ({"prompt": "P", "completion": "half \ud800"}, "not_text"),
        ({"prompt": "P", "completion": "C", "system": 3}, "wrong_type"),
        ({"prompt": "P", "completion": "C", "tools": "no"}, "wrong_type"),
        ({"messages": CHAT}, "mixed_formats"),
        ({"instruction": "I", "input": "x", "output": "O"}, "mixed_formats"),
    ],
)
def test_errors_of_pairs_have_codes(values: dict[str, Any], code: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(Row("f", 7, values), "prompt_completion", section())
    assert (caught.value.code, caught.value.row) == (code, 7)


@pytest.mark.parametrize(
    ("turns", "code"),
    [
        ([], "empty_field"),
        ([{"role": "user", "content": "Q"}], "missing_field"),
        ([{"content": "Q"}], "missing_field"),
        ([{"role": "user"}], "missing_field"),
        ([{"role": "robot", "content": "Q"}], "unknown_role"),
        ([{"role": ["user"], "content": "Q"}], "unknown_role"),
        ([{"role": "assistant", "content": " "}], "empty_field"),
        ([{"role": "assistant", "content": 3}], "wrong_type"),
        ([{"role": "assistant", "content": "A", "weight": 2}], "wrong_type"),
        ([{"role": "assistant", "content": [{"type": {}, "text": "A"}]}], "wrong_type"),
        ([{"role": "assistant", "tool_calls": [{"name": "\ud800"}]}], "not_text"),
        ([{"role": "assistant", "content": "A", "reasoning": "\udc00"}], "not_text"),
        (["text"], "wrong_type"),
    ],
)
def test_errors_of_messages_have_codes(turns: list[Any], code: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(Row("f", 7, {"messages": turns}), "messages", section())
    assert (caught.value.code, caught.value.row) == (code, 7)


def test_a_row_that_lacks_a_field_is_not_taken_for_another_format() -> None:
    for values, format in (({"input": "x", "output": "O"}, "alpaca"), ({"text": "T"}, "classification")):
        with pytest.raises(DataError) as caught:
            parse(Row("f", 1, values), format, section())
        assert caught.value.code == "missing_field"


def test_a_format_that_was_asked_for_reads_rows_of_several_looks() -> None:
    row = Row("f", 1, {"instruction": "I", "input": "x", "output": "O"})
    item = parse(row, "prompt_completion", section(format="prompt_completion"))
    assert isinstance(item, Conversation) and untrained(item.turns) == (("user", "x"), ("assistant", "O"))


@pytest.mark.parametrize("extra", [{}, {"id": 7}, {"source": "s", "system": "S"}, {"instruction": None}])
@pytest.mark.parametrize(
    ("format", "values", "code"),
    [
        ("alpaca", {"input": "a", "output": "b"}, "missing_field"),
        ("alpaca", {"input": "a", "response": "b"}, "missing_field"),
        ("alpaca", {"input": "a", "output": "b", "text": "a b"}, "missing_field"),
        ("alpaca", {"output": "b", "text": "a b"}, "missing_field"),
        ("alpaca", {"prompt": "a", "completion": "b"}, "mixed_formats"),
        ("alpaca", {"input": "a", "answer": "b"}, "mixed_formats"),
        ("alpaca", {"text": "a b"}, "mixed_formats"),
        ("alpaca", {"messages": CHAT}, "mixed_formats"),
        ("prompt_completion", {"prompt": "a", "text": "a b"}, "missing_field"),
        ("prompt_completion", {"answer": "b", "text": "a b", "label": 1}, "missing_field"),
        ("prompt_completion", {"text": "a b"}, "mixed_formats"),
        ("messages", {"text": "a b"}, "mixed_formats"),
    ],
)
def test_other_columns_do_not_make_a_row_one_of_another_format(
    format: str, values: dict[str, Any], extra: dict[str, Any], code: str
) -> None:
    with pytest.raises(DataError) as caught:
        parse(Row("f", 7, values | extra), format, section())
    assert (caught.value.code, caught.value.row) == (code, 7)


def test_what_is_wrong_with_a_row_is_said(tmp_path: Path) -> None:
    def reasons(name: str, content: bytes) -> list[str]:
        path = tmp_path / name
        path.write_bytes(content)
        bad: list[DataError] = []
        list(read_rows(str(path), section(path), on_bad=bad.append))
        return [error.problem.removeprefix(str(path)) for error in bad]

    assert reasons("a.jsonl", b'{"text": "cut o\n{"text": "b"}\n{"text": "a\tb"}\n{"text": "end') == [
        ":1 is not JSON: a string is not closed before the line ends (column 16).",
        ":3 is not JSON: invalid control character at (column 12).",
        ":4 is not JSON: unterminated string starting at (column 10).",
    ]
    assert reasons("a.csv", b"prompt,completion\na\na,b,c\n") == [
        ":2 has 1 field; the header has 2.",
        ":3 has 3 fields; the header has 2.",
    ]
    [whole] = reasons("a.parquet", b"PAR1 no")
    assert whole.startswith(" cannot be read as Parquet: ")


def test_a_name_that_is_no_file_fails_fast_where_no_hub_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants as constants

    asked: list[str] = []

    def load(name: str, config: str | None, *, split: str) -> Any:
        asked.append(name)
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert len(list(read_rows("ownner/namme", section("ownner/namme")))) == len(ROWS)
    assert asked == ["ownner/namme"]
    assert not caplog.records  # The client's talk of retries is not for the user.
    with pytest.raises(DataError) as caught:
        list(read_rows("ownner/namme", section("ownner/namme")))
    assert_two_lines(caught.value, "There is no local file ownner/namme")
    assert asked == ["ownner/namme"]
