"""Evaluating: is it better, and which does a person find better."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from onlay.cli.app import JsonOption, SetOption, app, emit, say_next, terminal


@app.command()
def evaluate(
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="A run, an adapter folder, a registered version, or a model.")
    ],
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--with", metavar="ADAPTER", help="Another adapter for the same base, in the same load; repeatable."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="Rows to ask. Default: the run's held-out ones.")
    ] = None,
    overrides: SetOption = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Runs that differ in the seed alone; missing ones are trained.")
    ] = 1,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Report folder. Default: RUN/report.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare with the base and decide by the gates.

    Answers held-out rows, measures what was forgotten and refused, and writes report.html.  Every comparison is paired.
    """
    from onlay import stages
    from onlay.console.runs import Reporter

    with Reporter(terminal()) as report:
        made = stages.evaluate(
            what, others=others or (), overrides=overrides or (), data=data, seeds=seeds, output=output, report=report
        )

    def display() -> None:
        from onlay.console.evaluation import report_view

        run = what if (Path(what) / "run.json").is_file() else None
        terminal(stderr=False).print(report_view(made, run=run))

    emit(made.model_dump(mode="json") | {"digest": made.digest}, as_json, display)


@app.command()
def compare(
    what: Annotated[str, typer.Argument(metavar="RUN", help="A run with a report, or a report's folder.")],
    against: Annotated[str, typer.Option("--against", metavar="SYSTEM", help="The other system.")] = "base",
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="At most so many rows, drawn at random.")] = None,
    again: Annotated[int, typer.Option("--again", min=0, help="Rows to ask twice: how steady is the person?")] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the order.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Choose between two systems' answers, blind.

    Answers come in random order without names; type a, b, tie, skip or q.  Every choice is kept at once.
    """
    from onlay import stages

    judged, left = stages.compare(what, against=against, rows=rows, again=again, seed=seed, ask=_asking(as_json))

    def display() -> None:
        decided = f"{judged.wins} for {judged.system}, {judged.losses} for {judged.against}, {judged.ties} tied"
        print(f"\n{decided} of {judged.rows} rows; p {judged.p_value:.2g} (sign test).")
        if left:
            print(f"{left} {'row is' if left == 1 else 'rows are'} left.")
            # The same options draw the same rows.
            options = [("--against", against), ("--rows", rows), ("--again", again or None), ("--seed", seed or None)]
            given = " ".join(f"{option} {value}" for option, value in options if value is not None)
            say_next(f"onlay compare {what} {given}")

    emit(judged.model_dump(mode="json") | {"left": left}, as_json, display)


def _asking(as_json: bool) -> Callable[[str], str]:
    """Questions go to standard error with --json, which leaves standard output to the one object."""

    def ask(text: str) -> str:
        print(text, end="", flush=True, file=sys.stderr if as_json else None)
        return input()

    return ask
