"""Adapters in PEFT's format: which modules they sit on, how they are made, saved and loaded.

PEFT supplies the layers and the file format, so that plain PEFT and every server that takes PEFT adapters load them.
Beside PEFT's two files lies `onlay.json`, with the base's name, revision and weight fingerprint.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onlay.errors import BaseModelError, OutputError, RecipeError
from onlay.recipe import LoraAdapter
from onlay.records import ModelFacts, write_whole

if TYPE_CHECKING:
    from peft import PeftModel

ATTENTION_PARENT = re.compile(
    r"(^|[._])(attn|attention|self_attn|self_attention|mixer|temporal_block|mamba)([._]|$)|attention", re.I
)
QUERY_VALUE = re.compile(r"^(q_proj|v_proj|query|value|wq|wv|q_lin|v_lin|q|v)$", re.I)
FUSED_QKV = re.compile(r"^(query_key_value|qkv_proj|qkv|c_attn|wqkv|attn_qkv)$", re.I)

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
            found = [name for name in linears if name == entry or name.endswith("." + entry)]
            found_experts = [name for name in experts if name == entry or name.endswith("." + entry)]
            if not found and not found_experts:
                own = sorted({_leaf(name) for name in linears} | {".".join(name.split(".")[-2:]) for name in experts})
                raise RecipeError(
                    f"adapter.targets: {entry} is not a module of this base.", f"Its own are: {', '.join(own)}."
                )
            modules += found
            parameters += found_experts
        return Targets(modules=tuple(dict.fromkeys(modules)), parameters=tuple(dict.fromkeys(parameters)))
    if wanted == "all-linear":
        return Targets(modules=tuple(linears), parameters=tuple(experts))
    attention = [name for name in linears if ATTENTION_PARENT.search(name.rpartition(".")[0])]
    if wanted == "attention":
        chosen, chosen_experts = attention, []
    elif wanted == "mlp":
        chosen, chosen_experts = [name for name in linears if name not in set(attention)], experts
    elif wanted == "qv":
        chosen = [name for name in attention if QUERY_VALUE.match(_leaf(name)) or FUSED_QKV.match(_leaf(name))]
        chosen_experts = []
    else:
        raise RecipeError(
            f"adapter.targets = {wanted} is not a preset.",
            "Use all-linear, attention, mlp, qv, or a list of module names such as [q_proj, v_proj].",
        )
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


def attach(model: nn.Module, section: LoraAdapter, *, seed: int) -> tuple[PeftModel, list[str]]:
    """Puts a fresh adapter on a frozen base: A (R, I) Kaiming-uniform, B (O, R) zero, so the first output is the base's.

    Adapter weights are float32 over a 16-bit base, else the base's dtype.  Returns the adapted model and the names of the
    modules that a preset wanted but that cannot be adapted: PEFT rewrites the names of some mixture-of-experts bases, and
    Mamba's layers read some weights without calling their module.
    Raises RecipeError or BaseModelError.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    targets = find_targets(model, section.targets)
    if targets.parameters and section.dropout:
        raise RecipeError(
            f"adapter.dropout = {section.dropout} cannot be used on this base's fused experts ({targets.parameters[0]}).",
            "Set adapter.dropout to 0, or target attention alone: adapter.targets = attention.",
        )
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.resolved_alpha,  # type: ignore[arg-type]
        lora_dropout=section.dropout,
        bias=section.bias,
        target_modules=_shortest_names(model, targets.modules),
        target_parameters=_shortest_parameters(model, targets.parameters) or None,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets.modules),
    )
    unused = [name for name in _linear_names(model) if section.targets == "all-linear" and _cannot_adapt(model, name)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    adapted.train()
    have = {name.removeprefix("base_model.model.") for name in adapted_modules(adapted)}
    left_out = unused + [name for name in targets.modules if name not in have]
    if left_out and isinstance(section.targets, list):
        raise BaseModelError(
            f"adapter.targets: {left_out[0]} cannot be adapted in this base: PEFT reads its name as the fused experts'.",
            "Leave it out of adapter.targets.",
        )
    return adapted, left_out  # type: ignore[return-value]


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
    }


def load_adapter(model: nn.Module, folder: Path, *, facts: ModelFacts) -> PeftModel:
    """Puts a saved adapter on its base, for use.  Raises OutputError when it is not there or was trained on another base."""
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise OutputError(f"{folder} holds no adapter.", "Finish the run first: onlay train --resume RUN.")
    notes = folder / "onlay.json"
    if notes.is_file():
        trained_on = json.loads(notes.read_text(encoding="utf-8"))
        if trained_on["base_weight_fingerprint"] != facts.weight_fingerprint:
            raise BaseModelError(
                f"{folder} was trained on {trained_on['base']} with other weights than {facts.path}.",
                f"Use the base at revision {trained_on['base_revision']}, or train again on this one.",
            )
    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    adapted.eval()
    return adapted


def adapted_modules(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Name of each adapted module to its trainable A and B: {"...q_proj": {"A": (R, I), "B": (O, R)}}."""
    pairs: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        match = re.match(r"(.*)\.lora_([AB])\.[^.]+\.weight$", name)
        if match and parameter.requires_grad:
            pairs.setdefault(match[1], {})[match[2]] = parameter
    return pairs
