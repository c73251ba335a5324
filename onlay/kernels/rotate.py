"""Queries, keys and values of a training step: adapters' part, norm by head and rotary embedding in one pass, and back.

What and why.  Between the product of q, k and v and the attention stand, in transformers, the adapters' products, views, norms,
the rotation in six ops and copies; here one pass forward and one backward, which writes the three gradients side by side:

    z = y + h B                                         y (T, (H + 2 G) D) the base's product
    n = z r (w + offset),  r = 1 / sqrt(mean(z^2) + eps)   by head of q and k, where the base normalises them; else n = z
    q, k = n cos + rotate_half(n) sin                   on the first W columns of a head; the others, and v, as they are

    backward: dn = dq cos + rotate_half^T(dq sin),   dz = r (g - m mean(g m)) with g = dn (w + offset), m = z r;  dy = dz

Layout.  y (T, (H + 2 G) D), rows contiguous, any distance between them; cos, sin (T, W) with W <= D even; q (T, H, D), k and v
(T, G, D) contiguous; each adapter's h (T, R) of any row distance, B (R, O) contiguous; r (T, H + G).
Precision.  float32 inside (float64 for float64), each result rounded once, where transformers rounds after each op.
What the frozen base lets us skip.  The gradients of the norms' weights.
Kept for the backward.  Nothing of q, k and v before the rotation, unless the base normalises them: then y, r and h.
When it is *not* used.  For interleaved rotation and everything that onlay/model/forms.py does not recognise.
Sources.  RoPE (arXiv:2104.09864); queries and keys normalised by head (arXiv:2010.04245).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onlay.kernels.dispatch import runs_fast
from onlay.kernels.gated import added
from onlay.kernels.normalise import wide
from onlay.kernels.updates import Update


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """How the columns of y are heads, and their norms."""

    queries: int
    groups: int
    """Heads of keys, and of values."""
    width: int
    q_norm: Tensor | None = None
    """(width,)"""
    k_norm: Tensor | None = None
    eps: float = 0.0
    offset: float = 0.0

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.queries * self.width, self.groups * self.width, self.groups * self.width


Updates = tuple[Update | None, Update | None, Update | None]


@dataclass(frozen=True, slots=True)
class Rotated:
    q: Tensor
    k: Tensor
    v: Tensor
    r: Tensor | None
    """(T, H + G) where there are norms."""


def rotate(y: Tensor, cos: Tensor, sin: Tensor, *, heads: Heads, updates: Updates = (None, None, None)) -> Rotated:
    """y (T, (H + 2 G) D) -> q (T, H, D), k (T, G, D), v (T, G, D)."""
    if runs_fast(y):
        from onlay.kernels.rotate_triton import rotate as fast

        return Rotated(*fast(y, cos, sin, heads=heads, updates=updates))
    return reference_rotate(y, cos, sin, heads=heads, updates=updates)


def rotate_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, *, heads: Heads, y: Tensor | None = None,
    r: Tensor | None = None, updates: Updates = (None, None, None),
) -> Tensor:  # fmt: skip
    """dy (T, (H + 2 G) D).  y, r and updates, as given to and by `rotate`, are needed where there are norms."""
    if runs_fast(dq):
        from onlay.kernels.rotate_triton import rotate_backward as fast

        return fast(dq, dk, dv, cos, sin, heads=heads, y=y, r=r, updates=updates)
    return reference_rotate_backward(dq, dk, dv, cos, sin, heads=heads, y=y, r=r, updates=updates)


def _turn(n: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """n (T, heads, D); back: the transposed rotation."""
    half = cos.shape[-1] // 2
    c, s = wide(cos)[:, None], wide(sin)[:, None]
    left, right = n[..., :half], n[..., half : 2 * half]
    sin_left, sin_right = (s[..., half:], -s[..., :half]) if back else (-s[..., :half], s[..., half:])
    turned = [
        torch.addcmul(left * c[..., :half], right, sin_left),
        torch.addcmul(right * c[..., half:], left, sin_right),
    ]
    return torch.cat([*turned, n[..., 2 * half :]] if 2 * half < n.shape[-1] else turned, -1)


def _split(y: Tensor, heads: Heads, updates: Updates) -> list[Tensor]:
    parts = y.split(heads.sizes, -1)
    return [added(part, update).unflatten(-1, (-1, heads.width)) for part, update in zip(parts, updates, strict=True)]


def reference_rotate(y: Tensor, cos: Tensor, sin: Tensor, *, heads: Heads, updates: Updates) -> Rotated:
    out, scales = [], []
    *pair, v = _split(y, heads, updates)
    for z, weight in zip(pair, (heads.q_norm, heads.k_norm), strict=True):
        n = z
        if weight is not None:
            r = z.square().mean(-1).add(heads.eps).rsqrt()
            scales.append(r)
            n = z * r[..., None] * (wide(weight) + heads.offset)
        out.append(_turn(n, cos, sin).to(y.dtype))
    return Rotated(out[0], out[1], v.to(y.dtype), torch.cat(scales, 1) if scales else None)


def reference_rotate_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, *, heads: Heads, y: Tensor | None, r: Tensor | None,
    updates: Updates,
) -> Tensor:  # fmt: skip
    grads = [_turn(wide(d), cos, sin, back=True) for d in (dq, dk)]
    if heads.q_norm is not None:
        assert y is not None and r is not None
        zs = _split(y, heads, updates)
        for place, (weight, scale) in enumerate(
            zip((heads.q_norm, heads.k_norm), r.split([heads.queries, heads.groups], 1), strict=True)
        ):
            assert weight is not None
            g = grads[place] * (wide(weight) + heads.offset)
            m = zs[place] * scale[..., None]
            grads[place] = scale[..., None] * (g - m * (g * m).mean(-1, keepdim=True))
    return torch.cat([d.flatten(1) for d in (*grads, wide(dv))], 1).to(dq.dtype)
