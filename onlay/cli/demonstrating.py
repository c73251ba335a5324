"""The demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onlay.cli.app import JsonOption, app, emit, say_next, terminal


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder. Default: runs/demo-DATE-TIME.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train the bundled base and show what it learned.

    Uses bundled examples; ends with base and adapter side by side on rows that were held out.
    """
    from dataclasses import asdict

    from onlay import stages
    from onlay.console.runs import Reporter, demo_view

    with Reporter(terminal()) as report:
        result = stages.demo(output=str(output) if output else None, report=report)

    def display() -> None:
        demo_view(terminal(stderr=False), result)
        say_next(f"onlay chat {result.run} --compare")

    emit(asdict(result), as_json, display)
