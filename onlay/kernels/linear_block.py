"""A frozen linear layer with its adapter as one autograd node, where no larger node covers it.

    y = x W^T + bias + h B^T,  h = x (s A)^T          backward as in onlay/kernels/lora_group.py

Layout.  x (..., I) -> (..., O).
Kept for the backward.  x and h.
Precision.  Products in the dtype of x with sums in float32; y is rounded once more when the adapter's part is added.
When it is *not* used.  With DoRA.
Source: LoRA (arXiv:2106.09685), equation 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from onlay.kernels.fp8 import quantize_rows
from onlay.kernels.lora_group import Factors, Group, draw_seed


def linear_block(x: Tensor, group: Group, parameters: list[Tensor]) -> Tensor:
    """x (..., I) -> (..., O) for a group of one layer.  Can be differentiated once."""
    out: Tensor = _LinearBlock.apply(x, group, *parameters)
    return out


class _LinearBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, *parameters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            factors = Factors.of(group, parameters, x.dtype)
            seed = draw_seed(group)
            y = factors.product(quantize_rows(rows) if group.frozen.fp8 else rows)
            hidden = factors.hidden_of(rows, seed=seed)
            if hidden is not None:
                y.addmm_(hidden, factors.b[0].t())
        ctx.group, ctx.seed, ctx.shape = group, seed, x.shape
        ctx.save_for_backward(rows, hidden, *parameters)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, *parameters = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            dy = grad.reshape(len(rows), -1).contiguous()
            factors = Factors.of(ctx.group, parameters, rows.dtype)
            g = factors.hidden_grad(dy)
            found = factors.gradients(rows, dy, hidden, g, seed=ctx.seed)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = factors.add_input_grad(factors.back_product(dy), g, seed=ctx.seed).view(ctx.shape)
        return dx, None, *found
