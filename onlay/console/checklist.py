"""What a person sees of the production checklist: a table a phase, and in one line whether it is ready."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onlay.release.checklist import Item, states
from onlay.release.evidence import State
from onlay.stages.checking import Checklist

SIGNS: dict[State, tuple[str, str]] = {
    "passed": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "not done": ("○", "yellow"),
    "not yet applicable": ("–", "dim"),
}
"""A sign beside the word, so that nothing is told by colour alone."""
_SHORT_DIGEST = 12


def checklist_view(found: Checklist) -> Group:
    return Group(*_parts(found))


def _parts(found: Checklist) -> Iterator[RenderableType]:
    for phase, items in groupby(found.items, key=lambda item: item.phase):
        yield Text(f"\n{phase}" if phase != found.items[0].phase else phase, style="bold")
        yield _table(list(items))
    yield Text("")
    count = states(found.items)
    told = ", ".join(f"{count[state]} {state}" for state in SIGNS if count[state])
    word, style = (
        ("READY", "bold green") if found.ready else ("NOT READY", "bold red" if found.failed else "bold yellow")
    )
    yield Text.assemble((word, style), f"  {found.run}: {told} (deployment not counted)")


def _table(items: list[Item]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True, width=20)
    table.add_column(width=24, overflow="fold")
    table.add_column(overflow="fold", ratio=1)
    for item in items:
        sign, style = SIGNS[item.state]
        told = Text(item.evidence)
        if item.digest is not None:
            told.append(f"  [{item.record} {item.digest[:_SHORT_DIGEST]}]", style="dim")
        for line in item.details:
            told.append(f"\n· {line}", style="dim")
        if item.remedy is not None:
            told.append(f"\n→ {item.remedy}", style="cyan" if item.state != "not yet applicable" else "dim")
        table.add_row(Text(f"{sign} {item.state}", style), Text(item.name), told)
    return table
