"""AdamW over the trainable weights, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from onlay.recipe import TrainingSection


def make_optimizer(trainable: Mapping[str, nn.Parameter], *, weight_decay: float) -> torch.optim.AdamW:
    """Weight decay pulls matrices only: biases, norms and other vectors are left out of it, as is usual."""
    matrices = [p for p in trainable.values() if p.ndim >= 2]
    vectors = [p for p in trainable.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    on_gpu = any(p.is_cuda for p in trainable.values())
    # lr is set before every step; fused on the GPU: one launch instead of one a tensor.
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, fused=on_gpu or None)


def learning_rate_at(step: int, *, peak: float, total_steps: int, section: TrainingSection) -> float:
    """Rate of optimizer step `step` (1 is the first, which already moves).  Cosine and linear end at zero after the last."""
    warmup_steps = math.ceil(section.warmup_fraction * total_steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    if section.scheduler == "constant":
        return peak
    if section.scheduler == "linear":
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
