"""Loading a base: frozen, in the precision that the device is good at, and proof that it stays as it is.

torch and transformers are imported inside the functions: importing this file costs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onlay.errors import BaseModelError
from onlay.hardware import Hardware, quick_import
from onlay.model.storage import (
    NOT_QUANTIZED,
    choose_storage,
    describe_placement,
    multiplies_in_fp8,
    needs_spreading,
    refuse_fp8,
    spread_memory,
)
from onlay.model.weight_files import read_tensors
from onlay.recipe import ModelSection
from onlay.records import ModelFacts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from onlay.model.quantize import OnQuantized

Progress = Callable[[int, int], None]

_HARMLESS_EXTRAS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".masked_bias")
"""Endings of buffers that old checkpoints hold and that today's code computes."""
_CHUNK_ELEMENTS = 2**22
"""Elements per chunk of a checksum: 8 bytes each, at most three such arrays at a time (96 MiB)."""
_CPU_CHUNK_ELEMENTS = 2**16
"""On a CPU smaller chunks stay in its cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """A loaded base: no weight of it requires a gradient, it is in evaluation mode and keeps no cache."""

    model: PreTrainedModel
    compute_dtype: torch.dtype
    weight_dtype: torch.dtype
    """Of what is not quantized."""
    attention: str
    """transformers' name of the attention implementation in use."""
    storage: str = NOT_QUANTIZED
    """bf16 (not quantized), nf4, int8 or fp8."""
    notes: dict[str, str] = field(default_factory=dict)
    """For the Run.  storage: why this one; storage_16_bit: what is not quantized; products: where they are in FP8;
    placement: where parts went, if spread."""


def choose_compute(section: ModelSection, hardware: Hardware) -> str:
    """bf16, fp16 or fp32: as asked, else what the devices are good at.  With fp8 it is of all but the products."""
    if section.compute not in ("auto", "fp8"):
        return section.compute
    if not hardware.has_cuda:
        return "fp32"
    return "bf16" if hardware.has_bf16 else "fp16"


def load_base(
    facts: ModelFacts,
    section: ModelSection,
    hardware: Hardware,
    *,
    attention: str | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    trains_weights: bool = False,
    needs_16_bit: bool = False,
    progress: Progress | None = None,
    on_quantized: OnQuantized | None = None,
    spread: bool = False,
) -> Base:
    """The base of `facts`, read from its local folder straight onto `device` (default: the first GPU, else the CPU).

    `attention` is a transformers name (sdpa, eager, ...); None lets transformers pick.  With `weights: random` the
    weights are drawn from `seed` in fp32, on the CPU, so that every device starts from the same ones.  Weights that
    will themselves be trained are kept in fp32: 16 bits lose small updates.  With `needs_16_bit`, `storage: auto` never
    quantizes.
    `progress(done_bytes, total_bytes)` follows the reading.  `on_quantized(name, weight, module)` is called for each layer
    that was quantized while its weight (O, I), on the device, in the compute dtype, is still there.
    `spread`, for bases that nothing is trained on: one too large for the first GPU is spread over all GPUs and the host.
    Raises BaseModelError when weights and architecture do not belong together or memory is too small, SetupError when
    bitsandbytes is missing for nf4 or a GPU has no FP8 for fp8.
    """
    with quick_import():
        import torch

    compute = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[choose_compute(section, hardware)]
    place = torch.device(device) if device is not None else torch.device("cuda:0" if hardware.has_cuda else "cpu")
    storage, reason = choose_storage(
        facts, section, hardware, trains_weights=trains_weights, needs_16_bit=needs_16_bit
    )  # fmt: skip
    if place.type == "cuda":
        refuse_fp8(section, storage, hardware)
    spread = spread and device is None and needs_spreading(facts, section, storage, hardware)
    job = _Job(
        facts=facts, section=section, attention=attention, storage=storage, place=place, spread=spread,
        hardware=hardware, progress=progress, on_quantized=on_quantized,
    )  # fmt: skip
    try:
        # Most of the modeling code is imported by the first call.
        with quick_import(), quiet_transformers():
            if section.weights == "random":
                storage, reason, weights = NOT_QUANTIZED, "random weights are trained", torch.float32
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    model = _empty(job, weights).to(place)
            else:
                weights = torch.float32 if trains_weights else compute
                model = _read(job, weights)
    except torch.OutOfMemoryError:
        raise BaseModelError(
            f"{facts.name} does not fit into the memory of {place} (model.storage = {storage}).",
            "Set model.storage to nf4, free the GPU's memory, or name a smaller base.",
        ) from None
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BaseModelError(f"{facts.name} cannot be loaded: {first}", _remedy(error, attention)) from None
    _freeze(model)
    notes = {"storage": f"{storage}: {reason}"}
    if storage != NOT_QUANTIZED:
        notes["storage_16_bit"] = _describe_rest(model)
    if multiplies_in_fp8(section, storage, on_gpu=place.type == "cuda"):
        notes["products"] = _describe_products(model)
    if spread:
        # Set where it went to several places.
        notes["placement"] = describe_placement(vars(model).get("hf_device_map", {"": str(model.device)}))
    return Base(
        model=model, compute_dtype=compute, weight_dtype=weights, storage=storage, notes=notes,
        attention=str(model.config._attn_implementation),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    facts: ModelFacts
    section: ModelSection
    attention: str | None
    storage: str
    place: torch.device
    spread: bool
    hardware: Hardware
    progress: Progress | None
    on_quantized: OnQuantized | None


def _empty(job: _Job, dtype: torch.dtype) -> Any:
    """The model with new weights: on the meta device, inside `torch.device("meta")`, it costs nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM

    trust, path = job.section.trust_remote_code, job.facts.path
    options: dict[str, Any] = {} if job.attention is None else {"attn_implementation": job.attention}
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust, **options)


def _read(job: _Job, dtype: torch.dtype) -> Any:
    """The model with its weights from the files, packed as they arrive where they are to be quantized."""
    import torch
    from transformers import GenerationConfig

    from onlay.model.hf_quantizer import quantizable, storage_config
    from onlay.model.stream import TensorStream, reading_order

    with torch.device("meta"):
        skeleton = _empty(job, dtype)
    options: dict[str, Any] = {}
    if job.spread:
        options |= {"device_map": "auto", "max_memory": spread_memory(job.hardware)}
    elif job.place.type != "cpu":
        options["device_map"] = {"": job.place}
    packing = None
    if job.storage != NOT_QUANTIZED:
        if not quantizable(skeleton, job.storage):
            raise BaseModelError(
                f"{job.facts.name} has no linear layer that can be quantized (model.storage = {job.storage}).",
                "Set model.storage to bf16.",
            )
        packing = options["quantization_config"] = storage_config(
            job.storage,
            double_quantization=job.section.double_quantization,
            fp8_products=multiplies_in_fp8(job.section, job.storage, on_gpu=job.place.type == "cuda"),
            on_quantized=job.on_quantized,
        )
    folder = Path(job.facts.path)
    tensors = reading_order(read_tensors(folder, job.facts.name), by_target=packing is not None)
    onto = torch.device("cpu") if job.spread else job.place
    with TensorStream(tensors, onto, readers=job.hardware.cpu_cores, progress=job.progress) as stream:
        try:
            model, info = type(skeleton).from_pretrained(
                None,
                config=skeleton.config,
                state_dict=stream.tickets(),
                dtype=dtype,
                # Reported below, by name, instead of in a table on the screen.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        finally:
            if packing is not None and packing.error is not None:
                raise packing.error
    if packing is not None:
        info["mismatched_keys"] = {*info["mismatched_keys"], *packing.mismatched}
    _check_loading(job.facts, info)
    # What transformers sets when it opens the folder itself.
    model.config.name_or_path = model.name_or_path = job.facts.path
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _describe_rest(model: nn.Module) -> str:
    """What is not quantized, by kind, with its share of all weights."""
    from onlay.model.quantize import QuantizedLinear

    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    packed = sum(layer.in_features * layer.out_features for layer in layers.values())
    kinds: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner in layers or parameter.ndim < 2:
            continue
        leaf = name if parameter.ndim > 2 else owner
        kind = re.sub(r"\.\d+\.", ".*.", leaf)
        kinds[kind] = kinds.get(kind, 0) + parameter.numel()
    every = packed + sum(kinds.values())
    return ", ".join(f"{kind} ({count / every:.1%} of the weights)" for kind, count in kinds.items())


def _describe_products(model: nn.Module) -> str:
    """Which products are in FP8, and what they cost where there is no FP8."""
    from onlay.model.quantize import QuantizedLinear

    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    others = sum(not layer.fp8_products for layer in layers)
    words = f"{len(layers) - others} layers multiply in FP8 (e4m3, a scale for each row)"
    if others:
        words += f", {others} in the precision of the rest: their sizes are no multiples of 16"
    if any(layer.weight.device.type != "cuda" for layer in layers):
        words += "; a CPU has no FP8 and computes the same numbers wide, which is slow"
    return words


def _remedy(error: Exception, attention: str | None) -> str:
    if isinstance(error, ImportError):
        return "Install the package it names, or name another base."
    if attention is not None and "attention" in str(error).lower():
        return "Another attention implementation is needed: eager works everywhere."
    return "Name another base, or upgrade transformers."


def _freeze(model: Any) -> None:
    model.requires_grad_(False)
    model.eval()
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.use_cache = False


def _check_loading(facts: ModelFacts, info: dict[str, Any]) -> None:
    """Every weight of the model came from the files, and every stored weight went into the model.

    Tied weights, which are stored once, are not among the missing: transformers ties them before it counts.
    """
    again = "Download the base again; if it stays so, its config.json and its weights do not belong together."
    for key, stored, expected in sorted(info["mismatched_keys"]):
        raise BaseModelError(
            f"{facts.name}: {key} is stored as {_shape(stored)}, but {facts.architecture} has {_shape(expected)}.",
            again,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise BaseModelError(f"{facts.name}: {_some(missing)} missing in its safetensors files.", again)
    extra = sorted(key for key in info["unexpected_keys"] if not key.endswith(_HARMLESS_EXTRAS))
    if extra:
        raise BaseModelError(
            f"{facts.name}: {_some(extra)} stored, but {facts.architecture} has no such weight.", again
        )
    if info["error_msgs"]:
        raise BaseModelError(f"{facts.name}: {str(info['error_msgs'][0]).splitlines()[0]}", again)


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 2} more are" if len(keys) > 2 else (" are" if len(keys) == 2 else " is")
    return " and ".join(keys[:2]) + more if len(keys) <= 2 else ", ".join(keys[:2]) + more


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(str(size) for size in shape)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no reports while loading; what matters in them is raised by `load_base`."""
    from transformers.utils import logging as untyped

    reports: Any = untyped
    level, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity_error()
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(level)
        if bars:
            reports.enable_progress_bar()


def weight_checksums(model: nn.Module) -> dict[str, int]:
    """One exact number for each frozen weight, computed where it lies: equal before and after, or it changed.

    Of quantized layers it covers the packed numbers and their scales.

    With the weights' bits read as integers e_i: sum(e_i) in the upper 64 bits and sum((i + 1) e_i) in the lower ones,
    both modulo 2**64.  A flipped bit changes the first, two swapped values change the second.
    """
    import torch

    names: list[str] = []
    sums: list[Tensor] = []
    with torch.no_grad():
        for name, tensor in _frozen_tensors(model):
            names.append(name)
            sums.append(_sums(tensor.detach()))
        # Copied to the host together: one wait for the device, not one for each parameter.
        values = torch.stack([pair.to(sums[0].device) for pair in sums]).tolist() if sums else []
    return {name: (plain % 2**64 << 64) + placed % 2**64 for name, (plain, placed) in zip(names, values, strict=True)}


def _frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    from onlay.model.quantize import QuantizedLinear

    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield from module.named_buffers(prefix=name)


def _sums(weight: Tensor) -> Tensor:
    """(2,) int64: sum of the bits, and their sum weighted by position; int64 arithmetic wraps, as wanted."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    bits = weight.contiguous().view(-1).view(integers)
    total = torch.zeros(2, dtype=torch.int64, device=weight.device)
    length = _CHUNK_ELEMENTS if weight.is_cuda else _CPU_CHUNK_ELEMENTS
    places = torch.arange(1, min(length, bits.numel()) + 1, dtype=torch.int64, device=weight.device)
    for start in range(0, bits.numel(), length):
        # A copy even of 64-bit weights, because it is multiplied in place.
        chunk = bits[start : start + length].to(torch.int64, copy=True)
        plain = chunk.sum()
        placed = chunk.mul_(places[: chunk.numel()]).sum() + start * plain
        total += torch.stack((plain, placed))
    return total
