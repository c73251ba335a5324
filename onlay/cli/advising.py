"""Should one fine-tune at all, and with which settings?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from onlay.cli.app import JsonOption, SetOption, app, emit, terminal
from onlay.errors import OnlayError

if TYPE_CHECKING:
    from onlay.stages import Advising

Task = Literal["style", "format", "classify", "extract", "chat", "skill", "domain", "facts"]


@app.command()
def advise(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="A YAML recipe; its data are read.")] = None,
    task: Annotated[
        Task | None, typer.Option("--task", metavar="WORD", help=f"What is learned: {', '.join(get_args(Task))}.")
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Rows of data. Default: the recipe's.")] = None,
    mean_tokens: Annotated[
        float | None, typer.Option("--mean-tokens", min=1.0, help="Tokens of a row. Default: from the recipe's rows.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Base, such as llama-3.1-8b, or a folder.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME", help="Such as rtx4090; or none. Default: this machine's.")
    ] = None,
    facts_change: Annotated[
        Literal["never", "rarely", "often"] | None,
        typer.Option(
            "--facts-change", metavar="WORD", help="How often what answers say changes: never, rarely, often."
        ),
    ] = None,
    prompted: Annotated[
        Literal["good", "fair", "poor"] | None,
        typer.Option("--prompted", metavar="WORD", help="The base with a good prompt: good, fair, poor."),
    ] = None,
    latency: Annotated[
        Literal["relaxed", "tight"] | None,
        typer.Option("--latency", metavar="WORD", help="tight: every millisecond counts; or relaxed."),
    ] = None,
    serves: Annotated[
        Literal["one", "many"] | None,
        typer.Option("--serves", metavar="WORD", help="Tasks that one base will serve: one, many."),
    ] = None,
    prices: Annotated[
        Path | None, typer.Option("--prices", metavar="FILE", help="A table of GPUs of your own, over onlay's.")
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether to fine-tune at all, and with which settings.

    Each with its reason and source, and which servers will take the adapter. Loads nothing; a recipe's data are read.
    """
    from onlay import stages
    from onlay.planning.advice import Answers

    if recipe is None and (task, rows, model, facts_change, prompted) == (None,) * 5:
        raise OnlayError("There is nothing to advise on.", "Give a RECIPE, or --task, --rows and --model.")
    answers = Answers(
        task=task, rows=rows, mean_tokens=mean_tokens, facts_change=facts_change, prompted=prompted, latency=latency,
        served_tasks=serves,
    )  # fmt: skip
    made = stages.advise(recipe, answers=answers, overrides=overrides or (), model=model, gpu=gpu, prices=prices)

    def display() -> None:
        from onlay.console.advice import advice_view

        advice_view(terminal(stderr=False), made)

    emit(_values(made), as_json, display)


def _values(made: Advising) -> dict[str, Any]:
    from dataclasses import asdict

    values = asdict(made)
    return {"recipe": made.recipe, "base": made.base, "gpu": made.gpu, **values["advice"]} | {
        "servers": values["servers"], "notes": values["notes"],
    }  # fmt: skip
