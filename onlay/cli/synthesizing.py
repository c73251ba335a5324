"""Making rows from seed tasks."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onlay.cli.app import JsonOption, SetOption, app, emit, say_next, terminal
from onlay.errors import SetupError

if TYPE_CHECKING:
    from onlay.stages import Synthesis


@app.command()
def synthesize(
    seeds: Annotated[str, typer.Argument(metavar="SEEDS", help="Seed tasks with answers: a file in any format.")],
    model: Annotated[
        str, typer.Option("--model", metavar="NAME", help="A base, run or version; with --endpoint its model.")
    ],
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", metavar="URL", help="An OpenAI-compatible server: https://host/v1.")
    ] = None,
    key_variable: Annotated[
        str | None, typer.Option("--key-variable", metavar="NAME", help="Environment variable that holds its key.")
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests at once.")] = 4,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1.0, help="Seconds that a server may take to reply.")
    ] = 300,
    rows: Annotated[int, typer.Option("--rows", min=1, help="New rows wanted.")] = 100,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: SEEDS' name with -synthetic.jsonl.")
    ] = None,
    shown: Annotated[int, typer.Option("--shown", min=1, help="Tasks that a prompt shows, at most.")] = 8,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="Of the tasks; answers take 0.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest reply.")] = 1024,
    most_alike: Annotated[
        float, typer.Option("--most-alike", min=0.01, max=1.0, help="ROUGE-L at which a task is not new.")
    ] = 0.7,
    judge: Annotated[
        str | None, typer.Option("--judge", metavar="NAME", help="A model that grades each row, named like --model.")
    ] = None,
    judge_endpoint: Annotated[
        str | None, typer.Option("--judge-endpoint", metavar="URL", help="The judge's server.")
    ] = None,
    judge_key_variable: Annotated[
        str | None, typer.Option("--judge-key-variable", metavar="NAME", help="Variable that holds its key.")
    ] = None,
    least_score: Annotated[int, typer.Option("--least-score", min=1, max=5, help="Least grade that is kept.")] = 4,
    prices: Annotated[
        tuple[float, float] | None,
        typer.Option("--prices", metavar="IN OUT", help="USD for a million tokens of the model: prompts, answers."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of what is shown, and of local sampling.")] = 0,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write new rows like the seeds, by a model.

    Refuses tasks that are not new, and poor answers; each row says where it comes from.  The same command goes on where an
    interrupted one stopped.  Exits with 1 when there are fewer rows than asked for.
    """
    from onlay import stages
    from onlay.console.runs import Reporter
    from onlay.data.synthesis.rounds import Settings
    from onlay.stages import Speaker

    if judge is None and (judge_endpoint or judge_key_variable):
        raise SetupError(
            "--judge-endpoint and --judge-key-variable say where a judge is, and there is none.",
            "Name its model: --judge NAME.",
        )
    speaker = partial(Speaker, concurrency=concurrency, timeout_seconds=timeout)
    grading = None
    if judge is not None:
        grading = speaker(model=judge, endpoint=judge_endpoint, key_variable=judge_key_variable)
    settings = Settings(
        seed=seed, shown=shown, temperature=temperature, max_new_tokens=max_new_tokens, most_alike=most_alike,
        least_score=least_score,
    )  # fmt: skip
    with Reporter(terminal()) as report:
        made = stages.synthesize(
            seeds, model=speaker(model=model, endpoint=endpoint, key_variable=key_variable), judge=grading, rows=rows, output=output,
            settings=settings, prices=prices, overrides=overrides or (), report=report,
        )  # fmt: skip
    emit(made.values(), as_json, lambda: _display(made))
    if made.stopped is not None:
        sys.exit(1)


def _display(made: Synthesis) -> None:
    from onlay.data.synthesis.filters import REASONS

    print(f"{made.path}: {made.rows:,} rows by {made.model}, from {made.seeds:,} seed tasks in {made.rounds} rounds")
    if made.stopped is not None:
        print(f"Fewer than the {made.asked:,} asked for: {made.stopped}.")
    asked = ", ".join(f"{count:,} for {kind}" for kind, count in made.requests.items()) or "none"
    cost = "" if made.usd is None else f"; {made.usd:.4f} USD"
    print(f"Requests: {asked}; {made.kept_replies:,} replies were kept from before.")
    print(f"Tokens: {made.prompt_tokens:,} of prompts, {made.answer_tokens:,} of answers{cost}.")
    for reason, count in made.rejected.items():
        print(f"  refused {count:>6,}  {REASONS[reason]}")
    for note in made.notes:
        print(f"Note: {note}.")
    if made.rows:
        say_next(f"onlay review {made.path} --sample 50")
