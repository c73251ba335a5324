"""The kernels of onlay/kernels/residual.py, where the equations are.  Imported where they run: it needs Triton."""

# ruff: noqa: N803  (compile-time constants are written in capitals)

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onlay.kernels.tile import add_product, multiplies_slowly, parts, ranks_at_a_time
from onlay.kernels.updates import Update

BLOCK_ROWS = 64
"""Of a tile: the rows that Hopper's matrix units take from four warps."""
BLOCK_COLUMNS = 128
"""256 bytes of a row."""
TILE_SLOW = (32, 32)
"""Rows and columns where products run outside of the matrix units."""
WARPS = 8
"""32 numbers a thread of each tensor."""
DRAWN = 1024
"""Draws of Philox in a program, each for 8 places.  The mask is made by this number: it is the same forward and backward."""


@triton.jit(do_not_specialize=["count"])
def _add_update(
    y, residual, h, h_stride, b, count, width,
    S: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, COLUMNS)
    columns = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    rows = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live, within = rows < count, columns < width
    there = live[:, None] & within[None, :]
    at = rows[:, None] * width + columns[None, :]
    z = tl.load(y + at, mask=there, other=0.0).to(tl.float32)
    z = add_product(z, rows, live, columns, within, h, h_stride, b, width, S, BLOCK)
    if RESIDUAL:
        z += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=there)


@triton.jit
def _drop(x, y, at, number, size, least, factor, ADD: tl.constexpr):
    there = at < size
    kept = tl.load(x + at, mask=there, other=0.0).to(tl.float32) * factor
    kept = tl.where(number >= least, kept, 0.0)
    if ADD:
        kept += tl.load(y + at, mask=there, other=0.0).to(tl.float32)
    tl.store(y + at, kept.to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["seed", "least"])
def _dropped(x, y, size, seed, least, factor, DRAWN: tl.constexpr, ADD: tl.constexpr):
    """y = (y +) x m / (1 - p): one draw is four numbers of 32 bits, which are eight of 16 bits for eight places DRAWN apart."""
    drawn = tl.program_id(0).to(tl.int64) * DRAWN + tl.arange(0, DRAWN)
    # Seven rounds are what Philox's authors need to pass every test of BigCrush.
    a, b, c, d = tl.randint4x(seed, drawn, n_rounds=7)
    at = tl.program_id(0).to(tl.int64) * DRAWN * 8 + tl.arange(0, DRAWN)
    _drop(x, y, at, a & 0xFFFF, size, least, factor, ADD)
    _drop(x, y, at + DRAWN, a >> 16, size, least, factor, ADD)
    _drop(x, y, at + 2 * DRAWN, b & 0xFFFF, size, least, factor, ADD)
    _drop(x, y, at + 3 * DRAWN, b >> 16, size, least, factor, ADD)
    _drop(x, y, at + 4 * DRAWN, c & 0xFFFF, size, least, factor, ADD)
    _drop(x, y, at + 5 * DRAWN, c >> 16, size, least, factor, ADD)
    _drop(x, y, at + 6 * DRAWN, d & 0xFFFF, size, least, factor, ADD)
    _drop(x, y, at + 7 * DRAWN, d >> 16, size, least, factor, ADD)


def add_update(y: Tensor, *, update: Update | None, residual: Tensor | None) -> Tensor:
    """As in onlay/kernels/residual.py; written into y."""
    assert y.is_contiguous() and (residual is None or residual.is_contiguous())
    count, width = y.shape
    if count:
        h, stride, b, ranks = parts(y, update)
        height, across = TILE_SLOW if multiplies_slowly(y) else (BLOCK_ROWS, BLOCK_COLUMNS)
        launch: Any = _add_update[(triton.cdiv(count, height) * triton.cdiv(width, across),)]
        launch(
            y, y if residual is None else residual, h, stride, b, count, width, S=ranks, BLOCK=ranks_at_a_time(y, ranks),
            ROWS=height, COLUMNS=across, RESIDUAL=residual is not None, num_warps=WARPS,
        )  # fmt: skip
    return y


def drop_rows(x: Tensor, *, seed: int, p: float) -> Tensor:
    """As in onlay/kernels/residual.py."""
    return _launch_dropped(x, torch.empty_like(x), seed=seed, p=p, add=False)


def add_dropped(y: Tensor, u: Tensor, *, seed: int, p: float) -> Tensor:
    """As in onlay/kernels/residual.py."""
    return _launch_dropped(u, y, seed=seed, p=p, add=True)


def _launch_dropped(x: Tensor, y: Tensor, *, seed: int, p: float, add: bool) -> Tensor:
    assert x.is_contiguous() and y.is_contiguous() and x.shape == y.shape
    if x.numel():
        launch: Any = _dropped[(triton.cdiv(x.numel(), 8 * DRAWN),)]
        # A number of 16 bits, over 2^16, is at least p: p is met to 2^-16.
        launch(x, y, x.numel(), seed, math.ceil(p * 2**16), 1.0 / (1.0 - p), DRAWN=DRAWN, ADD=add)
    return y
