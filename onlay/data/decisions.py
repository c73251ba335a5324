"""A file of a person's decisions about rows, one line each, added to as they are made.  Raises OutputError.

A later decision about a row takes the place of an earlier one.  A row is named by its file, as seen from the folder of the
decisions (so that both can be moved together), and by its number there: one file of decisions may be about several files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from onlay.data.sources import Row, type_name
from onlay.errors import OutputError

Word = Literal["accept", "edit", "reject"]
WORDS: tuple[Word, ...] = ("accept", "edit", "reject")
FIELDS = {"row", "place", "digest", "decision", "edited", "who", "when"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """One line of a file of decisions."""

    row: int
    """Row.number in the file: the line of JSONL and CSV, the 1-based position elsewhere."""
    place: str
    """`file:row`, the file as seen from the folder of the decisions."""
    digest: str
    """Of the row's content when it was decided on."""
    decision: Word
    edited: dict[str, Any] | None = None
    """The row as it should be; with `edit`."""
    who: str
    when: str
    """UTC, ISO 8601."""


class Decisions:
    """A file of decisions, one line each, added to as they are made."""

    def __init__(self, path: Path) -> None:
        """Raises OutputError for a file that holds something else."""
        self.path = path
        self._folder = os.path.abspath(path.parent)
        self._latest: dict[tuple[str, int], Decision] = {}
        for decision in _decisions(path) if path.exists() else ():
            self._keep(decision)

    def __len__(self) -> int:
        return len(self._latest)

    def __iter__(self) -> Iterator[Decision]:
        return iter(self._latest.values())

    def place(self, row: Row) -> str:
        """What a decision about this row has as its place."""
        return f"{self._file(row.file)}:{row.number}"

    def about(self, row: Row) -> Decision | None:
        return self._latest.get((self._file(row.file), row.number))

    def of(self, file: str) -> list[Decision]:
        """Those about this file's rows."""
        name = self._file(file)
        return [decision for (where, _), decision in self._latest.items() if where == name]

    def _file(self, file: str) -> str:
        return os.path.relpath(os.path.abspath(file), self._folder)

    def add(self, decision: Decision) -> None:
        """Written to the disk before it returns.  Raises OutputError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                if file.tell() and not _ends_whole(self.path):
                    # So that this line does not go on where a killed program stopped.
                    file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
                file.write(_line(decision))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritten(error, "this one") from None
        self._keep(decision)

    def extend(self, decisions: Sequence[Decision]) -> None:
        """All of them or, where it is interrupted, none.  Raises OutputError."""
        if not decisions:
            return
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before = self.path.read_bytes() if self.path.exists() else b""
            with temporary.open("wb") as file:
                file.write(before[: before.rfind(b"\n") + 1])
                file.writelines(map(_line, decisions))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError as error:
            raise self._unwritten(error, "these") from None
        finally:
            temporary.unlink(missing_ok=True)
        for decision in decisions:
            self._keep(decision)

    def _keep(self, decision: Decision) -> None:
        name = os.path.join(self._folder, decision.place.rpartition(":")[0])
        self._latest[os.path.relpath(name, self._folder), decision.row] = decision

    def _unwritten(self, error: OSError, which: str) -> OutputError:
        return OutputError(
            f"{self.path} could not be written: {error.strerror}.",
            f"Free disk space, or choose another place; the decisions before {which} are kept.",
        )


def _line(decision: Decision) -> bytes:
    return json.dumps(asdict(decision), allow_nan=False).encode() + b"\n"


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _decisions(path: Path) -> Iterator[Decision]:
    for number, values in decision_lines(path):
        try:
            decision = Decision(**values)
        except TypeError:
            raise _not_a_decision(path, number, f"it has {', '.join(values)}") from None
        if not all(isinstance(text, str) for text in (decision.place, decision.digest, decision.who, decision.when)):
            raise _not_a_decision(path, number, "place, digest, who and when are text")
        yield decision


def decision_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines whose row, decision and edited are of the right kind.  What follows the last line end was being written when the
    program was killed, and is no line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}.", "Check the file and its permissions.") from None
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _not_a_decision(path, number, f"it is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise _not_a_decision(path, number, f"it is {type_name(values)}")
        unknown = sorted(values.keys() - FIELDS)
        if unknown:
            raise _not_a_decision(path, number, f"{unknown[0]} is no field of one")
        row, word, edited = values.get("row"), values.get("decision"), values.get("edited")
        if not isinstance(row, int) or isinstance(row, bool) or row < 1:
            raise _not_a_decision(path, number, f"row is {row!r}, not the number of a row")
        if word not in WORDS:
            raise _not_a_decision(path, number, f"decision is {word!r}, not one of {', '.join(WORDS)}")
        if (word == "edit") != isinstance(edited, dict):
            raise _not_a_decision(path, number, "`edited` is an object with decision edit, and null with the others")
        yield number, values


def _not_a_decision(path: Path, number: int, why: str) -> OutputError:
    return OutputError(
        f"{path}:{number} is not a decision: {why}.",
        'A line is such as {"row": 3, "decision": "reject"}, or "edit" with "edited": {...}.',
    )
