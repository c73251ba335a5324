"""What is written down already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from onlay.cli.app import JsonOption, app, emit, terminal


@app.command()
def show(
    what: Annotated[
        str, typer.Argument(metavar="RUN|DIGEST", help="A run folder, or the start of any record's digest.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Show a record and the chain it was made from."""
    from onlay import stages
    from onlay.records import Record

    record, chain = stages.show(what)
    values = record.model_dump(mode="json") | {"digest": record.digest} if isinstance(record, Record) else record
    links = [{"kind": row.kind, "digest": row.digest, "path": row.path, "created_at": row.created_at} for row in chain]

    def display() -> None:
        from onlay.console.runs import record_view

        record_view(terminal(stderr=False), values, links, Path(what))

    emit({"record": values, "chain": links}, as_json, display)


@app.command()
def log(as_json: JsonOption = False) -> None:
    """List the runs on this machine, newest first."""
    from onlay import stages

    runs = [row.values | {"digest": row.digest} for row in stages.log()]

    def display() -> None:
        from onlay.console.runs import log_table

        terminal(stderr=False).print(log_table(runs) if runs else "No run yet. Start with: onlay demo")

    emit({"runs": runs}, as_json, display)


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema."""
    from onlay import stages

    print(json.dumps(stages.schema(), indent=2))
