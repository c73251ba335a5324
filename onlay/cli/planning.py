"""Memory, time and cost of a run, before it is run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onlay.cli.app import JsonOption, SetOption, app, emit, terminal, write
from onlay.errors import OnlayError, RecipeError

if TYPE_CHECKING:
    from onlay.stages import Compared

REFUSED = 2
"""Exit code where the plan is for other settings than were asked for."""


@app.command()
def plan(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="A YAML recipe; its data are read.")] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME", help="Such as rtx4090 or 2xh100. Default: this machine's.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Base, such as llama-3.1-8b, or a folder.")
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Rows of data. Default: the recipe's.")] = None,
    mean_tokens: Annotated[
        float | None, typer.Option("--mean-tokens", min=1.0, help="Tokens of a row. Default: from the recipe's rows.")
    ] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", min=0.01, help="Passes over the rows.")] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", metavar="KEY=A,B,C", help="A table over values of a field, of gpu or of model."),
    ] = None,
    all_gpus: Annotated[
        bool, typer.Option("--all-gpus", help="Which GPU is the cheapest for this job, and which the fastest.")
    ] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Which memory full tuning, LoRA and QLoRA need, from 1B to 70B.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw the memory of the plan and its ladder.")
    ] = None,
    prices: Annotated[
        Path | None, typer.Option("--prices", metavar="FILE", help="A table of GPUs of your own, over onlay's.")
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether a run fits a GPU, its time and its cost.

    From a recipe, or from --model, --rows and --mean-tokens. Loads nothing and rents nothing.
    """
    from onlay import stages

    several = {"--compare": bool(compare), "--all-gpus": all_gpus, "--table": table}
    asked = [option for option, given in several.items() if given]
    if len(asked) > 1:
        raise RecipeError(f"{' and '.join(asked)} are different questions.", "Ask one at a time.")
    of_one_job = (recipe, model, rows, mean_tokens, epochs, prices, overrides or None)
    unread = {
        "--plot": plot is not None and bool(asked), "--gpu": gpu is not None and asked in (["--all-gpus"], ["--table"]),
        "a job": table and any(given is not None for given in of_one_job),
    }  # fmt: skip
    for what, given in unread.items():
        if given:
            raise RecipeError(f"{asked[0]} does not read {what}.", "Leave one of the two out.")
    if table:
        _show_table(as_json)
        return
    job: dict[str, Any] = {
        "overrides": overrides or (), "model": model, "epochs": epochs, "prices": prices,
        "declared": stages.Declared(rows=rows, mean_tokens=mean_tokens),
    }  # fmt: skip
    if compare:
        if len(compare) > 1:
            raise RecipeError(
                f"--compare {' and --compare '.join(compare)} are two tables.",
                "Compare one field at a time; --set holds the others.",
            )
        key, equals, values = compare[0].partition("=")
        if not equals or not all(values.split(",")):
            raise RecipeError(f"--compare {compare[0]} is not KEY=A,B,C.", "Example: --compare rank=8,16,32,64")
        _show_compared(key, stages.compare_plans(key, values.split(","), recipe, gpu=gpu, **job), as_json)
        return
    if all_gpus:
        _show_compared("gpu", stages.plan_all_gpus(recipe, **job), as_json)
        return
    made = stages.plan(recipe, gpu=gpu, **job)
    if plot is not None:
        _draw(plot, made)

    def display() -> None:
        from onlay.console.plan import plan_view

        plan_view(terminal(stderr=False), made)
        if plot is not None:
            write(f"wrote {plot}\n")

    drawn = {} if plot is None else {"plot": str(plot)}
    emit(made.model_dump(mode="json") | {"digest": made.digest} | drawn, as_json, display)
    if made.refused is not None:
        sys.exit(REFUSED)


def _show_compared(key: str, rows: list[Compared], as_json: bool) -> None:
    def display() -> None:
        from onlay.console.plan import compared_view

        compared_view(terminal(stderr=False), key, rows)

    values = [
        {"value": row.value, "plan": None if row.plan is None else row.plan.model_dump(mode="json"), "error": row.problem, "remedy": row.remedy}
        for row in rows
    ]  # fmt: skip
    emit({"compare": key, "plans": values}, as_json, display)


def _show_table(as_json: bool) -> None:
    from dataclasses import asdict

    from onlay.planning.table import ASSUMPTIONS, hardware_table

    rows = hardware_table()

    def display() -> None:
        from onlay.console.plan import table_view

        table_view(terminal(stderr=False), rows)

    emit({"assumptions": list(ASSUMPTIONS), "rows": [asdict(row) for row in rows]}, as_json, display)


def _draw(path: Path, made: Any) -> None:
    from onlay.console.plan import plan_drawing
    from onlay.records import write_whole

    if path.suffix != ".svg":
        raise OnlayError(
            f"--plot {path} is not an .svg file, which is what is drawn.", f"--plot {path.with_suffix('.svg')}"
        )
    write_whole(path, plan_drawing(made))
