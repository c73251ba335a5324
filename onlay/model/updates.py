"""What a saved adapter changes, parameter by parameter, without the model in memory.

    lora, lora+, pissa, loftq   W + (alpha / r) B A
    rslora                      W + (alpha / sqrt(r)) B A
    dora                        m * (W + s B A) / ||W + s B A||, the norm over each output's row

W (O, I), A (R, I), B (O, R), m (O,).  GPT-2's Conv1D keeps W transposed, (I, O).  Fused experts (E, ...) have one pair an
expert, stacked in PEFT's two matrices: A (E R, I) by experts, B (O, R E) with the expert as the last index.
Sources: LoRA (arXiv:2106.09685) equation 3, rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353) equation 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from onlay.errors import OutputError
from onlay.model.stored_names import Place

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """One pair of matrices, and the parameter that it changes."""

    parameter: str
    key: str
    """Start of its names in the adapter's file."""
    scale: float
    transposed: bool
    """The parameter is (I, O), or (E, I, O)."""
    num_experts: int | None
    has_magnitude: bool


class Updates:
    """A saved adapter: `updates` by parameter, `biases` (parameter to name in the file) that replace the base's.

    Use as a context manager: the file is mapped, not read, until `apply` needs a pair.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        """`model`: the base without weights; PEFT's layers are put on it to learn what the names mean.

        Raises OutputError for an adapter with something in it that cannot be merged.
        """
        self.folder = folder
        self.updates = {update.parameter: update for update in _read_layers(model, folder)}
        self.biases: dict[str, str] = {}
        self._check_names()

    @property
    def parameters(self) -> list[str]:
        """Everything that merging changes."""
        return [*self.updates, *self.biases]

    def _check_names(self) -> None:
        from safetensors import safe_open

        known = {name for update in self.updates.values() for name in _names(update)}
        with safe_open(str(self.folder / _WEIGHTS), framework="pt") as file:
            found = set(file.keys())
        for name in sorted(found - known):
            if ".lora_" in name or not name.endswith(".bias"):
                raise OutputError(
                    f"{self.folder} holds {name}, which cannot be merged.", "Serve the adapter beside its base instead."
                )
            self.biases[_plain(name)] = name
        missing = sorted(known - found)
        if missing:
            raise OutputError(f"{self.folder} has no {missing[0]}.", "Was it edited? Export it again from its run.")

    def __enter__(self) -> Self:
        from safetensors import safe_open

        self._file: Any = safe_open(str(self.folder / _WEIGHTS), framework="pt")
        self._file.__enter__()
        # The slices of one parameter's experts follow each other in the base's files: gate and up are two.
        self._pair = lru_cache(maxsize=3)(self._read_pair)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pair.cache_clear()
        self._file.__exit__(kind, error, trace)

    def _read_pair(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R), or (E, R, I) and (E, O, R)."""
        update = self.updates[name]
        a = self._file.get_tensor(f"{update.key}.lora_A.weight").to(dtype)
        b = self._file.get_tensor(f"{update.key}.lora_B.weight").to(dtype)
        if update.num_experts is not None:
            a = a.reshape(update.num_experts, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, update.num_experts).permute(2, 0, 1)
        return a, b

    def apply(self, weight: Tensor, place: Place) -> Tensor:
        """The merged values of what lies at `place`; `weight` holds the base's, in the precision to work in.

        `weight` is changed in place where possible.  Three-dimensional ones are given one expert at a time.
        """
        if place.parameter in self.biases:
            value: Tensor = self._file.get_tensor(self.biases[place.parameter])
            return value.to(weight.device, weight.dtype)
        update = self.updates[place.parameter]
        a, b = (part.to(weight.device) for part in self._pair(place.parameter, weight.dtype))
        if update.num_experts is not None:
            assert place.expert is not None
            a, b = a[place.expert], b[place.expert]
        # Rows of the stored matrix: outputs, or inputs where it is transposed.
        left, right = (a.t(), b.t()) if update.transposed else (b, a)
        weight.addmm_(left[place.start : place.stop], right, alpha=update.scale)
        if update.has_magnitude:
            magnitude = self._file.get_tensor(f"{update.key}.lora_magnitude_vector").to(weight.device, weight.dtype)
            rows = weight.t() if update.transposed else weight
            rows.mul_((magnitude / torch.linalg.vector_norm(rows, dim=1))[:, None])
        return weight


def _names(update: Update) -> list[str]:
    names = [f"{update.key}.lora_A.weight", f"{update.key}.lora_B.weight"]
    return names + ([f"{update.key}.lora_magnitude_vector"] if update.has_magnitude else [])


def _plain(name: str) -> str:
    """A parameter's name without what PEFT put around it."""
    return name.removeprefix(_PREFIX).replace(".base_layer", "")


def _read_layers(model: nn.Module, folder: Path) -> list[Update]:
    from peft import LoraConfig, PeftConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    if not (folder / "adapter_config.json").is_file() or not (folder / _WEIGHTS).is_file():
        raise OutputError(f"{folder} holds no adapter.", "Finish the run first: onlay train --resume RUN.")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise OutputError(f"{folder} is not a LoRA adapter but {config.peft_type}.", "Merge it with PEFT itself.")
    config.init_lora_weights = False  # Nothing is computed: there are no weights to begin from.
    config.inference_mode = True
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)  # type: ignore[arg-type]
    layers = [(name, module) for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]
    return [_read_layer(name, module, folder) for name, module in layers]


def _read_layer(name: str, module: Any, folder: Path) -> Update:
    from peft.tuners.lora import Linear
    from peft.tuners.lora.layer import ParamWrapper

    [adapter] = module.lora_A
    if isinstance(module, ParamWrapper):
        experts = module.get_param().shape[0]
        # The attribute by which PEFT tells (E, I, O) from (E, O, I).
        transposed = bool(getattr(module.get_base_layer(), "is_transposed", False))
        leaf = module.parameter_name
    elif isinstance(module, Linear):
        experts, transposed, leaf = None, bool(module.fan_in_fan_out), "weight"
    else:
        raise OutputError(
            f"{folder} adapts {name}, a {type(module).__name__}, which cannot be merged.",
            "Serve the adapter beside its base instead.",
        )
    return Update(
        parameter=_plain(f"{name}.{leaf}"),
        key=name,
        scale=float(module.scaling[adapter]),
        transposed=transposed,
        num_experts=experts,
        has_magnitude=bool(module.use_dora[adapter]),
    )
