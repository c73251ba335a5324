"""Giving pseudonyms back what they stand for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onlay.cli.app import JsonOption, app, emit, write

if TYPE_CHECKING:
    from onlay.stages import Restored


@app.command()
def restore(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="A text, JSON or CSV file; - for standard input.")],
    key: Annotated[
        str, typer.Option("--key", metavar="KEYFILE", help="The key of the pseudonyms, a file or env:NAME.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="OUT", help="A new file. Default: standard output.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Replace pseudonyms by what they stand for, with their key.

    The vault beside the key knows it.  FILE stays as it is.  Pseudonyms of other keys stay, and are counted.
    """
    from onlay import stages

    texts: list[str] = []
    # With --json the text is part of the one object; else it is on its way before the last of it was read.
    receive = None if output is not None else texts.append if as_json else write
    made = stages.restore(sys.stdin.buffer if file == "-" else file, key=key, output=output, write=receive)
    values = made.values() | ({"text": "".join(texts)} if output is None else {})
    emit(values, as_json, lambda: _display(made))


def _display(made: Restored) -> None:
    """On standard error where standard output is the text."""
    out = sys.stderr if made.output is None else sys.stdout
    where = "" if made.output is None else f"{made.output}: "
    print(f"{where}Pseudonyms: {made.restored:,} restored, {made.unknown:,} unknown.", file=out)
    if made.unknown:
        print(f"Unknown ones stay as they are: {', '.join(made.unknown_tokens)}.", file=out)
