"""What a person sees: progress bars, tables and coloured rows, by rich."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from onlay.records import Dataset, Recovery, Run
from onlay.stages import Demo, Loading, Prepared

if TYPE_CHECKING:
    from onlay.training.loop import StepReport

PLAIN_LINE_SECONDS = 10.0
"""Without a terminal, training writes one line at most this often."""


class Reporter:
    """Shows events as they come: bars in a terminal, now and then a line elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def __call__(self, event: Any) -> None:
        if isinstance(event, Recovery):
            self.console.print(f"[yellow]{event.reason}[/]: {escape(event.detail)}; {escape(event.action)}.", highlight=False)
        elif isinstance(event, Loading):
            self._bar(event.what, event.done, event.total, "")
        elif isinstance(event, str):
            self.console.print(f"[dim]{escape(event)}[/]", highlight=False)
        else:
            self._step(event)

    def _step(self, step: StepReport) -> None:
        speed = step.tokens / step.seconds
        numbers = f"loss {step.loss:.4f}  {speed:,.0f} tokens/s  {step.memory_bytes / 2**30:.1f} GiB"
        self._bar("training", step.step, step.total_steps, numbers)
        due = time.monotonic() - self._last_line > PLAIN_LINE_SECONDS or step.step in (1, step.total_steps)
        if not self.console.is_terminal and due:
            self._last_line = time.monotonic()
            self.console.print(f"step {step.step}/{step.total_steps}  {numbers}  rate {step.learning_rate:.2e}", highlight=False)

    def _bar(self, what: str, done: int, total: int, numbers: str) -> None:
        if not self.console.is_terminal:
            return
        if what != self._what:
            self._stop()
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(compact=True), console=self.console,
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
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def dataset_table(dataset: Dataset) -> Group:
    table = Table("split", "rows", "examples", "tokens", "trained", "longest", title="Prepared", title_justify="left", box=None)
    for name, split in dataset.splits.items():
        share = f"{split.trained_tokens:,} ({split.trained_tokens / max(1, split.tokens):.0%})"
        table.add_row(name, f"{split.rows:,}", f"{split.examples:,}", f"{split.tokens:,}", share, f"{split.longest_tokens:,}")
    notes = [Text(f"{f.code}: {f.message}", style="yellow") for f in dataset.findings]
    head = Text(f"{dataset.source}  format {dataset.format}  template {dataset.template}  at most {dataset.max_tokens:,} tokens")
    return Group(head, table, *notes)


def rows_coloured(console: Console, prepared: Prepared, count: int) -> None:
    from onlay.data.build import coloured

    split = prepared.split("train")
    for index in range(min(count, len(split))):
        ids, trained = split.example(index)
        console.print(f"\n[bold]{escape(str(split.place(index)))}[/]  {len(ids)} tokens, {int(trained.sum())} trained")
        console.print(coloured(prepared.template, ids, trained), soft_wrap=True)


def run_table(run: Run) -> Table:
    table = _grid(f"Run {run.path}: {run.status}")
    table.add_row("steps", f"{run.steps:,} of {run.total_steps:,} in {run.seconds:.1f} s, {run.trained_tokens:,} trained tokens")
    table.add_row("loss", f"{_number(run.first_loss)} first, {_number(run.last_loss)} over the last tenth")
    if run.evaluation_loss is not None:
        kept = f" (step {run.selected_step})" if run.selected_step is not None else ""
        table.add_row("held-out loss", f"{_number(run.base_evaluation_loss)} base, {_number(run.evaluation_loss)} kept{kept}")
    table.add_row("trainable", f"{run.trainable_parameters:,} parameters")
    if run.peak_memory_bytes:
        table.add_row("peak memory", f"{run.peak_memory_bytes / 2**30:.2f} GiB")
    for recovery in run.recoveries:
        table.add_row("recovered", escape(f"step {recovery.step}: {recovery.reason}; {recovery.action}"))
    table.add_row("proofs", escape(_proofs(run)))
    table.add_row("layout", escape(run.fast_paths.get("layout", "")))
    if run.status == "finished":
        table.add_row("adapter", f"{run.path}/adapter")
    return table


def _proofs(run: Run) -> str:
    said = []
    movement = run.proofs.get("movement", {})
    for what in ("modules", "weights"):
        if f"moved_{what}" in movement:
            said.append(f"{movement[f'moved_{what}']} {what} moved")
    if run.proofs.get("finite"):
        said.append("all values finite")
    if run.proofs.get("base_unchanged"):
        said.append("base unchanged")
    return ", ".join(said) or "none yet"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def answers_table(results: list[dict[str, str]]) -> Table:
    table = Table("prompt", *(["base"] if "base" in results[0] else []), "adapter", show_lines=True)
    for result in results:
        base = [escape(result["base"])] if "base" in result else []
        table.add_row(escape(result["prompt"]), *base, escape(result["answer"]))
    return table


def log_table(runs: list[dict[str, Any]]) -> Table:
    table = Table("run", "status", "steps", "held-out loss", "started", "digest", box=None, pad_edge=False)
    for run in runs:
        losses = f"{_number(run['base_evaluation_loss'])} -> {_number(run['evaluation_loss'])}"
        table.add_row(run["path"], run["status"], f"{run['steps']}/{run['total_steps']}", losses, run["started"], run["digest"][:12])
    return table


def record_view(console: Console, values: dict[str, Any], links: list[dict[str, str]], folder: Path) -> None:
    """A record's fields, the losses of its run as a line, and the chain behind it."""
    table = _grid(values.get("path", ""))
    for key, value in values.items():
        table.add_row(key, escape(str(value)))
    console.print(table)
    if (folder / "metrics.jsonl").is_file():
        console.print(loss_curve(folder / "metrics.jsonl", width=min(console.width - 12, 100)))
    chain = Table("made from", "digest", "at", box=None, pad_edge=False, title="Chain", title_justify="left")
    for link in links:
        chain.add_row(link["kind"], link["digest"][:12], link["path"])
    console.print(chain)


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
    table = Table("", "base", "adapter", title=f"On {demo.rows} held-out rows", title_justify="left", title_style="bold")
    for name, label in (("exact_match", "exact match"), ("valid_json", "valid JSON")):
        table.add_row(label, _percent(demo.base[name]), _percent(demo.adapter[name]))
    table.add_row("held-out loss", _number(demo.base["evaluation_loss"]), _number(demo.adapter["evaluation_loss"]))
    console.print(table)
    answers = Table("prompt", "base", "adapter", show_lines=True)
    for example in demo.examples:
        answers.add_row(*(escape(example[key]) for key in ("prompt", "base", "adapter")))
    console.print(answers)
    console.print(f"Trained in {demo.train_seconds:.0f} s. Next: onlay chat {demo.run} --compare", highlight=False, soft_wrap=True)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
