"""What is kept of every row while data is audited and selected: numbers only, so that memory does not follow the text."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowTable:
    """Arrays of equal length N: one entry for each readable row of all sources, in order."""

    source: np.ndarray
    """(N,) uint16: which of the sources."""
    number: np.ndarray
    """(N,) int64: Row.number in its source."""
    prompt_key: np.ndarray
    """(N,) uint64: equal where everything before the last answer is equal up to white space (onlay.data.read.prompt_key)."""
    loose_prompt_key: np.ndarray
    """(N,) uint64: the same after normalising (NFKC, case folded, letters and digits only)."""
    answer_key: np.ndarray
    """(N,) uint64: of the last answer, normalised in the same way; of a document 0."""
    row_key: np.ndarray
    """(N,) uint64: of prompt and answer together, normalised; equal rows are exact duplicates."""
    prompt_characters: np.ndarray
    """(N,) int32."""
    answer_characters: np.ndarray
    """(N,) int32: of all assistant turns."""
    domain: np.ndarray
    """(N,) int32: place in `domains`; -1 where a row has none."""
    domains: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.number)

    def taken(self, rows: np.ndarray) -> Self:
        """The table of some rows, by index, in that order."""
        arrays = {name: getattr(self, name)[rows] for name in self._arrays()}
        return replace(self, **arrays)

    @classmethod
    def _arrays(cls) -> list[str]:
        return [field.name for field in fields(cls) if field.name != "domains"]

    @classmethod
    def joined(cls, parts: list[Self]) -> Self:
        """One table of several, whose rows follow each other; domains are numbered anew."""
        names: dict[str, int] = {}
        domains = []
        for part in parts:
            number = np.array([names.setdefault(name, len(names)) for name in part.domains] + [-1], dtype=np.int32)
            domains.append(number[part.domain])
        arrays = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in cls._arrays() if name != "domain"
        }
        return cls(**arrays, domain=np.concatenate(domains), domains=tuple(names))
