"""Tables of rows made by hand, for what is chosen by numbers alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onlay.data.material import Material, RowSource
from onlay.data.rows import RowTable
from onlay.records import AuditedFile


@dataclass(frozen=True)
class Made:
    """A row: equal texts have equal keys; `near` names its cluster of near-duplicates."""

    prompt: str
    answer: str = "yes"
    domain: str | None = None
    near: str | None = None
    source: int = 0


def key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def table_of(rows: Sequence[Made]) -> RowTable:
    domains: dict[str, int] = {}
    numbers = [0 if i == 0 or rows[i - 1].source != row.source else 1 for i, row in enumerate(rows)]
    for i in range(1, len(numbers)):
        numbers[i] = numbers[i - 1] + 1 if numbers[i] else 0

    def keys(texts: list[str]) -> np.ndarray:
        return np.array([key(text) for text in texts], dtype=np.uint64)

    return RowTable(
        source=np.array([row.source for row in rows], dtype=np.uint16),
        number=np.array(numbers, dtype=np.int64) + 1,
        prompt_key=keys([row.prompt for row in rows]),
        loose_prompt_key=keys([row.prompt.lower() for row in rows]),
        answer_key=keys([row.answer.lower() for row in rows]),
        row_key=keys([f"{row.prompt}\n{row.answer}".lower() for row in rows]),
        prompt_characters=np.array([len(row.prompt) for row in rows], dtype=np.int32),
        answer_characters=np.array([len(row.answer) for row in rows], dtype=np.int32),
        domain=np.array(
            [-1 if row.domain is None else domains.setdefault(row.domain, len(domains)) for row in rows], dtype=np.int32
        ),
        domains=tuple(domains),
    )


def clusters_of(rows: Sequence[Made]) -> np.ndarray:
    """As `find_clusters` numbers them: by the index of the first row."""
    first: dict[str, int] = {}
    return np.array(
        [i if row.near is None else first.setdefault(row.near, i) for i, row in enumerate(rows)], dtype=np.int64
    )


def singles(count: int, **fields: object) -> list[Made]:
    return [Made(f"question {i}", **fields) for i in range(count)]  # type: ignore[arg-type]


def material_of(rows: Sequence[Made], uses: Sequence[str] = ("train",), weights: Sequence[float] = ()) -> Material:
    """Of rows whose `source` counts through `uses`; source 0 is called a.jsonl, 1 b.jsonl and so on."""
    names = [f"{'abcdefgh'[number]}.jsonl" for number in range(len(uses))]
    sources = [
        RowSource(path=name, use=use, weight=weights[number] if number < len(weights) else 1.0)  # type: ignore[arg-type]
        for number, (name, use) in enumerate(zip(names, uses, strict=True))
    ]
    files = [
        AuditedFile(
            path=name, digest=name, format="prompt_completion", rows=sum(row.source == number for row in rows),
            unreadable=0, role="evaluation" if uses[number] == "evaluation" else "train",
        )
        for number, name in enumerate(names)
    ]  # fmt: skip
    return Material(sources=tuple(sources), files=tuple(files), table=table_of(rows), clusters=clusters_of(rows))
