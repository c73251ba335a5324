"""How many parameters a base has under an adapter, and how many of them train: equal to PEFT's own count.

A linear layer (O, I) gets A (R, I) and B (O, R): R (I + O) parameters.  DoRA adds a magnitude (O,), PiSSA has twice the
rank, a weight of E fused experts gets A (R E, I) and B (O, R E).  Source: Hu et al., LoRA, arXiv 2106.09685, section 4;
PEFT's layers for the rest.  A base that is known only on the meta device is counted there, with the adapter attached.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from onlay.errors import BaseModelError, RecipeError
from onlay.model.targets import is_wanted
from onlay.planning.families import Linear
from onlay.planning.shapes import BaseShape, How, build_on_meta
from onlay.recipe import FullTuning, HeadAdapter, LoraAdapter, PissaAdapter

AdapterSection = LoraAdapter | HeadAdapter | FullTuning

_NUMBER = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Parameters in memory while a method trains."""

    total: int
    """Base and what was added to it; with method head the base's body and the new head, with full the base."""
    trainable: int
    """Those with a gradient."""
    held: int
    """Of the trainable ones, those that are kept as they are: the half of PiSSA that stands for the base's part."""
    modules: dict[str, int]
    """Trainable parameters by the name of their module without the number of the layer, as self_attn.q_proj; `biases`
    are those of the base."""
    how: How

    @property
    def share(self) -> float:
        """trainable / total."""
        return self.trainable / self.total


def count_parameters(shape: BaseShape, section: AdapterSection, *, num_labels: int | None = None) -> ParameterCount:
    """Counts for one base and one adapter section; num_labels is needed for method head, whose size goes by it.

    Within milliseconds where `shape.how` is closed form; else torch is imported and the adapter attached to a model
    without weights.  Raises RecipeError for targets that the base does not have or a method that it does not allow, and
    BaseModelError for a preset that finds nothing.
    """
    if isinstance(section, FullTuning):
        whole = shape.num_parameters
        return ParameterCount(total=whole, trainable=whole, held=0, modules={"base": whole}, how=shape.how)
    if isinstance(section, HeadAdapter):
        return _count_head(shape, num_labels)
    if shape.how == "meta device":
        return _count_attached(shape, section)
    chosen = choose_linears(shape, section.targets)
    _refuse(section, chosen)
    return _count(shape, section, chosen)


def choose_linears(shape: BaseShape, targets: str | list[str]) -> list[Linear]:
    """The linear layers of a shape that a preset or a list of names means; of each group those layers that it names.

    For shapes whose `how` is closed form.  Raises RecipeError for a name that matches nothing, BaseModelError for a preset
    that finds nothing.
    """
    if isinstance(targets, list):
        missing = next((entry for entry in targets if not any(_of(linear, [entry]) for linear in shape.linears)), None)
        if missing is not None:
            own = ", ".join(dict.fromkeys(_short(linear) for linear in shape.linears))
            raise RecipeError(f"adapter.targets: {missing} is not a module of {shape.name}.", f"Its own are: {own}.")
    chosen = [part for linear in shape.linears if (part := _of(linear, targets)) is not None]
    if not chosen:
        own = ", ".join(dict.fromkeys(_short(linear) for linear in shape.linears))
        raise BaseModelError(
            f"adapter.targets = {targets} finds no module in {shape.name}.", f"Name them: its linear layers are {own}."
        )
    return chosen


def _short(linear: Linear) -> str:
    return ".".join(linear.name.split(".")[-2 if linear.is_expert else -1 :])


def _of(linear: Linear, wanted: str | list[str]) -> Linear | None:
    """The part of a group that is wanted; None: nothing of it."""
    if linear.is_expert and isinstance(wanted, str):
        return linear if wanted in ("all-linear", "mlp") else None
    # Files may lack the outermost prefix that the model's names have.
    names = tuple(
        name
        for name in linear.names
        if is_wanted(name, wanted) or (isinstance(wanted, list) and any(entry.endswith("." + name) for entry in wanted))
    )
    if not names:
        return None
    return Linear(
        name=linear.name, names=names, inputs=linear.inputs, outputs=linear.outputs, bias=linear.bias, experts=linear.experts
    )  # fmt: skip


def _refuse(section: LoraAdapter, chosen: list[Linear]) -> None:
    """What `onlay.model.adapter.attach` would refuse for fused experts, known before there is a model."""
    fused = next((linear for linear in chosen if linear.is_expert), None)
    if fused is None:
        return
    beside = "target attention alone: adapter.targets = attention."
    if section.method in ("dora", "pissa", "loftq"):
        raise RecipeError(
            f"adapter.method = {section.method} cannot be used on this base's fused experts ({fused.names[0]}).",
            f"Use adapter.method = lora, or {beside}",
        )
    if section.dropout:
        raise RecipeError(
            f"adapter.dropout = {section.dropout} cannot be used on this base's fused experts ({fused.names[0]}).",
            f"Set adapter.dropout to 0, or {beside}",
        )


def _count(shape: BaseShape, section: LoraAdapter, chosen: list[Linear]) -> ParameterCount:
    halves = 2 if isinstance(section, PissaAdapter) else 1
    modules: dict[str, int] = defaultdict(int)
    for linear in chosen:
        one = halves * section.rank * linear.matrices * (linear.inputs + linear.outputs)
        modules[linear.name] += linear.count * (one + (linear.outputs if section.method == "dora" else 0))
    added = sum(modules.values())
    biases = {
        "none": 0,
        "all": shape.bias_parameters,
        "lora_only": sum(linear.count * linear.outputs for linear in chosen if linear.bias),
    }[section.bias]
    if biases:
        modules["biases"] = biases
    return ParameterCount(
        total=shape.num_parameters + added, trainable=added + biases, held=added // 2 if halves == 2 else 0,
        modules=dict(modules), how="closed form",
    )  # fmt: skip


def _count_head(shape: BaseShape, num_labels: int | None) -> ParameterCount:
    if num_labels is None or num_labels < 2:
        raise RecipeError(
            f"adapter.method = head has a weight for each label, and num_labels = {num_labels}.",
            "Give the number of different labels in the data, 2 or more.",
        )
    added = num_labels * shape.head_inputs
    if shape.how == "meta device":
        from onlay.model.head import attach_head

        head = attach_head(build_on_meta(shape), [str(label) for label in range(num_labels)])
        total = sum(parameter.numel() for parameter in head.parameters())
    else:
        total = shape.num_parameters - shape.head_parameters - shape.head_bias_parameters + added
    return ParameterCount(total=total, trainable=added, held=0, modules={"score": added}, how=shape.how)


def _count_attached(shape: BaseShape, section: LoraAdapter) -> ParameterCount:
    import torch

    from onlay.model.adapter import PREFIX, attach

    model = build_on_meta(shape)
    with torch.device("meta"):  # PEFT makes its layers on the CPU otherwise, which of large experts takes gigabytes.
        adapted, _ = attach(model, section, seed=0, resumed=True)
    modules: dict[str, int] = defaultdict(int)
    trainable = biases = total = 0
    for full, parameter in adapted.named_parameters():
        total += parameter.numel()
        if not parameter.requires_grad:
            continue
        trainable += parameter.numel()
        if ".lora_" in full:
            layer = full.removeprefix(PREFIX).partition(".lora_")[0]
            modules[_NUMBER.sub("", layer)] += parameter.numel()
        else:
            biases += parameter.numel()
    if biases:
        modules["biases"] = biases
    held = (trainable - biases) // 2 if isinstance(section, PissaAdapter) else 0
    return ParameterCount(total=total, trainable=trainable, held=held, modules=dict(modules), how="meta device")
