"""Looking through data before it is trained on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onlay.cli.app import JsonOption, SetOption, app, emit, terminal
from onlay.errors import OnlayError, OutputError

if TYPE_CHECKING:
    from onlay.records import Audit


@app.command()
def audit(
    target: Annotated[
        str, typer.Argument(metavar="DATA|RECIPE", help="A data file, a hub data set owner/name, or a recipe.")
    ],
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="FILE", help="A benchmark whose rows must not be trained on; repeatable."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="NAME", help="Count tokens and check masks for it. Default: the recipe's."),
    ] = None,
    known: Annotated[bool, typer.Option("--known", help="Also load the base: which answers does it know?")] = False,
    rows: Annotated[str, typer.Option("--rows", metavar="N|all", help="Most rows named with each finding.")] = "20",
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the whole report as a page.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes for large files. Default: one for each core.")
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is wrong with data, where, how bad, and what to do.

    Reads every row.  Exits with 1 when a finding is an error or a row cannot be read.
    """
    from onlay import stages
    from onlay.console.runs import Reporter

    shown = _count(rows)
    with Reporter(terminal()) as report:
        made = stages.audit(
            target, overrides=overrides or (), against=against or (), base=base, known=known, shown=shown,
            workers=workers, page=html, report=report,
        )  # fmt: skip
    unwritten = _write(made, html)

    def display() -> None:
        from onlay.console.audit import audit_view

        terminal(stderr=False).print(audit_view(made, page=html if unwritten is None else None))

    emit(made.model_dump(mode="json") | {"ok": made.ok, "digest": made.digest}, as_json, display)
    if unwritten is not None:  # What was found is worth telling all the same.
        raise unwritten
    if not made.ok:
        sys.exit(1)


def _write(made: Audit, html: Path | None) -> OutputError | None:
    if html is None:
        return None
    from onlay.data.audit.page import write_page

    try:
        write_page(made, html)
    except OutputError as error:
        return error
    return None


def _count(rows: str) -> int | None:
    if rows == "all":
        return None
    if not rows.isdecimal() or not int(rows):
        raise OnlayError(f"--rows {rows} is neither a number from 1 nor `all`.", "Example: --rows 50")
    return int(rows)
