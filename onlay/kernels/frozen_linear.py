"""A frozen linear layer whose weight is stored packed and rebuilt each time it is needed, as one autograd node.

What and why.  Autograd would keep the rebuilt 16-bit weight of every layer until the backward pass, which is the memory that
quantizing saved.  This node keeps nothing but the way to rebuild it.

    forward    y = x W^T + b
    backward   dx = dy W (rebuilt again);  db = sum of dy, where the bias trains

Layout.  x (..., I), W (O, I), b (O,) or None -> (..., O); the leading sizes may be anything, zero included.
Precision.  Everything in the dtype of x; under autocast x is cast first, as torch does for its own linear layers.
What the frozen base lets us skip.  dW, and with it keeping x.
Kept for the backward.  `rebuild`, which holds the packed weight; it must not change in between.
When it is *not* used.  For weights that are stored as they are used: torch.nn.functional.linear keeps a reference only.
Source.  QLoRA (arXiv:2305.14314), equations 5 and 6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Rebuild = Callable[[torch.dtype], Tensor]
"""Gives the weight (O, I) in the dtype asked for."""


def frozen_linear(x: Tensor, rebuild: Rebuild, bias: Tensor | None) -> Tensor:
    """x (..., I) -> (..., O).  Gradients for x and bias; can be differentiated once."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    out: Tensor = _FrozenLinear.apply(x, rebuild, bias)
    return out


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rebuild: Rebuild, bias: Tensor | None) -> Tensor:
        ctx.rebuild, ctx.bias_dtype = rebuild, None if bias is None else bias.dtype
        return functional.linear(x, rebuild(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # A backward pass begun under autocast must not turn the products to other numbers than the forward's.
        with torch.autocast(grad.device.type, enabled=False):
            grad_x = grad @ ctx.rebuild(grad.dtype) if ctx.needs_input_grad[0] else None
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias
