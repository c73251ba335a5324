"""What a block adds to the rows that go around it, with the adapters' part; and dropout whose mask is never stored.

    add_update     x + y + h B                           x (T, D) the residual (or none), y (T, D) the base's product
    drop_rows      y = x m / (1 - p),   m = 1 where a number drawn from (seed, place) is at least p
    add_dropped    y + u m / (1 - p)                     with the same m: the way back

Layout.  All (T, D) contiguous; h (T, R) of any row distance, B (R, D) contiguous.
Precision.  float32 inside (float64 for float64), rounded once.
The draw is Philox by (seed, place) on a GPU and the generator of the CPU there: the same seed gives the same mask on the same
kind of device, which is all that forward and backward need.
Sources.  Dropout (arXiv:1207.0580); Philox (Salmon et al., SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

from onlay.kernels.dispatch import runs_fast
from onlay.kernels.gated import added
from onlay.kernels.normalise import wide
from onlay.kernels.updates import Update


def add_update(y: Tensor, *, update: Update | None, residual: Tensor | None) -> Tensor:
    """y (T, D) with the rest added; may write into y and return it, never into `residual`."""
    if update is None and residual is None:
        return y
    if runs_fast(y):
        from onlay.kernels.residual_triton import add_update as fast

        return fast(y, update=update, residual=residual)
    return reference_add_update(y, update=update, residual=residual)


def drop_rows(x: Tensor, *, seed: int, p: float) -> Tensor:
    """x (T, D) with a share of p dropped, into a new tensor.  seed: 0 .. 2^31 - 1."""
    if runs_fast(x):
        from onlay.kernels.residual_triton import drop_rows as fast

        return fast(x, seed=seed, p=p)
    return (wide(x) * reference_mask(x, seed=seed, p=p)).to(x.dtype)


def add_dropped(y: Tensor, u: Tensor, *, seed: int, p: float) -> Tensor:
    """y + u with a share of p of u dropped, written into y."""
    if runs_fast(y):
        from onlay.kernels.residual_triton import add_dropped as fast

        return fast(y, u, seed=seed, p=p)
    return y.copy_(wide(y) + wide(u) * reference_mask(y, seed=seed, p=p))


def reference_add_update(y: Tensor, *, update: Update | None, residual: Tensor | None) -> Tensor:
    z = added(y, update)
    return (z if residual is None else z + wide(residual)).to(y.dtype)


def reference_mask(x: Tensor, *, seed: int, p: float) -> Tensor:
    """(T, D): 0 or 1 / (1 - p)."""
    drawn = torch.rand(x.shape, generator=torch.Generator(x.device).manual_seed(seed), device=x.device)
    return (drawn >= p).to(wide(x).dtype) / (1.0 - p)
