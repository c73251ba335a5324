"""What a person sees: progress bars, tables and coloured rows, by rich."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from onlay.doctor import Check
from onlay.records import Dataset, Merge, Recovery, Run
from onlay.stages import Demo, Loading, Prepared

if TYPE_CHECKING:
    from onlay.training.loop import StepReport

PLAIN_LINE_SECONDS = 10.0
"""Without a terminal, training writes one line at most this often."""
BAR_WIDTH = 12
"""Leaves room for loss, tokens/s, memory and time left in 80 columns."""
MOST_SHOWN = 12
"""A mapping with more entries than this is counted, not listed."""


class Reporter:
    """Shows events as they come: bars in a terminal, now and then a line elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._last_line = time.monotonic()
        self._speed: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def __call__(self, event: Any) -> None:
        if isinstance(event, Recovery):
            self._say(f"{event.reason}: {event.detail}; {event.action}.", style="yellow")
        elif isinstance(event, Loading):
            self._bar(event.what, event.done, event.total, "")
        elif isinstance(event, str):
            self._say(event, style="dim")
        else:
            self._step(event)

    def _say(self, text: str, *, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=not self.console.is_terminal)

    def _step(self, step: StepReport) -> None:
        now = step.tokens / step.seconds
        # Steps differ in length: the mean over about the last ten says more than the last.
        self._speed = now if self._speed is None else 0.9 * self._speed + 0.1 * now
        numbers = f"loss {step.loss:.4f}  {self._speed:,.0f} tokens/s  {step.memory_bytes / 2**30:.1f} GiB"
        self._bar("training", step.step, step.total_steps, numbers)
        due = time.monotonic() - self._last_line > PLAIN_LINE_SECONDS or step.step in (1, step.total_steps)
        if not self.console.is_terminal and due:
            self._last_line = time.monotonic()
            self._say(f"step {step.step}/{step.total_steps}  {numbers}  rate {step.learning_rate:.2e}")

    def _bar(self, what: str, done: int, total: int, numbers: str) -> None:
        if not self.console.is_terminal:
            return
        if what != self._what:
            self._stop()
            line = Column(no_wrap=True, overflow="ellipsis")
            self._progress = Progress(
                TextColumn("{task.description}", table_column=line), BarColumn(BAR_WIDTH), MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}", table_column=line), TimeRemainingColumn(compact=True),
                console=self.console,
            )  # fmt: skip
            self._progress.start()
            self._task, self._what = self._progress.add_task(what, total=total, numbers=numbers), what
        assert self._progress is not None and self._task is not None
        self._progress.update(self._task, completed=done, total=total, numbers=numbers)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._task, self._what = None, None, ""


def _grid(title: str) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _list(*columns: str, numbers: Sequence[str] = (), title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def doctor_view(console: Console, checks: Sequence[Check]) -> None:
    table = _list("", "what", "found")
    for check in checks:
        found = Text(check.found)
        if check.remedy:
            found.append(f"\n{check.remedy}", style="dim" if check.ok else "yellow")
        table.add_row(Text("ok", "green") if check.ok else Text("no", "red"), Text(check.name), found)
    console.print(table)


def dataset_table(dataset: Dataset) -> Group:
    head = Text(
        f"{dataset.source}: format {dataset.format}, template {dataset.template}, at most {dataset.max_tokens:,} tokens\n"
    )
    if dataset.labels:
        more = f" and {len(dataset.labels) - MOST_SHOWN} more" if len(dataset.labels) > MOST_SHOWN else ""
        head.append(f"{len(dataset.labels)} labels: {', '.join(dataset.labels[:MOST_SHOWN])}{more}\n")
    names = ("rows", "examples", "tokens", "trained", "longest")
    table = _list("split", *names, numbers=names)
    for name, split in dataset.splits.items():
        share = f"{split.trained_tokens:,} ({split.trained_tokens / max(1, split.tokens):.0%})"
        counts = (f"{split.rows:,}", f"{split.examples:,}", f"{split.tokens:,}", share, f"{split.longest_tokens:,}")
        table.add_row(name, *counts)
    return Group(head, table, *_findings(dataset))


def _findings(dataset: Dataset) -> list[Text]:
    notes = []
    for finding in dataset.findings:
        more = ", ..." if finding.count > len(finding.rows) else ""
        where = f" ({', '.join(row.place for row in finding.rows)}{more})" if finding.rows else ""
        notes.append(Text(f"{finding.count:,} {finding.message}{where}", style="yellow"))
    return [Text(""), *notes] if notes else []


def rows_coloured(console: Console, prepared: Prepared, count: int) -> None:
    from onlay.data.split import coloured

    split = prepared.split("train")
    for index in range(min(count, len(split))):
        ids, trained = split.example(index)
        console.print(f"\n[bold]{escape(str(split.place(index)))}[/]  {len(ids)} tokens, {int(trained.sum())} trained")
        console.print(coloured(prepared.template, ids, trained), soft_wrap=True)


def run_table(run: Run) -> Table:
    table = _grid(f"Run {run.path}: {run.status}")
    for name, value in _summary(run):
        table.add_row(name, Text(value))
    return table


def _summary(run: Run) -> Iterator[tuple[str, str]]:
    yield "steps", f"{run.steps:,} of {run.total_steps:,} in {run.seconds:.1f} s, {run.trained_tokens:,} trained tokens"
    yield "loss", f"{_number(run.first_loss)} at the first step, {_number(run.last_loss)} over the last tenth"
    if run.evaluation_loss is not None:
        kept = f" (step {run.selected_step})" if run.selected_step is not None else ""
        yield "held-out loss", f"{_number(run.base_evaluation_loss)} before, {_number(run.evaluation_loss)} after{kept}"
    if run.scores:
        scores = {name: _percent(run.scores[name]) for name in ("accuracy", "majority_accuracy", "macro_f1")}
        always = f"{scores['majority_accuracy']} by always saying the most frequent label"
        yield "accuracy", f"{scores['accuracy']} of {run.scores['rows']:,.0f} held-out rows; {always}"
        yield "macro F1", scores["macro_f1"]
    yield "trainable", f"{run.trainable_parameters:,} parameters"
    if run.peak_memory_bytes:
        yield "peak memory", f"{run.peak_memory_bytes / 2**30:.2f} GiB"
    for recovery in run.recoveries:
        yield "recovered", f"step {recovery.step}: {recovery.reason}; {recovery.action}"
    if run.error:
        yield "error", run.error
    yield "proofs", _proofs(run)
    yield "layout", run.fast_paths.get("layout", "")
    for name in ("left_out", "stopped_early"):
        if name in run.fast_paths:
            yield name.replace("_", " "), run.fast_paths[name]
    if run.status == "finished":
        kind = {"full": "model", "head": "head"}.get(run.method, "adapter")
        yield kind, f"{run.path}/{kind}"


def _proofs(run: Run) -> str:
    said = []
    movement = run.proofs.get("movement", {})
    for what in ("modules", "weights"):
        if f"moved_{what}" in movement:
            count = movement[f"moved_{what}"]
            said.append(f"{count} {what if count != 1 else what.removesuffix('s')} moved")
    if run.proofs.get("finite"):
        said.append("all values finite")
    if run.proofs.get("base_unchanged"):
        said.append("base unchanged")
    return ", ".join(said) or "none yet"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def merge_table(merge: Merge) -> Group:
    """A merged model's proof, one column for each choice of weights that was measured."""
    checks = merge.candidates or {merge.into: merge.verification}
    columns = [f"into {name}" for name in checks]
    table = _list("", *columns, numbers=columns)
    rows = [check.told() for check in checks.values()]
    for label in rows[0]:
        table.add_row(label, *(Text(row[label]) for row in rows))
    return Group(Text(f"{merge.path}: merged into the {merge.into} weights of {merge.base}", style="bold"), table)


def answers_table(results: Sequence[dict[str, Any]]) -> Table:
    """One row a prompt: {"prompt", "answer"}, and "base" between them when comparing.  Nothing is cut off."""
    compared = "base" in results[0]
    names = ["prompt", "base", "answer"] if compared else ["prompt", "answer"]
    table = Table(show_lines=True)
    for name in names:
        table.add_column("adapter" if name == "answer" and compared else name, overflow="fold")
    for result in results:
        table.add_row(*(Text(result[name]) for name in names))
    return table


def log_table(runs: list[dict[str, Any]]) -> Table:
    table = _list("run", "status", "steps", "held-out loss", "started (UTC)", numbers=("steps",))
    for run in runs:
        losses = [run["base_evaluation_loss"], run["evaluation_loss"]]
        change = " -> ".join(f"{loss:.3f}" for loss in losses) if None not in losses else "-"
        steps = f"{run['steps']}/{run['total_steps']}"
        table.add_row(Text(run["path"]), run["status"], steps, change, run["started"][5:16].replace("T", " "))
    return table


def record_view(console: Console, values: dict[str, Any], links: list[dict[str, str]], folder: Path) -> None:
    """A record's fields, the losses of its run as a line, and the chain behind it."""
    table = _grid(values.get("path", ""))
    for key, value in _fields(values):
        table.add_row(key, Text(value))
    console.print(table)
    if (folder / "metrics.jsonl").is_file():
        console.print(loss_curve(folder / "metrics.jsonl", width=min(console.width - 24, 100)))
    if links:
        chain = _list("made from", "digest", "at", title="Chain")
        for link in links:
            chain.add_row(link["kind"], link["digest"][:12], Text(link["path"]))
        console.print("", chain)


def _fields(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields that hold something, nested ones as `outer.inner`; the chain shows the sources."""
    for key, value in values.items():
        if key in ("sources", "path") or value is None or value in ([], {}):
            continue
        if isinstance(value, dict) and len(value) <= MOST_SHOWN:
            for inner, item in _fields(value):
                yield f"{key}.{inner}", item
        elif isinstance(value, dict):
            yield key, f"{len(value):,} entries, such as {_short(dict([next(iter(value.items()))]))}"
        elif isinstance(value, list) and isinstance(value[0], dict):
            for number, item in enumerate(value):
                said = ", ".join(f"{name} {_short(inner)}" for name, inner in item.items() if inner not in (None, []))
                yield key if not number else "", said
        else:
            yield key, _short(value)


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_short(item) for item in value)
    return str(value)


def loss_curve(path: Path, *, width: int) -> Text:
    """Training loss over the steps as one line of blocks."""
    from onlay.training.metrics_log import read_metrics

    losses = [event["loss"] for event in read_metrics(path) if event["event"] == "step"]
    if not losses:
        return Text("no step yet")
    size = max(1, -(-len(losses) // width))
    means = [sum(losses[i : i + size]) / len(losses[i : i + size]) for i in range(0, len(losses), size)]
    low, high = min(means), max(means)
    blocks = "▁▂▃▄▅▆▇█"
    line = "".join(blocks[round((mean - low) / max(high - low, 1e-12) * 7)] for mean in means)
    return Text(f"loss {high:.2f} {line} {means[-1]:.2f}")


def demo_view(console: Console, demo: Demo) -> None:
    scores = _list("", "base", "adapter", numbers=("base", "adapter"), title=f"On {demo.rows} held-out rows")
    for name, label in (("exact_match", "exact match"), ("valid_json", "valid JSON")):
        scores.add_row(label, _percent(demo.base[name]), _percent(demo.adapter[name]))
    scores.add_row("held-out loss", _number(demo.base["evaluation_loss"]), _number(demo.adapter["evaluation_loss"]))
    answers = answers_table([example | {"answer": example["adapter"]} for example in demo.examples])
    console.print(scores, "", answers, f"Trained in {demo.train_seconds:.0f} s.", sep="\n", highlight=False)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
