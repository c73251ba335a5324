"""How a frozen base is kept (not quantized, nf4, int8 or fp8), whether it fits, and where its parts went; without torch."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from math import prod

from onlay.errors import SetupError
from onlay.hardware import Hardware
from onlay.recipe import ModelSection
from onlay.records import ModelFacts

BASE_SHARE = 0.75
"""Share of the smallest GPU's memory that a base may take before `storage: auto` quantizes it.  The rest is working room:
adapter and optimizer, activations, CUDA itself."""
SPREAD_SHARE = 0.9
"""Share of a GPU's memory, and of the host's, that a base may take where nothing is trained; beyond it, it is spread."""
NOT_QUANTIZED = "bf16"
FP8_CAPABILITY = (8, 9)
"""Compute capability from which on a GPU multiplies in FP8: Ada (8.9), Hopper (9.0) and later."""
FP8_STEP = 16
"""Both sizes of a layer must be multiples of it to be multiplied in FP8 (onlay/kernels/fp8.py)."""


def choose_storage(
    facts: ModelFacts, section: ModelSection, hardware: Hardware, *, trains_weights: bool = False, needs_16_bit: bool = False
) -> tuple[str, str]:  # fmt: skip
    """bf16 (not quantized), nf4, int8 or fp8, and the reason in words.

    `auto` is bf16 unless 2 bytes a parameter (4 with compute fp32) pass BASE_SHARE of the smallest GPU, the weights are
    neither trained nor needed as they are, and bitsandbytes is installed: then it is nf4.
    """
    if section.storage != "auto":
        return section.storage, "as asked in the recipe"
    if not hardware.has_cuda:
        return NOT_QUANTIZED, "on a CPU nothing is quantized unasked"
    whole = stored_bytes(facts, section, NOT_QUANTIZED)
    room = BASE_SHARE * hardware.device_memory_bytes
    sizes = f"{_gb(whole)} of base, {_gb(hardware.device_memory_bytes)} of GPU memory"
    if whole <= room:
        return NOT_QUANTIZED, f"it fits: {sizes}"
    if trains_weights or needs_16_bit:
        return NOT_QUANTIZED, f"the method needs the weights as they are ({sizes})"
    if importlib.util.find_spec("bitsandbytes") is None:
        return NOT_QUANTIZED, f"nf4 would leave more room, but bitsandbytes is not installed ({sizes})"
    return "nf4", f"more than {BASE_SHARE:.0%} of the memory would be taken: {sizes}"


def multiplies_in_fp8(section: ModelSection, storage: str, *, on_gpu: bool) -> bool:
    """Whether a base in this storage multiplies in FP8: where it is asked for, and for fp8 unasked on a GPU.

    On a CPU that is slower than rebuilding the weights, and done on demand only.
    """
    if storage == "fp8" and section.compute == "auto":
        return on_gpu
    return storage in ("nf4", "fp8") and section.compute == "fp8"


def refuse_fp8(section: ModelSection, storage: str, hardware: Hardware) -> None:
    """Raises SetupError where a GPU has no FP8 and it is asked for."""
    field = "storage" if storage == "fp8" else "compute"
    if storage != "fp8" and section.compute != "fp8":
        return
    for device in hardware.devices:
        if device.compute_capability < FP8_CAPABILITY:
            major, minor = device.compute_capability
            raise SetupError(
                f"model.{field} = fp8 needs a GPU of compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or more; {device.name} has {major}.{minor}.",
                f"Set model.storage to nf4 or int8{'' if section.compute != 'fp8' else ', and model.compute to auto'}.",
            )


def stored_bytes(facts: ModelFacts, section: ModelSection, storage: str) -> int:
    """Bytes of the base in memory.  Quantized are its linear layers, apart from fused experts and the output head."""
    whole = 4 if section.compute == "fp32" else 2
    if storage == NOT_QUANTIZED:
        return whole * facts.num_parameters
    packed = sum(
        prod(shape)
        for name, shape in facts.linear_shapes.items()
        if "experts" not in name and (storage != "fp8" or not any(size % FP8_STEP for size in shape))
    )
    small = bytes_per_weight(storage, section.double_quantization)
    return round(whole * (facts.num_parameters - packed) + small * packed)


def bytes_per_weight(storage: str, double_quantization: bool) -> float:
    """Of a quantized weight: nf4 has a float32 scale for each 64, or an 8-bit one and a float32 for each 256 of those.

    int8 and fp8 have one scale for each row: too few to count.
    """
    if storage in ("int8", "fp8"):
        return 1.0
    return 1 / 2 + 1 / 64 + 4 / (64 * 256) if double_quantization else 1 / 2 + 4 / 64


def needs_spreading(facts: ModelFacts, section: ModelSection, storage: str, hardware: Hardware) -> bool:
    """Whether the base is too large for the first GPU, even with nothing beside it but its cache."""
    if not hardware.has_cuda:
        return False
    return stored_bytes(facts, section, storage) > SPREAD_SHARE * hardware.devices[0].memory_bytes


def spread_memory(hardware: Hardware) -> dict[int | str, int]:
    """Bytes of each GPU, by number, and of the host that a spread base may take; what is in use there comes off besides."""
    gpus: dict[int | str, int] = {
        number: int(SPREAD_SHARE * device.memory_bytes) for number, device in enumerate(hardware.devices)
    }
    return gpus | {"cpu": int(SPREAD_SHARE * hardware.host_memory_bytes)}


def describe_placement(device_map: Mapping[str, int | str]) -> str:
    """Where the parts of a model went: "embed_tokens, layers 0-17 on cuda:0; layers 18-31, norm on cuda:1; lm_head on cpu".

    `device_map` goes from names of modules to devices, as transformers leaves it in `hf_device_map`.
    """
    places: dict[str, list[str]] = {}
    for name, device in device_map.items():
        place = f"cuda:{device}" if isinstance(device, int) else str(device)
        places.setdefault(place, []).append(name)
    return "; ".join(f"{', '.join(_parts(names))} on {place}" for place, names in places.items())


def _parts(names: list[str]) -> list[str]:
    """Names of modules in short: the last word of each, consecutive layers together."""
    parts: list[tuple[str, int, int] | str] = []
    for name in names:
        match = re.search(r"(?:^|\.)(\w+)\.(\d+)$", name)
        if match is None:
            layer = re.search(r"(\w+\.\d+\.\S+)$", name)
            parts.append((layer[1] if layer else name.rpartition(".")[2]) or "everything")
            continue
        kind, number = match[1], int(match[2])
        last = parts[-1] if parts else ""
        if isinstance(last, tuple) and last[0] == kind and last[2] == number - 1:
            parts[-1] = (kind, last[1], number)
        else:
            parts.append((kind, number, number))
    return [part if isinstance(part, str) else _span(*part) for part in parts]


def _span(kind: str, first: int, last: int) -> str:
    return f"{kind} {first}" if first == last else f"{kind} {first}-{last}"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
