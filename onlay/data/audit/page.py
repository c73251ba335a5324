"""An audit as one page that needs nothing but itself (onlay/pages/frame.py): what is wrong, where, how bad, what to do.

It is made from the record alone.  Personal data and secrets are masked wherever the page shows text of the data, and rows
that were found for holding them are named, not shown.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from onlay.data.audit.destination import MARKER
from onlay.data.audit.plots import (
    MOST_BARS,
    SIGNS,
    Figure,
    counts_chart,
    figures,
    findings_chart,
    ranked,
    share,
    spoken,
    trained_chart,
)  # fmt: skip
from onlay.data.privacy.masks import mask
from onlay.pages.differences import marked
from onlay.pages.frame import MOST_CHARACTERS, clean, environment
from onlay.records import Audit, Finding, Group, RowAt, write_whole

if TYPE_CHECKING:
    from onlay.records import Distribution

MOST_ROWS = 200
"""Named with one finding; the rest are counted."""
MOST_GROUPS = 12
"""Shown of one finding; the rest are counted."""
MOST_LABEL = 26
"""Characters of a value that a chart shows whole."""
MOST_VALUES = 500
"""Lines of one table of values; the rest are counted."""
SECTIONS = {
    "lengths": ("Lengths", ("characters", "tokens", "to_prompt")),
    "duplicates": ("Duplicates", ("cluster",)),
    "masks": ("What trains", ("trained",)),
    "base": ("What the base knows", ("base",)),
}
"""Of histograms: by a word that the distribution's name holds; the later section wins, and others are under `Other numbers`."""
SHARES = {
    "domains": "Domains",
    "clusters": "Clusters of like rows",
    "personal_data": "Personal data and secrets, occurrences by type",
    "scripts": "Scripts and languages",
    "openings": "How answers begin",
    "roles": "Roles",
}
"""Titles of counts by value, in the page's order; others follow under the name that the record gives them."""
OF_ALL_ROWS = frozenset({"openings"})
"""Whose shares are of all rows; those of the others are of what was counted."""
TOLD_ELSEWHERE = frozenset({"severities"})
SIDE_BY_SIDE = ("contradictory", "leakage", "benchmark", "duplicates")
"""Groups in this order; those of other findings after them."""
CODE = re.compile(r"`([^`]+)`")
NOT_SHOWN = ("personal_", "secret_")
"""Findings whose rows are never shown as text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One number of the first page."""

    label: str
    number: str
    outcome: str
    """worse, open, better or none; the last has no judgement in it."""
    told: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """Counts by value: a chart of the largest, and a table of all where the chart cannot tell them."""

    title: str
    chart: Markup
    values: list[tuple[str, int, str]]
    """Value, count, share."""
    left_out: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A group with its differences marked."""

    group: Group
    prompt: str
    texts: list[tuple[str, Markup | str, str]]
    """Place, text with marks, plain text."""


def write_page(audit: Audit, path: Path) -> Path:
    """Writes the page to `path`, whole or not at all, and returns it.  Raises OutputError."""
    write_whole(path, page(audit))
    return path


def page(audit: Audit) -> str:
    """The page's HTML; the same record gives the same bytes."""
    # A message may hold a value of the data, such as a domain.
    findings = [one.model_copy(update={"message": mask(one.message)}) for one in audit.findings]
    facts, audit = _facts(audit), audit.model_copy(update={"findings": findings})
    by_section = _figures_by_section(audit.distributions)
    reasons, others = _reasons(audit)
    groups, hidden = _groups(others)
    filters: dict[str, Callable[..., Any]] = {
        "spoken": spoken,
        "by_file": _by_file,
        "coded": _coded,
        "brief": _brief_places(audit),
    }
    html = environment("onlay.data.audit", filters=filters).get_template("audit.html.jinja").render(
        marker=MARKER,
        audit=audit,
        subject=Path(audit.files[0].path).name if audit.files else "no file",
        verdict=_verdict(audit),
        tiles=tiles(audit),
        by_severity=[(severity, [one for one in audit.findings if one.severity == severity]) for severity in SIGNS],
        signs=SIGNS,
        share_of=lambda one: _share_of(one, audit),
        reasons=reasons,
        most_rows=MOST_ROWS,
        overview=findings_chart(audit.findings),
        leakage=_leakage(audit),
        trained=trained_chart(audit.tokens, audit.trained_tokens or 0) if audit.tokens else None,
        sections=[(name, title, by_section[name]) for name, (title, _) in SECTIONS.items() if name in by_section],
        others=by_section.get("others", []),
        counted=_counted(audit.shares, rows=audit.rows),
        groups=groups,
        messages={one.code: one.message for one in audit.findings},
        hidden=hidden,
        facts=facts,
    )  # fmt: skip
    return clean(html)


def _verdict(audit: Audit) -> tuple[str, str, str, str]:
    """Style, sign, words, and why; the first is `Not ready` exactly where the command exits with 1, or nothing could be read."""
    errors = [one for one in audit.findings if one.severity == "error"]
    warnings = [one for one in audit.findings if one.severity == "warning"]
    reasons = []
    if audit.unreadable:
        reasons.append(f"{audit.unreadable:,} {'row' if audit.unreadable == 1 else 'rows'} cannot be read.")
    if errors:
        reasons.append(f"{_numbered(errors, 'error')} must be corrected first.")
    if not audit.rows:
        reasons.append("There is no row to train on.")
    if not audit.ok or not audit.rows:
        return "stop", "✕", "Not ready", " ".join(reasons)
    if warnings:
        return (
            "open",
            "▲",
            "Look first",
            f"Nothing stops training; {_numbered(warnings, 'warning')} should be looked at.",
        )
    return "ship", "✓", "Ready", "Nothing was found that stands against training on these rows."


def _numbered(findings: list[Finding], noun: str) -> str:
    return f"{len(findings)} {noun}" + "s" * (len(findings) != 1)


def tiles(audit: Audit) -> list[Tile]:
    """How much, how bad, how often the same, how much of it trains."""
    files = sum(one.role == "train" for one in audit.files)
    others = [f"{one.rows:,} {one.role} rows" for one in audit.files if one.role != "train"]
    told = ", ".join([f"training rows in {files} {'file' if files == 1 else 'files'}", *others])
    found = [Tile(label="Rows", number=f"{audit.rows:,}", outcome="none", told=f"{told}.")]
    whole = audit.rows + audit.unreadable
    told = f"{share(audit.unreadable, whole)} of all." if audit.unreadable else "Every row could be read."
    found.append(Tile(label="Unreadable", number=f"{audit.unreadable:,}", outcome="worse" if audit.unreadable else "none", told=told))  # fmt: skip
    for label, severity, outcome in (("Errors", "error", "worse"), ("Warnings", "warning", "open")):
        these = [one for one in audit.findings if one.severity == severity]
        told = f"The largest: {these[0].count:,} {these[0].message}." if these else "None."
        found.append(Tile(label=label, number=str(len(these)), outcome=outcome if these else "none", told=told))
    repeated = sum(one.count for one in audit.findings if one.code.startswith("duplicates_"))
    told = f"{repeated:,} rows repeat another." if repeated else "No row repeats another."
    found.append(Tile(label="Duplicates", number=share(repeated, audit.rows), outcome="none", told=told))
    if audit.tokens is not None:
        trained = (
            f"{share(audit.trained_tokens, audit.tokens)} of them train"
            if audit.trained_tokens is not None
            else "counted"
        )
        told = f"{trained}, with the tokenizer of {audit.base}."
        found.append(Tile(label="Tokens", number=f"{audit.tokens:,}", outcome="none", told=told))
    return found


def _share_of(finding: Finding, audit: Audit) -> str:
    """Of all rows; empty where that would say nothing, and of what names no rows."""
    whole = audit.rows + audit.unreadable
    return share(finding.count, whole) if finding.rows and 0 < finding.count < whole else ""


def _by_file(rows: Iterable[RowAt]) -> list[tuple[str, str]]:
    """File and row numbers, as many as are shown."""
    shown = itertools.islice(rows, MOST_ROWS)
    return [
        (file, ", ".join(f"{one.row:,}" for one in these))
        for file, these in itertools.groupby(shown, key=lambda row: row.file)
    ]


def _coded(text: str) -> Markup:
    """With `names` in backticks as code."""
    return Markup(CODE.sub(r"<code>\1</code>", str(escape(text))))


def _brief_places(audit: Audit) -> Callable[[str], str]:
    """`data/support.jsonl:7` is told as `support.jsonl:7` where no other file has that name."""
    paths = {one.path for one in audit.files} | {row.file for group in audit.groups for row in group.rows}
    names = Counter(Path(path).name for path in paths)
    return lambda place: Path(place).name if names[Path(place).name.rpartition(":")[0]] == 1 else place


def _figures_by_section(distributions: Iterable[Distribution]) -> dict[str, list[Figure]]:
    parts: dict[str, list[Distribution]] = {}
    for one in distributions:
        fitting = [name for name, (_, words) in SECTIONS.items() if any(word in one.name for word in words)]
        parts.setdefault(fitting[-1] if fitting else "others", []).append(one)
    made = {name: figures(these) for name, these in parts.items()}
    return {name: these for name, these in made.items() if these}


def _leakage(audit: Audit) -> Markup | None:
    counts = {spoken(one.code): one.count for one in audit.findings if one.code.startswith(("leakage_", "benchmark_"))}
    return counts_chart(counts, whole=audit.rows, name="leakage-chart", title="Training rows that are also elsewhere")


def _counted(shares: Mapping[str, Mapping[str, int]], *, rows: int) -> list[Counted]:
    found = []
    for number, name in enumerate(
        [*(name for name in SHARES if name in shares), *sorted(shares.keys() - SHARES.keys())]
    ):
        counts: dict[str, int] = {}
        for value, count in shares[name].items():
            counts[mask(value)] = counts.get(mask(value), 0) + count
        title = SHARES.get(name, spoken(name).capitalize())
        whole = rows if name in OF_ALL_ROWS else sum(counts.values())
        chart = counts_chart(counts, whole=whole, name=f"counts-{number}", title=title)
        if chart is None or name in TOLD_ELSEWHERE:
            continue
        ordered = ranked(counts)
        whole_in_chart = len(ordered) <= MOST_BARS and all(len(value) <= MOST_LABEL for value in counts)
        told = [] if whole_in_chart else ordered[:MOST_VALUES]
        values = [(value, count, share(count, whole)) for value, count in told]
        found.append(Counted(title=title, chart=chart, values=values, left_out=max(0, len(ordered) - MOST_VALUES)))
    return found


def _reasons(audit: Audit) -> tuple[dict[str, list[tuple[str, str]]], list[Group]]:
    """Place and reason by code, of groups that tell why a finding was made; and the groups that are to stand side by side."""
    codes = {one.code for one in audit.findings}
    reasons: dict[str, list[tuple[str, str]]] = {}
    others = []
    for group in audit.groups:
        beside = len(group.texts) > 1 and group.code.startswith(SIDE_BY_SIDE)
        if beside or group.prompt or group.code not in codes or group.code.startswith(NOT_SHOWN):
            others.append(group)
            continue
        told = reasons.setdefault(group.code, [])
        for row, why in zip(group.rows, group.texts, strict=True):
            told.append((row.place, mask(why).removeprefix(row.place).lstrip(", ")))
    return reasons, others


def _groups(groups: Iterable[Group]) -> tuple[list[tuple[str, list[Shown], int]], int]:
    """By code: those shown, how many are left out; and how many are not shown because of what they hold."""
    by_code: dict[str, list[Group]] = {}
    hidden = 0
    for group in groups:
        if group.code.startswith(NOT_SHOWN):
            hidden += 1
        else:
            by_code.setdefault(group.code, []).append(group)
    rank = {prefix: place for place, prefix in enumerate(SIDE_BY_SIDE)}
    ordered = sorted(by_code.items(), key=lambda one: rank.get(one[0].partition("_")[0], len(rank)))
    shown = [(code, [_shown(group) for group in these[:MOST_GROUPS]], max(0, len(these) - MOST_GROUPS)) for code, these in ordered]  # fmt: skip
    return shown, hidden


def _shown(group: Group) -> Shown:
    """Every text but the first has its differences from the first marked."""
    texts = []
    masked = [mask(text) for text in group.texts]
    for place, (row, text) in enumerate(zip(group.rows, masked, strict=True)):
        whole = max(len(text), len(masked[0])) <= MOST_CHARACTERS
        texts.append((row.place, marked(text, expected=masked[0]) if place and whole else text, text))
    return Shown(group=group, prompt=mask(group.prompt), texts=texts)


def _facts(audit: Audit) -> list[tuple[str, str]]:
    rows = [("digest of this audit", audit.digest), ("base", audit.base or "none: nothing was tokenized")]
    rows += [(f"digest of {one.path}", one.digest) for one in audit.files]
    told = {one.digest for one in audit.files}
    rows += [(f"digest of {kind}", digest) for kind, digest in sorted(audit.sources.items()) if digest not in told]
    rows += [(spoken(name), f"{value:,.4g}") for name, value in audit.measures.items()]
    return [*rows, ("audited in", f"{audit.seconds:,.1f} s")]
