"""The production checklist of a run or a version."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from onlay.cli.app import JsonOption, app, emit, terminal


@app.command()
def check(
    run: Annotated[str, typer.Argument(metavar="RUN|VERSION", help="A run folder, or a registered version.")],
    base_licence: Annotated[
        str | None, typer.Option("--base-licence", metavar="NAME", help="Read where the base's files state none.")
    ] = None,
    data_licence: Annotated[
        str | None, typer.Option("--data-licence", metavar="NAME", help="Read where the recipe states none.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Walk the production checklist of a run or version.

    Every state is computed from records and files.  What is not done yet holds up readiness and not the exit code;
    deployment holds up neither.
    """
    from onlay.stages import checking

    found = checking.check(run, base_licence=base_licence, data_licence=data_licence)

    def display() -> None:
        from onlay.console.checklist import checklist_view

        checklist_view(terminal(stderr=False), found)

    values = {"run": found.run, "ready": found.ready, "items": [asdict(item) for item in found.items]}
    emit(values, as_json, display)
    if found.failed:
        sys.exit(1)
