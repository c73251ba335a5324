"""The registry of adapter versions: registering, promoting, rolling back, comparing, passing on."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onlay.cli.app import JsonOption, RunArgument, app, emit, say_next, terminal

if TYPE_CHECKING:
    from onlay.records import AdapterVersion
    from onlay.release.registry import DamagedVersion

VersionArgument = Annotated[
    str, typer.Argument(metavar="VERSION", help="NAME@4, NAME@ALIAS, NAME@latest, or NAME (the latest).")
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A registered name.")]
ReasonOption = Annotated[str | None, typer.Option("--reason", help="Kept in the history.")]


@app.command()
def register(
    run: RunArgument,
    name: Annotated[str, typer.Option("--name", help="Name of the adapter, such as support.")],
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FOLDER", help="Its Report. Default: the latest on this run, if there is one."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make an immutable version of a finished run.

    Copies the adapter, its tokenizer and records, each content once.  The same content is the version that is there.
    """
    from onlay.console.runs import Reporter
    from onlay.stages import registering

    with Reporter(terminal()) as report:
        done = registering.register(run, name=name, evaluation=evaluation, report=report)
    values = _values(done.version, []) | {"new": done.new, "notes": done.notes}

    def display() -> None:
        _say(done.version, new=done.new, notes=done.notes)
        if done.version.rank is None and done.version.verdict is None:
            # No gates judge a classification head: whoever promotes it says why.
            say_next(f"onlay promote {done.version.id} --as live --force --reason 'REASON'")
        elif done.version.verdict is None:
            say_next(f"onlay evaluate {run}, then onlay register {run} --name {name}")
        else:
            say_next(f"onlay promote {done.version.id} --as live")

    emit(values, as_json, display)


@app.command()
def promote(
    version: VersionArgument,
    alias: Annotated[str, typer.Option("--as", metavar="ALIAS", help="Alias to move.")] = "live",
    force: Annotated[bool, typer.Option("--force", help="Although its gates were not passed; needs --reason.")] = False,
    reason: ReasonOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version that passed its gates."""
    from onlay.stages import registering

    found, moved = registering.promote(version, alias=alias, force=force, reason=reason)
    what = "is now" if moved else "was already"
    values = {"version": found.version, "id": found.id, "alias": alias, "moved": moved}
    emit(values, as_json, lambda: print(f"{found.name}@{alias} {what} {found.id}."))


@app.command()
def rollback(
    name: NameArgument,
    alias: Annotated[str, typer.Option("--alias", help="Alias to move back.")] = "live",
    reason: ReasonOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at the version that it had before.

    Each call goes one step further back.
    """
    from onlay.stages import registering

    found = registering.rollback(name, alias=alias, reason=reason)
    values = {"version": found.version, "id": found.id, "alias": alias}
    emit(values, as_json, lambda: print(f"{found.name}@{alias} is {found.id} again."))


@app.command()
def versions(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Default: all names.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the versions of an adapter, or of all."""
    from onlay.release.registry import DamagedVersion
    from onlay.stages import registering

    found = registering.versions(name)
    rows = [
        _values(version, aliases) | {"damaged": version.problem if isinstance(version, DamagedVersion) else None}
        for version, aliases in found
    ]

    def display() -> None:
        from onlay.console.registry import versions_table

        empty = "Nothing is registered yet: onlay register RUN --name NAME"
        terminal(stderr=False).print(versions_table(rows) if rows else empty)
        for version, _ in found:
            if isinstance(version, DamagedVersion):
                print(f"\n{version.id}: {version.problem}.\n{version.remedy}")

    emit({"versions": rows}, as_json, display)


@app.command()
def diff(
    one: VersionArgument,
    other: Annotated[str, typer.Argument(metavar="VERSION", help="The one to compare it with.")],
    as_json: JsonOption = False,
) -> None:
    """Compare two versions: recipe, data, scores, base, files."""
    from onlay.stages import registering

    found = asdict(registering.diff(one, other))

    def display() -> None:
        from onlay.console.registry import difference_view

        difference_view(terminal(stderr=False), found)

    emit(found, as_json, display)


@app.command()
def verify(
    version: Annotated[
        str | None, typer.Argument(metavar="NAME|VERSION", help="All versions of a name, or one. Default: everything.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Recompute every digest; exit with 1 when one differs."""
    from onlay.stages import registering

    whole, damaged = registering.verify(version)
    values = {"versions": [found.id for found in whole], "damaged": [asdict(damage) for damage in damaged]}

    def display() -> None:
        for damage in damaged:
            print(f"{damage.version}: {'; '.join(damage.problems)}")
        sound = len({found.id for found in whole} - {damage.version for damage in damaged})
        print(f"{sound} {'version is' if sound == 1 else 'versions are'} as registered, {len(damaged)} not.")

    emit(values, as_json, display)
    if damaged:
        sys.exit(1)


@app.command()
def history(name: NameArgument, as_json: JsonOption = False) -> None:
    """Tell who registered and moved what, when and why."""
    from onlay.stages import registering

    events = [asdict(event) for event in registering.history(name)]

    def display() -> None:
        from onlay.console.registry import history_table

        terminal(stderr=False).print(history_table(events))

    emit({"events": events}, as_json, display)


@app.command()
def push(
    version: VersionArgument,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="New folder, hf://OWNER/NAME or mlflow://NAME.")],
    as_json: JsonOption = False,
) -> None:
    """Write a version to a folder, the hub or MLflow.

    What arrived is compared with what was registered.
    """
    from onlay.stages import registering

    found, place = registering.push(version, target)

    def display() -> None:
        print(f"{found.id} is in {place}.")
        say_next(f"onlay pull {place}")

    emit({"version": found.version, "id": found.id, "digest": found.digest, "path": place}, as_json, display)


@app.command()
def pull(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="What `onlay push` wrote: folder, hf:// or mlflow://.")
    ],
    name: Annotated[str | None, typer.Option("--name", help="Name to register it under. Default: its own.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Register a version that was pushed, after checking it."""
    from onlay.stages import registering

    done = registering.pull(source, name=name)
    values = _values(done.version, []) | {"new": done.new, "notes": done.notes}
    emit(values, as_json, lambda: _say(done.version, new=done.new, notes=done.notes))


@app.command()
def compatible(
    what: Annotated[str, typer.Argument(metavar="ADAPTER|RUN|VERSION", help="A folder, or a registered version.")],
    base: Annotated[str | None, typer.Option("--base", help="Hub name or folder. Default: the adapter's own.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether an adapter fits a base, and which servers take it.

    From headers alone; exits with 1 when it does not fit.
    """
    from onlay.console.runs import Reporter
    from onlay.stages import fitting

    with Reporter(terminal()) as report:
        found = fitting.compatible(what, base=base, report=report)

    def display() -> None:
        from onlay.console.registry import compatibility_view

        compatibility_view(terminal(stderr=False), found, named=what)

    emit(asdict(found), as_json, display)
    if found.fits is False:
        sys.exit(1)


def _values(version: AdapterVersion | DamagedVersion, aliases: list[str]) -> dict[str, Any]:
    from onlay.records import Record

    values = (
        version.model_dump(mode="json") | {"digest": version.digest} if isinstance(version, Record) else asdict(version)
    )
    return values | {"id": version.id, "aliases": aliases}


def _say(version: AdapterVersion, *, new: bool, notes: list[str]) -> None:
    print(f"{version.id} is registered." if new else f"This is {version.id}, which was registered before.")
    for note in notes:
        print(f"- {note}")
