"""The kernels of onlay/kernels/rotate.py, where the equations are.  Imported where they run: it needs Triton."""

# ruff: noqa: N803  (compile-time constants are written in capitals)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onlay.kernels.tile import add_product, multiplies_slowly, parts, power_above, ranks_at_a_time

if TYPE_CHECKING:
    from onlay.kernels.rotate import Heads, Updates

BLOCK_ROWS = 32
"""Of a program, which has one head: both halves of it and of the angles then stay in registers.  With several heads the angles are
read less often, and yet it took longer (docs/log.md)."""
BLOCK_ROWS_SLOW = 16
"""The same where products run outside of the matrix units."""
WARPS = 4
"""16 numbers a thread of each half of a head of 128."""


@triton.jit
def _part(
    y, y_stride, rows, live, columns, within, h, h_stride, b, width, S: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Some columns of a projection of `width`, with its adapter's part."""
    there = live[:, None] & within[None, :]
    z = tl.load(y + rows[:, None] * y_stride + columns[None, :], mask=there, other=0.0).to(tl.float32)
    return add_product(z, rows, live, columns, within, h, h_stride, b, width, S, BLOCK)


@triton.jit
def _weight(norm, columns, within, offset):
    return tl.load(norm + columns, mask=within, other=0.0).to(tl.float32)[None, :] + offset


@triton.jit
def _head(
    y, y_stride, head, rows, live, h, h_stride, b, width, cos_l, cos_r, sin_l, sin_r, norm, eps, offset, r, r_stride, out,
    S: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr, REST: tl.constexpr,
    NORM: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """One head of some rows: from y to out (count, heads, D); `head` counts within the projection."""
    half, beyond = tl.arange(0, HALVES), tl.arange(0, REST)
    in_half, in_rest = half < HALF, 2 * HALF + beyond < D
    base = head * D
    left = _part(y, y_stride, rows, live, base + half, in_half, h, h_stride, b, width, S, BLOCK)
    right = _part(y, y_stride, rows, live, base + HALF + half, in_half, h, h_stride, b, width, S, BLOCK)
    if 2 * HALF < D:
        rest = _part(y, y_stride, rows, live, base + 2 * HALF + beyond, in_rest, h, h_stride, b, width, S, BLOCK)
    if NORM:
        square = tl.sum(left * left, 1) + tl.sum(right * right, 1)
        if 2 * HALF < D:
            square += tl.sum(rest * rest, 1)
        scale = tl.div_rn(1.0, tl.sqrt_rn(square / D + eps))
        tl.store(r + rows * r_stride, scale, mask=live)
        left = left * scale[:, None] * _weight(norm, half, in_half, offset)
        right = right * scale[:, None] * _weight(norm, HALF + half, in_half, offset)
        if 2 * HALF < D:
            rest = rest * scale[:, None] * _weight(norm, 2 * HALF + beyond, in_rest, offset)
    if TURN:
        turned = left * cos_l.to(tl.float32) - right * sin_l.to(tl.float32)
        right = right * cos_r.to(tl.float32) + left * sin_r.to(tl.float32)
        left = turned
    to = out + rows[:, None] * width + base
    there = live[:, None] & in_half[None, :]
    tl.store(to + half[None, :], left.to(out.dtype.element_ty), mask=there)
    tl.store(to + HALF + half[None, :], right.to(out.dtype.element_ty), mask=there)
    if 2 * HALF < D:
        there = live[:, None] & in_rest[None, :]
        tl.store(to + 2 * HALF + beyond[None, :], rest.to(out.dtype.element_ty), mask=there)


@triton.jit
def _angles(at, stride, rows, live, HALF: tl.constexpr, HALVES: tl.constexpr):
    """Left and right half of some rows of cos or sin."""
    half = tl.arange(0, HALVES)
    at += rows[:, None] * stride + half[None, :]
    there = live[:, None] & (half < HALF)[None, :]
    return tl.load(at, mask=there, other=0.0), tl.load(at + HALF, mask=there, other=0.0)


@triton.jit(do_not_specialize=["count"])
def _rotate(
    y, y_stride, h_q, h_k, h_v, h_stride_q, h_stride_k, h_stride_v, b_q, b_k, b_v, cos, sin, cos_stride, sin_stride,
    q_norm, k_norm, eps, offset, r, q, k, v, count,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr,
    REST: tl.constexpr, S_Q: tl.constexpr, S_K: tl.constexpr, S_V: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % (HEADS + 2 * GROUPS)
    rows = (tl.program_id(0) // (HEADS + 2 * GROUPS)).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < count
    cos_l, cos_r = _angles(cos, cos_stride, rows, live, HALF, HALVES)
    sin_l, sin_r = _angles(sin, sin_stride, rows, live, HALF, HALVES)
    if head < HEADS:
        _head(
            y, y_stride, head, rows, live, h_q, h_stride_q, b_q, HEADS * D, cos_l, cos_r, sin_l, sin_r, q_norm, eps,
            offset, r + head, HEADS + GROUPS, q, S_Q, BLOCK, D, HALF, HALVES, REST, NORM, True,
        )  # fmt: skip
    elif head < HEADS + GROUPS:
        _head(
            y + HEADS * D, y_stride, head - HEADS, rows, live, h_k, h_stride_k, b_k, GROUPS * D, cos_l, cos_r,
            sin_l, sin_r, k_norm, eps, offset, r + head, HEADS + GROUPS, k, S_K, BLOCK, D, HALF, HALVES, REST, NORM, True,
        )  # fmt: skip
    else:
        _head(
            y + (HEADS + GROUPS) * D, y_stride, head - HEADS - GROUPS, rows, live, h_v, h_stride_v, b_v, GROUPS * D,
            cos_l, cos_r, sin_l, sin_r, k_norm, eps, offset, r, 0, v, S_V, BLOCK, D, HALF, HALVES, REST, False, False,
        )  # fmt: skip


@triton.jit
def _head_back(
    d, d_stride, y, y_stride, head, rows, live, h, h_stride, b, width, cos_l, cos_r, sin_l, sin_r, norm, offset, r, r_stride,
    dy, dy_stride,
    S: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr, REST: tl.constexpr,
    NORM: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """One head of some rows: from d, at the head's own gradient, to its place in dy."""
    half, beyond = tl.arange(0, HALVES), tl.arange(0, REST)
    in_half, in_rest = half < HALF, 2 * HALF + beyond < D
    there_half, there_rest = live[:, None] & in_half[None, :], live[:, None] & in_rest[None, :]
    base = head * D
    d += rows[:, None] * d_stride
    left = tl.load(d + half[None, :], mask=there_half, other=0.0).to(tl.float32)
    right = tl.load(d + HALF + half[None, :], mask=there_half, other=0.0).to(tl.float32)
    if 2 * HALF < D:
        rest = tl.load(d + 2 * HALF + beyond[None, :], mask=there_rest, other=0.0).to(tl.float32)
    if TURN:
        turned = left * cos_l.to(tl.float32) + right * sin_r.to(tl.float32)
        right = right * cos_r.to(tl.float32) - left * sin_l.to(tl.float32)
        left = turned
    if NORM:
        scale = tl.load(r + rows * r_stride, mask=live, other=0.0)[:, None]
        m_left = _part(y, y_stride, rows, live, base + half, in_half, h, h_stride, b, width, S, BLOCK) * scale
        m_right = _part(y, y_stride, rows, live, base + HALF + half, in_half, h, h_stride, b, width, S, BLOCK) * scale
        left *= _weight(norm, half, in_half, offset)
        right *= _weight(norm, HALF + half, in_half, offset)
        along = tl.sum(left * m_left, 1) + tl.sum(right * m_right, 1)
        if 2 * HALF < D:
            m_rest = _part(
                y, y_stride, rows, live, base + 2 * HALF + beyond, in_rest, h, h_stride, b, width, S, BLOCK
            ) * scale  # fmt: skip
            rest *= _weight(norm, 2 * HALF + beyond, in_rest, offset)
            along += tl.sum(rest * m_rest, 1)
        mean = (along / D)[:, None]
        left = scale * (left - m_left * mean)
        right = scale * (right - m_right * mean)
        if 2 * HALF < D:
            rest = scale * (rest - m_rest * mean)
    to = dy + rows[:, None] * dy_stride + base
    tl.store(to + half[None, :], left.to(dy.dtype.element_ty), mask=there_half)
    tl.store(to + HALF + half[None, :], right.to(dy.dtype.element_ty), mask=there_half)
    if 2 * HALF < D:
        tl.store(to + 2 * HALF + beyond[None, :], rest.to(dy.dtype.element_ty), mask=there_rest)


@triton.jit(do_not_specialize=["count"])
def _rotate_backward(
    dq, dk, dv, q_stride, k_stride, v_stride, q_head, k_head, v_head, y, y_stride,
    h_q, h_k, h_stride_q, h_stride_k, b_q, b_k, cos, sin, cos_stride, sin_stride, q_norm, k_norm, offset, r, dy, count,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr,
    REST: tl.constexpr, S_Q: tl.constexpr, S_K: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % (HEADS + 2 * GROUPS)
    rows = (tl.program_id(0) // (HEADS + 2 * GROUPS)).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < count
    cos_l, cos_r = _angles(cos, cos_stride, rows, live, HALF, HALVES)
    sin_l, sin_r = _angles(sin, sin_stride, rows, live, HALF, HALVES)
    every: tl.constexpr = (HEADS + 2 * GROUPS) * D
    if head < HEADS:
        _head_back(
            dq + head.to(tl.int64) * q_head, q_stride, y, y_stride, head, rows, live, h_q, h_stride_q, b_q, HEADS * D,
            cos_l, cos_r, sin_l, sin_r, q_norm, offset, r + head, HEADS + GROUPS, dy, every,
            S_Q, BLOCK, D, HALF, HALVES, REST, NORM, True,
        )  # fmt: skip
    elif head < HEADS + GROUPS:
        group = head - HEADS
        _head_back(
            dk + group.to(tl.int64) * k_head, k_stride, y + HEADS * D, y_stride, group, rows, live, h_k, h_stride_k, b_k,
            GROUPS * D, cos_l, cos_r, sin_l, sin_r, k_norm, offset, r + head, HEADS + GROUPS, dy + HEADS * D, every,
            S_K, BLOCK, D, HALF, HALVES, REST, NORM, True,
        )  # fmt: skip
    else:
        group = head - HEADS - GROUPS
        _head_back(
            dv + group.to(tl.int64) * v_head, v_stride, y, y_stride, group, rows, live, h_k, h_stride_k, b_k,
            GROUPS * D, cos_l, cos_r, sin_l, sin_r, k_norm, offset, r, 0, dy + (HEADS + GROUPS) * D, every,
            0, BLOCK, D, HALF, HALVES, REST, False, False,
        )  # fmt: skip


def _shape(heads: Heads, cos: Tensor, like: Tensor) -> dict[str, Any]:
    """Constants of a program."""
    half = cos.shape[1] // 2
    return {
        "HEADS": heads.queries, "GROUPS": heads.groups, "D": heads.width, "HALF": half,
        # At least 16 columns, as products take.
        "HALVES": max(16, power_above(half)), "REST": max(16, power_above(heads.width - 2 * half)),
        "ROWS": BLOCK_ROWS_SLOW if multiplies_slowly(like) else BLOCK_ROWS,
        "num_warps": WARPS,
        "NORM": heads.q_norm is not None,
    }  # fmt: skip


def _grid(count: int, constants: dict[str, Any]) -> tuple[int]:
    return ((constants["HEADS"] + 2 * constants["GROUPS"]) * triton.cdiv(count, constants["ROWS"]),)


def _norms(heads: Heads, like: Tensor) -> tuple[Tensor, Tensor]:
    if heads.q_norm is None or heads.k_norm is None:
        assert heads.q_norm is heads.k_norm
        return like, like
    assert heads.q_norm.is_contiguous() and heads.k_norm.is_contiguous()
    return heads.q_norm, heads.k_norm


def rotate(
    y: Tensor, cos: Tensor, sin: Tensor, *, heads: Heads, updates: Updates
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v and r: as in onlay/kernels/rotate.py."""
    assert y.stride(1) == cos.stride(1) == sin.stride(1) == 1
    count = len(y)
    q, k, v = (
        torch.empty(count, number, heads.width, dtype=y.dtype, device=y.device)
        for number in (heads.queries, heads.groups, heads.groups)
    )
    r = None
    if heads.q_norm is not None:
        r = torch.empty(count, heads.queries + heads.groups, dtype=torch.float32, device=y.device)
    if count:
        constants = _shape(heads, cos, y)
        (h_q, st_q, b_q, s_q), (h_k, st_k, b_k, s_k), (h_v, st_v, b_v, s_v) = (parts(y, update) for update in updates)
        q_norm, k_norm = _norms(heads, y)
        launch: Any = _rotate[_grid(count, constants)]
        launch(
            y, y.stride(0), h_q, h_k, h_v, st_q, st_k, st_v, b_q, b_k, b_v, cos, sin, cos.stride(0), sin.stride(0),
            q_norm, k_norm, heads.eps, heads.offset, y if r is None else r, q, k, v, count,
            S_Q=s_q, S_K=s_k, S_V=s_v, BLOCK=ranks_at_a_time(y, s_q, s_k, s_v), **constants,
        )  # fmt: skip
    return q, k, v, r


def rotate_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, *, heads: Heads, y: Tensor | None, r: Tensor | None,
    updates: Updates,
) -> Tensor:  # fmt: skip
    """As in onlay/kernels/rotate.py; dq, dk and dv may have any distance between rows and between heads."""
    dq, dk, dv = (d if d.stride(2) == 1 else d.contiguous() for d in (dq, dk, dv))
    assert cos.stride(1) == sin.stride(1) == 1
    count = len(dq)
    dy = torch.empty(count, sum(heads.sizes), dtype=dq.dtype, device=dq.device)
    if not count:
        return dy
    constants = _shape(heads, cos, dq)
    if heads.q_norm is None:
        y, r, updates = dq, dq, (None, None, None)
    assert y is not None and r is not None and (y is dq or y.stride(1) == 1) and r.is_contiguous() | (r is dq)
    (h_q, st_q, b_q, s_q), (h_k, st_k, b_k, s_k) = (parts(dq, update) for update in updates[:2])
    q_norm, k_norm = _norms(heads, dq)
    launch: Any = _rotate_backward[_grid(count, constants)]
    launch(
        dq, dk, dv, dq.stride(0), dk.stride(0), dv.stride(0), dq.stride(1), dk.stride(1), dv.stride(1), y, y.stride(0),
        h_q, h_k, st_q, st_k, b_q, b_k, cos, sin, cos.stride(0), sin.stride(0), q_norm, k_norm, heads.offset, r, dy, count,
        S_Q=s_q, S_K=s_k, BLOCK=ranks_at_a_time(dq, s_q, s_k), **constants,
    )  # fmt: skip
    return dy
