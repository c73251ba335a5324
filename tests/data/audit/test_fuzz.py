"""500 malformed files: never a traceback, always file and row, and no row lost without being counted.

`python bench/fuzz_data.py` runs the same check on 20,000 others.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is in the extra `dev`")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onlay.data.audit.engine import CHUNK_ROWS, AuditSource, Settings, examine
from onlay.data.audit.pool import IN_PROCESS_CHUNKS
from onlay.data.sources import ENDED, Row, read_rows
from onlay.errors import DataError
from onlay.recipe import DataSection
from tests.data.audit import fuzzing

EXAMPLES = {
    "lines": (fuzzing.jsonl_files(), 150),
    "lists": (fuzzing.json_lists(), 100),
    "broken_lists": (fuzzing.BROKEN_JSON, 50),
    "csv": (fuzzing.csv_files(), 80),
    "gzip": (fuzzing.zipped(), 50),
    "parquet": (fuzzing.parquet_files(), 20),
    "noise": (fuzzing.NOISE, 50),
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_malformed_files(tmp_path: Path, kind: str) -> None:
    cases, count = EXAMPLES[kind]

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=cases)
    def holds(case: fuzzing.Case) -> None:
        fuzzing.check(case, tmp_path)

    holds()


def test_there_are_five_hundred() -> None:
    assert sum(count for _, count in EXAMPLES.values()) == 500


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_the_check_notices_a_lost_row(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    case = data.draw(fuzzing.jsonl_files())
    assert case.rows is not None
    wrong = fuzzing.Case(case.name, case.data, case.rows + 1, case.ended, case.format)
    with pytest.raises(AssertionError):
        fuzzing.check(wrong, tmp_path_factory.mktemp("lost"))


def read(path: Path) -> tuple[list[Row], list[DataError]]:
    bad: list[DataError] = []
    return list(read_rows(str(path), DataSection(train=str(path)), on_bad=bad.append)), bad


@pytest.mark.parametrize(
    ("name", "data", "rows", "code"),
    [
        ("rows.jsonl", b"\xef\xbb\xbf", 0, None),
        ("rows.jsonl", b"\xef\xbb\xbf\n" + b'{"text": "a"}\n', 1, None),
        ("rows.json", b'[{"text": "a"}]\n', 1, None),
        ("rows.json", b'[{"text": "a"}]\n[{"text": "b"}]', 1, ENDED),
        ("rows.json", b'[{"text": "a"}] x', 1, ENDED),
        ("rows.json", b'{"rows": [{"text": "a"}], "version": 1}', 1, None),
        ("rows.json", b'{"train": [{"text": "a"}],\n "test": [{"text": "b"}]}', 1, ENDED),
        ("rows.json", b'{"version": 1, "rows": [\n{"text": "a"}]', 1, ENDED),
    ],
)
def test_what_a_reader_would_lose_in_silence(
    tmp_path: Path, name: str, data: bytes, rows: int, code: str | None
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    found, bad = read(path)
    assert (len(found), [error.code for error in bad]) == (rows, [] if code is None else [code])


def test_a_parquet_file_with_a_broken_column_name(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "completion": ["b"]}), path)
    path.write_bytes(path.read_bytes().replace(b"completion", b"com\xff\xfeetion"))
    found, bad = read(path)
    assert found == [] and [error.code for error in bad] == [ENDED]


def test_a_row_nested_too_deeply_to_be_pickled_is_examined(tmp_path: Path) -> None:
    """Worker processes get rows as pickles."""
    path = tmp_path / "rows.jsonl"
    deep = '{"text": "A document of some words.", "more": ' + "[" * 900 + "]" * 900 + "}"
    lines = [f'{{"text": "This is document {number}."}}' for number in range(CHUNK_ROWS * (IN_PROCESS_CHUNKS + 1))]
    path.write_text("\n".join([*lines, deep]), encoding="utf-8")
    quick = Settings(workers=2, near_threshold=None, texts=False, privacy=False)
    examined = examine([AuditSource(path=str(path), role="train")], DataSection(train=str(path)), settings=quick)
    assert (examined.files[0].rows, examined.files[0].unreadable) == (len(lines) + 1, 0)


def test_gzip_cut_short_keeps_what_came_before(tmp_path: Path) -> None:
    import gzip
    import json
    import random

    letters = random.Random(0)
    lines = [json.dumps({"text": "".join(letters.choices("abcdefgh ", k=400))}).encode() for _ in range(400)]
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(lines), mtime=0)[:-2000])
    rows, bad = read(path)
    assert 300 < len(rows) < 400
    assert bad[-1].code == ENDED and bad[-1].row in (len(rows) + 1, len(rows) + 2)
