"""A plan in a terminal, and its memory as a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onlay.records import Plan, PlannedRung

if TYPE_CHECKING:
    from onlay.planning.table import Row
    from onlay.stages import Compared

SIGNS = {"chosen": ("✓", "green"), "slower": ("·", ""), "does not fit": ("✗", "red"), "not unasked": ("?", "yellow")}
"""A sign beside the colour, so that nothing is told by colour alone."""
MOST_RUNGS = 8
NAMED = {"full": "full tuning", "lora": "LoRA", "qlora": "QLoRA"}
DRAWING_WIDTH, LABEL_WIDTH, BAR_HEIGHT = 760, 200, 26
COLOURS = {
    "base": "#4b5c70", "adapter": "#8a4fb0", "gradients": "#b4630c", "optimizer": "#c9a227", "activations": "#0b6bcb",
    "loss": "#2f8f4e", "working memory": "#7fa8d6",
}  # fmt: skip
STYLE = "svg { background: #ffffff; font: 12px system-ui, sans-serif; fill: #1c2733 } .muted { fill: #5d6b7a } .grid { stroke: #c3ccd6 } .limit { stroke: #b3261e; stroke-width: 2 }"


def plan_view(console: Console, plan: Plan) -> None:
    from onlay.planning.forecast import summary_lines

    first, *rest = summary_lines(plan)
    console.print(Text(first, "bold"))
    for line in rest:
        console.print(Text(line, "yellow" if line == plan.refused else ""))
    console.print()
    console.print(_rungs(plan.rungs))
    hidden = len(plan.rungs) - MOST_RUNGS
    if hidden > 0:
        console.print(Text(f"and {hidden} more, all of them with --json", "dim"))
    for note in [*plan.notes, *plan.cost.notes]:
        console.print(Text(f"· {note}", "dim"))


def _rungs(rungs: Sequence[PlannedRung]) -> Table:
    table = _table("", "tried", "GiB", "tokens/s", "why", right=("GiB", "tokens/s"))
    for rung in shown_rungs(rungs):
        sign, style = SIGNS[rung.verdict]
        rate = "" if rung.tokens_per_second is None else f"{rung.tokens_per_second:,.0f}"
        table.add_row(
            Text(sign, style), Text(rung.setting), f"{rung.needed_bytes / 2**30:.1f}", rate, Text(rung.reason)
        )
    return table


def shown_rungs(rungs: Sequence[PlannedRung]) -> list[PlannedRung]:
    """At most MOST_RUNGS: what fits, the fastest first, and of what does not at least as many."""
    fitting = [rung for rung in rungs if rung.verdict in ("chosen", "slower")]
    others = [rung for rung in rungs if rung.verdict not in ("chosen", "slower")]
    few = fitting[: max(MOST_RUNGS // 2, MOST_RUNGS - len(others))]
    return [*few, *others[: MOST_RUNGS - len(few)]]


def compared_view(console: Console, key: str, rows: Sequence[Compared]) -> None:
    """One row a value; the cheapest and the fastest are named below."""
    from onlay.planning.forecast import tell_seconds, tell_usd

    table = _table(
        key,
        "trainable",
        "GiB",
        "tokens/s",
        "time",
        "USD",
        "settings",
        right=("trainable", "GiB", "tokens/s", "time", "USD"),
    )
    for row in rows:
        if row.plan is None:
            table.add_row(Text(row.value), "", "", "", "", "", Text(str(row.problem), "red"))
            continue
        plan = row.plan
        settings = plan.settings
        again = sum(level != "none" for level in settings.levels)
        said = f"{settings.storage}, {settings.micro_batch_tokens:,} tokens a pass"
        said += f", {again} of {len(settings.levels)} layers recomputed" if again else ""
        table.add_row(
            Text(row.value), f"{plan.parameters.trainable:,}", f"{plan.memory.needed_bytes / 2**30:.1f}",
            f"{plan.time.tokens_per_second:,.0f}", tell_seconds(plan.time.seconds) + ("" if plan.time.verified else " ~"),
            "-" if plan.cost.usd is None else tell_usd(plan.cost.usd).removesuffix(" USD"), Text(said),
        )  # fmt: skip
    console.print(table)
    plans = [row for row in rows if row.plan is not None]
    priced = [(row.plan.cost.usd, row.value) for row in plans if row.plan is not None and row.plan.cost.usd is not None]
    timed = [(row.plan.time.seconds, row.value) for row in plans if row.plan is not None]
    cheapest = f"cheapest: {min(priced)[1]} ({tell_usd(min(priced)[0])}); " if priced else ""
    if timed:
        console.print(Text(f"{cheapest}fastest: {min(timed)[1]} ({tell_seconds(min(timed)[0])})", "bold"))
    if any(row.plan is not None and not row.plan.time.verified for row in rows):
        console.print(Text("~ unverified: the speed of this kind of GPU was not measured", "dim"))


def table_view(console: Console, rows: Sequence[Row]) -> None:
    from onlay.planning.table import ASSUMPTIONS

    table = _table("base", "method", "trainable", "GiB", "smallest GPU", right=("trainable", "GiB"))
    for row in rows:
        table.add_row(
            row.base, NAMED[row.method], f"{row.trainable:,}", f"{row.needed_bytes / 2**30:.1f}",
            row.gpu or "more than one GPU has",
        )  # fmt: skip
    console.print(table)
    for line in ASSUMPTIONS:
        console.print(Text(f"· {line}", "dim"))


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(
            column, justify="right" if column in right else "left", no_wrap=column in right, overflow="fold"
        )
    return table


def plan_drawing(plan: Plan) -> str:
    """An SVG: the plan's memory by component as one bar, each rung's as another, and the GPU's as a line."""
    from markupsafe import Markup

    from onlay.pages.drawing import Drawing, Scale, axis
    from onlay.planning.forecast import parts_of

    rungs = shown_rungs(plan.rungs)
    drawing = Drawing(name="plan", width=DRAWING_WIDTH, height=88 + BAR_HEIGHT * (len(rungs) + 2))
    most = max(plan.memory.device_bytes, *(rung.needed_bytes for rung in rungs)) / 2**30
    scale = Scale(low=0.0, high=1.05 * most, start=LABEL_WIDTH, end=DRAWING_WIDTH - 16)
    bottom = 40 + BAR_HEIGHT * (len(rungs) + 1)
    axis(drawing, scale, top=34, bottom=bottom)
    drawing.text(LABEL_WIDTH, 16, f"{plan.base} on {plan.gpu}: GiB")

    def bar(y: float, start: float, end: float, colour: str, told: str) -> None:
        form = '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}" fill="{}"><title>{}</title></rect>'
        drawing.parts.append(
            Markup(form).format(scale(start), y, scale(end) - scale(start), BAR_HEIGHT - 8, colour, told)
        )

    start, y = 0.0, 36.0
    drawing.text(8, y + 14, "the plan, by component")
    for name, value in parts_of(plan.memory).items():
        bar(y, start, start + value / 2**30, COLOURS[name], f"{name}: {value / 2**30:.2f} GiB")
        start += value / 2**30
    for number, rung in enumerate(rungs, 1):
        y = 36.0 + BAR_HEIGHT * number
        drawing.text(8, y + 14, rung.setting, most=LABEL_WIDTH - 16)
        colour = {"chosen": "#0b6bcb", "does not fit": "#c98b86"}.get(rung.verdict, "#9fb2c6")
        bar(
            y,
            0.0,
            rung.needed_bytes / 2**30,
            colour,
            f"{rung.setting}: {rung.needed_bytes / 2**30:.1f} GiB, {rung.verdict}",
        )
    limit = scale(plan.memory.device_bytes / 2**30)
    drawing.line(limit, 30, limit, bottom, style="limit")
    x = 8.0
    for name, colour in COLOURS.items():
        drawing.parts.append(
            Markup('<rect x="{:.1f}" y="{:.1f}" width="10" height="10" fill="{}"/>').format(x, bottom + 28, colour)
        )
        drawing.text(x + 14, bottom + 37, name, style="muted")
        x += 30 + 6.7 * len(name)
    drawing.parts.insert(0, Markup("<style>{}</style>").format(Markup(STYLE)))
    return f"{drawing.svg('Memory of a plan', f'{plan.base} on {plan.gpu}; the red line is what the GPU has')}\n"
