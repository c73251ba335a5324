"""The app that the verbs are added to, the options that several take, and how results and errors leave."""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from onlay import __version__
from onlay.errors import OnlayError

app = typer.Typer(
    help="LoRA fine-tuning of open language models: from a data file to a proven adapter.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON object on standard output, progress on standard error.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override a recipe field; may be repeated."),
]
RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe; `onlay init DATA` writes one.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
AnsweringArgument = Annotated[
    Path, typer.Argument(metavar="RUN|VERSION", help="A run folder, or a registered version such as support@4.")
]
SystemOption = Annotated[str | None, typer.Option("--system", help="System message. Default: the recipe's.")]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.")]
TopPOption = Annotated[
    float, typer.Option("--top-p", min=0.01, max=1.0, help="Sample from the likeliest tokens that make up this share.")
]
PenaltyOption = Annotated[
    float, typer.Option("--repetition-penalty", min=1.0, help="Above 1, tokens said before become less likely.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")]
CompareOption = Annotated[bool, typer.Option("--compare", help="The base's answer beside the adapter's.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


def sampling_of(max_new_tokens: int, temperature: float, top_p: float, repetition_penalty: float, seed: int) -> Any:
    from onlay.generation.engine import Sampling

    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )


def write(text: str) -> None:
    print(text, end="", flush=True)


def say_next(*commands: str) -> None:
    """The next commands, each on one line however long, so that it can be copied."""
    print("\nNext: " + "\n      ".join(commands))


def terminal(*, stderr: bool = True) -> Any:
    from rich.console import Console

    return Console(stderr=stderr)


def emit(values: dict[str, Any], as_json: bool, display: Callable[[], None]) -> None:
    if os.environ.get("RANK", "0") != "0":  # Of several ranks the first speaks.
        return
    if as_json:
        print(json.dumps(values, ensure_ascii=False))
    else:
        display()


INTERRUPTED = 130


def main() -> None:
    """Entry point: what a user can put right becomes two lines on standard error and an exit code."""
    # Deprecations in transformers and peft speak to those who call them, not to those who train.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|accelerate")
    # Ending, Python would look through every object of torch and transformers once more: over a second for nothing.
    atexit.register(gc.freeze)
    try:
        # Without Typer's own error page; Ctrl-C in a verb comes back as its exit code.
        if app(prog_name="onlay", standalone_mode=False) == INTERRUPTED:
            _fail("Interrupted.", "What was saved before is kept; `onlay log` lists the runs.", INTERRUPTED)
    except OnlayError as error:
        _fail(error.problem, error.remedy, error.exit_code)
    except typer.TyperException as error:
        verb = next((word for word in sys.argv[1:2] if word in verbs()), "")
        _fail(" ".join(error.format_message().split()), f"See: onlay {verb} --help".replace("  ", " "), error.exit_code)


def verbs() -> list[str]:
    return [command.callback.__name__ for command in app.registered_commands if command.callback is not None]


def _fail(problem: str, remedy: str, exit_code: int) -> None:
    if "--json" in sys.argv:
        print(json.dumps({"error": problem, "remedy": remedy}, ensure_ascii=False))
    print(f"{problem}\n{remedy}", file=sys.stderr)
    sys.exit(exit_code)
