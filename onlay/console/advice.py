"""Advice in a terminal: what to do, then a table of settings with reasons and sources, then the servers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from onlay.planning.advice import Advised
    from onlay.release.servers import Verdicts
    from onlay.stages.advising import Advising

VERDICTS = {"same": ("=", "green"), "near": ("≈", "green"), "differs": ("≠", "yellow")}
"""A sign beside the colour, so that nothing is told by colour alone."""
WIDE = 110
"""Columns from which sources have a column of their own."""
ACCEPTED = {"accepted": ("✓", "green"), "accepted with flags": ("✓", "yellow"), "not accepted": ("✗", "red")}
OPTIONS = {
    "served_tasks": "--serves", "base": "--model", "memory_bytes": "--gpu", "has_gpu": "--gpu", "task": "--task",
    "facts_change": "--facts-change", "prompted": "--prompted", "latency": "--latency", "rows": "--rows",
    "mean_tokens": "--mean-tokens",
}  # fmt: skip
"""What tells each answer."""


def advice_view(console: Console, made: Advising) -> None:
    advice = made.advice
    console.print(Text.assemble((f"{_words(advice.approach.advised)}", "bold"), f": {advice.approach.reason}."))
    console.print(Text(f"[{advice.approach.source}]", "dim"))
    _tell_others(console, [advice.approach])
    if not advice.trains:
        console.print(Text("\nIf you train all the same:"))
    console.print()
    wide = console.width >= WIDE
    console.print(_table([*advice.settings, advice.serving], with_recipe=made.recipe is not None, with_source=wide))
    _tell_others(console, [*advice.settings, advice.serving])
    if made.servers:
        console.print()
        console.print(_servers(made.servers))
    for note in made.notes:
        console.print(Text(f"· {note}", "dim"))
    missing = list(dict.fromkeys(OPTIONS[name] for name in advice.unknown))
    if missing:
        console.print(Text(f"Not said, and it would change the advice: {', '.join(missing)}", "cyan"), soft_wrap=True)


def _table(settings: Sequence[Advised], *, with_recipe: bool, with_source: bool) -> Table:
    """`with_source`: in a column of its own; else behind the reason."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("setting", no_wrap=True)
    if with_recipe:
        table.add_column("recipe", overflow="fold")
    table.add_column("advised", overflow="fold")
    table.add_column("reason", overflow="fold", ratio=3)
    if with_source:
        table.add_column("source", overflow="fold", ratio=2, style="dim")
    for one in settings:
        sign, style = VERDICTS[one.verdict] if one.verdict is not None else (" ", "")
        reason = Text(one.reason)
        if not with_source:
            reason.append(f"  [{one.source}]", style="dim")
        recipe = [Text("" if one.recipe is None else _words(one.recipe))] if with_recipe else []
        advised = Text(f"{sign} {_words(one.advised)}" if with_recipe else _words(one.advised), style)
        table.add_row(one.setting.rpartition(".")[2], *recipe, advised, reason, *([one.source] if with_source else []))
    return table


def _servers(servers: Sequence[Verdicts]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for one in servers:
        sign, style = ACCEPTED[one.verdict]
        table.add_row(one.server, Text(f"{sign} {one.verdict}", style), Text("; ".join(one.reasons)))
    return table


def _tell_others(console: Console, settings: Sequence[Advised]) -> None:
    for one in settings:
        for other in one.overruled:
            console.print(
                Text(f"  {one.setting}: {_words(other.value)} was overruled: {other.reason} [{other.source}]", "dim")
            )


def _words(value: Any) -> str:
    """A rate as 2e-04, everything else as it is written in a recipe."""
    if isinstance(value, list):
        return ", ".join(str(one) for one in value)
    if isinstance(value, float):
        return f"{value:.2g}" if abs(value) < 1e-2 and value else f"{value:g}"
    return str(value)
