"""Rows of .json files: a list of objects, streamed.  Raises DataError that names file and line."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onlay.data.files import ENDED, Asked, Row, object_row, opened, read_jsonl
from onlay.errors import DataError

CHUNK_CHARACTERS = 1 << 20


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

    def expect_end(self) -> None:
        found = self.peek()
        if found:
            raise self.error(f"expected the end of the file, found {found!r}", self.at)

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
            except RecursionError:
                raise self.error("it is nested too deeply", self.at) from None
            except json.JSONDecodeError as error:
                # An error well before the buffer's end is real; near it, or in an open string, the value may go on.
                real = error.pos < len(self.buffer) - 16 and not error.msg.startswith("Unterminated")
                if real or not self._more():
                    raise self.error(error.msg[:1].lower() + error.msg[1:], min(error.pos, len(self.buffer))) from None
            except ValueError as error:  # A number of more digits than Python converts.
                raise self.error(str(error), self.at) from None
            else:
                if end < len(self.buffer) or not self._more():
                    self.at = end
                    return value

    def error(self, what: str, position: int) -> DataError:
        number = self.line + self.buffer.count("\n", 0, position)
        return DataError(
            f"{self.file}:{number} is not JSON: {what}.", "A .json file holds a list of objects.", code=ENDED
        )


def read_json(path: Path, asked: Asked) -> Iterator[Row]:
    """A list of objects; an object that holds one; or, as is common, objects one a line."""
    file = str(path)
    with opened(path, asked.reading) as raw:
        stream = _JsonStream(io.TextIOWrapper(raw, encoding="utf-8-sig"), file)
        first = stream.peek()
        if first == "[":
            stream.take("[")
            yield from _elements(stream, file, asked)
            stream.expect_end()
            return
        if first == "{" and not _first_line_is_whole(path):
            yield from _first_list(stream, file, asked)
            return
        if first and first != "{":
            raise DataError(
                f"{file} starts with {first!r}, not with a list of objects.",
                "A .json file holds a list of objects.",
                code=ENDED,
            )
    yield from read_jsonl(path, asked)


def _first_line_is_whole(path: Path) -> bool:
    """Whether the first line is a JSON value by itself: then the file is JSON lines under another name."""
    with opened(path) as raw:
        line = raw.readline(64 * CHUNK_CHARACTERS)
        more = raw.read(1)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
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


def _elements(stream: _JsonStream, file: str, asked: Asked) -> Iterator[Row]:
    """The objects of a list whose opening bracket is taken."""
    if stream.peek() == "]":
        stream.take("]")
        return
    for number in itertools.count(1):
        value = stream.value()
        try:
            row = object_row(file, number, value, "element")
        except DataError as error:
            asked.on_bad(error)
        else:
            yield row
        if stream.take(",]") == "]":
            return


def _first_list(stream: _JsonStream, file: str, asked: Asked) -> Iterator[Row]:
    """Streams the one list of objects among an object's values; the other values are skipped.  A second list ends it."""
    stream.take("{")
    keys: list[str] = []
    found: str | None = None
    while stream.peek() == '"':
        keys.append(stream.value())
        stream.take(":")
        if _begins_list_of_objects(stream):
            if found is not None:
                raise DataError(
                    f"{file} holds two lists of objects, {found!r} and {keys[-1]!r}.",
                    "A .json file holds one list of objects: write the other to a file of its own.",
                    code=ENDED,
                )
            found = keys[-1]
            yield from _elements(stream, file, asked)
        if stream.take(",}") == "}":
            break
    if found is None:
        names = ", ".join(keys[:8]) or "nothing"
        raise DataError(
            f"{file} is one object that holds no list of objects (it holds {names}).",
            "A .json file holds a list of objects, one for each row.",
            code=ENDED,
        )
    stream.expect_end()


def _begins_list_of_objects(stream: _JsonStream) -> bool:
    """Takes the bracket that a list of objects begins with; skips any other value."""
    if stream.peek() != "[":
        stream.value()
        return False
    stream.take("[")
    if stream.peek() == "{":
        return True
    if stream.peek() == "]":
        stream.take("]")
        return False
    while True:
        stream.value()
        if stream.take(",]") == "]":
            return False
