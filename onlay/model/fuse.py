"""The fast path: replaces what adapted layers compute by one op each, per instance, and can put everything back.

Nothing is patched globally: a layer that is covered gets a `forward` of its own, which steps aside whenever the layer is
asked for something else (adapter off, merged, 16 bit).  A layer that is not covered keeps PEFT's, and the Run says why.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from onlay.kernels.lora_linear import lora_linear


def fuse(model: nn.Module) -> dict[str, str]:
    """Puts adapted linear layers on the fast path.  Returns {reason: names of what stays on the ordinary one}."""
    from peft.tuners.lora import LoraLayer

    ordinary: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        reason = _not_covered(layer)
        if reason is None:
            layer.forward = partial(_forward, layer)
        else:
            ordinary.setdefault(reason, []).append(name)
    return {reason: f"{len(names)} layers, first {names[0]}" for reason, names in ordinary.items()}


def unfuse(model: nn.Module) -> None:
    """Every layer as PEFT made it."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _forward:
            del module.forward


def _not_covered(module: Any) -> str | None:
    from peft.tuners.lora import Linear

    if type(module) is not Linear or type(module.base_layer) is not nn.Linear or module.fan_in_fan_out:
        return f"adapters on {type(module.get_base_layer()).__name__}"
    [adapter] = module.lora_A
    if adapter in module.lora_variant:
        return "DoRA"
    if not isinstance(module.lora_dropout[adapter], nn.Identity):
        return "dropout"
    if module.lora_bias[adapter]:
        return "a bias in the adapter"
    weight = module.base_layer.weight
    if weight.device.type != "cpu":
        return f"device {weight.device.type}"
    if weight.dtype not in (torch.float32, torch.float64):
        return f"weights in {_name(weight.dtype)}"
    if module.lora_A[adapter].weight.dtype != weight.dtype:
        return f"an adapter in {_name(module.lora_A[adapter].weight.dtype)} on weights in {_name(weight.dtype)}"
    if weight.requires_grad or (module.base_layer.bias is not None and module.base_layer.bias.requires_grad):
        return "a base layer that trains"
    return None


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _forward(module: Any, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    """The forward of PEFT's Linear, through one op where that gives the same."""
    [adapter] = module.lora_A
    aside = module.disable_adapters or module.merged or adapter not in module.active_adapters or args or kwargs
    base = module.base_layer
    if aside or x.dtype != base.weight.dtype or torch.is_autocast_enabled(x.device.type):
        ordinary: Tensor = type(module).forward(module, x, *args, **kwargs)
        return ordinary
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    return lora_linear(x, base.weight, base.bias, a, b, module.scaling[adapter])
