"""The kernels of onlay/kernels/decode.py, where the equations are.  Imported where they run: it needs Triton."""

# ruff: noqa: N803  (compile-time constants are written in capitals)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from onlay.kernels.tile import add_product, parts
from onlay.kernels.updates import MOST_ROWS, HeadNorm, Update

__all__ = ["TritonError", "add_residual", "rotate_and_store", "swiglu"]

BLOCK_SUM = 64
"""Ranks that are multiplied at a time."""
BLOCK_COLUMNS = 64
"""Of the MLP, in one program."""
STEPS_AHEAD = 3
"""Of the ranks' loop: what pays was measured on an H200 (docs/log.md)."""


@triton.jit
def _add_update(
    z, rows, live, columns, within, h, h_stride, b, width, S: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """z (rows, columns) float32 + h B, rounded to the dtype of B; z itself with S = 0."""
    z = add_product(z, rows, live, columns, within, h, h_stride, b, width, S, BLOCK)
    if S > 0:
        z = z.to(b.dtype.element_ty).to(tl.float32)
    return z


@triton.jit
def _head(
    y, width, head, rows, live, h, h_stride, b, cos, sin, norm, eps, out, row_stride,
    S: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """One head of some rows: from y (N, width) to out + row * row_stride."""
    half = tl.arange(0, HALF)
    every = half < HALF
    first = head * 2 * HALF + half
    at = rows[:, None] * width + first[None, :]
    left = tl.load(y + at, mask=live[:, None], other=0.0).to(tl.float32)
    right = tl.load(y + at + HALF, mask=live[:, None], other=0.0).to(tl.float32)
    left = _add_update(left, rows, live, first, every, h, h_stride, b, width, S, BLOCK)
    right = _add_update(right, rows, live, first + HALF, every, h, h_stride, b, width, S, BLOCK)
    if NORM:
        mean = (tl.sum(left * left, 1) + tl.sum(right * right, 1)) / (2 * HALF)
        scale = tl.rsqrt(mean + eps)[:, None]
        left = left * scale * tl.load(norm + half).to(tl.float32)[None, :]
        right = right * scale * tl.load(norm + HALF + half).to(tl.float32)[None, :]
    if ROTATE:
        turn = rows[:, None] * 2 * HALF + half[None, :]
        cos_l = tl.load(cos + turn, mask=live[:, None], other=0.0).to(tl.float32)
        cos_r = tl.load(cos + turn + HALF, mask=live[:, None], other=0.0).to(tl.float32)
        sin_l = tl.load(sin + turn, mask=live[:, None], other=0.0).to(tl.float32)
        sin_r = tl.load(sin + turn + HALF, mask=live[:, None], other=0.0).to(tl.float32)
        left, right = left * cos_l - right * sin_l, right * cos_r + left * sin_r
    to = out + rows[:, None].to(tl.int64) * row_stride + half[None, :]
    tl.store(to, left.to(out.dtype.element_ty), mask=live[:, None])
    tl.store(to + HALF, right.to(out.dtype.element_ty), mask=live[:, None])


@triton.jit
def _rotate_and_store(
    q, k, v, h_q, h_k, h_v, h_stride_q, h_stride_k, h_stride_v,
    b_q, b_k, b_v, cos, sin, q_norm, k_norm, eps, out, keys, values, column, N, columns,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, S_Q: tl.constexpr, S_K: tl.constexpr, S_V: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    kv = GROUPS * 2 * HALF
    cache_row = kv * columns
    if head < HEADS:
        _head(
            q, HEADS * 2 * HALF, head, rows, live, h_q, h_stride_q, b_q, cos, sin, q_norm, eps,
            out + head * 2 * HALF, HEADS * 2 * HALF, S_Q, HALF, BLOCK, NORM, True,
        )  # fmt: skip
    elif head < HEADS + GROUPS:
        group = head - HEADS
        to = (group * columns + tl.load(column).to(tl.int32)) * 2 * HALF
        _head(
            k, kv, group, rows, live, h_k, h_stride_k, b_k, cos, sin, k_norm, eps,
            keys + to, cache_row, S_K, HALF, BLOCK, NORM, True,
        )  # fmt: skip
    else:
        group = head - HEADS - GROUPS
        to = (group * columns + tl.load(column).to(tl.int32)) * 2 * HALF
        _head(
            v, kv, group, rows, live, h_v, h_stride_v, b_v, cos, sin, k_norm, eps,
            values + to, cache_row, S_V, HALF, BLOCK, False, False,
        )  # fmt: skip


@triton.jit
def _swiglu(
    gate, up, h_g, h_u, h_stride_g, h_stride_u, b_g, b_u, out, N, width,
    S_G: tl.constexpr, S_U: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, within = rows < N, columns < width
    at = rows[:, None] * width + columns[None, :]
    there = live[:, None] & within[None, :]
    g = tl.load(gate + at, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=there, other=0.0).to(tl.float32)
    g = _add_update(g, rows, live, columns, within, h_g, h_stride_g, b_g, width, S_G, BLOCK)
    u = _add_update(u, rows, live, columns, within, h_u, h_stride_u, b_u, width, S_U, BLOCK)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(gate.dtype.element_ty), mask=there)


@triton.jit
def _add_residual(
    x, y, h, h_stride, b, out, N, width, S: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, within = rows < N, columns < width
    at = rows[:, None] * width + columns[None, :]
    there = live[:, None] & within[None, :]
    z = tl.load(y + at, mask=there, other=0.0).to(tl.float32)
    z = _add_update(z, rows, live, columns, within, h, h_stride, b, width, S, BLOCK)
    z += tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, z.to(out.dtype.element_ty), mask=there)


def _block(rows: int) -> int:
    return min(MOST_ROWS, max(16, 1 << (rows - 1).bit_length()))


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
    updates: tuple[Update | None, Update | None, Update | None],
    norms: tuple[HeadNorm, HeadNorm] | None,
) -> Tensor:
    """As in onlay/kernels/decode.py."""
    rows, groups, columns, width = keys.shape
    heads = q.shape[1] // width
    out = torch.empty(rows, heads, width, dtype=q.dtype, device=q.device)
    given = [parts(y, update) for y, update in zip((q, k, v), updates, strict=True)]
    (h_q, st_q, b_q, s_q), (h_k, st_k, b_k, s_k), (h_v, st_v, b_v, s_v) = given
    block = _block(rows)
    launch: Any = _rotate_and_store[(heads + 2 * groups, triton.cdiv(rows, block))]
    launch(
        q.contiguous(), k.contiguous(), v.contiguous(), h_q, h_k, h_v, st_q, st_k, st_v, b_q, b_k, b_v,
        cos.contiguous(), sin.contiguous(), norms[0].weight if norms else q, norms[1].weight if norms else q,
        norms[0].eps if norms else 0.0, out, keys, values, column, rows, columns,
        HEADS=heads, GROUPS=groups, HALF=width // 2, S_Q=s_q, S_K=s_k, S_V=s_v,
        # Twice as wide tiles of float32 would not fit the shared memory of smaller GPUs.
        BLOCK=2 * BLOCK_SUM if q.element_size() == 2 else BLOCK_SUM // 2, BLOCK_N=block, NORM=norms is not None,
    )  # fmt: skip
    return out


def swiglu(gate: Tensor, up: Tensor, *, updates: tuple[Update | None, Update | None]) -> Tensor:
    """As in onlay/kernels/decode.py."""
    rows, width = gate.shape
    out = torch.empty_like(gate)
    given = [parts(y, update) for y, update in zip((gate, up), updates, strict=True)]
    (h_g, st_g, b_g, s_g), (h_u, st_u, b_u, s_u) = given
    block = _block(rows)
    launch: Any = _swiglu[(triton.cdiv(width, BLOCK_COLUMNS), triton.cdiv(rows, block))]
    launch(
        gate.contiguous(), up.contiguous(), h_g, h_u, st_g, st_u, b_g, b_u, out, rows, width,
        S_G=s_g, S_U=s_u, BLOCK=BLOCK_SUM, BLOCK_N=block, BLOCK_I=BLOCK_COLUMNS, num_stages=STEPS_AHEAD,
    )  # fmt: skip
    return out


def add_residual(x: Tensor, y: Tensor, *, update: Update) -> Tensor:
    """As in onlay/kernels/decode.py."""
    rows, width = y.shape
    out = torch.empty_like(y)
    h, stride, b, ranks = parts(y, update)
    block = _block(rows)
    launch: Any = _add_residual[(triton.cdiv(width, BLOCK_COLUMNS), triton.cdiv(rows, block))]
    launch(
        x.contiguous(), y.contiguous(), h, stride, b, out, rows, width,
        S=ranks, BLOCK=BLOCK_SUM, BLOCK_N=block, BLOCK_O=BLOCK_COLUMNS,
    )  # fmt: skip
    return out
