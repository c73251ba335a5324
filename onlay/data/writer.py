"""Writes what a build makes: the arrays of a split, the list of rows that were left out, the counts of what happened."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TextIO

import numpy as np

from onlay.data.sources import Row
from onlay.data.split import ARRAYS, PLACE_BITS
from onlay.records import Finding, RowAt, SplitFacts

SHOWN_PLACES = 5


@dataclass
class Counts:
    """Of what happened to rows, by code, with the first few places."""

    counts: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[RowAt]] = field(default_factory=dict)

    def add(self, code: str, row: Row, count: int = 1) -> None:
        self.counts[code] = self.counts.get(code, 0) + count
        rows = self.rows.setdefault(code, [])
        at = RowAt(file=row.file, row=row.number)
        if len(rows) < SHOWN_PLACES and at not in rows:
            rows.append(at)

    def listed(self, messages: Mapping[str, str], *, told: Mapping[str, object]) -> list[Finding]:
        """As findings; `told` fills the {names} of the messages."""
        return [
            Finding(code=code, count=count, message=messages[code].format(**told), rows=self.rows[code])
            for code, count in sorted(self.counts.items())
        ]

    @property
    def words(self) -> str:
        return ", ".join(f"{count} {code}" for code, count in sorted(self.counts.items())) or "none dropped"


class RemovedRows:
    """removed.jsonl: a line for every row that was read and is in no split."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0

    def __enter__(self) -> Self:
        self.out: TextIO = self.path.open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.out.close()

    def add(self, row: Row, reason: str, *, kept: RowAt | None = None) -> None:
        """`kept`: the row that stayed in its place."""
        values: dict[str, object] = {"file": row.file, "row": row.number, "reason": reason}
        if kept is not None:
            values["kept"] = kept.place
        self.out.write(json.dumps(values, ensure_ascii=False) + "\n")
        self.count += 1


class SplitWriter:
    """Appends examples to a split's files."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.files: dict[str, BinaryIO] = {}
        self.written = dict.fromkeys(ARRAYS, 0)
        self.given = self.trained_tokens = self.longest = 0
        """`given`: rows that were meant for this split."""
        self.rows_of: Counter[int] = Counter()
        self.examples_of: Counter[int] = Counter()
        """By the number of the source: rows that the split has examples of, and those examples."""
        self.has_end = False
        """Whether any example trains a token that ends an answer."""

    def __enter__(self) -> Self:
        for array in ARRAYS:
            self.files[array] = (self.folder / f"{self.name}.{array}.npy").open("w+b")
            self._header(array)
        self._append("offsets", np.zeros(1, dtype=np.int64))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for array, out in self.files.items():
            if kind is None:
                begun = out.tell()
                out.seek(0)
                self._header(array)
                out.seek(begun)
            out.close()

    def _header(self, array: str) -> None:
        # numpy pads the header so that the length can grow in place.
        described = {
            "descr": np.lib.format.dtype_to_descr(ARRAYS[array]),
            "fortran_order": False,
            "shape": (self.written[array],),
        }
        np.lib.format.write_array_header_1_0(self.files[array], described)

    def _append(self, array: str, values: np.ndarray) -> None:
        self.files[array].write(np.ascontiguousarray(values, dtype=ARRAYS[array]).tobytes())
        self.written[array] += len(values)

    def add(self, ids: Sequence[int], trained: Sequence[bool], *, source: int, number: int) -> None:
        """One example: its token ids, which of them train, and the row that it was made from."""
        self._append("tokens", np.array(ids, dtype=np.int32))
        self._append("trained", np.array(trained, dtype=bool))
        self._append("offsets", np.array([self.written["tokens"]], dtype=np.int64))
        self._append("places", np.array([source << PLACE_BITS | number], dtype=np.int64))
        self.examples_of[source] += 1
        self.trained_tokens += sum(trained)
        self.longest = max(self.longest, len(ids))

    @property
    def facts(self) -> SplitFacts:
        return SplitFacts(
            rows=self.rows_of.total(),
            examples=self.written["places"],
            tokens=self.written["tokens"],
            trained_tokens=self.trained_tokens,
            longest_tokens=self.longest,
        )
