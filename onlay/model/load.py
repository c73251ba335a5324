"""Loading a base: frozen, in the precision that the device is good at, and proof that it stays as it is.

torch and transformers are imported inside the functions: importing this file costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onlay.errors import BaseModelError
from onlay.hardware import Hardware, quick_import
from onlay.recipe import ModelSection
from onlay.records import ModelFacts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

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
    attention: str
    """transformers' name of the attention implementation in use."""


def choose_compute(section: ModelSection, hardware: Hardware) -> str:
    """bf16, fp16 or fp32: as asked, else what the devices are good at."""
    if section.compute != "auto":
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
) -> Base:
    """The base of `facts`, read from its local folder straight onto `device` (default: the first GPU, else the CPU).

    `attention` is a transformers name (sdpa, eager, ...); None lets transformers pick.  With `weights: random` the
    weights are drawn from `seed` in fp32, on the CPU, so that every device starts from the same ones.  Weights that
    will themselves be trained are kept in fp32: 16 bits lose small updates.
    Raises BaseModelError when weights and architecture do not belong together.
    """
    with quick_import():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # Its annotations miss output_loading_info.
    compute = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[choose_compute(section, hardware)]
    place = torch.device(device) if device is not None else torch.device("cuda:0" if hardware.has_cuda else "cpu")
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    if attention is not None:
        options["attn_implementation"] = attention
    try:
        # Most of the modeling code is imported by the first call.
        with quick_import(), quiet_transformers():
            if section.weights == "random":
                weights = torch.float32
                config = AutoConfig.from_pretrained(
                    facts.path, local_files_only=True, trust_remote_code=section.trust_remote_code
                )
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    model = auto.from_config(config, dtype=weights, **options).to(place)
            else:
                weights = torch.float32 if trains_weights else compute
                if place.type != "cpu":
                    options["device_map"] = {"": place}
                model, info = auto.from_pretrained(
                    facts.path,
                    dtype=weights,
                    local_files_only=True,
                    use_safetensors=True,
                    # Reported below, by name, instead of in a table on the screen.
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    **options,
                )
                _check_loading(facts, info)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BaseModelError(f"{facts.name} cannot be loaded: {first}", _remedy(error, attention)) from None
    _freeze(model)
    return Base(
        model=model, compute_dtype=compute, weight_dtype=weights, attention=str(model.config._attn_implementation)
    )


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

    logging: Any = untyped
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def weight_checksums(model: nn.Module) -> dict[str, int]:
    """One exact number for each frozen parameter, computed where it lies: equal before and after, or it changed.

    With the weights' bits read as integers e_i: sum(e_i) in the upper 64 bits and sum((i + 1) e_i) in the lower ones,
    both modulo 2**64.  A flipped bit changes the first, two swapped values change the second.
    """
    import torch

    names: list[str] = []
    sums: list[Tensor] = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                names.append(name)
                sums.append(_sums(parameter.detach()))
        # Copied to the host together: one wait for the device, not one for each parameter.
        values = torch.stack([pair.to(sums[0].device) for pair in sums]).tolist() if sums else []
    return {name: (plain % 2**64 << 64) + placed % 2**64 for name, (plain, placed) in zip(names, values, strict=True)}


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
