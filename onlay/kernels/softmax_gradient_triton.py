"""The kernel of onlay/kernels/softmax_gradient.py, where the equations are.  Imported where it runs: it needs Triton."""

# ruff: noqa: N803  (compile-time constants are written in capitals)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onlay.kernels.tile import power_above

BLOCK_CLASSES = 16384
"""Of a step, 32 kB of 16-bit logits.  Few rows are under way at a time, so the second reading finds them in the cache."""
NUMBERS_A_WARP = 1024
MOST_WARPS = 16


@triton.jit
def _softmax_gradient(
    logits, targets, nats, stride, V: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    aimed = tl.load(logits + target).to(tl.float32)
    largest = aimed
    total = 0.0
    for start in range(0, V, BLOCK):
        classes = start + tl.arange(0, BLOCK)
        z = tl.load(logits + classes, mask=classes < V, other=-float("inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(z - above), 0)
        largest = above
    tl.store(nats + row, tl.log(total) + (largest - aimed))
    if GRADIENT:
        inverse = tl.div_rn(1.0, total)
        for start in range(0, V, BLOCK):
            classes = start + tl.arange(0, BLOCK)
            z = tl.load(logits + classes, mask=classes < V, other=-float("inf")).to(tl.float32)
            chances = tl.exp(z - largest) * inverse - tl.where(classes == target, 1.0, 0.0)
            tl.store(logits + classes, chances.to(logits.dtype.element_ty), mask=classes < V)


def softmax_gradient_(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    """As in onlay/kernels/softmax_gradient.py."""
    assert logits.stride(1) == 1 and targets.is_contiguous()
    count, classes = logits.shape
    nats = torch.empty(count, dtype=torch.float32, device=logits.device)
    if count:
        block = min(BLOCK_CLASSES, power_above(classes))
        launch: Any = _softmax_gradient[(count,)]
        launch(
            logits, targets, nats, logits.stride(0), V=classes, BLOCK=block, GRADIENT=gradient,
            num_warps=min(MOST_WARPS, max(4, block // NUMBERS_A_WARP)),
        )  # fmt: skip
    return nats
