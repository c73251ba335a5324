"""Training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onlay.cli.app import INTERRUPTED, JsonOption, SetOption, app, emit, say_next, terminal

if TYPE_CHECKING:
    from onlay.records import Run


@app.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="A YAML recipe.")] = None,
    overrides: SetOption = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN", help="Go on with an interrupted run folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter, or go on with an interrupted run.

    Ends with a summary and the next command.  Ctrl-C saves; the exit code is then 130.
    """
    from onlay import stages
    from onlay.console.runs import Reporter

    with Reporter(terminal()) as report:
        run = stages.train(recipe, overrides=overrides or (), resume=resume, report=report)

    def display() -> None:
        from onlay.console.runs import run_table

        terminal(stderr=False).print(run_table(run))
        say_next(*_next_commands(run))

    emit(run.model_dump(mode="json") | {"digest": run.digest}, as_json, display)
    if run.status == "interrupted":
        sys.exit(INTERRUPTED)


def _next_commands(run: Run) -> list[str]:
    if run.status == "interrupted":
        return [f"onlay train --resume {run.path}"]
    if run.method == "head":
        return [f"onlay generate {run.path} --prompt 'a text'"]
    # Without held-out rows there is nothing to evaluate it on.
    evaluate = [f"onlay evaluate {run.path}"] if run.evaluation_loss is not None else []
    return [*evaluate, f"onlay chat {run.path}{'' if run.method == 'full' else ' --compare'}"]
