"""Merging: a finished run's adapter goes into its base's own files, and the result is proven before it gets its name.

The order: everything that can be refused is refused; base and adapter as trained say their logits and leave memory; the
files are written under a temporary name, one matrix at a time; the merged folder is loaded as any transformers model and
compared (onlay/release/verify.py); only then is it renamed.  docs/merge.md tells what the choices mean.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from onlay.data.pack import MicroBatch
from onlay.errors import OnlayError, OutputError, ProofError
from onlay.hardware import Hardware
from onlay.model.adapter import load_adapter
from onlay.model.compatibility import check
from onlay.model.facts import has_experts, read_facts
from onlay.model.load import Base, choose_compute, load_base
from onlay.model.storage import SPREAD_SHARE, stored_bytes
from onlay.model.stored_names import find_places, model_without_weights, tied_parameters
from onlay.model.updates import Updates
from onlay.model.weight_files import StoredTensor, read_tensors
from onlay.recipe import LoftqAdapter, ModelSection, Recipe
from onlay.records import Dataset, Merge, MergeCheck, ModelFacts, Run
from onlay.release.model_card import copy_small_files, write_card, write_generation_config, write_template
from onlay.release.shards import DTYPES, Change, write_shards
from onlay.release.verify import (
    RATIO,
    Difference,
    Logits,
    choose_rows,
    difference,
    judge,
    logits_of,
    round_again,
)
from onlay.training.batches import Examples

Report = Callable[[str, int, int], None]
"""what, done, in all"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A merge that was asked for; `stages` brings it together."""

    run: Run
    recipe: Recipe
    facts: ModelFacts
    dataset: Dataset
    adapter: Path
    out: Path
    into: str
    """auto, original or quantized."""
    storage: str
    """How the base was kept in training: bf16 (not quantized), nf4, int8 or fp8."""
    examples: Examples
    split: str
    """Of the data set that `examples` are."""
    rows: int
    max_difference: float | None
    hardware: Hardware
    report: Report

    @property
    def choices(self) -> list[str]:
        """The weights to merge into that are tried."""
        if self.storage == "bf16":
            return ["original"]
        if self.into == "auto" and isinstance(self.recipe.adapter, LoftqAdapter):
            return ["quantized"]  # The adapter makes up for the rounding: on the original weights that is an error.
        return ["quantized", "original"] if self.into == "auto" else [self.into]

    def section(self, storage: str) -> ModelSection:
        """For this storage.  Products are not in FP8, also where they were in training: a merge is of weights, and what
        rounding the activations does is not theirs."""
        compute = choose_compute(self.recipe.model, self.hardware)
        return self.recipe.model.model_copy(update={"storage": storage, "compute": compute})

    @cached_property
    def batches(self) -> list[MicroBatch]:
        vocabulary = self.facts.vocabulary_size
        return choose_rows(self.examples, rows=self.rows, vocabulary_size=vocabulary, seed=self.recipe.training.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What the files' tensors become, found out from names and shapes alone."""

    tensors: list[StoredTensor]
    updates: Updates
    changes: Mapping[str, Change]
    """By stored name, for the original weights."""
    dtype: torch.dtype
    """The coarsest of the changed tensors as stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """The logits of a base alone and with its adapter, and how it was kept."""

    base: Logits
    adapter: Logits
    quantized: tuple[str, ...]
    """Names of the linear layers that were quantized."""
    weight_dtype: torch.dtype
    noise: Difference
    """What rounding A and B to the precision of the work does."""


def merge_adapter(job: Job) -> Merge:
    """Writes `job.out`; or, when the merged model does not say what base and adapter said, a folder with another name and
    a record with status `rejected`.  Raises OutputError and BaseModelError, mostly before anything is written."""
    began = time.perf_counter()
    _refuse(job)
    plan = _plan(job)
    if not job.batches:
        raise OutputError(f"{job.dataset.path} holds no row with a trained token.", "Prepare the run's data again.")
    trained = _said(job, job.storage)
    on_original = trained
    if job.storage != "bf16" and "original" in job.choices:
        on_original = _said(job, "bf16")
    folders: dict[str, Path] = {}
    checks: dict[str, MergeCheck] = {}
    changed: dict[str, int] = {}
    try:
        for into in job.choices:
            folder = folders[into] = job.out.with_name(f".{job.out.name}.{into}.{os.getpid()}")
            changes = plan.changes if into == "original" else _with_round_trips(job, plan, trained)
            changed[into] = len(changes)
            with _disk(folder):
                _write(job, plan, changes, folder)
            own = on_original if into == "original" else trained
            checks[into] = _check(job, plan, changes, folder, into=into, trained=trained, own=own)
        best = min(checks, key=lambda into: _badness(checks[into]))
        seconds = round(time.perf_counter() - began, 2)
        return _finish(job, plan, best, checks, folders[best], seconds=seconds, changed_tensors=changed[best])
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)


def _badness(found: MergeCheck) -> tuple[bool, float]:
    off = found.mean_logit_difference
    return not found.passed, math.inf if off is None else off


def _refuse(job: Job) -> None:
    if job.into == "quantized" and job.storage == "bf16":
        raise OutputError(
            f"{job.run.path} was trained on a base that is not quantized: there are no quantized weights to merge into.",
            "Leave --into out.",
        )
    if job.into == "original" and isinstance(job.recipe.adapter, LoftqAdapter):
        raise OutputError(
            f"{job.run.path} makes up for the rounding of {job.storage} (loftq): on the original weights that is an error.",
            "Leave --into out: it is merged into the quantized weights.",
        )
    check(job.adapter, job.facts)
    free, needed = _free_bytes(job.out), len(job.choices) * job.facts.weight_bytes
    if free < needed:
        raise OutputError(
            f"{job.out} needs {needed / 1e9:.1f} GB while it is made; {free / 1e9:.1f} GB are free there.",
            "Free disk space, choose another OUT"
            + (", or name one of the two ways with --into." if len(job.choices) > 1 else "."),
        )


def _free_bytes(out: Path) -> int:
    place = out.absolute().parent
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _plan(job: Job) -> Plan:
    model = model_without_weights(job.facts, trust_remote_code=job.recipe.model.trust_remote_code)
    tied = tied_parameters(model)
    tensors = read_tensors(Path(job.facts.path), job.facts.name)
    updates = Updates(
        model_without_weights(job.facts, trust_remote_code=job.recipe.model.trust_remote_code), job.adapter
    )
    for name in updates.parameters:
        if name in tied:
            raise OutputError(
                f"{job.adapter} changes {name}, which is the same weight as {tied[name]}: merging would change both.",
                "Serve the adapter beside its base instead.",
            )
    places = find_places(model, tensors, updates.parameters)
    changes = {name: Change(place=place, updated=True) for name, place in places.items()}
    stored = {tensor.name: tensor.dtype for tensor in tensors}
    for name in changes:
        if stored[name] not in DTYPES:
            raise OutputError(
                f"{name} is stored as {stored[name]}; an adapter is merged into {', '.join(DTYPES)}.",
                "Serve the adapter beside its base instead.",
            )
    dtypes = {DTYPES[stored[name]] for name in changes}
    return Plan(
        tensors=tensors, updates=updates, changes=changes, dtype=max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    )


# --------------------------------------------------------------------------------------------- what was trained says


def _said(job: Job, storage: str) -> Said:
    """Loads the base, in `storage`, and asks it alone and with the adapter; leaves nothing in memory but the logits."""
    from onlay.model.quantize import QuantizedLinear

    base = _load(job, job.facts, job.section(storage))
    ask = partial(logits_of, batches=job.batches, compute_dtype=base.compute_dtype)
    quantized = tuple(name for name, module in base.model.named_modules() if isinstance(module, QuantizedLinear))
    alone = ask(base.model, progress=partial(job.report, f"asking the base in {storage}"))
    adapted = load_adapter(base.model, job.adapter, facts=job.facts)
    both = ask(adapted, progress=partial(job.report, f"asking base and adapter in {storage}"))
    names = [name for name, _ in adapted.named_parameters() if ".lora_" in name]
    round_again(adapted, names, stored=base.compute_dtype, seed=1)
    noise = difference(ask(adapted, progress=partial(job.report, "measuring what rounding does")), both)
    said = Said(base=alone, adapter=both, quantized=quantized, weight_dtype=base.weight_dtype, noise=noise)
    del base, adapted
    _free_memory()
    return said


def _load(job: Job, facts: ModelFacts, section: ModelSection) -> Base:
    """On the first GPU, over all of them where it needs that, else on the CPU: slow, but every weight is in reach."""
    needed = stored_bytes(facts, section, section.storage)
    room = SPREAD_SHARE * sum(device.memory_bytes for device in job.hardware.devices)
    device = "cpu" if needed > room and job.hardware.has_cuda else None
    progress = partial(job.report, f"loading {facts.name if facts is job.facts else 'the merged model'}")
    base = load_base(facts, section, job.hardware, device=device, spread=True, progress=progress)
    if any(weight.is_meta for weight in base.model.parameters()):  # Parts went to the host after all.
        del base
        _free_memory()
        base = load_base(facts, section, job.hardware, device="cpu", progress=progress)
    return base


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------- what is written


def _with_round_trips(job: Job, plan: Plan, trained: Said) -> dict[str, Change]:
    """The changes for a base as it was trained on: every quantized layer becomes what it stood for, adapted or not."""
    from onlay.model.quantize import round_trip

    device = torch.device("cuda:0" if job.hardware.has_cuda else "cpu")

    def as_trained(weight: Tensor) -> Tensor:
        # Cast as at loading, and rounded to what the layer multiplied with.
        loaded = weight.to(device, trained.weight_dtype)
        stood_for = round_trip(
            loaded, storage=job.storage, double_quantization=job.recipe.model.double_quantization
        )  # fmt: skip
        return stood_for.to(trained.weight_dtype).to("cpu", torch.float32)

    model = model_without_weights(job.facts, trust_remote_code=job.recipe.model.trust_remote_code)
    places = find_places(model, plan.tensors, [f"{name}.weight" for name in trained.quantized])
    changes = dict(plan.changes)
    for name, place in places.items():
        known = changes.get(name, Change(place=place, updated=False))
        changes[name] = replace(known, round_trip=as_trained)
    return changes


def _write(job: Job, plan: Plan, changes: Mapping[str, Change], folder: Path) -> None:
    folder.mkdir(parents=True)
    copy_small_files(job.facts, folder, remote_code=job.recipe.model.trust_remote_code)
    write_template(job.facts, folder, recipe=job.recipe, dataset=job.dataset)
    write_generation_config(folder, stop_token_ids=job.dataset.stop_token_ids)
    write_shards(plan.tensors, changes, plan.updates, folder, progress=partial(job.report, "writing shards"))


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise OutputError(
            f"{folder.parent} cannot be written to: {what}.", "Free disk space, or choose another OUT."
        ) from None


# ----------------------------------------------------------------------------------------------------- what is proven


def _check(
    job: Job, plan: Plan, changes: Mapping[str, Change], folder: Path, *, into: str, trained: Said, own: Said
) -> MergeCheck:
    """Loads a merged folder and compares it: with base and adapter as trained, for the user; with the adapter on the very
    weights that it was merged into, for the proof."""
    section = job.section("bf16").model_copy(
        update={"base": str(folder.absolute()), "revision": None, "double_quantization": True}
    )
    base = _load(job, read_facts(section), section)
    ask = partial(logits_of, base.model, job.batches, compute_dtype=base.compute_dtype)
    merged = ask(progress=partial(job.report, f"asking the merged model ({into})"))
    names = sorted({change.place.parameter for change in changes.values() if change.updated})
    round_again(base.model, names, stored=plan.dtype, seed=0)
    rounded = difference(ask(progress=partial(job.report, "measuring what rounding does")), merged)
    noise = rounded.and_independent(own.noise)
    del base, ask
    _free_memory()
    seen, proven = difference(merged, trained.adapter), difference(merged, own.adapter)
    from_base, effect = difference(merged, own.base), difference(own.adapter, own.base)
    reason = judge(
        seen=seen, proven=proven, from_base=from_base, effect=effect, noise=noise, max_difference=job.max_difference,
        with_peaks=not has_experts(job.facts),
    )  # fmt: skip
    perplexity = {"adapter": trained.adapter, "merged": merged, "base": trained.base}
    return MergeCheck(
        into=into, split=job.split, rows=len(job.batches), tokens=merged.tokens,
        max_logit_difference=_number(seen.largest), mean_logit_difference=_number(seen.mean),
        top1_agreement=seen.top1_agreement,
        perplexity={name: _number(said.perplexity) for name, said in perplexity.items()},
        base_mean_logit_difference=_number(from_base.mean),
        proven_max_difference=_number(proven.largest), proven_mean_difference=_number(proven.mean),
        rounding_max_difference=_number(noise.largest), rounding_mean_difference=_number(noise.mean),
        limit=_number(RATIO * noise.mean if job.max_difference is None else job.max_difference),
        passed=reason is None, reason=reason,
    )  # fmt: skip


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------------------------- the end


def _finish(
    job: Job,
    plan: Plan,
    into: str,
    checks: dict[str, MergeCheck],
    folder: Path,
    *,
    seconds: float,
    changed_tensors: int,
) -> Merge:
    """Card, record and the final name, or another name for what was not proven."""
    chosen = checks[into]
    path = job.out if chosen.passed else _rejected_name(job.out)
    digest = hashlib.sha256((job.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    merge = Merge(
        sources={
            "run": job.run.digest, "recipe": job.recipe.digest, "model": job.facts.digest, "dataset": job.dataset.digest,
            "adapter": digest,
        },
        path=str(path), status="merged" if chosen.passed else "rejected", base=job.facts.name,
        base_revision=job.facts.revision, method=job.recipe.adapter.method, storage=job.storage, into=into,
        seconds=seconds, weight_bytes=sum(tensor.num_bytes for tensor in plan.tensors),
        changed_tensors=changed_tensors, verification=chosen, candidates=checks if len(checks) > 1 else {},
        error=chosen.reason,
    )  # fmt: skip
    with _disk(folder):
        write_card(folder, merge=merge, recipe=job.recipe, facts=job.facts)
        merge.save(folder)
        if path.exists():
            raise OutputError(f"{path} came to be while the adapter was merged.", "Choose another OUT.")
        folder.rename(path)
    return merge


def _rejected_name(out: Path) -> Path:
    """OUT.rejected, or OUT.rejected-2, ...: what an earlier merge left is not touched."""
    names = (out.with_name(f"{out.name}.rejected{f'-{n}' if n > 1 else ''}") for n in range(1, 10**6))
    return next(path for path in names if not path.exists())


def rejection(merge: Merge) -> OnlayError:
    """What is raised for a merge that was not proven, once its record is in the ledger."""
    return ProofError(
        f"The merged model does not say what base and adapter say: {merge.error}.",
        f"It is kept as {merge.path} to look at; serve the adapter beside its base instead.",
    )
