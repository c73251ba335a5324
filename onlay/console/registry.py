"""What a person sees of the registry: tables of versions, moves and differences, verdicts of servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from onlay.stages.fitting import Compatibility

_SHORT_DIGEST = 12
_STYLES = {"accepted": "green", "accepted with flags": "yellow", "not accepted": "red"}


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def versions_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("version", "aliases", "base", "held-out loss", "gates", "registered", "digest")
    for row in rows:
        if row["damaged"] is not None:
            table.add_row(
                Text(row["id"]), Text(", ".join(row["aliases"]), "bold"), Text("damaged", "red"), "", "",
                _when(row), row["digest"][:_SHORT_DIGEST],
            )  # fmt: skip
            continue
        loss = row["evaluation_loss"]
        table.add_row(
            Text(row["id"]), Text(", ".join(row["aliases"]), "bold"), Text(row["base"]),
            "-" if loss is None else f"{loss:.4f}", _gates(row), _when(row),
            row["digest"][:_SHORT_DIGEST],
        )  # fmt: skip
    return table


def _when(row: Mapping[str, Any]) -> str:
    return str(row["registered_at"][:16].replace("T", " "))


def _gates(row: Mapping[str, Any]) -> str:
    if row["verdict"] is None:
        return "no Report"
    passed = sum(gate["passed"] for gate in row["gates"])
    return f"{passed} of {len(row['gates'])} passed" if row["gates"] else "none"


def history_table(events: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("when (UTC)", "who", "what", "why")
    for event in events:
        name, to = event["name"], f"{event['name']}@{event['to_version']}"
        before = f" (was {name}@{event['from_version']})" if event["from_version"] is not None else ""
        what = {
            "register": f"registered {to}",
            "promote": f"{name}@{event['alias']} is {to}{before}",
            "rollback": f"{name}@{event['alias']} is {to} again{before}",
        }[event["action"]]
        forced = ", forced" if event["forced"] else ""
        table.add_row(
            event["at"][:19].replace("T", " "), Text(event["by"]), Text(what + forced), Text(event["reason"] or "")
        )
    return table


def difference_view(console: Console, found: Mapping[str, Any]) -> None:
    table = _table("", found["one"], found["other"])
    for part in ("recipe", "data", "scores", "base", "files"):
        for name, (one, other) in found[part].items():
            shorten = part == "files" or name.endswith(("digest", "fingerprint"))
            table.add_row(Text(f"{part}: {name}"), Text(_shown(one, shorten)), Text(_shown(other, shorten)))
    if table.row_count:
        console.print(table)
    else:
        console.print(f"{found['one']} and {found['other']} do not differ.", highlight=False)


def _shown(value: Any, shorten: bool) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)[:_SHORT_DIGEST] if shorten else str(value)


def compatibility_view(console: Console, found: Compatibility, *, named: str) -> None:
    """`named`: the adapter as the user named it."""
    fits = {True: "fits", False: "does not fit", None: "is not compared with"}[found.fits]
    console.print(Text(f"{named} {fits} {found.base or 'a base'}.", "bold"), soft_wrap=True)
    for note in found.notes:
        console.print(Text(f"- {note}"), soft_wrap=True)
    for server in found.servers:
        console.print(Text(f"\n{server.server}: {server.verdict}", _STYLES[server.verdict]))
        if server.flags:
            console.print(Text(f"  {server.flags}"), soft_wrap=True)
        for reason in server.reasons:
            console.print(Text(f"  - {reason}"), soft_wrap=True)
