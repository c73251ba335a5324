"""`merge`: a run's adapter inlaid in its base, with proof."""

from __future__ import annotations

from pathlib import Path

from onlay import ledger
from onlay.errors import OutputError
from onlay.model.stack import import_stack
from onlay.recipe import Recipe, read_recipe
from onlay.records import Dataset, Merge, Run
from onlay.stages.answering import trained_storage
from onlay.stages.events import Loading, Report, silent


def merge(
    run: str | Path,
    out: str | Path,
    *,
    into: str = "auto",
    max_difference: float | None = None,
    rows: int = 32,
    report: Report = silent,
) -> Merge:
    """Merges a finished run's adapter into its base and proves the result; `out` is then a plain transformers model.

    `into`, for a run on a quantized base: `original` weights, `quantized` ones as trained against, or `auto`, the nearer.
    `rows` are compared; `max_difference` takes the place of the derived limit and bounds the largest logit difference.
    Raises OnlayError; ProofError when the result is not what base and adapter are: it is then kept under another name.
    """
    folder = _run_folder(Path(run))
    done = Run.load(folder)
    recipe = read_recipe(folder / "recipe.yaml")
    _check_mergeable(folder, done, recipe, out=Path(out), into=into, rows=rows)

    import_stack()
    from onlay.data.split import open_split
    from onlay.hardware import find_hardware
    from onlay.model.facts import read_facts
    from onlay.release.merge import Job, merge_adapter, rejection

    dataset = Dataset.load(folder)
    split = "evaluation" if "evaluation" in dataset.splits else "train"
    facts = read_facts(recipe.model, progress=lambda so_far, total: report(Loading("fetching the base", so_far, total)))
    job = Job(
        run=done, recipe=recipe, facts=facts, dataset=dataset, adapter=folder / "adapter", out=Path(out), into=into,
        storage=trained_storage(folder / "adapter", recipe.model), examples=open_split(dataset, split), split=split, rows=rows,
        max_difference=max_difference, hardware=find_hardware(),
        report=lambda what, so_far, total: report(Loading(what, so_far, total)),
    )  # fmt: skip
    merged = merge_adapter(job)
    ledger.append(merged, merged.path)
    if merged.status != "merged":
        raise rejection(merged)
    return merged


def _run_folder(given: Path) -> Path:
    """The run folder, where its adapter/ was named."""
    return given.parent if given.name == "adapter" and not (given / "run.json").is_file() else given


def _check_mergeable(folder: Path, run: Run, recipe: Recipe, *, out: Path, into: str, rows: int) -> None:
    if out.exists():
        raise OutputError(f"{out} exists already.", "Choose another OUT, or move it away.")
    if recipe.adapter.artefact != "adapter":
        why = {"model": "there is no adapter: model/ is the whole model", "head": "a classification head is no update"}
        raise OutputError(
            f"{folder} was trained with method {recipe.adapter.method}: {why[recipe.adapter.artefact]}.",
            f"Use {folder / recipe.adapter.artefact} as it is.",
        )
    if run.status != "finished" or not (folder / "adapter").is_dir():
        raise OutputError(f"{folder} is {run.status}: it has no adapter yet.", f"onlay train --resume {folder}")
    if into not in ("auto", "original", "quantized"):
        raise OutputError(f"--into {into} is none of auto, original, quantized.", "Leave it out for auto.")
    if rows < 1:
        raise OutputError(f"--rows {rows} compares nothing.", "Give at least 1.")
