"""Norms of a base: which of them are plain RMSNorms, tried and not looked up, and the fast path for them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from onlay.kernels.rms_norm import rms_norm


def eps_of(norm: Any) -> float | None:
    """What a norm adds before the root, under the names that transformers uses."""
    found = (vars(norm).get(name) for name in ("variance_epsilon", "eps"))
    return next((float(value) for value in found if value is not None), None)


def is_rms_norm(module: Any) -> bool:
    """Whether it computes weight * x / sqrt(mean(x^2) + eps): tried on two vectors."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    eps = eps_of(module)
    if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.dim() != 1 or eps is None:
        return False
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, len(weight), generator=draw).to(weight)
    with torch.no_grad():
        own, ours = type(module).forward(module, x), functional.rms_norm(x, (len(weight),), weight, eps)
    limit = 4 * max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
    return bool((own - ours).float().norm() <= limit * own.float().norm())


def fuse_norms(model: nn.Module) -> str:
    """Puts frozen RMSNorms on the fast path.  Returns how many, and why others are not, for the Run."""
    kinds = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    covered: list[tuple[Any, float]] = []
    reasons: dict[str, int] = {}
    for module in kinds:
        reason, eps = _not_covered(module), eps_of(module)
        if reason is None and eps is not None:
            covered.append((module, eps))
        else:
            reasons[reason or "another form"] = reasons.get(reason or "another form", 0) + 1
    for module, eps in covered:
        module.forward = partial(_forward, module, eps)
    said = [f"{len(covered)} RMSNorms as one op each"] if covered else []
    return "; ".join(said + [f"{count} as the base has them: {reason}" for reason, count in reasons.items()])


def unfuse_norms(model: nn.Module) -> None:
    """Every norm as the base has it."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _forward:
            del module.forward


def _not_covered(module: Any) -> str | None:
    if "forward" in vars(module):
        return "something else has replaced their forward"
    parameters = list(module.parameters())
    if any(parameter.requires_grad for parameter in parameters):
        return "they train"
    for parameter in parameters:
        if parameter.device.type != "cpu":
            return f"device {parameter.device.type}"
        if parameter.dtype != torch.float32:
            return f"weights in {str(parameter.dtype).removeprefix('torch.')}"
    return None if is_rms_norm(module) else "another form"


def _forward(module: Any, eps: float, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    """The norm's forward, through one op where that gives the same."""
    if args or kwargs or hidden_states.dtype != torch.float32:
        ordinary: Tensor = type(module).forward(module, hidden_states, *args, **kwargs)
        return ordinary
    return rms_norm(hidden_states, module.weight, eps)
