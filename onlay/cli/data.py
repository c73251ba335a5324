"""Before training: the machine and the data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from onlay.cli.app import JsonOption, RecipeArgument, SetOption, app, emit, say_next, terminal


@app.command()
def init(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A data file, or a hub data set owner/name.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write the recipe. Default: DATA's name with .yaml.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a commented recipe for a data file.

    Looks at the data and the device and proposes an ungated base that fits.
    """
    from onlay import stages

    path, summary = stages.init(data, output=output)

    def display() -> None:
        print("\n".join([*summary, f"Wrote {path}.", ""]))
        say_next(f"onlay prepare {path} --show 3, then onlay train {path}")

    emit({"recipe": str(path), "summary": " ".join(summary)}, as_json, display)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what is missing here, and how to install it.

    Looks at Python, torch, CUDA, disk and packages.  Exits with 1 when something that every run needs is missing.
    """
    from dataclasses import asdict

    from onlay.doctor import examine

    checks = examine()
    well = all(check.ok for check in checks)

    def display() -> None:
        from onlay.console.runs import doctor_view

        doctor_view(terminal(stderr=False), checks)

    emit({"ok": well, "checks": [asdict(check) for check in checks]}, as_json, display)
    if not well:
        sys.exit(1)


@app.command()
def prepare(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    show: Annotated[
        int, typer.Option("--show", min=0, help="Print this many rows with the trained tokens coloured.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Read, check, template and tokenize data; cached by content."""
    from onlay import stages
    from onlay.console.runs import Reporter

    with Reporter(terminal()) as report:
        prepared = stages.prepare(recipe, overrides=overrides or (), report=report)
    dataset = prepared.dataset

    def display() -> None:
        from onlay.console.runs import dataset_table, rows_coloured

        console = terminal(stderr=False)
        console.print(dataset_table(dataset))
        if show:
            rows_coloured(console, prepared, show)
        say_next(f"onlay train {recipe}")

    emit(dataset.model_dump(mode="json") | {"digest": dataset.digest}, as_json, display)
