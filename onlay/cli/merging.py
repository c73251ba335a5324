"""Merging an adapter into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onlay.cli.app import JsonOption, RunArgument, app, emit, terminal


@app.command()
def merge(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    into: Annotated[
        str,
        typer.Option(
            "--into",
            metavar="auto|original|quantized",
            help="For a run on a quantized base: its original weights, or what the quantized ones stand for. auto: the nearer.",
        ),
    ] = "auto",
    max_difference: Annotated[
        float | None,
        typer.Option(
            "--max-difference", min=0.0, help="Largest logit difference allowed. Default: derived from rounding."
        ),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Held-out rows to compare on.")] = 32,
    as_json: JsonOption = False,
) -> None:
    """Merge a run's adapter into its base.

    Writes a plain transformers model, loads it and compares it with base and adapter before it gets its name.
    """
    from onlay import stages
    from onlay.console.runs import Reporter

    with Reporter(terminal()) as report:
        merged = stages.merge(run, out, into=into, max_difference=max_difference, rows=rows, report=report)

    def display() -> None:
        from onlay.console.runs import merge_table

        terminal(stderr=False).print(merge_table(merged))

    emit(merged.model_dump(mode="json") | {"digest": merged.digest}, as_json, display)
