"""Writes the tables and the plot of docs/performance.md from the rows in bench/results.

    python docs/performance.py            # exit code 1 when page or plot are not what the rows say
    python docs/performance.py --write

A page holds `<!-- measured: NAME -->` and `<!-- end -->`; what stands between is made here.  Of a configuration that was measured
several times the latest row counts.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from onlay.pages.drawing import MARKS, Drawing, Scale, ticks

DOCS = Path(__file__).parent
BENCH = DOCS.parent / "bench"
sys.path.insert(0, str(BENCH))

from budget import BUDGETS_GIB, best_within, told_settings  # type: ignore[import-not-found, unused-ignore]  # noqa: E402
from throughput import disagreements  # type: ignore[import-not-found, unused-ignore]  # noqa: E402

sys.path.remove(str(BENCH))

PAGE, PLOT = DOCS / "performance.md", DOCS / "performance.svg"
BLOCK = re.compile(r"<!-- measured: (\w+) -->\n.*?<!-- end -->", re.S)
NOTHING = "Not measured yet."
LONG_TOKENS = 3000
"""A row of bench/memory.py with so many tokens says something about long contexts."""
Row = dict[str, Any]
STYLE = """
svg { background: #ffffff; font: 12px system-ui, sans-serif; fill: #1c2733 }
.muted { fill: #5d6b7a } .grid { stroke: #dde3ea } .curve { fill: none; stroke-width: 2 }
.onlay { stroke: #0b6bcb } .unsloth { stroke: #2f8f4e } .liger { stroke: #b4630c } .axolotl { stroke: #8a4fb0 } .trl { stroke: #8a949e }
.onlay .mark { fill: #0b6bcb } .unsloth .mark { fill: #2f8f4e } .liger .mark { fill: #b4630c } .axolotl .mark { fill: #8a4fb0 }
.trl .mark { fill: #8a949e } text { stroke: none }
"""


def rows_of(name: str) -> list[Row]:
    """A file in bench/results; empty where it was not measured."""
    path = BENCH / "results" / name
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def latest(rows: Sequence[Row]) -> list[Row]:
    """One row for each configuration of each system, in the order in which they were first measured."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        settings = json.loads(row["settings"])
        work = {key: value for key, value in settings.items() if key not in ("steps", "warmup")}
        found[row["case"], row["system"], json.dumps(work)] = row
    return list(found.values())


def throughput_table(rows: Sequence[Row]) -> str:
    """Grouped by the work, the fastest first; the ratio is to the best peer of the same run."""
    if not rows:
        return NOTHING
    lines = [
        "| work | system | settings | tokens/s | to the best peer | peak GiB | of the ceiling | first loss |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    chosen = latest(rows)
    for case in dict.fromkeys(row["case"] for row in chosen):
        group = [row for row in chosen if row["case"] == case]
        for row in sorted(group, key=lambda row: -float(row["tokens_per_second"] or 0)):
            lines.append(f"| {case} | {row['system']} | {told_settings(row)} | {_numbers(row, group)} |")
    return "\n".join(lines)


def _numbers(row: Row, group: Sequence[Row]) -> str:
    if row["error"]:
        return f"failed | | | | {row['error'].replace('|', '/')}"
    peers = [
        float(other["tokens_per_second"]) for other in group
        if other["system"] != "onlay" and other["run"] == row["run"] and not other["error"]
    ]  # fmt: skip
    ratio = f"{float(row['tokens_per_second']) / max(peers):.2f}" if peers and row["system"] == "onlay" else ""
    share = f"{float(row['share_of_ceiling']):.0%}" if row["share_of_ceiling"] else ""
    rate, peak = int(float(row["tokens_per_second"])), float(row["peak_gib"])
    return f"{rate:,} | {ratio} | {peak:.1f} | {share} | {float(row['first_loss']):.4f}"


def losses_text(rows: Sequence[Row]) -> str:
    if not rows:
        return NOTHING
    found = disagreements(latest(rows))
    return "\n".join(["They do not:", "", *(f"- {line}" for line in found)]) if found else "They do."


def context_table(rows: Sequence[Row]) -> str:
    long = [row for row in rows if row["tokens_a_row"].isdigit() and int(row["tokens_a_row"]) >= LONG_TOKENS]
    if not long:
        return NOTHING
    lines = ["| base | rank | tokens in one row | settings | peak GiB | tokens/s |", "|---|---:|---:|---|---:|---:|"]
    for row in long:
        settings = f"recompute {row['recompute']}{', offloaded' if row['offload'] == 'True' else ''}, {row['optimizer']}, {row['precision']} adapter"
        lines.append(
            f"| {row['shape']} {row['storage']} | {row['rank']} | {int(row['tokens_a_row']):,} | {settings} | "
            f"{float(row['peak_gib']):.1f} | {int(row['tokens_per_second']):,} |"
        )
    return "\n".join(lines)


def budget_table(rows: Sequence[Row]) -> str:
    best = best_within(rows)
    if not best:
        return NOTHING
    lines = [f"| GiB | {' | '.join(best)} |", f"|---:|{'---|' * len(best)}"]
    for budget in BUDGETS_GIB:
        cells = []
        for system in best:
            row = best[system][budget]
            cells.append("none measured that fits" if row is None else f"**{int(float(row['tokens_per_second'])):,}**: {told_settings(row)}")  # fmt: skip
        lines.append(f"| {budget} | {' | '.join(cells)} |")
    return "\n".join(lines)


def runs_text(rows: Sequence[Row]) -> str:
    """Device and versions of each run."""
    if not rows:
        return NOTHING
    lines = []
    for run in dict.fromkeys(row["run"] for row in rows):
        of_run = [row for row in rows if row["run"] == run]
        packages: dict[str, str] = {}
        for row in of_run:
            packages |= {k: v for k, v in json.loads(row["versions"]).items() if v != "not installed"}
        device = next((row["device"] for row in of_run if row["device"]), "unknown device")
        told = ", ".join(f"{name} {number}" for name, number in packages.items())
        lines.append(f"- {run} UTC, {device}, commit {of_run[0]['commit']}: {len(of_run)} rows; {told}.")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- plot


def plot(rows: Sequence[Row]) -> str:
    """Tokens a second over GiB of memory, each system's best within each budget."""
    best = best_within(rows)
    drawing = Drawing(name="budget", height=380)
    drawing.parts.append(Markup("<style>{}</style>").format(Markup(STYLE)))
    left, right, top, bottom = 64, drawing.width - 110, 28, 320
    if not best:
        drawing.text(left, top, NOTHING, style="muted")
        return str(drawing.svg("Tokens a second within a memory budget", NOTHING)) + "\n"
    most = max(float(row["tokens_per_second"]) for of in best.values() for row in of.values() if row is not None)
    x = Scale(low=math.log2(BUDGETS_GIB[0]), high=math.log2(BUDGETS_GIB[-1]), start=left, end=right)
    y = Scale(low=0.0, high=1.05 * most, start=bottom, end=top)
    for value in ticks(y.low, y.high):
        drawing.line(left, y(value), right, y(value), style="grid")
        drawing.text(left - 8, y(value) + 4, f"{value:,.0f}", style="muted", anchor="end")
    for budget in BUDGETS_GIB:
        drawing.text(x(math.log2(budget)), bottom + 18, str(budget), style="muted", anchor="middle")
    drawing.text((left + right) / 2, bottom + 42, "GiB of GPU memory", style="muted", anchor="middle")
    drawing.text(left, top - 12, "tokens a second, 8B, rank 16 on all linear layers", style="muted")
    shapes = itertools.cycle(MARKS)
    for system, of in best.items():
        _curve(drawing, system, of, x=x, y=y, shape=next(shapes))
    told = "For each memory budget the fastest setting of each system that fits it."
    return str(drawing.svg("Tokens a second within a memory budget", told)) + "\n"


def _curve(drawing: Drawing, system: str, best: dict[int, Row | None], *, x: Scale, y: Scale, shape: str) -> None:
    style = system.removeprefix("trl+")
    points = []
    for budget, row in best.items():
        if row is None:
            continue
        rate = float(row["tokens_per_second"])
        points.append((x(math.log2(budget)), y(rate)))
        told = f"{system}, {budget} GiB: {rate:,.0f} tokens/s ({told_settings(row)})"
        drawing.mark(*points[-1], shape=shape, style=style, told=told)
    if points:
        drawing.path(points, style=f"curve {style}")
        drawing.text(points[-1][0] + 12, points[-1][1] + 4, system)


# ---------------------------------------------------------------------------------------------------------------- page


def blocks() -> dict[str, Callable[[], str]]:
    throughput, budget = rows_of("throughput.csv"), rows_of("budget.csv")
    return {
        "throughput": lambda: throughput_table(throughput),
        "losses": lambda: losses_text(throughput + budget),
        "budget": lambda: budget_table(throughput + budget),
        "context": lambda: context_table(rows_of("memory.csv")),
        "runs": lambda: runs_text(throughput + budget),
    }


def filled(text: str) -> str:
    """The page with its blocks made anew."""
    made = blocks()
    return BLOCK.sub(lambda match: f"<!-- measured: {match[1]} -->\n{made[match[1]]()}\n<!-- end -->", text)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    wanted = {PAGE: filled(text), PLOT: plot(rows_of("throughput.csv") + rows_of("budget.csv"))}
    stale = [path for path, made in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != made]
    write = "--write" in sys.argv[1:]
    for path in stale:
        if write:
            path.write_text(wanted[path], encoding="utf-8")
        print(
            f"{path.name}: {'written' if write else 'not what bench/results says; python docs/performance.py --write'}"
        )
    sys.exit(1 if stale and not write else 0)


if __name__ == "__main__":
    main()
