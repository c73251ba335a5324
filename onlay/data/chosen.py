"""The rows of a recipe that were chosen to train or to be held out, read again from their sources in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onlay.data.material import Material, row_section
from onlay.data.read import Conversation, Document, parse
from onlay.data.select import REASONS, Selection
from onlay.data.sources import Row, read_rows
from onlay.data.writer import RemovedRows
from onlay.errors import DataError
from onlay.recipe import Recipe

CHUNK_ROWS = 1000
CHUNK_CHARACTERS = 1 << 19
"""Rows are tokenized together up to whichever comes first; a token takes about 200 bytes on the way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """A row that trains or is held out; `index` counts through all rows of all sources."""

    index: int
    row: Row
    item: Conversation | Document


def chosen_rows(
    material: Material, selection: Selection, recipe: Recipe, number: int, removed: RemovedRows | None
) -> Iterator[Chosen | None]:
    """The rows of a source in order, None for one that is left out, which is listed in `removed`.  Raises DataError if it changed."""
    source, file, section = material.sources[number], material.files[number], row_section(recipe)
    rows = np.flatnonzero(material.table.source == number)
    numbers, first = material.table.number[rows], int(rows[0])
    read = 0
    for read, row in enumerate(read_rows(source.path, section, limit=source.limit), 1):
        if read > len(numbers) or row.number != numbers[read - 1]:
            break
        index = first + read - 1
        why = REASONS[selection.reason[index]]
        if not why:
            yield Chosen(index=index, row=row, item=parse(row, file.format, section))
            continue
        kept = int(selection.kept[index])
        if removed is not None and why != "general_not_drawn":
            removed.add(row, why, kept=material.at(kept) if kept != index else None)
        yield None
    else:
        if read == len(numbers):
            return
    raise DataError(
        f"{source.path} had {len(numbers)} rows when it was checked; now it has not.",
        "Run again when nothing writes to the file.",
    )


def chunks(rows: Iterator[Chosen | None]) -> Iterator[tuple[list[Chosen], int]]:
    """Rows to tokenize together, and how many were read for them: few enough that memory stays bounded, enough that the
    tokenizer runs in parallel."""
    chunk: list[Chosen] = []
    read = characters = 0
    for chosen in rows:
        read += 1
        if chosen is not None:
            item = chosen.item
            chunk.append(chosen)
            characters += (
                len(item.text) if isinstance(item, Document) else sum(len(turn.content) for turn in item.turns)
            )
        if read >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk, read
            chunk, read, characters = [], 0, 0
    if read:
        yield chunk, read
