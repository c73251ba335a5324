"""RMSNorm with a frozen weight as one autograd node, where no larger node covers it.

    y = x r (w + offset),  r = 1 / sqrt(mean(x^2) + eps)         onlay/kernels/normalise.py, forward and backward

Layout.  x (..., D), w (D,) -> (..., D).
Kept for the backward.  x and r.
When it is *not* used.  Where the norm trains, or computes something else.
Source: RMSNorm (arXiv:1910.07467).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from onlay.kernels.mlp_block import Norm
from onlay.kernels.normalise import normalise, normalise_backward


def norm_block(x: Tensor, norm: Norm) -> Tensor:
    """x (..., D) -> (..., D).  Can be differentiated once."""
    out: Tensor = _NormBlock.apply(x, norm)
    return out


class _NormBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        normed = normalise(rows, norm.weight, eps=norm.eps, offset=norm.offset)
        assert normed.y is not None
        ctx.norm = norm
        ctx.save_for_backward(rows, normed.r)
        return normed.y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, r = ctx.saved_tensors
        # Copied: normalise_backward may write over what it is given, and this gradient is autograd's.
        given = grad.reshape(rows.shape).clone(memory_format=torch.contiguous_format)
        return normalise_backward(given, rows, ctx.norm.weight, r, offset=ctx.norm.offset).view(grad.shape), None
