"""Norms of a base: which of them are RMSNorms, and of which kind: tried and not looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def eps_of(norm: Any) -> float | None:
    """What a norm adds before the root, under the names that transformers uses."""
    found = (vars(norm).get(name) for name in ("variance_epsilon", "eps"))
    return next((float(value) for value in found if value is not None), None)


def offset_of(module: Any) -> float | None:
    """0 where it computes weight * x / sqrt(mean(x^2) + eps), 1 with weight + 1 instead, None for anything else: tried on two vectors."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    eps = eps_of(module)
    if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.dim() != 1 or eps is None:
        return None
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, len(weight), generator=draw).to(weight)
    limit = 4 * max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
    with torch.no_grad():
        own = type(module).forward(module, x).float()
        for offset in (0.0, 1.0):
            ours = functional.rms_norm(x, (len(weight),), (weight.float() + offset).to(weight), eps).float()
            if (own - ours).norm() <= limit * own.norm():
                return offset
    return None


def is_rms_norm(module: Any) -> bool:
    """Whether it computes weight * x / sqrt(mean(x^2) + eps)."""
    return offset_of(module) == 0.0
