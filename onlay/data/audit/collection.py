"""What the chunks' results come to: merged in the rows' order, judged over all rows together, and counted."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from itertools import repeat
from typing import Any

import numpy as np

from onlay.data.audit.catalogue import Tally
from onlay.data.audit.languages import judge_languages
from onlay.data.audit.overlap import SharedNgrams
from onlay.data.audit.similar import Fingerprints
from onlay.data.audit.statistics import length_outliers, short_answers
from onlay.data.audit.texts import judge_openings
from onlay.data.audit.words import distinct
from onlay.data.audit.worker import Result, Role, opening_key
from onlay.data.rows import RowTable
from onlay.errors import DataError
from onlay.records import Group, RowAt

MOST_OPENINGS = 50_000
"""Different openings kept while they are counted; where there are more, those met once are forgotten."""
SHOWN_REASONS = 5


class Collection:
    """Of one source."""

    def __init__(self, source: int, path: str) -> None:
        self.source, self.path = source, path
        self.rows = 0
        self._tables: list[RowTable] = []
        self._fingerprints: list[Fingerprints] = []
        self._shared: dict[Role, list[SharedNgrams]] = {}
        self._ngrams: list[np.ndarray] = []
        self._found: dict[str, array[int]] = {}
        self._reasons: dict[str, list[tuple[int, str]]] = {}
        self.unreadable = 0
        self.openings: Counter[str] = Counter()
        self._opening_keys: list[np.ndarray] = []
        self.languages: Counter[str] = Counter()
        self._languages: list[np.ndarray] = []
        self._language_numbers: dict[str, int] = {}
        self.personal: Counter[str] = Counter()
        self.roles: Counter[str] = Counter()

    def add(self, result: Result) -> None:
        self.rows += len(result.table)
        self._tables.append(result.table)
        if result.fingerprints is not None:
            self._fingerprints.append(result.fingerprints)
        if result.ngrams is not None:
            self._ngrams.append(result.ngrams)
        for role, shared in result.shared.items():
            self._shared.setdefault(role, []).append(shared)
        for code, numbers in result.found.items():
            self._found.setdefault(code, array("q")).extend(numbers)
        for code, number, why in result.reasons:
            self._give_reason(code, number, why)
        for number, code, problem, _ in result.bad:
            self._count_bad(code, number, problem)
        self._add_texts(result)
        self.personal += result.personal
        self.roles += result.roles

    def _add_texts(self, result: Result) -> None:
        self.openings.update(result.openings)
        if len(self.openings) > MOST_OPENINGS:
            self.openings = Counter({opening: count for opening, count in self.openings.items() if count > 1})
        self._opening_keys.append(result.opening_keys)
        self.languages.update(name for name in result.languages if name)
        numbers = [self._language_numbers.setdefault(name, len(self._language_numbers)) for name in result.languages]
        self._languages.append(np.array(numbers, dtype=np.int16))

    def refuse(self, error: DataError) -> None:
        """Counts a row that could not be read."""
        assert error.code is not None and error.row is not None
        self._count_bad(error.code, error.row, error.problem)

    def _count_bad(self, code: str, number: int, problem: str) -> None:
        self.unreadable += 1
        self._found.setdefault(code, array("q")).append(number)
        self._give_reason(code, number, problem)

    def _give_reason(self, code: str, number: int, why: str) -> None:
        given = self._reasons.setdefault(code, [])
        given.append((number, why))
        if len(given) > 4 * SHOWN_REASONS:  # Errors of the reader run ahead of those of the parser.
            given.sort()
            del given[SHOWN_REASONS:]

    # -------------------------------------------------------------------------------------------------- afterwards

    def table(self) -> RowTable:
        return RowTable.joined(_taken(self._tables))

    def fingerprints(self) -> Fingerprints | None:
        return Fingerprints.joined(_taken(self._fingerprints)) if self._fingerprints else None

    def ngrams(self) -> np.ndarray:
        """Sorted, each once."""
        parts = _taken(self._ngrams)
        return distinct(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.uint64)

    def shared(self) -> dict[Role, SharedNgrams]:
        return {role: SharedNgrams.joined(parts) for role, parts in self._shared.items()}

    def count_into(self, tally: Tally) -> None:
        """Adds this source's rows, by code and in order."""
        for code, numbers in self._found.items():
            tally.add_many(code, sources=repeat(self.source, len(numbers)), numbers=sorted(numbers))
        self._found.clear()

    def reasons(self) -> list[tuple[str, RowAt, str]]:
        """Code, place and reason, the first few of each code."""
        return [
            (code, RowAt(file=self.path, row=number), why)
            for code, given in self._reasons.items()
            for number, why in sorted(given)[:SHOWN_REASONS]
        ]

    def rows_with_opening(self, openings: set[str]) -> np.ndarray:
        """(K,) int64: places in `table`."""
        keys = np.array([opening_key(opening) for opening in openings], dtype=np.uint64)
        return np.flatnonzero(np.isin(np.concatenate(self._opening_keys), keys)) if self._opening_keys else _none()

    def rows_in_language(self, languages: set[str]) -> np.ndarray:
        """(K,) int64: places in `table`."""
        numbers = [number for name, number in self._language_numbers.items() if name in languages]
        return np.flatnonzero(np.isin(np.concatenate(self._languages), numbers)) if self._languages else _none()


def _none() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


def _taken(parts: list[Any]) -> list[Any]:
    """The parts, which are then kept by the caller alone: what is joined need not lie in memory twice for long."""
    taken = list(parts)
    parts.clear()
    return taken


def judge(collections: list[Collection], table: RowTable, tally: Tally) -> dict[str, dict[str, int]]:
    """Counts what shows over all training rows together: openings, languages, lengths.  Gives counts by value."""
    openings: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    for one in collections:
        openings.update(one.openings)
        languages.update(one.languages)
    rows = sum(one.rows for one in collections)
    usual, foreign = judge_openings(openings, rows=rows), judge_languages(languages)
    outliers, short = length_outliers(table), short_answers(table)
    for one in collections:
        mine = np.flatnonzero(table.source == one.source)
        numbers = table.number[mine]
        found = {
            "boilerplate_openings": numbers[one.rows_with_opening(usual)] if usual else _none(),
            "other_language": numbers[one.rows_in_language(foreign)] if foreign else _none(),
            "length_outliers": table.number[outliers[table.source[outliers] == one.source]],
            "answer_shorter_than_usual": table.number[short[table.source[short] == one.source]],
        }
        for code, these in found.items():
            tally.add_many(code, sources=repeat(one.source, len(these)), numbers=these)
    personal: Counter[str] = sum((one.personal for one in collections), Counter())
    roles: Counter[str] = sum((one.roles for one in collections), Counter())
    shares: Mapping[str, Mapping[str, int]] = {
        "scripts": languages,
        "roles": roles,
        "openings": {opening: openings[opening] for opening in usual},
        "personal_data": personal,
    }
    return {name: _largest_first(counts) for name, counts in shares.items() if counts}


def _largest_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def reason_groups(collections: list[Collection], tally: Tally) -> list[Group]:
    """For each code of a row that could not be used: why, for the first few."""
    by_code: dict[str, list[tuple[RowAt, str]]] = {}
    for one in collections:
        for code, place, why in one.reasons():
            by_code.setdefault(code, []).append((place, why))
    return [
        Group(
            code=code, count=tally.count(code), rows=[place for place, _ in given[:SHOWN_REASONS]],
            texts=[why for _, why in given[:SHOWN_REASONS]],
        )
        for code, given in by_code.items()
    ]  # fmt: skip
