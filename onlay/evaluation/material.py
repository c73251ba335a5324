"""The bundled evaluation material, and the user's files of the same form.  Raises DataError that names file and row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from onlay.data.sources import Row, read_rows, type_name
from onlay.errors import DataError
from onlay.recipe import DataSection

Name = Literal["general_text", "general_checks", "safety_prompts"]


def bundled(name: Name) -> Path:
    """Where a bundled set lies; what is in it: docs/evaluation_material.md."""
    return Path(__file__).parent.parent / "examples" / "evaluation" / f"{name}.jsonl"


def rows_of(path: Path | str) -> Iterator[Row]:
    """The rows of a local file of any form that training data may have.  Raises DataError, also where there are none."""
    if not Path(path).is_file():
        raise DataError(
            f"There is no evaluation file at {path}.",
            f"Paths are relative to {Path.cwd()}; hub data sets are not read.",
        )
    empty = True
    for row in read_rows(str(path), DataSection(train=str(path))):
        empty = False
        yield row
    if empty:
        raise DataError(f"{path} holds no rows.", "Give a file with at least one row.")


def text_field(row: Row, field: str, *, needs: str) -> str:
    """Text of a row that is not blank.  `needs` is the remedy: what a row of this file must have."""
    value = row.values.get(field)
    if not isinstance(value, str):
        found = "missing" if field not in row.values else f"{type_name(value)}, not text"
        raise DataError(f"{row.place}, field {field}: it is {found}.", needs)
    if not value.strip():
        raise DataError(f"{row.place}, field {field}: it is empty.", needs)
    return value


def only_fields(row: Row, allowed: tuple[str, ...], *, needs: str) -> None:
    """Raises DataError for a field that nothing reads: a misspelt one would be lost in silence."""
    unknown = [name for name in row.values if name not in allowed]
    if unknown:
        raise DataError(f"{row.place}: {unknown[0]} is none of {', '.join(allowed)}.", needs)
