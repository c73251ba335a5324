"""A person's decisions about rows: accept, edit or reject.  Kept as they are made, and applied to a copy of the file.

Each decision holds the row's number and a digest of its content: one about a row whose content has changed since is applied
to nothing.  A later decision about a row takes the place of an earlier one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from onlay.data.decisions import Decision, Decisions, decision_lines
from onlay.data.read import DETECTION_ROWS, Conversation, Document, detect_format, parse
from onlay.data.sources import Row, read_rows, type_name
from onlay.errors import DataError, OutputError
from onlay.recipe import DataSection

Check = Callable[[Any], str | None]
"""Of an edited row: why it cannot take the row's place, or None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A row as a person sees it."""

    row: Row
    digest: str
    item: Conversation | Document | None
    problem: str | None
    """Why the row cannot be trained on, or not be written, as it is: `item` is None then."""
    writable: bool = True
    """False: it cannot be accepted as it is."""
    codes: tuple[str, ...] = ()
    """Of the audit's findings about it."""
    before: Decision | None = None
    """What was decided about it before its content changed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What a person said to one row."""

    word: Literal["accept", "edit", "reject", "skip", "back", "quit"]
    edited: dict[str, Any] | None = None


Ask = Callable[[Shown, int, int, Check], Said]
"""Shows a row (its number among those to decide, how many those are) and returns what the person said."""


def row_digest(row: Row) -> str:
    """SHA-256 of the row's content, also of what JSON text cannot hold: it may be a row to reject for it."""
    # Escaped: a row may hold half of a pair of characters.
    text = json.dumps(row.values, sort_keys=True, separators=(",", ":"), default=repr)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def unwritable(row: Row) -> str | None:
    """Why the row cannot be written as a line of JSON, or None: NaN and infinite numbers, the dates of a Parquet file."""
    try:
        json.dumps(row.values, allow_nan=False)
    except (TypeError, ValueError) as error:
        return f"{row.place} holds what JSON text cannot: {error}."
    return None


# ------------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True, kw_only=True, slots=True)
class Reviewed:
    """A file to review: how its rows are read."""

    source: str
    section: DataSection
    format: str | None
    """None where no known format has its columns: rows are then shown as they are written."""

    @classmethod
    def opened(cls, source: str, section: DataSection) -> Reviewed:
        """Raises DataError for a file that is not there, or holds no rows that can be read."""
        first: list[Row] = []
        bad: list[DataError] = []
        for row in read_rows(source, section, limit=section.max_rows, on_bad=bad.append):
            first.append(row)
            if len(first) == DETECTION_ROWS:
                break
        if not first:
            raise bad[0] if bad else DataError(f"{source} holds no rows.", "Give a file with at least one row.")
        try:
            json.dumps(first[0].values)
        except TypeError:  # A column of another kind, so every row.
            remedy = "Write the file as JSON lines first, with that as text."
            raise DataError(str(unwritable(first[0])), remedy) from None
        try:
            return cls(source=source, section=section, format=detect_format(first, section))
        except DataError:
            return cls(source=source, section=section, format=None)

    def rows(self, *, on_bad: Callable[[DataError], None] | None = None, only: set[int] | None = None) -> Iterator[Row]:
        """`on_bad` gets the rows that cannot be read; without it the first raises DataError."""
        more: dict[str, Any] = {"on_bad": on_bad} if on_bad is not None else {}
        return read_rows(
            self.source, self.section, limit=self.section.max_rows if only is None else None, only=only, **more
        )

    def parsed(self, row: Row) -> tuple[Conversation | Document | None, str | None]:
        """What the row says, or why it cannot be trained on or written."""
        problem = unwritable(row)
        if problem is not None:
            return None, problem
        if self.format is None:
            return None, None
        try:
            return parse(row, self.format, self.section), None
        except DataError as error:
            return None, error.problem

    def problem(self, number: int, values: Any) -> str | None:
        """Why an edited row cannot take the row's place, or None."""
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            return f"{self.source}:{number} would be {type_name(values)}, not an object of named fields."
        return self.parsed(Row(self.source, number, values))[1]


def draw_rows(
    reviewed: Reviewed,
    *,
    wanted: Mapping[int, Sequence[str]] | None,
    sample: int | None,
    seed: int,
    on_bad: Callable[[DataError], None],
) -> list[int]:
    """Numbers of the rows to review, in the file's order.  The same arguments draw the same.

    `wanted`: numbers of the rows to choose among (with the codes of their findings); None: all.
    """
    numbers = [row.number for row in reviewed.rows(on_bad=on_bad) if wanted is None or row.number in wanted]
    if sample is not None and sample < len(numbers):
        numbers = sorted(random.Random(seed).sample(numbers, sample))
    return numbers


# ---------------------------------------------------------------------------------------------------------- decisions


def take_over(path: Path, reviewed: Reviewed, decisions: Decisions, *, who: str, when: str) -> dict[str, int]:
    """Adds the decisions of a file that fit, and counts all: taken, replaced (taken over an earlier one), known, changed (the
    row's content is another now), missing (no such row), unusable (the row as accepted or edited cannot be used).

    A line needs `row` and `decision` (and `edited`); a `digest` is checked where there is one.  Nothing is added when a line
    is not a decision: OutputError.
    """
    lines: dict[int, list[dict[str, Any]]] = {}
    for _, values in decision_lines(path):
        lines.setdefault(values["row"], []).append(values)
    counts = Counter(dict.fromkeys(("taken", "replaced", "known", "changed", "missing", "unusable"), 0))
    found: list[Decision] = []
    for row in reviewed.rows(on_bad=lambda _: None, only=set(lines)):
        digest = row_digest(row)
        # The file may be about several, or a row may have changed and been decided on anew.
        fitting = [values for values in lines.pop(row.number) if values.get("digest") in (None, digest)]
        if not fitting:
            counts["changed"] += 1
            continue
        values = fitting[-1]
        edited_badly = values["decision"] == "edit" and reviewed.problem(row.number, values["edited"]) is not None
        if edited_badly or (values["decision"] == "accept" and unwritable(row) is not None):
            counts["unusable"] += 1
        else:
            found.append(Decision(
                row=row.number, place=decisions.place(row), digest=digest, decision=values["decision"], edited=values.get("edited"),
                who=str(values.get("who") or who), when=str(values.get("when") or when),
            ))  # fmt: skip
    counts["missing"] = len(lines)
    new = []
    for decision in found:
        before = decisions.about(Row(reviewed.source, decision.row, {}))
        if before is not None and _same(before, decision):
            counts["known"] += 1
            continue
        counts["taken"] += 1
        counts["replaced"] += before is not None
        new.append(decision)
    decisions.extend(new)
    return dict(counts)


def _same(first: Decision, second: Decision) -> bool:
    return (first.digest, first.decision, first.edited) == (second.digest, second.decision, second.edited)


# ------------------------------------------------------------------------------------------------------------ session


def review_rows(
    reviewed: Reviewed,
    numbers: Sequence[int],
    *,
    decisions: Decisions,
    codes: Mapping[int, Sequence[str]],
    ask: Ask,
    who: str,
    now: Callable[[], str],
) -> int:
    """Asks for each row that has no decision yet, and writes each decision before the next is asked for; how many are left.

    Rows are read as they come up; those that were shown can be gone back to.
    """
    open_rows = _undecided(reviewed, set(numbers), decisions, codes)
    total = sum(1 for _ in _undecided(reviewed, set(numbers), decisions, codes))
    shown: list[Shown] = []
    at = 0
    while True:
        if at == len(shown):
            following = next(open_rows, None)
            if following is None:
                break
            shown.append(following)
        row = shown[at]
        said = ask(row, at + 1, total, partial(reviewed.problem, row.row.number))
        if said.word == "quit":
            break
        if said.word == "back":
            at = max(0, at - 1)
            continue
        if said.word != "skip":
            decisions.add(Decision(
                row=row.row.number, place=decisions.place(row.row), digest=row.digest, decision=said.word, edited=said.edited,
                who=who, when=now(),
            ))  # fmt: skip
        at += 1
    return sum(1 for _ in _undecided(reviewed, set(numbers), decisions, codes))


def _undecided(
    reviewed: Reviewed, numbers: set[int], decisions: Decisions, codes: Mapping[int, Sequence[str]]
) -> Iterator[Shown]:
    for row in reviewed.rows(on_bad=lambda _: None, only=numbers):
        digest, before = row_digest(row), decisions.about(row)
        if before is None or before.digest != digest:
            item, problem = reviewed.parsed(row)
            yield Shown(
                row=row,
                digest=digest,
                item=item,
                problem=problem,
                writable=unwritable(row) is None,
                before=before,
                codes=tuple(codes.get(row.number, ())),
            )


# -------------------------------------------------------------------------------------------------------------- apply


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """What became of the rows of a file."""

    accepted: int
    edited: int
    rejected: int
    """Left out of the new file."""
    undecided: int
    changed: int
    """Rows whose content is not what was decided on: untouched, as if undecided."""
    changed_places: tuple[str, ...]
    missing: int
    """Decisions about rows that the file does not have."""
    written: int


MOST_PLACES = 20


def apply_decisions(reviewed: Reviewed, decisions: Decisions, *, output: Path, decided_only: bool) -> Applied:
    """Writes the rows as decided, as JSON lines; whole or not at all.  Raises OutputError and DataError.

    Rows without a decision are kept as they are, or left out with `decided_only`.
    """
    if output.exists():
        raise OutputError(f"{output} exists already.", "Choose another name.")
    counts: Counter[str] = Counter()
    places: list[str] = []
    missing = {decision.row for decision in decisions.of(reviewed.source)}
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as out:
            for row in reviewed.rows():
                decision = decisions.about(row)
                missing.discard(row.number)
                what = _fate(row, decision)
                counts[what] += 1
                if what == "changed" and len(places) < MOST_PLACES:
                    places.append(row.place)
                if what == "rejected" or (decided_only and what in ("undecided", "changed")):
                    continue
                out.write(_json_line(decision.edited if decision is not None and what == "edited" else _written(row)))
                counts["written"] += 1
            out.flush()
            os.fsync(out.fileno())
        temporary.rename(output)
    except OSError as error:
        raise OutputError(
            f"{output} could not be written: {error.strerror}.", "Free disk space, or choose another place."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    names = ("accepted", "edited", "rejected", "undecided", "changed", "written")
    return Applied(**{name: counts[name] for name in names}, changed_places=tuple(places), missing=len(missing))


def _written(row: Row) -> dict[str, Any]:
    problem = unwritable(row)
    if problem is not None:
        raise DataError(problem, f"Reject or edit the row: onlay review {row.file}")
    return row.values


def _json_line(values: Any) -> bytes:
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(values, allow_nan=False).encode() + b"\n"


def _fate(row: Row, decision: Decision | None) -> str:
    if decision is None:
        return "undecided"
    if decision.digest != row_digest(row):
        return "changed"
    return {"accept": "accepted", "edit": "edited", "reject": "rejected"}[decision.decision]
