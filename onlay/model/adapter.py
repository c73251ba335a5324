"""Adapters in PEFT's format: which modules they sit on, how they are made, saved and loaded.

PEFT supplies the layers and the file format, so that plain PEFT and every server that takes PEFT adapters load them.
Beside PEFT's two files lies `onlay.json`, with the base's name, revision and weight fingerprint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from onlay.errors import BaseModelError, OutputError, RecipeError
from onlay.model.compatibility import check, read_adapter
from onlay.model.initialize import Factors, Held, begin_factors, held_halves, put_loftq, put_pissa
from onlay.model.quantize import QuantizedLinear
from onlay.model.targets import is_wanted
from onlay.recipe import LoftqAdapter, LoraAdapter, PissaAdapter, TargetPreset
from onlay.records import ModelFacts, write_whole

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

PREFIX = "base_model.model."
"""What PEFT puts before the names of the model that it wraps."""

MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""PEFT refuses `out_proj` and `conv1d` of these: their scan reads the weights without calling the module."""
DIRECT_STEP_TYPES = ("falcon_mamba", "jamba", "mamba")
"""These multiply by `dt_proj.weight` without calling the module: an adapter on it would never be used or trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Full names, as in `model.named_modules()` and `model.named_parameters()`."""

    modules: tuple[str, ...]
    """Linear layers (or GPT-2's Conv1D, which is one transposed)."""
    parameters: tuple[str, ...]
    """Three-dimensional weights of fused experts, (experts, in, out) or (experts, out, in)."""


def find_targets(model: nn.Module, wanted: str | list[str]) -> Targets:
    """Maps a preset or a list of names to this model's own modules.

    A list entry matches a module whose name equals it or ends with `.entry`.  Raises RecipeError, listing the model's own
    names, when an entry matches nothing, and BaseModelError when a preset finds nothing.
    """
    linears = [name for name in _linear_names(model) if not _cannot_adapt(model, name)]
    experts = _expert_parameters(model)
    if isinstance(wanted, list):
        modules: list[str] = []
        parameters: list[str] = []
        for entry in wanted:
            found = [name for name in linears if is_wanted(name, [entry])]
            found_experts = [name for name in experts if is_wanted(name, [entry])]
            if not found and not found_experts:
                own = sorted({_leaf(name) for name in linears} | {".".join(name.split(".")[-2:]) for name in experts})
                raise RecipeError(
                    f"adapter.targets: {entry} is not a module of this base.", f"Its own are: {', '.join(own)}."
                )
            modules += found
            parameters += found_experts
        return Targets(modules=tuple(dict.fromkeys(modules)), parameters=tuple(dict.fromkeys(parameters)))
    if wanted not in get_args(TargetPreset):
        raise RecipeError(
            f"adapter.targets = {wanted} is not a preset.",
            "Use all-linear, attention, mlp, qv, or a list of module names such as [q_proj, v_proj].",
        )
    chosen = [name for name in linears if is_wanted(name, wanted)]
    chosen_experts = experts if wanted in ("all-linear", "mlp") else []
    if not chosen and not chosen_experts:
        leaves = ", ".join(sorted({_leaf(name) for name in linears}))
        raise BaseModelError(
            f"adapter.targets = {wanted} finds no module in this base.", f"Name them: its linear layers are {leaves}."
        )
    return Targets(modules=tuple(chosen), parameters=tuple(chosen_experts))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _linear_names(model: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None  # type: ignore[operator]
    return [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def _cannot_adapt(model: nn.Module, name: str) -> bool:
    """Whether the model reads this module's weight without calling it, so that an adapter on it would do nothing."""
    kind = getattr(model.config, "model_type", "")
    refused = {"out_proj", "conv1d"} if kind in MAMBA_TYPES else set()
    refused |= {"dt_proj"} if kind in DIRECT_STEP_TYPES else set()
    return _leaf(name) in refused


def _expert_parameters(model: nn.Module) -> list[str]:
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and re.search(r"(^|\.)experts\.", name) and not name.endswith("bias")
    ]


def attach(
    model: nn.Module,
    section: LoraAdapter,
    *,
    seed: int,
    factors: Mapping[str, Factors] | None = None,
    resumed: bool = False,
) -> tuple[PeftModel, list[str]]:
    """Puts a fresh adapter of the section's method on a frozen base.

    A (R, I) begins Kaiming-uniform and B (O, R) zero, so the first output is the base's.  DoRA also trains a magnitude
    (O,), which begins as the norm of each row of W.  PiSSA's A and B have twice the rank, of which
    `held_parts` must be held still (see onlay/model/initialize.py); LoftQ's begin with `factors`, by the name
    of each quantized module.  `resumed` leaves out what those two compute,
    because a checkpoint's weights will take its place.
    A and B have the section's precision (fp32: at least that, a float64 base has float64 ones); a magnitude is float32,
    as an update would be lost in 16 bits of it.
    Returns the adapted model and the names of the modules that a preset wanted but that cannot be adapted: PEFT rewrites
    the names of some mixture-of-experts bases, and Mamba's layers read some weights without calling their module.
    Raises RecipeError or BaseModelError.
    """
    from peft import get_peft_model

    targets = find_targets(model, section.targets)
    _refuse(model, section, targets)
    unused = [name for name in _linear_names(model) if section.targets == "all-linear" and _cannot_adapt(model, name)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, _peft_config(model, section, targets))  # type: ignore[arg-type]
    adapted.train()
    have = {name.removeprefix(PREFIX) for name in adapted_modules(adapted)}
    left_out = unused + [name for name in targets.modules if name not in have]
    if left_out and isinstance(section.targets, list):
        raise BaseModelError(
            f"adapter.targets: {left_out[0]} cannot be adapted in this base: PEFT reads its name as the fused experts'.",
            "Leave it out of adapter.targets.",
        )
    _set_precision(adapted, section)
    _begin(adapted, section, seed=seed, factors=factors, resumed=resumed)
    return adapted, left_out  # type: ignore[return-value]


def _refuse(model: nn.Module, section: LoraAdapter, targets: Targets) -> None:
    """What a method cannot do on this base.  Raises RecipeError."""
    beside = "target attention alone: adapter.targets = attention."
    if targets.parameters and section.dropout:
        raise RecipeError(
            f"adapter.dropout = {section.dropout} cannot be used on this base's fused experts ({targets.parameters[0]}).",
            f"Set adapter.dropout to 0, or {beside}",
        )
    if targets.parameters and section.method in ("dora", "pissa", "loftq"):
        why = {
            "dora": "PEFT has no DoRA for weights of three dimensions",
            "pissa": "the SVD of each expert would begin an adapter of its own",
            "loftq": "they are not stored as layers that NF4 rounds one by one",
        }[section.method]
        raise RecipeError(
            f"adapter.method = {section.method} cannot be used on this base's fused experts ({targets.parameters[0]}): {why}.",
            f"Use adapter.method = lora, or {beside}",
        )
    if section.method == "dora" and section.precision == "bf16":
        raise RecipeError(
            "adapter.precision = bf16 cannot be used with adapter.method = dora: it rounds the norms it divides by.",
            "Set adapter.precision to fp32, or adapter.method to lora.",
        )
    if isinstance(section, PissaAdapter):
        for name in targets.modules:
            if not model.get_parameter(f"{name}.weight").is_floating_point():
                raise RecipeError(
                    f"adapter.method = pissa takes its adapter out of the base's own weights, and {name} is quantized.",
                    "Set model.storage to bf16; or adapter.method to loftq, which makes up for the rounding of nf4.",
                )


def _peft_config(model: nn.Module, section: LoraAdapter, targets: Targets) -> LoraConfig:
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    halves = 2 if isinstance(section, PissaAdapter) else 1
    return LoraConfig(
        r=halves * section.rank,
        lora_alpha=halves * section.resolved_alpha,  # type: ignore[arg-type]
        use_rslora=section.method == "rslora",
        use_dora=section.method == "dora",
        lora_dropout=section.dropout,
        bias=section.bias,
        target_modules=_shortest_names(model, targets.modules),
        target_parameters=_shortest_parameters(model, targets.parameters) or None,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets.modules),
    )


def _set_precision(adapted: nn.Module, section: LoraAdapter) -> None:
    for module in adapted_modules(adapted).values():
        for part, weight in module.items():
            if section.precision == "bf16" and part != "magnitude":
                weight.data = weight.data.to(torch.bfloat16)
            elif weight.dtype != torch.float64:
                weight.data = weight.data.to(torch.float32)


def _begin(
    adapted: nn.Module, section: LoraAdapter, *, seed: int, factors: Mapping[str, Factors] | None, resumed: bool
) -> None:
    """The first weights of the methods that do not begin as plain LoRA does."""
    if resumed:
        return
    for name, module in adapted_modules(adapted).items():
        plain = name.removeprefix(PREFIX)
        if isinstance(section, PissaAdapter):
            first = begin_factors(
                _weight(adapted, name), rank=section.rank, scale=section.scale, iterations=section.svd_iterations, seed=seed, name=plain
            )  # fmt: skip
            put_pissa(module["A"], module["B"], first)
        elif isinstance(section, LoftqAdapter):
            if factors is not None and plain in factors:
                put_loftq(module["A"], module["B"], factors[plain])
            elif not factors or isinstance(_base_layer(adapted, name), QuantizedLinear):
                raise RecipeError(
                    f"adapter.method = loftq makes up for the rounding of nf4, which is not known for {plain}.",
                    "Set model.storage to nf4, or adapter.method to lora.",
                )
            # What stays in 16 bits has nothing to make up for, and begins as plain LoRA does.
        elif section.method == "dora":
            # PEFT's own start is rounded to the base's precision; the first output would not be the base's.
            norm = torch.linalg.vector_norm(_weight(adapted, name).to(module["magnitude"].dtype), dim=1)
            module["magnitude"].data.copy_(norm)


def _base_layer(adapted: nn.Module, name: str) -> nn.Module:
    from peft.tuners.lora import Linear

    layer = adapted.get_submodule(name)
    assert isinstance(layer, Linear)
    return layer.get_base_layer()


def _weight(adapted: nn.Module, name: str) -> Tensor:
    """W (O, I) of the layer under an adapter, as it is used."""
    base = _base_layer(adapted, name)
    if isinstance(base, QuantizedLinear):
        return base.dequantize()
    weight = base.get_parameter("weight").detach()
    return weight if isinstance(base, nn.Linear) else weight.t()  # Conv1D is one transposed.


def held_parts(adapted: nn.Module, section: LoraAdapter) -> Held:
    """What `onlay.training.optimizer.hold` is to keep as it is now: PiSSA's second halves; of other methods nothing."""
    held: dict[nn.Parameter, tuple[tuple[slice, ...], Tensor]] = {}
    if isinstance(section, PissaAdapter):
        for module in adapted_modules(adapted).values():
            held |= held_halves(module["A"], module["B"])
    return held


def _shortest_names(model: nn.Module, modules: tuple[str, ...]) -> list[str]:
    """Leaf names where they mean exactly these modules (portable and short), else the full names."""
    leaves = sorted({_leaf(name) for name in modules})
    matched = {name for name, _ in model.named_modules() if _leaf(name) in leaves}
    return leaves if matched == set(modules) else list(modules)


def _shortest_parameters(model: nn.Module, parameters: tuple[str, ...]) -> list[str]:
    tails = sorted({".".join(name.split(".")[-2:]) for name in parameters})
    matched = {name for name, _ in model.named_parameters() if any(name.endswith("." + tail) for tail in tails)}
    return tails if matched == set(parameters) else list(parameters)


def save_adapter(model: PeftModel, folder: Path, *, facts: ModelFacts, extra: dict[str, Any]) -> None:
    """Writes adapter_model.safetensors, adapter_config.json and onlay.json into `folder`."""
    for config in model.peft_config.values():
        # The hub name where there is one, so that plain PEFT can fetch the base by itself.
        config.base_model_name_or_path = facts.name if facts.revision else facts.path
        config.revision = facts.revision
    try:
        model.save_pretrained(str(folder), save_embedding_layers=False)
    except OSError as error:
        raise OutputError(f"{folder} could not be written: {error}.", "Free disk space, then resume the run.") from None
    write_whole(folder / "onlay.json", json.dumps(base_identity(facts) | extra, indent=2) + "\n")


def base_identity(facts: ModelFacts) -> dict[str, Any]:
    return {
        "base": facts.name,
        "base_revision": facts.revision,
        "base_weight_fingerprint": facts.weight_fingerprint,
        "base_architecture": facts.architecture,
        "base_num_layers": facts.num_layers,
        "base_vocabulary_size": facts.vocabulary_size,
    }


def load_adapter(
    model: nn.Module, folder: Path, *, facts: ModelFacts, storage: str | None = None, name: str = "default"
) -> PeftModel:
    """Puts a saved adapter on its base, for use; under a `name`, beside those that the model holds already.

    Raises OutputError when it is not there, and BaseModelError when it was trained on another base or a weight of it has
    no place in this one.  `storage` is how the base is kept; None does not look at that.
    """
    from peft import PeftModel, get_peft_model_state_dict

    check(folder, facts, storage=storage)
    adapter = read_adapter(folder)
    modules = dict((model.get_base_model() if isinstance(model, PeftModel) else model).named_modules())
    for module, (outputs, inputs) in adapter.shapes.items():
        found = _sizes(modules.get(module))
        if found != (outputs, inputs):
            here = "has no such layer" if found is None else f"has {found[0]:,} x {found[1]:,}"
            raise BaseModelError(
                f"{folder} does not fit {facts.path}: {module} is {outputs:,} x {inputs:,} (outputs x inputs) in its base, this one {here}.",
                adapter.remedy,
            )
    if isinstance(model, PeftModel):
        adapted = model
        adapted.load_adapter(str(folder), name, is_trainable=False)
    else:
        adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=False)
    # PEFT makes what the file does not hold anew, and leaves out what the model has no place for; of fused experts it
    # may have rewritten the names.
    held = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False).keys()
    odd = sorted(key for key in held ^ set(adapter.tensors) if ".experts." not in key)
    if odd:
        side = "is not in the adapter" if odd[0] in held else "has no place in this base"
        raise BaseModelError(f"{folder} does not fit {facts.path}: {odd[0]} {side}.", adapter.remedy)
    adapted.eval()
    return adapted


def load_adapters(
    model: nn.Module, folders: Mapping[str, Path], *, facts: ModelFacts, storage: str | None = None
) -> PeftModel:
    """Puts saved adapters on one base, each under its name.  The first is active; raises as `load_adapter` does."""
    assert folders
    for name, folder in folders.items():
        if "." in name or name in "lora_":
            raise OutputError(
                f"{name!r} cannot be an adapter's name.", "Use one without dots that is no part of `lora_`: support_2."
            )
        bias = read_adapter(folder).config.get("bias", "none")
        if len(folders) > 1 and bias != "none":
            raise BaseModelError(
                f"{folder} was trained with bias = {bias}: its biases take the place of the base's, for all adapters.",
                "Load it alone.",
            )
    for name, folder in folders.items():
        model = load_adapter(model, folder, facts=facts, storage=storage, name=name)
    return model  # type: ignore[return-value]


def _sizes(module: nn.Module | None) -> tuple[int, int] | None:
    """Outputs and inputs of a linear layer; None of what is no such layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else None


def adapted_modules(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Each adapted module's trainable parts: {"...q_proj": {"A": (R, I), "B": (O, R)}}, and "magnitude" (O,) with DoRA."""
    parts: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        match = re.match(r"(.*)\.lora_(?:([AB])|magnitude_vector)\.[^.]+\.weight$", name)
        if match and parameter.requires_grad:
            parts.setdefault(match[1], {})[match[2] or "magnitude"] = parameter
    return parts
