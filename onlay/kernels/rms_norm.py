"""RMSNorm with a frozen weight as one autograd node, on a CPU.

What and why.  transformers computes it in eight operations, each of which goes through memory, and keeps five of their
results for the backward.  As one node it is three operations forward and three backward:

    r = 1 / sqrt(mean(x^2) + eps)      n = x r      y = n * w
    dn = dy * w      dx = r (dn - n mean(dn * n))

Layout.  x (..., D), w (D,) -> (..., D); r (..., 1).
Precision.  Everything in the dtype of x, float32; transformers' own norm rounds wider inputs to float32 first.
What the frozen base lets us skip.  The gradient of w.
Kept for the backward.  n and r.
When it is *not* used.  Off the CPU, in 16 bit (transformers' casts are part of the model there), where w trains, and for norms of
another form: onlay/model/norms.py tries each on a vector.
Source: RMSNorm (arXiv:1910.07467).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same by definition."""
    y: Tensor = functional.rms_norm(x, (x.shape[-1],), weight, eps)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D) -> (..., D).  Gradient for x; weight (D,) is frozen; can be differentiated once."""
    y: Tensor = _RmsNorm.apply(x, weight, eps)
    return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        n = x * r
        ctx.save_for_backward(n, r, weight)
        y: Tensor = n * weight
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        n, r, weight = ctx.saved_tensors
        dn = grad * weight
        along = (dn * n).mean(-1, keepdim=True)
        dx: Tensor = dn.addcmul_(n, along, value=-1).mul_(r)
        return dx, None, None
