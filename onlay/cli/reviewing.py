"""Going through rows by hand."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onlay.cli.app import JsonOption, SetOption, app, emit, say_next, terminal

if TYPE_CHECKING:
    from onlay.data.review import Ask
    from onlay.stages import Review


@app.command()
def review(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A data file.")],
    findings: Annotated[
        Path | None,
        typer.Option("--findings", metavar="AUDIT", help="Only rows that `onlay audit --json` listed there."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="CODE", help="Of the findings only this; may be repeated.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", min=1, help="At most so many rows, drawn at random.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the drawing.")] = 0,
    decisions: Annotated[
        Path | None,
        typer.Option("--decisions", metavar="FILE", help="Take decisions over from a file; nobody is asked."),
    ] = None,
    apply: Annotated[
        Path | None, typer.Option("--apply", metavar="OUT", help="Write the rows as decided; nobody is asked.")
    ] = None,
    decided_only: Annotated[
        bool, typer.Option("--decided-only", help="With --apply: leave out rows without a decision.")
    ] = False,
    log: Annotated[
        Path | None, typer.Option("--log", help="Where decisions are kept. Default: FILE's name with .decisions.jsonl.")
    ] = None,
    who: Annotated[str | None, typer.Option("--who", help="Who decides. Default: the user's name.")] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accept, edit or reject rows, one by one.

    One key for each row; every decision is kept at once, so stop and go on at any time.  The file itself stays as it is:
    --apply writes the cleaned one.
    """
    from onlay import stages
    from onlay.console.runs import Reporter
    from onlay.stages import Chosen

    chosen = Chosen(findings=findings, only=tuple(only or ()), sample=sample, seed=seed)
    asks = decisions is None and apply is None
    with Reporter(terminal()) as report:
        made = stages.review(
            file, ask=_desk(as_json) if asks else None, chosen=chosen, decisions=decisions, log=log, apply=apply,
            decided_only=decided_only, who=who, overrides=overrides or (), report=report,
        )  # fmt: skip
    how = [("--set", one) for one in overrides or ()] + ([("--log", str(log))] if log is not None else [])
    which = [("--findings", findings), ("--sample", sample), ("--seed", seed or None), ("--who", who)]
    again = [(option, str(value)) for option, value in which if value is not None] + [
        ("--only", one) for one in only or ()
    ]
    emit(made.values(), as_json, lambda: _display(made, again=again, how=how))


def _desk(as_json: bool) -> Ask | None:
    """None without a terminal.  With --json rows are shown on standard error, which leaves standard output to the object."""
    shown = sys.stderr if as_json else sys.stdout
    if not (sys.stdin.isatty() and shown.isatty()):
        return None
    from onlay.console.review import Desk

    return Desk(terminal(stderr=as_json))


Options = list[tuple[str, str]]


def _display(made: Review, *, again: Options, how: Options) -> None:
    """`again`: what was given of rows and person; `how`: how the file is read, and where decisions are kept."""
    from onlay.stages.synthesizing import bare_name

    decided = ", ".join(f"{count:,} {word}" for word, count in made.decided.items()) or "none"
    if made.taken_over is not None:
        counts = made.taken_over
        print(
            f"Taken over: {counts['taken']:,} ({counts['replaced']:,} in place of earlier ones; {counts['known']:,} known)."
        )
        for what, why in (
            ("changed", "about rows whose content is another now"),
            ("missing", "about rows that the file does not have"),
            ("unusable", "that would leave a row that cannot be used"),
        ):
            if counts[what]:
                print(f"Not taken over: {counts[what]:,} {why}.")
    print(f"Decisions in {made.decisions_path}: {decided}.")
    if made.applied is not None:
        _display_applied(made)
    elif made.left:
        print(f"{made.left:,} of {made.chosen:,} rows are left.")
        say_next(_command(made.file, again + how))
    else:
        say_next(_command(made.file, [*how, ("--apply", f"{bare_name(made.file)}-reviewed.jsonl")]))


def _command(file: str, options: Options) -> str:
    return shlex.join(["onlay", "review", file, *(word for option in options for word in option)])


def _display_applied(made: Review) -> None:
    assert made.applied is not None
    told = made.applied
    print(
        f"{made.output}: {told['written']:,} rows; {told['accepted']:,} accepted, {told['edited']:,} edited, "
        f"{told['rejected']:,} rejected, {told['undecided']:,} without a decision."
    )
    if told["changed"]:
        places = ", ".join(told["changed_places"])
        print(f"Untouched: {told['changed']:,} rows whose content changed since their decision ({places}).")
    if told["missing"]:
        print(f"{told['missing']:,} decisions are about rows that the file does not have.")
    say_next(f"onlay audit {made.output}")
