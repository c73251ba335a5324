"""An audit in a terminal: the verdict, every finding with its first places and its remedy, and some rows side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onlay.data.privacy.masks import mask
from onlay.records import Audit, Finding, RowAt, Severity
from onlay.records import Group as RowGroup

SIGNS: dict[Severity, tuple[str, str]] = {"error": ("✗", "bold red"), "warning": ("▲", "yellow"), "note": ("·", "dim")}
"""A sign beside the word, so that nothing is told by colour alone."""
PLACES = 5
GROUPS = 2
"""Shown of each finding that has groups."""
GROUP_ROWS = 3
TEXT_CHARACTERS = 160


def audit_view(audit: Audit, *, page: Path | None = None) -> Group:
    """`page`: where the whole report was written, if it was."""
    return Group(*_parts(audit, page))


def _parts(audit: Audit, page: Path | None) -> Iterator[RenderableType]:
    for file in audit.files:
        bad = f", {file.unreadable:,} unreadable" if file.unreadable else ""
        yield Text(f"{file.path}: {file.rows:,} {file.role} rows{bad} ({file.format})")
    if audit.tokens is not None:
        yield Text(f"{audit.tokens:,} tokens, {audit.trained_tokens:,} of them trained ({audit.base})")
    if audit.findings:
        yield Text("")
        yield _table(audit.findings, only_file=len(audit.files) == 1)
        yield from _groups(audit)
    yield Text("")
    yield _verdict(audit)
    if page is not None:
        yield Text(f"The whole report: {page}", style="cyan")


def _verdict(audit: Audit) -> Text:
    count = {name: sum(one.severity == name for one in audit.findings) for name in SIGNS}
    told = ", ".join(f"{number} {name}{'s' * (number > 1)}" for name, number in count.items() if number)
    seconds = f"in {audit.seconds:,.1f} s"
    if not audit.ok:
        unreadable = f"; {audit.unreadable:,} rows cannot be read" if audit.unreadable else ""
        return Text.assemble(("NOT READY", "bold red"), f"  {told}{unreadable}, {seconds}")
    if count["warning"]:
        return Text.assemble(("LOOK FIRST", "bold yellow"), f"  {told}, {seconds}")
    return Text.assemble(("READY", "bold green"), f"  {told or 'nothing found'}, {seconds}")


def _table(findings: list[Finding], *, only_file: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True, width=9)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(overflow="fold", ratio=1)
    for one in findings:
        sign, style = SIGNS[one.severity]
        told = Text(one.message)
        told.append(f"  [{one.code}]", style="dim")
        if one.rows:
            told.append(f"\n{_places(one.rows, one.count, only_file=only_file)}", style="dim")
        if one.remedy:
            told.append(f"\n→ {one.remedy}", style="cyan")
        table.add_row(Text(f"{sign} {one.severity}", style), Text(f"{one.count:,}"), told)
    return table


def _places(rows: list[RowAt], count: int, *, only_file: bool) -> str:
    """`file:3, 7, 12 and 40 more`, the file named once; `rows 3, 7` where there is but one."""
    shown = rows[:PLACES]
    parts, before = [], shown[0].file if only_file else ""
    for row in shown:
        parts.append(str(row.row) if row.file == before else row.place)
        before = row.file
    if only_file:
        parts[0] = f"{'row' if count == 1 else 'rows'} {parts[0]}"
    more = f" and {count - len(shown):,} more" if count > len(shown) else ""
    return ", ".join(parts) + more


def _groups(audit: Audit) -> Iterator[RenderableType]:
    by_code: dict[str, list[RowGroup]] = {}
    for group in audit.groups:
        by_code.setdefault(group.code, []).append(group)
    for finding in audit.findings:
        mine = by_code.get(finding.code, ())
        if mine:
            yield Text(f"\n{finding.code}", style="bold")
        for group in mine[:GROUPS]:
            if group.prompt:
                yield Text(f"  {_short(group.prompt)}")
            for row, text in list(zip(group.rows, group.texts, strict=False))[:GROUP_ROWS]:
                place = "" if text.startswith(row.place) else f"{row.place}  "  # A reason names it itself.
                yield Text.assemble((f"  {place}", "dim"), _short(text))
            if group.count > GROUP_ROWS:
                yield Text(f"  and {group.count - GROUP_ROWS:,} more", style="dim")


def _short(text: str) -> str:
    """On one line, personal data and secrets masked; control characters are not for a terminal."""
    # Masked before it is cut: a part of an identifier would not be found.
    line = "".join(mark if mark.isprintable() else " " for mark in mask(text))
    line = " ".join(line.split())
    return line if len(line) <= TEXT_CHARACTERS else line[: TEXT_CHARACTERS - 1] + "…"
