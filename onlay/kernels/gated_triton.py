"""The kernels of onlay/kernels/gated.py, where the equations are.  Imported where they run: it needs Triton."""

# ruff: noqa: N803  (compile-time constants are written in capitals)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onlay.kernels.tile import add_product, multiplies_slowly, parts, ranks_at_a_time
from onlay.kernels.updates import Update

if TYPE_CHECKING:
    from onlay.kernels.gated import Activation

BLOCK_ROWS = 16
BLOCK_COLUMNS = 128
"""Of a tile: 256 bytes of a row; three tiles of sums in float32 then leave registers for several programs a multiprocessor."""
TILES = 8
"""Of a program, one below the other: its columns of B are read once for all of them, and the next tiles are on their way while one is
computed.  That takes the kernel from half to nine tenths of what memory allows on an H200; the sizes are the best of thirty (docs/log.md)."""
STAGES = 3
TILE_SLOW = (32, 32)
"""Rows and columns where products run outside of the matrix units."""
WARPS = 4


@triton.jit
def _act(z, ACT: tl.constexpr):
    """act(z) and its derivative."""
    if ACT == "silu":
        gate = tl.sigmoid(z)
        return z * gate, gate * (1.0 + z * (1.0 - gate))
    elif ACT == "gelu":
        share = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return z * share, share + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    else:
        # (1 + tanh(u)) / 2 = sigmoid(2 u) = s, and s (1 - s) by exp(-2 |u|): nothing is lost where tanh is near -1 or 1.
        tl.static_assert(ACT == "gelu_tanh")
        double_u = 1.5957691216057308 * (z + 0.044715 * z * z * z)
        small = tl.exp(-tl.abs(double_u))
        inverse = 1.0 / (1.0 + small)
        share = tl.where(double_u >= 0.0, inverse, small * inverse)
        slope = share + z * (small * inverse * inverse) * (1.5957691216057308 * (1.0 + 0.134145 * z * z))
        return z * share, slope


@triton.jit
def _factor(b, columns, within, width, S: tl.constexpr, BLOCK: tl.constexpr):
    """B of some columns, for all rows of a program; nothing where it is too tall to be held, or not there."""
    if S > 0 and S <= BLOCK:
        inner = tl.arange(0, BLOCK)
        factor = tl.load(
            b + inner[:, None] * width + columns[None, :], mask=(inner < S)[:, None] & within[None, :], other=0.0
        )
    else:
        factor = tl.zeros((1, 1), dtype=b.dtype.element_ty)
    return factor


@triton.jit
def _plus(z, factor, rows, live, columns, within, h, h_stride, b, width, S: tl.constexpr, BLOCK: tl.constexpr):
    """z + h B, with the factor that is held or with what add_product reads."""
    if S > 0 and S <= BLOCK:
        inner = tl.arange(0, BLOCK)
        hidden = tl.load(
            h + rows[:, None] * h_stride + inner[None, :], mask=live[:, None] & (inner < S)[None, :], other=0.0
        )
        z = tl.dot(hidden, factor, z, input_precision="ieee")
    else:
        z = add_product(z, rows, live, columns, within, h, h_stride, b, width, S, BLOCK)
    return z


@triton.jit(do_not_specialize=["count"])
def _gated(
    gate, up, gate_stride, up_stride, h_g, h_u, h_stride_g, h_stride_u, b_g, b_u, p, count, width,
    S_G: tl.constexpr, S_U: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACT: tl.constexpr,
    TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, COLUMNS)
    columns = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    first = (tl.program_id(0) // across).to(tl.int64) * ROWS * TILES
    within = columns < width
    f_g = _factor(b_g, columns, within, width, S_G, BLOCK)
    f_u = _factor(b_u, columns, within, width, S_U, BLOCK)
    for tile in tl.range(0, TILES, num_stages=STAGES):
        rows = first + tile * ROWS + tl.arange(0, ROWS)
        live = rows < count
        there = live[:, None] & within[None, :]
        z_g = tl.load(gate + rows[:, None] * gate_stride + columns[None, :], mask=there, other=0.0).to(tl.float32)
        z_u = tl.load(up + rows[:, None] * up_stride + columns[None, :], mask=there, other=0.0).to(tl.float32)
        z_g = _plus(z_g, f_g, rows, live, columns, within, h_g, h_stride_g, b_g, width, S_G, BLOCK)
        z_u = _plus(z_u, f_u, rows, live, columns, within, h_u, h_stride_u, b_u, width, S_U, BLOCK)
        acted, _ = _act(z_g, ACT)
        tl.store(p + rows[:, None] * width + columns[None, :], (acted * z_u).to(p.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["count"])
def _backward(
    gate, up, grad, gate_stride, up_stride, h_g, h_u, h_d, h_stride_g, h_stride_u, h_stride_d, b_g, b_u, b_d, count, width,
    S_G: tl.constexpr, S_U: tl.constexpr, S_D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, ACT: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, COLUMNS)
    columns = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    first = (tl.program_id(0) // across).to(tl.int64) * ROWS * TILES
    within = columns < width
    f_g = _factor(b_g, columns, within, width, S_G, BLOCK)
    f_u = _factor(b_u, columns, within, width, S_U, BLOCK)
    f_d = _factor(b_d, columns, within, width, S_D, BLOCK)
    for tile in tl.range(0, TILES, num_stages=STAGES):
        rows = first + tile * ROWS + tl.arange(0, ROWS)
        live = rows < count
        there = live[:, None] & within[None, :]
        at_gate = gate + rows[:, None] * gate_stride + columns[None, :]
        at_up = up + rows[:, None] * up_stride + columns[None, :]
        at_grad = grad + rows[:, None] * width + columns[None, :]
        z_g = tl.load(at_gate, mask=there, other=0.0).to(tl.float32)
        z_u = tl.load(at_up, mask=there, other=0.0).to(tl.float32)
        d = tl.load(at_grad, mask=there, other=0.0).to(tl.float32)
        z_g = _plus(z_g, f_g, rows, live, columns, within, h_g, h_stride_g, b_g, width, S_G, BLOCK)
        z_u = _plus(z_u, f_u, rows, live, columns, within, h_u, h_stride_u, b_u, width, S_U, BLOCK)
        d = _plus(d, f_d, rows, live, columns, within, h_d, h_stride_d, b_d, width, S_D, BLOCK)
        acted, slope = _act(z_g, ACT)
        tl.store(at_grad, (acted * z_u).to(grad.dtype.element_ty), mask=there)
        tl.store(at_gate, (d * z_u * slope).to(gate.dtype.element_ty), mask=there)
        tl.store(at_up, (d * acted).to(up.dtype.element_ty), mask=there)


def gated(
    gate: Tensor, up: Tensor, *, activation: Activation, gate_update: Update | None, up_update: Update | None
) -> Tensor:
    """As in onlay/kernels/gated.py."""
    assert gate.stride(1) == up.stride(1) == 1
    count, width = gate.shape
    p = torch.empty(count, width, dtype=gate.dtype, device=gate.device)
    if count:
        (h_g, st_g, b_g, s_g), (h_u, st_u, b_u, s_u) = parts(gate, gate_update), parts(up, up_update)
        height, across = _tile(gate)
        launch: Any = _gated[(triton.cdiv(count, height * TILES) * triton.cdiv(width, across),)]
        launch(
            gate, up, gate.stride(0), up.stride(0), h_g, h_u, st_g, st_u, b_g, b_u, p, count, width,
            S_G=s_g, S_U=s_u, BLOCK=ranks_at_a_time(gate, s_g, s_u), ROWS=height, COLUMNS=across, ACT=activation,
            TILES=TILES, STAGES=STAGES, num_warps=WARPS,
        )  # fmt: skip
    return p


def gated_backward(
    gate: Tensor, up: Tensor, grad: Tensor, *, activation: Activation, gate_update: Update | None,
    up_update: Update | None, grad_update: Update | None,
) -> Tensor:  # fmt: skip
    """As in onlay/kernels/gated.py; p is written over `grad`."""
    assert gate.stride(1) == up.stride(1) == 1 and grad.is_contiguous()
    count, width = gate.shape
    if count:
        (h_g, st_g, b_g, s_g), (h_u, st_u, b_u, s_u) = parts(gate, gate_update), parts(up, up_update)
        h_d, st_d, b_d, s_d = parts(grad, grad_update)
        height, across = _tile(gate)
        launch: Any = _backward[(triton.cdiv(count, height * TILES) * triton.cdiv(width, across),)]
        launch(
            gate, up, grad, gate.stride(0), up.stride(0), h_g, h_u, h_d, st_g, st_u, st_d, b_g, b_u, b_d, count, width,
            S_G=s_g, S_U=s_u, S_D=s_d, BLOCK=ranks_at_a_time(gate, s_g, s_u, s_d), ROWS=height, COLUMNS=across,
            ACT=activation, TILES=TILES, STAGES=STAGES, num_warps=WARPS,
        )  # fmt: skip
    return grad


def _tile(y: Tensor) -> tuple[int, int]:
    """Rows and columns of a program."""
    return TILE_SLOW if multiplies_slowly(y) else (BLOCK_ROWS, BLOCK_COLUMNS)
