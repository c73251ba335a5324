"""RMSNorm with a frozen weight, forward and backward, with what stands next to it in a layer done in the same pass.

What and why.  Between two matrix products a layer's rows go through memory once for each op.  Here the norm and, on the way
back, the adapters' part of the gradient and the residual's are one pass each:

    forward    r = 1 / sqrt(mean(x^2) + eps)        y = x r (w + offset)         and, where asked, y in FP8 with a scale a row
    backward   g = (dy + h A) (w + offset)          n = x r
               dx = r (g - n mean(g n)) + residual

h (T, R) is the gradient of an adapter's inner rows and A (R, D) its first factor: h A is what the adapters add to dy; residual
(T, D) is the gradient that goes around the block.  offset is 1 for norms that keep w - 1 (Gemma's), else 0.
Layout.  x (T, D) contiguous, w (D,), r (T,).  A program computes one row.
Precision.  float32 inside (float64 for float64), each result rounded once; transformers rounds x r first.  h A accumulates in float32.
What the frozen base lets us skip.  The gradient of w; and y is not kept for the backward: its product with anything, as in
dA = h^T y, is diag(w) (h r)^T x.
When it is *not* used.  For norms that train, that centre, or of another form: onlay/model/forms.py tries each.
Source: RMSNorm (arXiv:1910.07467).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onlay.kernels.dispatch import runs_fast
from onlay.kernels.fp8_rows import Fp8Rows, reference_quantize_rows
from onlay.kernels.updates import Update


@dataclass(frozen=True, slots=True)
class Normed:
    y: Tensor | None
    """(T, D) in the dtype of x; None where only FP8 was asked for."""
    r: Tensor
    """(T,) float32 (float64 for float64)."""
    rows: Fp8Rows | None


def normalise(
    x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, plain: bool = True, quantize: bool = False
) -> Normed:
    """x (T, D) -> y (T, D) where `plain`, and in FP8 where `quantize`."""
    if runs_fast(x):
        from onlay.kernels.normalise_triton import normalise as fast

        return Normed(*fast(x, weight, eps=eps, offset=offset, plain=plain, quantize=quantize))
    return reference_normalise(x, weight, eps=eps, offset=offset, plain=plain, quantize=quantize)


def normalise_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    *,
    offset: float = 0.0,
    update: Update | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """dx (T, D) of grad (T, D).  May write into `grad` and return it."""
    if runs_fast(x):
        from onlay.kernels.normalise_triton import normalise_backward as fast

        return fast(grad, x, weight, r, offset=offset, update=update, residual=residual)
    return reference_normalise_backward(grad, x, weight, r, offset=offset, update=update, residual=residual)


def wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def reference_normalise(x: Tensor, weight: Tensor, *, eps: float, offset: float, plain: bool, quantize: bool) -> Normed:
    r = (torch.linalg.vector_norm(wide(x), dim=1).square() / x.shape[1] + eps).rsqrt()
    y = (wide(x) * r[:, None]).mul_(wide(weight) + offset).to(x.dtype)
    return Normed(y if plain else None, r, reference_quantize_rows(y) if quantize else None)


def reference_normalise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, r: Tensor, *, offset: float, update: Update | None, residual: Tensor | None
) -> Tensor:
    g = wide(grad)
    if update is not None:
        g = g + wide(update.hidden) @ wide(update.b)
    g = g * (wide(weight) + offset)
    n = wide(x) * r[:, None]
    dx = torch.addcmul(g, n, (g * n).mean(1, keepdim=True), value=-1).mul_(r[:, None])
    return (dx if residual is None else dx.add_(wide(residual))).to(x.dtype)
