"""Streams rows out of files and hub data sets.  Raises DataError that names file and line.

Memory is bounded by a chunk and the longest row, not by the file.  The readers are our own because an error must name
file and row, and rows of mixed types must never load in silence.  Nothing heavy is imported here, so a wrong data file is
reported before torch or transformers load.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from onlay.errors import DataError
from onlay.recipe import DataSection

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
CHUNK_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was found.  `number` is the line in JSONL and CSV files, the 1-based position elsewhere."""

    file: str
    number: int
    values: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.file}:{self.number}"


def read_rows(source: str, section: DataSection, *, limit: int | None = None) -> Iterator[Row]:
    """The rows of a file or hub data set, streamed; at most `limit`.  Raises DataError."""
    kind = _kind(source)
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv,
        ".parquet": _read_parquet, ".txt": _read_text,
    }  # fmt: skip
    rows = _read_hub(source, section) if kind == "hub" else readers[kind](Path(source))
    return itertools.islice(rows, limit)


def _kind(source: str) -> str:
    """The reader's suffix, or `hub`.  Raises DataError where the source cannot be read at all."""
    path = Path(source)
    suffix = _suffix(path)
    if path.is_dir():
        raise DataError(
            f"{source} is a folder, not a data file.", "Give one file in data.train: " + ", ".join(SUFFIXES) + "."
        )
    if path.exists():
        if suffix not in SUFFIXES:
            raise DataError(
                f"{source} has the suffix {path.suffix or '(none)'}, which is not one of {', '.join(SUFFIXES)}.",
                "Rename the file to what it holds; .gz may follow.",
            )
        return suffix
    looks_like_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) is not None
    if looks_like_hub and suffix not in SUFFIXES and not path.parent.is_dir():
        return "hub"
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        remedy = "Did you mean " + " or ".join(str(path.parent / name) for name in near) + "?"
    elif not path.parent.is_dir():
        remedy = f"The folder {path.parent} does not exist either; paths are relative to {Path.cwd()}."
    else:
        remedy = f"Paths are relative to {Path.cwd()}; a hub data set is written owner/name."
    raise DataError(f"There is no data file at {source}.", remedy)


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Bytes of a file, unpacked where it is gzipped; system errors become DataErrors."""
    try:
        if path.name.lower().endswith(".gz"):
            with gzip.open(path, "rb") as unpacked:
                yield unpacked  # type: ignore[misc]
        else:
            with path.open("rb") as plain:
                yield plain
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}.", "Download or compress it again.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason}.", "Save it as UTF-8.") from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}.", "Check the file and its permissions."
        ) from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    file = str(path)
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.isspace():
                continue
            try:
                values = json.loads(line)
            except UnicodeDecodeError:
                raise DataError(f"{file}:{number} is not UTF-8 text.", "Save the file as UTF-8.") from None
            except (ValueError, RecursionError) as error:
                raise _not_json(file, number, error, "A .jsonl file holds one JSON object a line.") from None
            yield _object_row(file, number, values, "line")


def _not_json(file: str, number: int, error: Exception, remedy: str) -> DataError:
    what = error.msg[:1].lower() + error.msg[1:] if isinstance(error, json.JSONDecodeError) else str(error)
    column = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
    return DataError(f"{file}:{number} is not JSON: {what}{column}.", remedy)


def _object_row(file: str, number: int, values: Any, unit: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(
            f"{file}:{number} is {type_name(values)}, not an object.",
            f'Each {unit} must be an object such as {{"prompt": ..., "completion": ...}}.',
        )
    return Row(file, number, values)


class _JsonStream:
    """Decodes one JSON value after another from a text stream, holding no more than a chunk and the value at hand."""

    def __init__(self, text: io.TextIOBase, file: str) -> None:
        self.text, self.file = text, file
        self.buffer, self.at, self.line, self.ended = "", 0, 1, False
        self.decoder = json.JSONDecoder()

    def _more(self) -> bool:
        chunk = self.text.read(max(CHUNK_CHARACTERS, len(self.buffer) - self.at)) if not self.ended else ""
        if not chunk:
            self.ended = True
            return False
        self.line += self.buffer.count("\n", 0, self.at)
        self.buffer, self.at = self.buffer[self.at :] + chunk, 0
        return True

    def peek(self) -> str:
        """The next character that is not white space, or the empty string at the end."""
        while True:
            while self.at < len(self.buffer):
                if not self.buffer[self.at].isspace():
                    return self.buffer[self.at]
                self.at += 1
            if not self._more():
                return ""

    def take(self, expected: str) -> str:
        found = self.peek()
        if not found or found not in expected:
            here = repr(found) if found else "the end of the file"
            wanted = " or ".join(repr(mark) for mark in expected)
            raise self.error(f"expected {wanted}, found {here}", self.at)
        self.at += 1
        return found

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                # An error well before the buffer's end is real; near it, or in an open string, the value may go on.
                real = error.pos < len(self.buffer) - 16 and not error.msg.startswith("Unterminated")
                if real or not self._more():
                    raise self.error(error.msg[:1].lower() + error.msg[1:], min(error.pos, len(self.buffer))) from None
            else:
                if end < len(self.buffer) or not self._more():
                    self.at = end
                    return value

    def error(self, what: str, position: int) -> DataError:
        number = self.line + self.buffer.count("\n", 0, position)
        return DataError(f"{self.file}:{number} is not JSON: {what}.", "A .json file holds a list of objects.")


def _read_json(path: Path) -> Iterator[Row]:
    """A list of objects; an object that holds one; or, as is common, objects one a line."""
    file = str(path)
    with _opened(path) as raw:
        stream = _JsonStream(io.TextIOWrapper(raw, encoding="utf-8-sig"), file)
        first = stream.peek()
        if first == "[":
            stream.take("[")
            yield from _elements(stream, file)
            return
        if first == "{" and not _first_line_is_whole(path):
            yield from _first_list(stream, file)
            return
        if first and first != "{":
            raise DataError(
                f"{file} starts with {first!r}, not with a list of objects.", "A .json file holds a list of objects."
            )
    yield from _read_jsonl(path)


def _first_line_is_whole(path: Path) -> bool:
    """Whether the first line is a JSON value by itself: then the file is JSON lines under another name."""
    with _opened(path) as raw:
        line = raw.readline(64 * CHUNK_CHARACTERS)
        more = raw.read(1)
    try:
        value = json.loads(line)
    except ValueError:
        return False
    # One object on one line is a row unless it wraps a list of rows.
    return bool(more) or not any(_is_list_of_objects(item) for item in value.values())


def _is_list_of_objects(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) for item in value)
        and not _is_turn(value[0])
    )


def _is_turn(value: dict[str, Any]) -> bool:
    return ("role" in value and ("content" in value or "tool_calls" in value)) or ("from" in value and "value" in value)


def _elements(stream: _JsonStream, file: str) -> Iterator[Row]:
    """The objects of a list whose opening bracket is taken."""
    if stream.peek() == "]":
        return
    for number in itertools.count(1):
        yield _object_row(file, number, stream.value(), "element")
        if stream.take(",]") == "]":
            return


def _first_list(stream: _JsonStream, file: str) -> Iterator[Row]:
    """Streams the first list of objects among an object's values; the values before it are skipped."""
    stream.take("{")
    keys: list[str] = []
    while stream.peek() == '"':
        keys.append(stream.value())
        stream.take(":")
        if stream.peek() == "[":
            stream.take("[")
            if stream.peek() == "{":
                yield from _elements(stream, file)
                return
            while stream.peek() != "]":
                stream.value()
                if stream.take(",]") == "]":
                    break
            else:
                stream.take("]")
        else:
            stream.value()
        if stream.take(",}") == "}":
            break
    names = ", ".join(keys[:8]) or "nothing"
    raise DataError(
        f"{file} is one object that holds no list of objects (it holds {names}).",
        "A .json file holds a list of objects, one for each row.",
    )


def _read_csv(path: Path) -> Iterator[Row]:
    file = str(path)
    csv.field_size_limit(sys.maxsize)
    with _opened(path) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        table = csv.reader(text, delimiter="\t" if _suffix(path) == ".tsv" else ",", strict=True)
        number = 1
        try:
            header = next(table, None)
            if header is None:
                return
            doubled = [name for name in header if header.count(name) > 1]
            if doubled:
                raise DataError(f"{file}:1 names the column {doubled[0]!r} twice.", "Give each column its own name.")
            number = table.line_num + 1
            for fields in table:
                if len(fields) != len(header) and fields:
                    raise DataError(
                        f"{file}:{number} has {len(fields)} fields; the header has {len(header)}.",
                        "Quote fields that hold commas, quotes or line breaks.",
                    )
                if fields:
                    yield Row(file, number, dict(zip(header, fields, strict=True)))
                number = table.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{file}:{number} is not CSV: {error}.", "Quote fields that hold commas, quotes or line breaks."
            ) from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    file = str(path)
    if path.name.lower().endswith(".gz"):
        raise DataError(f"{file} is a gzipped Parquet file.", "Unpack it: Parquet is compressed inside.")
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1000):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(file, number, values)
    except (pyarrow.ArrowException, OSError) as error:
        what = str(error).splitlines()[0]
        raise DataError(
            f"{file} cannot be read as Parquet: {what}.", "Write it again, or give another format."
        ) from None


def _read_text(path: Path) -> Iterator[Row]:
    with _opened(path) as raw:
        text = raw.read().decode("utf-8-sig")
    if text.strip():
        yield Row(str(path), 1, {"text": text})


def _read_hub(name: str, section: DataSection) -> Iterator[Row]:
    for number, values in enumerate(_load_hub(name, section), 1):
        yield Row(name, number, values)


def _load_hub(name: str, section: DataSection) -> Any:
    """The split of a hub data set (a `datasets.Dataset`, memory-mapped).  Raises DataError."""
    import datasets
    import huggingface_hub.errors as hub

    config, split = section.hub_config, section.hub_split
    try:
        return datasets.load_dataset(name, config, split=split)
    except (datasets.exceptions.DatasetNotFoundError, hub.GatedRepoError, hub.RepositoryNotFoundError) as error:
        what = str(error)
        if isinstance(error, hub.GatedRepoError) or "gated" in what:
            raise DataError(
                f"The data set {name} is gated on the hub.",
                "Accept its terms on its hub page, then set HF_TOKEN or run `hf auth login`; or give a local file.",
            ) from None
        raise DataError(
            f"There is no data set {name} on the hub (or it is private), and no local file of that name.",
            "Check the name owner/name; for a private one set HF_TOKEN or run `hf auth login`.",
        ) from None
    except (ConnectionError, hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) as error:
        raise DataError(
            f"The data set {name} cannot be fetched: the hub cannot be reached ({type(error).__name__}).",
            "Check the network (and HF_HUB_OFFLINE), or give a local file in data.train.",
        ) from None
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetGenerationError) as error:
        what = " ".join(str(error).split())[:300]
        raise DataError(
            f"The data set {name} (hub_config {config}, hub_split {split}) cannot be loaded: {what}.",
            "Set data.hub_config and data.hub_split to what its hub page lists, or give a local file.",
        ) from None


def source_digest(source: str, section: DataSection) -> str:
    """SHA-256 of a file's bytes, or of a hub data set's fingerprint."""
    if _kind(source) == "hub":
        fingerprint = f"{source} {section.hub_config} {section.hub_split} {_load_hub(source, section)._fingerprint}"
        return hashlib.sha256(fingerprint.encode()).hexdigest()
    try:
        with Path(source).open("rb") as raw:
            return hashlib.file_digest(raw, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}.", "Check the file and its permissions.") from None


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
