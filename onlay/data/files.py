"""Rows of files, each format by its own reader.  Raises DataError that names file and line.

Every wrong row goes to `Asked.on_bad`, which raises it by default; an audit counts it instead, and reading goes on at the
next row.  What comes after broken gzip, broken quotes or a broken JSON list cannot be told apart into rows: that ends the
file.  Memory is bounded by a chunk and the longest row, not by the file.  The readers are our own because an error must
name file and row, and rows of mixed types must never load in silence.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from onlay.errors import DataError

ENDED = "reading_ended"
"""Code of an error after which the rest of the file is not read."""

OnBad = Callable[[DataError], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was found.  `number` is the line in JSONL and CSV files, the 1-based position elsewhere."""

    file: str
    number: int
    values: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.file}:{self.number}"


def raise_bad(error: DataError) -> None:
    raise error


class Reading:
    """How much of a source is read, for a progress bar: bytes of a file, rows of a data set."""

    def __init__(self) -> None:
        self.total = 0
        """0 until it is known."""
        self._at: Callable[[], int] | None = None

    def follow(self, at: Callable[[], int], total: int) -> None:
        self._at, self.total = at, total

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return min(1.0, self._at() / self.total) if self._at is not None and self.total else 0.0


@dataclass(frozen=True, slots=True)
class Asked:
    """How to read, besides from where."""

    on_bad: OnBad
    only: Container[int] | None
    reading: Reading

    def wants(self, number: int) -> bool:
        return self.only is None or number in self.only


def suffix_of(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


@contextmanager
def opened(path: Path, reading: Reading | None = None) -> Iterator[BinaryIO]:
    """Bytes of a file, unpacked where it is gzipped; system errors become DataErrors."""
    try:
        with path.open("rb") as plain:
            if reading is not None:
                reading.follow(lambda: 0 if plain.closed else plain.tell(), path.stat().st_size)
            if path.name.lower().endswith(".gz"):
                with gzip.open(plain, "rb") as unpacked:
                    yield unpacked  # type: ignore[misc]
            else:
                yield plain
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is not a whole gzip file: {error}.", "Download or compress it again.", code=ENDED
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason}.", "Save it as UTF-8.", code=ENDED) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}.", "Check the file and its permissions."
        ) from None


def read_jsonl(path: Path, asked: Asked) -> Iterator[Row]:
    file = str(path)
    with opened(path, asked.reading) as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip() or not asked.wants(number):
                continue
            try:
                row = object_row(file, number, json.loads(line), "line")
            except UnicodeDecodeError:
                asked.on_bad(
                    DataError(
                        f"{file}:{number} is not UTF-8 text.", "Save the file as UTF-8.", code="not_text", row=number
                    )
                )
            except (ValueError, RecursionError) as error:
                asked.on_bad(_not_json(file, number, error, "A .jsonl file holds one JSON object a line."))
            except DataError as error:
                asked.on_bad(error)
            else:
                yield row


def _not_json(file: str, number: int, error: Exception, remedy: str) -> DataError:
    what = error.msg[:1].lower() + error.msg[1:] if isinstance(error, json.JSONDecodeError) else str(error)
    if isinstance(error, json.JSONDecodeError) and not error.doc[error.pos :].strip():
        # The line's own end, where a string is open.
        what = what.replace("invalid control character at", "a string is not closed before the line ends")
    column = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
    return DataError(f"{file}:{number} is not JSON: {what}{column}.", remedy, code="not_json", row=number)


def object_row(file: str, number: int, values: Any, unit: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(
            f"{file}:{number} is {type_name(values)}, not an object.",
            f'Each {unit} must be an object such as {{"prompt": ..., "completion": ...}}.',
            code="not_an_object",
            row=number,
        )
    return Row(file, number, values)


def read_csv(path: Path, asked: Asked) -> Iterator[Row]:
    file = str(path)
    csv.field_size_limit(sys.maxsize)
    with opened(path, asked.reading) as raw:
        # Bytes that are not UTF-8 come as half characters, so that only their row is lost.
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        table = csv.reader(text, delimiter="\t" if suffix_of(path) == ".tsv" else ",", strict=True)
        number, header = 1, None
        while True:
            try:
                fields = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                # Within open quotes no line is the beginning of a row any more.
                ended = "unexpected end" in str(error) or header is None
                asked.on_bad(
                    DataError(
                        f"{file}:{number} is not CSV: {error}.",
                        "Quote fields that hold commas, quotes or line breaks.",
                        code=ENDED if ended else "not_json",
                        row=number,
                    )
                )
                if ended:
                    return
            else:
                if header is None:
                    header = _header(file, fields)
                elif fields:
                    problem = _csv_problem(file, number, fields, header)
                    if problem is not None:
                        asked.on_bad(problem)
                    else:
                        yield Row(file, number, dict(zip(header, fields, strict=True)))
            number = table.line_num + 1


def _header(file: str, header: list[str]) -> list[str]:
    doubled = [name for name in header if header.count(name) > 1]
    if doubled:
        raise DataError(
            f"{file}:1 names the column {doubled[0]!r} twice.", "Give each column its own name.", code=ENDED, row=1
        )
    if not _is_utf8(header):
        raise DataError(f"{file}:1 is not UTF-8 text.", "Save the file as UTF-8.", code=ENDED, row=1)
    return header


def _csv_problem(file: str, number: int, fields: list[str], header: list[str]) -> DataError | None:
    if len(fields) != len(header):
        return DataError(
            f"{file}:{number} has {len(fields)} field{'s' * (len(fields) != 1)}; the header has {len(header)}.",
            "Quote fields that hold commas, quotes or line breaks, and write every field, if empty.",
            code="wrong_field_count",
            row=number,
        )
    if not _is_utf8(fields):
        return DataError(f"{file}:{number} is not UTF-8 text.", "Save the file as UTF-8.", code="not_text", row=number)
    return None


def _is_utf8(fields: list[str]) -> bool:
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_parquet(path: Path, asked: Asked) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    file = str(path)
    if path.name.lower().endswith(".gz"):
        raise DataError(f"{file} is a gzipped Parquet file.", "Unpack it: Parquet is compressed inside.")
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            asked.reading.follow(lambda: number, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=1000):
                for values in _values(batch, file, number, asked):
                    number += 1
                    if values is not None:
                        yield Row(file, number, values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = str(error).splitlines()[0]
        raise DataError(
            f"{file}{f':{number + 1}' if number else ''} cannot be read as Parquet: {what}.",
            "Write it again, or give another format.",
            code=ENDED,
            row=number + 1,
        ) from None


def _values(batch: Any, file: str, before: int, asked: Asked) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch; None for one whose bytes are not what its column says."""
    try:
        yield from batch.to_pylist()
        return
    except (UnicodeDecodeError, OverflowError):
        pass  # Found out before the first was given.
    for index in range(batch.num_rows):
        try:
            yield batch.slice(index, 1).to_pylist()[0]
        except (UnicodeDecodeError, OverflowError) as error:
            row = before + index + 1
            problem = f"{file}:{row} holds a value that cannot be read: {error}."
            asked.on_bad(DataError(problem, "Write the column as UTF-8 text.", code="not_text", row=row))
            yield None


def read_text(path: Path, asked: Asked) -> Iterator[Row]:
    with opened(path, asked.reading) as raw:
        text = raw.read().decode("utf-8-sig")
    if text.strip():
        yield Row(str(path), 1, {"text": text})


def type_name(value: Any) -> str:
    """What a JSON value is, in words for an error."""
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
