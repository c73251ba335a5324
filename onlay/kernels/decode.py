"""What one decoding step does between its matrix products, in one kernel each: rotary embedding into the cache, and SwiGLU.

What and why.  A step of decoding has one token a row, so every product reads a whole weight for a few rows, and what stands
between the products is launches: normalising heads, rotating, joining, storing and multiplying take ten kernels of 3 to
10 microseconds each in transformers, a third of a step of an 8B base.  Here they are one kernel each, and the adapters'
B products are added inside while the outputs are in registers anyway:

    z = y + h B            y (N, O) the base's product, h (N, S) = (x A^T) * mask, B (S, O): onlay/kernels/grouped_lora.py
    n = z * rsqrt(mean(z^2) + eps) * weight             by head, where the base normalises queries and keys
    out = n * cos + rotate_half(n) * sin                queries to their place, keys and values into column c of the cache
    swiglu: silu(z_gate) * z_up
    residual: x + z

Layout.  y (N, heads * D) contiguous, D = 2 * HALF with HALF a power of two of at least 16; cos, sin (N, D); keys and values
(N, heads, columns, D) contiguous; B (S, O) contiguous.  A program computes one head (or BLOCK columns of the MLP) of up to 64 rows.
Precision.  Products accumulate in float32 onto y; z is rounded to the dtype of y, as it is when the product is a kernel of its
own; what follows is float32 and rounded once, where transformers rounds after each operation.
Forward only: nothing is trained while decoding.
When it is *not* used.  On a CPU and without Triton the reference below runs; for heads of other widths, partial or interleaved
rotation, and everything that onlay/generation/fused.py does not recognise, transformers' own modules run.
Sources.  RoPE (arXiv:2104.09864); SwiGLU (arXiv:2002.05202); S-LoRA (arXiv:2311.03285) for adapters by row.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from onlay.kernels.updates import LEAST_HALF, HeadNorm, Update


def has_kernels(device: torch.device) -> bool:
    """Whether the fast kernels run here; else the reference does."""
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def fits(width: int) -> bool:
    """Whether heads of this width can be rotated by the kernel."""
    half = width // 2
    return width % 2 == 0 and half >= LEAST_HALF and half & (half - 1) == 0


# ------------------------------------------------------------------------------------------------------------ rotation


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    column: Tensor,
    updates: tuple[Update | None, Update | None, Update | None] = (None, None, None),
    norms: tuple[HeadNorm, HeadNorm] | None = None,
) -> Tensor:
    """Rotated queries (N, heads, D); writes rotated keys and the values into `column` (1,) of keys and values, in place.

    q (N, heads * D), k and v (N, groups * D); updates and norms in the order q, k(, v).
    Raises ValueError where the tables are not as wide as the heads: then only a part of each head is rotated.
    """
    if cos.shape[-1] != keys.shape[-1] or sin.shape[-1] != keys.shape[-1]:
        raise ValueError(f"rotary tables of width {cos.shape[-1]} for heads of width {keys.shape[-1]}")
    if has_kernels(q.device):
        from onlay.kernels.decode_triton import rotate_and_store as fast

        return fast(q, k, v, cos=cos, sin=sin, keys=keys, values=values, column=column, updates=updates, norms=norms)
    return reference_rotate_and_store(
        q, k, v, cos=cos, sin=sin, keys=keys, values=values, column=column, updates=updates, norms=norms
    )


def reference_rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    column: Tensor,
    updates: tuple[Update | None, Update | None, Update | None] = (None, None, None),
    norms: tuple[HeadNorm, HeadNorm] | None = None,
) -> Tensor:
    """The same by definition, in any precision."""
    width = keys.shape[-1]
    heads = [_updated(y, update).unflatten(-1, (-1, width)) for y, update in zip((q, k, v), updates, strict=True)]
    for i, norm in enumerate(norms or ()):
        heads[i] = functional.rms_norm(heads[i], (width,), norm.weight, norm.eps)
    cos, sin = cos[:, None], sin[:, None]
    queries, new_keys = _rotated(heads[0], cos, sin), _rotated(heads[1], cos, sin)
    keys.index_copy_(2, column, new_keys[:, :, None].to(keys.dtype))
    values.index_copy_(2, column, heads[2][:, :, None].to(values.dtype))
    return queries


def _updated(y: Tensor, update: Update | None) -> Tensor:
    return y if update is None else torch.addmm(y, update.hidden, update.b)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


# ------------------------------------------------------------------------------------------------------------ residual


def add_residual(x: Tensor, y: Tensor, *, update: Update | None = None) -> Tensor:
    """x + y + h B: (N, D) each."""
    if update is None:
        return x + y
    if has_kernels(x.device):
        from onlay.kernels.decode_triton import add_residual as fast

        total: Tensor = fast(x, y, update=update)
        return total
    return x + _updated(y, update)


# --------------------------------------------------------------------------------------------------------------- trial


def why_not(*, width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """What keeps the fast kernels from running for heads of this width: compiled and compared, adapters and norms included.

    None where nothing does, and where the reference runs anyway.
    """
    if not has_kernels(device):
        return None
    from onlay.kernels import decode_triton

    def draw(*shape: int, seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)

    rows, rank = 5, 24
    hidden = draw(rows, rank, seed=0)
    update = Update(hidden=hidden, b=draw(rank, width, seed=1))
    norm = HeadNorm(weight=draw(width, seed=2), eps=1e-6)
    q, k, v, cos, sin = (draw(rows, width, seed=seed) for seed in range(3, 8))
    column = torch.tensor([1], device=device)
    try:
        for norms in (None, (norm, norm)):
            found = []
            for function in (decode_triton.rotate_and_store, reference_rotate_and_store):
                keys, values = (torch.zeros(rows, 1, 2, width, dtype=dtype, device=device) for _ in range(2))
                queries = function(
                    q,
                    k,
                    v,
                    cos=cos,
                    sin=sin,
                    keys=keys,
                    values=values,
                    column=column,
                    updates=(update,) * 3,
                    norms=norms,
                )
                found.append(torch.cat([queries.flatten(), keys.flatten(), values.flatten()]))
            if (reason := _differ(*found)) is not None:
                return reason
        for fast, slow in (
            (decode_triton.swiglu(q, k, updates=(update, update)), reference_swiglu(q, k, updates=(update, update))),
            (decode_triton.add_residual(q, k, update=update), q + _updated(k, update)),
        ):  # fmt: skip
            if (reason := _differ(fast, slow)) is not None:
                return reason
    except (RuntimeError, decode_triton.TritonError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"the kernels do not run here: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    return None


def _differ(found: Tensor, expected: Tensor) -> str | None:
    difference = float((found.double() - expected.double()).norm() / expected.double().norm())
    # Each number is rounded a few times on either way.
    limit = 8 * torch.finfo(expected.dtype).eps
    return None if difference <= limit else f"the kernels differ by {difference:.1e}, allowed {limit:.1e}"


# -------------------------------------------------------------------------------------------------------------- SwiGLU


def swiglu(gate: Tensor, up: Tensor, *, updates: tuple[Update | None, Update | None] = (None, None)) -> Tensor:
    """silu(gate + h B_gate) * (up + h B_up): (N, I) each."""
    if has_kernels(gate.device):
        from onlay.kernels.decode_triton import swiglu as fast

        product: Tensor = fast(gate, up, updates=updates)
        return product
    return reference_swiglu(gate, up, updates=updates)


def reference_swiglu(
    gate: Tensor, up: Tensor, *, updates: tuple[Update | None, Update | None] = (None, None)
) -> Tensor:
    """The same by definition."""
    gate, up = (_updated(y, update) for y, update in zip((gate, up), updates, strict=True))
    return functional.silu(gate) * up
