"""`train`: from a recipe to a proven adapter, or on from where a run was interrupted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from onlay import ledger
from onlay.errors import OnlayError, OutputError, RecipeError
from onlay.model.stack import import_stack
from onlay.recipe import LoftqAdapter, PissaAdapter, Recipe, read_recipe
from onlay.records import Dataset, ModelFacts, Plan, Run, write_whole
from onlay.stages.events import Report, rank, silent, while_loading
from onlay.stages.following import follow_plan, follow_steps, plan_run, with_forecast
from onlay.stages.preparing import Prepared, Source, as_recipe, check_device, look, prepare_source

if TYPE_CHECKING:
    import torch

    from onlay.hardware import Hardware
    from onlay.model.initialize import LoftqFactors
    from onlay.training.devices import Devices

LEAST_FREE = 0.9
"""Share of a GPU's memory that must be free for a plan, which goes by all of it."""


def train(
    recipe: str | Path | Recipe | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: str | Path | None = None,
    report: Report = silent,
) -> Run:
    """Trains the adapter that a recipe describes, or goes on with an interrupted run folder.  Raises OnlayError."""
    if (recipe is None) == (resume is None):
        raise RecipeError("train needs a recipe or --resume RUN, one of the two.", "onlay train support.yaml")
    if resume is not None:
        return _resume(Path(resume), overrides, report)
    assert recipe is not None
    name = Path(recipe).stem if not isinstance(recipe, Recipe) else "run"
    parsed = as_recipe(recipe, overrides)
    folder = Path(parsed.training.output or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
    if rank() == 0:
        _check_free(folder)
    check_device(parsed)
    return _train(look(parsed, report=report), folder, resume=False, report=report)


def _resume(folder: Path, overrides: Sequence[str], report: Report) -> Run:
    if overrides:
        raise RecipeError("--set does not go with --resume: a run keeps its recipe.", "Start a new run to change it.")
    run = Run.load(folder)
    if run.status == "finished":
        raise OutputError(f"{folder} is finished.", f"onlay generate {folder} --prompt '...', or train anew for more.")
    recipe = read_recipe(folder / "recipe.yaml")
    if recipe.model.storage == "auto":
        # As it was decided when the run began, whatever this machine would choose.
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"storage": run.storage})})
    check_device(recipe)
    source = look(recipe, report=report)
    trained_on = ModelFacts.load(folder)
    if source.facts.weight_fingerprint != trained_on.weight_fingerprint:
        raise OutputError(
            f"{folder} was begun on other weights of {trained_on.name} than {source.facts.path} holds now.",
            "Put the base back as it was, or start a new run.",
        )
    return _train(source, folder, resume=True, report=report)


def _check_free(folder: Path) -> None:
    # A run killed while it began has these files and no run.json yet: there is nothing in it to keep.
    began = {"recipe.yaml", "model.json", "dataset.json", "plan.json"}
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - began):
        unfinished = (folder / "run.json").is_file() and Run.load(folder).status != "finished"
        remedy = (
            f"Go on with it: onlay train --resume {folder}"
            if unfinished
            else "Choose another training.output, or move it away."
        )
        raise OutputError(f"training.output = {folder} exists already.", remedy)


def _train(source: Source, folder: Path, *, resume: bool, report: Report) -> Run:
    import_stack()
    from onlay.data.pack import collate, plan_micro_batches
    from onlay.evaluation.scores import label_scores
    from onlay.hardware import find_hardware
    from onlay.model.facts import Digesting
    from onlay.model.load import load_base
    from onlay.model.tokenizer import pad_token_id
    from onlay.training.devices import find_devices
    from onlay.training.session import Parts, train_adapter

    recipe, facts = source.recipe, source.facts
    devices = find_devices(trackers=recipe.training.trackers, folder=folder)
    folder = Path(devices.agree(str(folder)))
    report = report if devices.is_main else silent
    with devices.accelerator.main_process_first():
        prepared = prepare_source(source, report=report)
    if resume and Dataset.load(folder).digest != prepared.dataset.digest:
        raise OutputError(
            f"The rows of {recipe.data.train_told} are no longer those that {folder} was begun with.",
            "Put the file back, or start a new run.",
        )
    _tell_smallest_difference(prepared, report)
    hardware = find_hardware()
    made = Plan.load(folder) if resume and (folder / "plan.json").is_file() else None
    if not resume:
        made = _plan(prepared, hardware, devices, report)
        recipe = recipe if made is None else follow_plan(recipe, made)
    watch = None
    if made is not None:
        report, watch = follow_steps(report, made)
    digesting = Digesting(facts, ledger.home()) if devices.is_main else None
    report(f"loading {facts.name}")
    loftq = _loftq_factors(recipe, folder, resume=resume)
    base = load_base(
        facts, recipe.model, hardware, device=devices.device, seed=recipe.training.seed,
        trains_weights=recipe.adapter.method == "full", needs_16_bit=isinstance(recipe.adapter, PissaAdapter),
        on_quantized=loftq, progress=while_loading(report),
    )  # fmt: skip
    if devices.is_main and not resume:
        _begin_folder(folder, recipe, prepared)
        if made is not None:
            made.save(folder)
            ledger.append(made, folder)
    devices.wait()
    splits = prepared.dataset.splits
    parts = Parts(
        recipe=recipe, facts=facts, dataset=prepared.dataset, base=base,
        train_examples=prepared.split("train"),
        held_out_examples=prepared.split("evaluation") if "evaluation" in splits else None,
        plan=plan_micro_batches, collate=collate, pad_token_id=pad_token_id(prepared.tokenizer), folder=folder,
        devices=devices, report=report, base_weight_digest=digesting.result if digesting else lambda: None,
        save_tokenizer=lambda path: prepared.tokenizer.save_pretrained(str(path)), label_scores=label_scores,
        loftq=loftq, levels=tuple(made.settings.levels) if made is not None else (),
    )  # fmt: skip
    try:
        run = train_adapter(parts, resume=resume)
    except OnlayError:
        # The folder then holds a Run that says why: it belongs into the log too.
        if devices.is_main and (folder / "run.json").is_file():
            ledger.append(Run.load(folder), folder)
        raise
    if watch is not None:
        run = with_forecast(run, watch)
    if devices.is_main:
        if watch is not None:
            run.save(folder)
        ledger.append(run, folder)
    return run


def _plan(prepared: Prepared, hardware: Hardware, devices: Devices, report: Report) -> Plan | None:
    """The plan of the first rank, for the smallest of the GPUs; None without a GPU, and where others use it: a plan counts on all of it."""
    device = min(hardware.devices, key=lambda one: one.memory_bytes) if hardware.has_cuda else None
    made = None
    if device is not None and (share := _free_share(devices.device)) < LEAST_FREE:
        report(f"no plan: {1 - share:.0%} of the GPU's memory is taken by others; what fits is found on the way")
    else:
        made = plan_run(prepared, device=device, gpus=devices.world, report=report)
    text = devices.agree(made.to_json() if made is not None else "")
    return Plan.model_validate_json(text) if text else None


def _free_share(device: torch.device) -> float:
    import torch

    free, total = torch.cuda.mem_get_info(torch.cuda.current_device() if device.index is None else device.index)
    return free / total


def _tell_smallest_difference(prepared: Prepared, report: Report) -> None:
    """How much better the result must be for its held-out rows to show it."""
    from onlay.evaluation.compare import smallest_difference, told_size
    from onlay.evaluation.scores import SCORES

    held_out = prepared.dataset.splits.get("evaluation")
    if held_out is None or prepared.dataset.labels:
        return
    rows = min(held_out.rows, prepared.source.recipe.evaluation.answer_rows)
    score = SCORES["exact_match"]
    least = smallest_difference(score, rows=rows)
    shown = (
        "no difference at all"
        if least is None
        else f"a difference of {told_size(score, least)} or more in four trials of five"
    )
    report(f"{rows:,} held-out rows will show {shown} (yes/no scores; a fifth of the rows taken to differ)")


def _loftq_factors(recipe: Recipe, folder: Path, *, resume: bool) -> LoftqFactors | None:
    """What makes a LoftQ adapter's first weights while the base is quantized; where a checkpoint holds later ones, nothing."""
    from onlay.model.initialize import LoftqFactors
    from onlay.model.targets import is_wanted
    from onlay.training.checkpoint import Checkpoints

    section = recipe.adapter
    if not isinstance(section, LoftqAdapter) or (resume and Checkpoints(folder / "checkpoints", keep=1).steps()):
        return None
    return LoftqFactors(section, seed=recipe.training.seed, wanted=lambda name: is_wanted(name, section.targets))


def _begin_folder(folder: Path, recipe: Recipe, prepared: Prepared) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}.", "Choose another training.output.") from None
    write_whole(folder / "recipe.yaml", recipe.to_yaml())
    facts = prepared.source.facts
    facts.save(folder)
    prepared.dataset.save(folder)
    text = json.dumps(recipe.model_dump(mode="json"))
    ledger.Ledger().append_json("recipe", recipe.digest, text, folder)
    ledger.append(facts, folder)
    ledger.append(prepared.dataset, folder)
