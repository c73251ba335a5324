"""Malformed data files, made by hypothesis, and what must hold for every one of them.

A case is the bytes of a file and, where its format defines rows, how many rows those bytes hold; the number is known from how
the file was made, not from reading it.  `check` then demands: nothing but DataError is raised; it names the file, and the
row where a row is at fault; the strict reader stops at the lenient reader's first complaint; and every row is either
read or counted.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from onlay.data.audit.comparison import compare_rows
from onlay.data.audit.engine import AuditSource, Settings, examine
from onlay.data.read import read_items
from onlay.data.sources import ENDED, Row, read_rows
from onlay.errors import DataError
from onlay.recipe import DataSection

FORMATS = ("auto", "auto", "auto", "alpaca", "prompt_completion", "messages", "sharegpt", "text", "classification")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    """Of the file: the suffix says the kind."""
    data: bytes
    rows: int | None
    """That the file holds, whole or broken; None: not known for bytes such as these."""
    ended: bool | None
    """Whether reading must end early, after `rows` rows; None: it may."""
    format: str = "auto"


# ------------------------------------------------------------------------------------------------------------ values

TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(("", " ", "\x00", "TODO", "a" * 300, "the same words " * 12, "\u2028", "\ufeff", "é" * 40, "Ã©", "[", '[{"role": "user"}]', "{", "1e999", "as an ai", "\U0001f600", "4111 1111 1111 1111", "<|im_end|>")),
)  # fmt: skip
RAW_VALUES = st.sampled_from((
    "NaN", "-Infinity", "1e400", "9" * 4301, "-" + "1" * 400, "0.1e-400", '"\\ud800"', '"\\udc00 \\ud83d"', '"\\u0000"', "null", "true", "{}", "[]", '""', "[[[[]]]]",
    "[" * 300 + "]" * 300, '{"a":' * 300 + "1" + "}" * 300, "[" * 900 + "]" * 900, '{"a":' * 990 + "1" + "}" * 990, "[" * 5000 + "]" * 5000,
))  # fmt: skip
"""JSON that json.dumps would not write, or not easily."""
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS)
VALUES = st.recursive(SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)), max_leaves=6)  # fmt: skip
CALLS = st.sampled_from((
    [], {}, "x", [{}], [{"name": "f"}], [{"name": 7}], [{"function": {"name": "f", "arguments": "{"}}], {"name": "f", "arguments": [1]},
    [{"function": {"name": "f", "arguments": {"x": None}}, "id": "1"}], '{"name": "f", "arguments": {}}',
))  # fmt: skip
TURNS = st.fixed_dictionaries(
    {},
    optional={
        "role": st.one_of(st.sampled_from(("user", "assistant", "system", "tool", "Assistant", "")), VALUES),
        "content": st.one_of(TEXTS, VALUES, st.lists(st.fixed_dictionaries({"type": st.sampled_from(("text", "reasoning", "image", "tool_call", ""))}, optional={"text": VALUES, "value": VALUES}), max_size=2)),
        "from": st.one_of(st.sampled_from(("human", "gpt", "function_call", "observation")), VALUES),
        "value": st.one_of(TEXTS, VALUES),
        "weight": st.sampled_from((0, 1, 2, "1", None, [0])),
        "tool_calls": CALLS,
        "function_call": CALLS,
    },
)  # fmt: skip
GOOD_ROWS = st.sampled_from((
    {"instruction": "Add", "input": "1 2", "output": "3"}, {"prompt": "Hello there", "completion": "Hello, and good day."}, {"text": "A document."},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}, {"text": "good", "label": "positive"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}, {"text": "good", "label": 3},
))  # fmt: skip
FIELD_NAMES = ("instruction", "input", "output", "prompt", "completion", "text", "label", "messages", "conversations", "system", "tools", "answer", "domain")  # fmt: skip
BAD_ROWS = st.one_of(
    st.dictionaries(st.one_of(st.sampled_from(FIELD_NAMES), TEXTS), VALUES, max_size=4),
    st.fixed_dictionaries({}, optional={"messages": st.one_of(VALUES, st.lists(st.one_of(TURNS, VALUES), max_size=4)), "conversations": st.lists(TURNS, max_size=4), "tools": CALLS}),
    VALUES,
)  # fmt: skip


@st.composite
def row_texts(draw: st.DrawFn) -> str:
    """The JSON text of a row: good, of wrong fields, or with a value that json.dumps would not write."""
    kind = draw(st.integers(0, 5))
    row = draw(GOOD_ROWS if kind < 3 else BAD_ROWS)
    text = json.dumps(row, ensure_ascii=draw(st.booleans()))
    if kind == 5 and isinstance(row, dict):
        name = json.dumps(draw(st.sampled_from(FIELD_NAMES)))
        inner = text[1:-1]
        text = "{" + (f"{inner}, " if inner else "") + f"{name}: {draw(RAW_VALUES)}" + "}"
    return text


# ------------------------------------------------------------------------------------------------------------- files


@st.composite
def changed(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with a stretch deleted, overwritten or put in."""
    at = draw(st.integers(0, len(data)))
    new = draw(st.one_of(st.binary(min_size=1, max_size=6), st.sampled_from((b'"', b"{", b"]", b",", b"\\", b"\xff\xfe", b"\xed\xa0\x80", b"\r", b"\x00"))))  # fmt: skip
    return data[:at] + new + data[at + draw(st.integers(0, 8)) :]


@st.composite
def jsonl_files(draw: st.DrawFn) -> Case:
    """Any line is a row, whatever is in it; blank ones are not."""
    lines = []
    for text in draw(st.lists(row_texts(), min_size=1, max_size=8)):
        line = text.encode("utf-8", "surrogatepass")
        if draw(st.integers(0, 4)) == 0:
            line = draw(
                st.one_of(changed(line), st.binary(max_size=12), st.just(b" \t"), st.just(line[: len(line) // 2]))
            )
        lines.append(line.replace(b"\n", b" "))
    ending = draw(st.sampled_from((b"\n", b"\n", b"\r\n", b"\n\n", b" \n")))
    body = ending.join(lines) + draw(st.sampled_from((b"", ending)))
    rows = sum(bool(line.strip()) for line in body.split(b"\n"))
    data = draw(st.sampled_from((b"", b"", BOM))) + body
    return Case(draw(st.sampled_from(("rows.jsonl", "rows.ndjson"))), data, rows, False, draw(st.sampled_from(FORMATS)))


@st.composite
def json_lists(draw: st.DrawFn) -> Case:
    """A list, or an object that holds one: whole, followed by more, or cut somewhere."""
    elements = draw(st.lists(row_texts(), min_size=1, max_size=6))
    wrapped = draw(st.booleans()) and elements[0].startswith("{") and not _is_turn(elements[0])
    head = '{"version": 1, "rows": [' if wrapped else "["
    comma = draw(st.sampled_from((",", ", ", ",\n", "\n,\r\n ")))
    text, ends = head, []
    for number, element in enumerate(elements):
        text += (comma if number else "\n") + element
        ends.append(len(text))
    more = draw(st.sampled_from(("", "", "", "\n", " x", '\n[{"text": "A second list."}]', "{}", ", 1]")))
    if wrapped:
        within = draw(st.sampled_from(("", "", ', "left": [1]', ', "more": [{"text": "Lost."}]')))
        text += f"\n]{within}}}{more}"
        ended = bool(more.strip()) or "Lost" in within
    else:
        text += f"\n]{more}"
        ended = bool(more.strip())
    too_deep = [number for number, element in enumerate(elements) if _is_undecodable(element)]
    if too_deep:
        return Case("rows.json", text.encode("utf-8", "surrogatepass"), None, None, draw(st.sampled_from(FORMATS)))
    data = text.encode("utf-8", "surrogatepass")
    if draw(st.booleans()) or more or data.decode("utf-8", "replace") != text:
        whole = data.decode("utf-8", "replace") == text
        return Case("rows.json", draw(st.sampled_from((b"", BOM))) + data, len(elements) if whole else None, ended if whole else None, draw(st.sampled_from(FORMATS)))  # fmt: skip
    at = draw(st.integers(len(head), len(text) - 1))
    # Cut right after a number, its last digit may be missing: it is no row, but neither is it a broken one for sure.
    surely = sum(end <= at for end in ends)
    exact = not any(end == at for end in ends) and elements[min(surely, len(elements) - 1)][0] not in "-0123456789"
    return Case(
        "rows.json", text[:at].encode("utf-8", "surrogatepass"), surely if exact else None, True if exact else None
    )


def _is_undecodable(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return True
    return False


def _is_turn(element: str) -> bool:
    return any(name in element for name in ('"role"', '"from"'))


@st.composite
def csv_files(draw: st.DrawFn) -> Case:
    """Quoted as it should be, of which some rows have a field too many; or with a stray change."""
    columns = draw(
        st.sampled_from(
            (("prompt", "completion"), ("text", "label"), ("text",), ("instruction", "input", "output"), ("", "x"))
        )
    )
    suffix = draw(st.sampled_from((".csv", ".tsv")))
    out = io.StringIO(newline="")
    writer = csv.writer(
        out, delimiter="\t" if suffix == ".tsv" else ",", lineterminator=draw(st.sampled_from(("\n", "\r\n")))
    )
    writer.writerow(columns)
    fields = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r\n\x00"), max_size=20)
    rows = draw(st.lists(st.lists(st.one_of(fields, st.sampled_from(('say "no"', "a,b\tc", "two\nlines", "=1+1", " "))), min_size=1, max_size=len(columns) + 1), max_size=6))  # fmt: skip
    for row in rows:
        writer.writerow(row)
    data = out.getvalue().encode("utf-8")
    if draw(st.integers(0, 2)):
        return Case(
            "rows" + suffix, draw(st.sampled_from((b"", BOM))) + data, len(rows), False, draw(st.sampled_from(FORMATS))
        )
    return Case("rows" + suffix, draw(changed(data)), None, None, draw(st.sampled_from(FORMATS)))


@st.composite
def parquet_files(draw: st.DrawFn) -> Case:
    import pyarrow
    import pyarrow.parquet

    rows = draw(st.lists(st.tuples(st.one_of(st.none(), st.text(st.characters(exclude_categories=("Cs",)), max_size=12)), st.one_of(st.none(), st.text(st.characters(exclude_categories=("Cs",)), max_size=12))), min_size=1, max_size=5))  # fmt: skip
    table = pyarrow.table({"prompt": pyarrow.array([row[0] for row in rows], pyarrow.string()), "completion": pyarrow.array([row[1] for row in rows], pyarrow.string())})  # fmt: skip
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    data = out.getvalue()
    way = draw(st.integers(0, 2))
    if way == 0:
        return Case("rows.parquet", data, len(rows), False, "prompt_completion")
    broken = data[: draw(st.integers(0, len(data) - 1))] if way == 1 else draw(changed(data))
    return Case("rows.parquet", broken, None, None, "prompt_completion")


@st.composite
def zipped(draw: st.DrawFn) -> Case:
    """Whole, cut short, or with a stray change."""
    case = draw(st.one_of(jsonl_files(), json_lists(), csv_files()))
    data = gzip.compress(case.data, mtime=0)
    way = draw(st.integers(0, 2))
    if way == 0:
        return Case(case.name + ".gz", data, case.rows, case.ended, case.format)
    broken = data[: draw(st.integers(0, len(data) - 1))] if way == 1 else draw(changed(data))
    return Case(case.name + ".gz", broken, None, None, case.format)


NAMES = ("rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.txt", "rows.parquet", "rows.jsonl.gz", "rows.json.gz")
NOISE = st.builds(Case, st.sampled_from(NAMES), st.one_of(st.binary(max_size=200), st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace"))), st.none(), st.none(), st.sampled_from(FORMATS))  # fmt: skip
BROKEN_JSON = st.builds(lambda case, data: Case(case.name, data, None, None, case.format), json_lists(), json_lists().flatmap(lambda case: changed(case.data)))  # fmt: skip
CASES = st.one_of(
    jsonl_files(), jsonl_files(), json_lists(), BROKEN_JSON, csv_files(), zipped(), parquet_files(), NOISE
)


# ------------------------------------------------------------------------------------------------------------- check


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case; for counting."""

    rows: int
    bad: int
    ended: bool
    refused: bool
    """Whether the audit as a whole was refused: no rows, or no known format."""


def check(case: Case, folder: Path) -> Outcome:
    """Writes the file and demands what must hold.  Raises AssertionError, or what should not have been raised."""
    path = folder / case.name
    path.write_bytes(case.data)
    file = str(path)
    section = DataSection(train=file, format=case.format)  # type: ignore[arg-type]
    bad: list[DataError] = []
    rows = list(read_rows(file, section, on_bad=bad.append))
    ended = [error for error in bad if error.code == ENDED]
    _errors_say_where(bad, file)
    assert len(ended) <= 1 and ended == bad[len(bad) - len(ended) :]
    if case.rows is not None:
        assert len(rows) + len(bad) - len(ended) == case.rows, (len(rows), [error.problem for error in bad], case.rows)
    if case.ended is not None:
        assert bool(ended) is case.ended
    numbers = [row.number for row in rows] + [
        error.row for error in bad if error.row is not None and error.code != ENDED
    ]
    assert len(set(numbers)) == len(numbers)
    _strict_reader_agrees(file, section, rows, bad)
    return _audit_agrees(file, section, rows, bad, ended=bool(ended))


def _errors_say_where(errors: list[DataError], file: str) -> None:
    for error in errors:
        assert error.code is not None, error.problem
        assert file in error.problem and "\n" not in error.problem and "\n" not in error.remedy, error.problem
        assert error.row is not None and error.row > 0, error.problem
        if error.code != ENDED:
            assert f"{file}:{error.row}" in error.problem, error.problem


def _raised(call: Callable[[], object]) -> DataError | None:
    try:
        call()
    except DataError as error:
        return error
    return None


def _strict_reader_agrees(file: str, section: DataSection, rows: list[Row], bad: list[DataError]) -> None:
    strict: list[Row] = []
    error = _raised(lambda: strict.extend(read_rows(file, section)))
    assert (error is None) is not bool(bad)
    assert error is None or (error.problem, error.code) == (bad[0].problem, bad[0].code)
    assert repr(strict) == repr(rows[: len(strict)])  # By repr, as NaN is not equal to itself.
    for format in ("alpaca", "prompt_completion", "messages", "sharegpt", "text", "classification"):
        error = _raised(lambda format=format: list(read_items(file, format, section)))  # type: ignore[misc]
        assert error is None or (file in error.problem and error.code is not None)


def _audit_agrees(file: str, section: DataSection, rows: list[Row], bad: list[DataError], *, ended: bool) -> Outcome:
    source, made = [AuditSource(path=file, role="train")], []
    error = _raised(lambda: made.append(examine(source, section, settings=Settings(workers=1))))
    if error is not None:
        assert file in error.problem and ("holds no rows" in error.problem or "no known format" in error.problem)
        return Outcome(len(rows), len(bad), ended, True)
    (examined,) = made
    (found,) = examined.files
    assert found.rows + found.unreadable == len(rows) + len(bad)
    assert found.rows == len(examined.table) <= len(rows)
    if found.rows:
        compare_rows(examined, threshold=0.8)
    quick = Settings(workers=1, near_threshold=None)
    error = _raised(lambda: examine(source, section, settings=quick, strict=True))
    assert (error is None) is not bool(found.unreadable)
    assert error is None or file in error.problem
    # Every readable row can be read again, as examples are.
    again = [index for index, _ in examined.read_items(examined.among("train").nonzero()[0])]
    assert again == list(range(found.rows))
    return Outcome(found.rows, found.unreadable, ended, False)
