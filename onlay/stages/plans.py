"""One plan: from what is wanted and a GPU to the record, or to two lines on what would fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay.errors import OnlayError, SetupError
from onlay.recipe import FullTuning, LoraAdapter, PissaAdapter, Recipe
from onlay.stages.advising import REFUSED, adapter_features

if TYPE_CHECKING:
    from onlay.hardware import Device
    from onlay.planning.devices import Gpu, GpuGroup
    from onlay.planning.lengths import Lengths
    from onlay.planning.memory import Load
    from onlay.planning.planner import Chosen, Job, Wishes
    from onlay.planning.shapes import BaseShape
    from onlay.records import Plan

ASK_FOR_LESS = "Delete the line, or ask for what fits: `onlay plan RECIPE` lists it."
"""What to do about a wish that does not fit."""
TASKLESS_LABELS = 2
"""Of a classification head, before its data were read: its size is next to nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A recipe and everything that its plan goes by, but for the GPU."""

    recipe: Recipe
    shape: BaseShape
    lengths: Lengths
    trained_share: float
    held_out_rows: int
    notes: tuple[str, ...]
    has_bitsandbytes: bool = True
    """For NF4 and small optimizer states; a plan for another machine takes it for installed."""


def plan_wanted(
    wanted: Wanted, group: GpuGroup, *, found: str | None, prices: str | Path | None, suggests: bool = True
) -> Plan:  # fmt: skip
    """`found`: the name of a GPU that is in no table.  Raises SetupError where nothing fits; `suggests`: it then names the smallest
    GPU and the largest base that would."""
    from onlay.planning.forecast import Length, Told, make_plan, tell_refused
    from onlay.planning.planner import choose

    recipe = wanted.recipe
    job, compute = _job(wanted, group)
    wishes = wishes_of(recipe)
    chosen = choose(job, wishes)
    if chosen.best is None:
        remedy = "Take a GPU with more memory, or a smaller base."
        if suggests:
            remedy = _what_fits(wanted, job, chosen, found=found, prices=prices)
        raise SetupError(_problem(wanted, job, chosen, found), remedy)
    asked = _said(wishes)
    length = Length(
        epochs=recipe.training.epochs, max_steps=recipe.training.max_steps, held_out_rows=wanted.held_out_rows,
        every_steps=recipe.evaluation.every_steps,
    )  # fmt: skip
    notes = list(wanted.notes)
    if recipe.training.max_steps is not None:
        notes.append(
            f"training.max_steps = {recipe.training.max_steps} sets the length of the run; epochs are not read"
        )
    told = Told(
        base=recipe.model.base, compute=compute, refused=tell_refused(job, chosen, asked), found_gpu=found,
        notes=(*notes, *_serving(recipe, wanted.shape, chosen.best.setting.storage)),
    )  # fmt: skip
    return make_plan(job, chosen, length, told)


def _job(wanted: Wanted, group: GpuGroup) -> tuple[Job, str]:
    """The planner's job, and the precision of the work in words."""
    from onlay.data.pack import plan_micro_batches
    from onlay.hardware import Hardware
    from onlay.model.storage import refuse_fp8
    from onlay.planning.layers import why_ordinary
    from onlay.planning.planner import Job

    recipe, gpu = wanted.recipe, group.gpu
    hardware = Hardware(devices=[gpu.device], cpu_cores=1, host_memory_bytes=0, platform="")
    refuse_fp8(recipe.model, recipe.model.storage, hardware)
    compute = (
        recipe.model.compute if recipe.model.compute not in ("auto", "fp8") else "bf16" if gpu.has_bf16 else "fp16"
    )
    section = recipe.adapter
    padded = recipe.training.packing == "off"

    def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
        return plan_micro_batches(lengths, budget_tokens=budget, packed=not padded)

    ordinary = why_ordinary(wanted.shape, section, capability=gpu.compute_capability, compute=compute)
    job = Job(
        load=_load(wanted, gpu, item_bytes=4 if compute == "fp32" else 2), lengths=wanted.lengths,
        rows_a_step=recipe.training.batch_size, group=group, pack=pack, padded=padded, ordinary=ordinary,
        quantizes=not isinstance(section, FullTuning | PissaAdapter) and recipe.model.weights != "random" and wanted.has_bitsandbytes,
        small_states=wanted.has_bitsandbytes,
    )  # fmt: skip
    return job, compute


def _load(wanted: Wanted, gpu: Gpu, *, item_bytes: int) -> Load:
    from onlay.planning.memory import load_of

    return load_of(
        wanted.shape, wanted.recipe.adapter, double_quantization=wanted.recipe.model.double_quantization, item_bytes=item_bytes,
        trained_share=wanted.trained_share, device_bytes=gpu.memory_bytes,
        num_labels=TASKLESS_LABELS if wanted.recipe.adapter.method == "head" else None,
    )  # fmt: skip


def wishes_of(recipe: Recipe) -> Wishes:
    """What the recipe itself says; a field that it leaves out, or leaves at auto, is open."""
    from onlay.planning.planner import Wishes

    training, given = recipe.training, recipe.training.model_fields_set
    return Wishes(
        storage=None if recipe.model.storage == "auto" else recipe.model.storage,
        fp8_products=True if recipe.model.compute == "fp8" else None, micro_tokens=training.micro_batch_tokens,
        recompute=None if training.recompute == "auto" else training.recompute,
        optimizer=training.optimizer if "optimizer" in given else None,
        offload=training.offload_activations if "offload_activations" in given else None,
    )  # fmt: skip


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _said(wishes: Wishes) -> list[str]:
    """`field = value` of each."""
    from onlay.planning.planner import FIELDS

    return [f"{FIELDS[name]} = {_word(getattr(wishes, name))}" for name in FIELDS if getattr(wishes, name) is not None]


def _problem(wanted: Wanted, job: Job, chosen: Chosen, found: str | None) -> str:
    """As it was asked, where anything was."""
    from onlay.planning.forecast import tell_need

    what = f"{wanted.recipe.model.base} with method {wanted.recipe.adapter.method}"
    if chosen.asked is None:
        need = tell_need(chosen.least.memory.device_bytes, job)
        return f"{what} does not fit {found or job.group.name}: {need}, with everything that saves memory."
    asked = ", ".join(_said(wishes_of(wanted.recipe)))
    need = tell_need(chosen.asked.memory.device_bytes, job)
    return f"{what} and {asked} does not fit {found or job.group.name}: {need}."


def _what_fits(wanted: Wanted, job: Job, chosen: Chosen, *, found: str | None, prices: str | Path | None) -> str:
    """The smallest GPU that takes this base, as it was asked and without the wishes, and the largest base that this GPU takes."""
    from onlay.planning.planner import Wishes, gib

    base, wishes, open_ = wanted.recipe.model.base, wishes_of(wanted.recipe), _without_storage(wanted)
    told = []
    without = base
    if chosen.asked is not None:
        fitting = _smallest_gpu(wanted, wishes, job, prices)
        told.append(f"As asked it fits {fitting}" if fitting else "No GPU of the table takes it as asked")
        without = f"without that {base} needs {gib(chosen.least.memory.device_bytes)} and"
    fitting = _smallest_gpu(open_, Wishes(), job, prices)
    if fitting is not None:
        told.append(f"{without} fits {fitting} and larger ones")
    else:
        told.append(f"no GPU of the table takes {base}")
    smaller = _largest_base(open_, job.group)
    if smaller is not None:
        told.append(f"on {found or job.group.name} the largest well-known base that fits is {smaller}")
    return f"{'; '.join(told)}."


def _without_storage(wanted: Wanted) -> Wanted:
    """No storage and no FP8 products asked for: a GPU without FP8 may be tried then."""
    model = wanted.recipe.model
    update = {"storage": "auto", **({"compute": "auto"} if model.compute == "fp8" else {})}
    return replace(wanted, recipe=wanted.recipe.model_copy(update={"model": model.model_copy(update=update)}))


def _smallest_gpu(wanted: Wanted, wishes: Wishes, job: Job, prices: str | Path | None) -> str | None:
    """With more memory than the job's, that takes it with these wishes."""
    from onlay.planning.devices import GpuGroup, read_gpus
    from onlay.planning.planner import fits

    for gpu in read_gpus(prices).values():
        if gpu.memory_bytes <= job.gpu.memory_bytes:
            continue
        try:
            other, _ = _job(wanted, GpuGroup(gpu=gpu, count=1))
        except SetupError:
            continue  # It has no FP8, which the recipe asks for.
        if fits(other, wishes):
            return gpu.name
    return None


def _largest_base(wanted: Wanted, group: GpuGroup) -> str | None:
    """That this GPU can train with this adapter, of those with a name and a closed form, each on the path of its family."""
    from onlay.planning.planner import Wishes, fits
    from onlay.planning.shapes import find_shape, known_names

    shapes = sorted((find_shape(name) for name in known_names()), key=lambda shape: -shape.num_parameters)
    for shape in shapes:
        if shape.num_parameters >= wanted.shape.num_parameters:
            continue
        try:
            job, _ = _job(replace(wanted, shape=shape), group)
        except OnlayError:
            continue  # Experts, or targets that this base does not have.
        if fits(job, Wishes()):
            return shape.name
    return None


def _serving(recipe: Recipe, shape: BaseShape, storage: str) -> list[str]:
    """Servers that will refuse the adapter which this recipe makes."""
    from onlay.release.servers import judge

    if not isinstance(recipe.adapter, LoraAdapter):
        return []
    features = adapter_features(
        recipe, shape, {"method": recipe.adapter.method, "rank": recipe.adapter.rank, "storage": storage}
    )
    assert features is not None
    verdicts = judge(features, base=recipe.model.base, name=recipe.release.name or "NAME")
    return [
        f"{one.server} will not take the adapter: {'; '.join(one.reasons)}"
        for one in verdicts
        if one.verdict == REFUSED
    ]


def as_known(device: Device, prices: str | Path | None) -> tuple[Gpu, str | None, tuple[str, ...]]:
    """The table's entry for a GPU that was found; else the nearest one's rates with this one's memory, unpriced."""
    from onlay.planning.devices import match_device, read_gpus

    table = read_gpus(prices)
    known = match_device(device, gpus=table)
    if known is not None:
        return known, None, ()
    capability = device.compute_capability

    def distance(gpu: Gpu) -> tuple[int, int]:
        theirs = gpu.compute_capability
        return abs(10 * theirs[0] + theirs[1] - 10 * capability[0] - capability[1]), abs(
            gpu.memory_bytes - device.memory_bytes
        )

    near = min(table.values(), key=distance)
    own = near.model_copy(
        update={
            "memory_mib": device.memory_bytes // 2**20, "compute_capability": capability, "offers": (),
            "efficiency_class": f"unknown ({near.name}'s rates)",
        }
    )  # fmt: skip
    return own, device.name, (f"{device.name} is not in the table of GPUs: the rates of {near.name} are taken for it",)
