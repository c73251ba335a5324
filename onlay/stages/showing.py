"""`show`, `log` and `schema`: what is written down already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onlay import ledger
from onlay.errors import OutputError
from onlay.recipe import Recipe
from onlay.records import RECORDS, Record, Run


def show(what: str | Path) -> tuple[Record | dict[str, Any], list[ledger.Row]]:
    """The record of a run folder, or the one whose digest starts with `what`; and the chain of records behind it."""
    folder = Path(what)
    if folder.is_dir():
        run = Run.load(folder)
        return run, list(ledger.chain(run))
    if not set(str(what).lower()) <= set("0123456789abcdef"):
        raise OutputError(f"{what} is neither a run folder nor the start of a digest.", "`onlay log` lists the runs.")
    row = ledger.find(str(what))
    return (row.record() if row.kind in RECORDS else row.values | {"digest": row.digest}), list(ledger.chain(row))


def log() -> list[ledger.Row]:
    """The latest record of every run on this machine, newest first."""
    return ledger.runs()


def schema() -> dict[str, Any]:
    """The recipe's JSON schema, for editors."""
    return Recipe.model_json_schema()
