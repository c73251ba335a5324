"""What a person sees of the production checklist: a table a phase, what to do below it, and whether it is ready."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
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


def checklist_view(console: Console, found: Checklist) -> None:
    for number, (phase, items) in enumerate(groupby(found.items, key=lambda item: item.phase)):
        mine = list(items)
        console.print(Text(f"\n{phase}" if number else phase, style="bold"))
        console.print(_table(mine))
        _what_to_do(console, mine)
    console.print(_conclusion(found), soft_wrap=True)


def _conclusion(found: Checklist) -> Text:
    count = states(found.items)
    told = ", ".join(f"{count[state]} {state}" for state in SIGNS if count[state])
    word, style = (
        ("READY", "bold green") if found.ready else ("NOT READY", "bold red" if found.failed else "bold yellow")
    )
    line = Text.assemble("\n", (word, style), f"  {found.run}: {told} (deployment not counted)")
    for state, what in (("failed", "failed"), ("not done", "missing")):
        names = [item.name for item in found.items if item.state == state and item.phase != "deployment"]
        line.append(f"; {what}: {', '.join(names)}" if names else "")
    return line


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
        table.add_row(Text(f"{sign} {item.state}", style), Text(item.name), told)
    return table


def _what_to_do(console: Console, items: list[Item]) -> None:
    """Remedies and commands, each on one line however long, so that it can be copied."""
    by_remedy: dict[str, list[Item]] = {}
    for item in items:
        if item.remedy is not None:
            by_remedy.setdefault(item.remedy, []).append(item)
    for remedy, concerned in by_remedy.items():
        later = all(item.state == "not yet applicable" for item in concerned)
        console.print(Text(f"→ {', '.join(item.name for item in concerned)}:", "dim"), soft_wrap=True)
        console.print(Text(f"  {remedy}", "dim" if later else "cyan"), soft_wrap=True)
    for item in items:
        for whose, command in item.commands.items():
            console.print(Text(f"→ {item.name}, {whose}:", "dim"), soft_wrap=True)
            console.print(Text(f"  {command}", "cyan"), soft_wrap=True)
