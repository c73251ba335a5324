"""The kernels of onlay/kernels/normalise.py, where the equations are.  Imported where they run: it needs Triton."""

# ruff: noqa: N803  (compile-time constants are written in capitals)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from onlay.kernels.fp8_rows import FP8, LARGEST, LEAST_AMAX, Fp8Rows
from onlay.kernels.tile import add_product, divided, multiplies_slowly, parts, power_above, ranks_at_a_time
from onlay.kernels.updates import Update

LEAST_TILE = 2048
"""Numbers of a program: narrow rows are computed several at a time, so that each thread has 16 bytes to load."""
NUMBERS_A_WARP = 512
"""Of a row: 16 numbers a thread, two loads of 16 bytes from each tensor in flight."""
MOST_WARPS = 16
TILE_BY_RANK = ((32, 16, 256), (None, 32, 128))
"""Up to which rank how many rows a program of the backward with an update has, and columns of a step.  It goes over its rows twice,
the second time from the cache if they are few, and reads A twice, which is less for all programs together if they are many."""
TILE_SLOW = (16, 64)
"""Rows and columns of a step where products run outside of the matrix units."""
TILE_A_WARP = 1024
"""Numbers of a step's tile: 32 a thread of each tensor."""
STEPS_AHEAD = 3
"""Of that backward's loops over columns."""


@triton.jit(do_not_specialize=["count"])
def _normalise(
    x, weight, eps, offset, y, r, numbers, scales, count, width,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, PLAIN: tl.constexpr, QUANTIZE: tl.constexpr,
    LARGEST: tl.constexpr, LEAST_AMAX: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    live, within = rows < count, columns < width
    there = live[:, None] & within[None, :]
    at = rows[:, None].to(tl.int64) * width + columns[None, :]
    z = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    # Exact division and root: there is one a row, and all of the row has its error.
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(z * z, 1) / width + eps))
    tl.store(r + rows, scale, mask=live)
    w = tl.load(weight + columns, mask=within, other=0.0).to(tl.float32) + offset
    normed = (z * scale[:, None] * w[None, :]).to(x.dtype.element_ty)
    if PLAIN:
        tl.store(y + at, normed, mask=there)
    if QUANTIZE:
        normed = tl.where(there, normed.to(tl.float32), 0.0)
        step = tl.div_rn(tl.maximum(tl.max(tl.abs(normed), 1), LEAST_AMAX), LARGEST)
        tl.store(scales + rows, step, mask=live)
        # Nothing needs clamping: the largest number's quotient is 448 but for a rounding, and its nearest number is 448.
        tl.store(numbers + at, divided(normed, step[:, None]).to(tl.float8e4nv), mask=there)


@triton.jit(do_not_specialize=["count"])
def _backward(
    grad, x, weight, r, offset, residual, count, width,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Whole rows, without an update."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    live, within = rows < count, columns < width
    there = live[:, None] & within[None, :]
    at = rows[:, None].to(tl.int64) * width + columns[None, :]
    scale = tl.load(r + rows, mask=live, other=0.0)[:, None]
    w = tl.load(weight + columns, mask=within, other=0.0).to(tl.float32) + offset
    g = tl.load(grad + at, mask=there, other=0.0).to(tl.float32) * w[None, :]
    n = tl.load(x + at, mask=there, other=0.0).to(tl.float32) * scale
    dx = scale * (g - n * (tl.sum(g * n, 1) / width)[:, None])
    if RESIDUAL:
        dx += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    tl.store(grad + at, dx.to(grad.dtype.element_ty), mask=there)


@triton.jit
def _scaled_gradient(
    grad, weight, offset, rows, live, columns, width, h, h_stride, a, S: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """g of a tile."""
    within = columns < width
    there = live[:, None] & within[None, :]
    g = tl.load(grad + rows[:, None] * width + columns[None, :], mask=there, other=0.0).to(tl.float32)
    g = add_product(g, rows, live, columns, within, h, h_stride, a, width, S, BLOCK)
    return g * (tl.load(weight + columns, mask=within, other=0.0).to(tl.float32) + offset)[None, :]


@triton.jit(do_not_specialize=["count"])
def _backward_updated(
    grad, x, weight, r, offset, residual, h, h_stride, a, count,
    WIDTH: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RESIDUAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some rows, tile by tile: once for mean(g n), and once more for dx."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < count
    scale = tl.load(r + rows, mask=live, other=0.0)[:, None]
    along = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in tl.range(0, WIDTH, COLUMNS, num_stages=STAGES):
        columns = start + tl.arange(0, COLUMNS)
        there = live[:, None] & (columns < WIDTH)[None, :]
        g = _scaled_gradient(grad, weight, offset, rows, live, columns, WIDTH, h, h_stride, a, S, BLOCK)
        n = tl.load(x + rows[:, None] * WIDTH + columns[None, :], mask=there, other=0.0).to(tl.float32) * scale
        along += g * n
    mean = (tl.sum(along, 1) / WIDTH)[:, None]
    for start in tl.range(0, WIDTH, COLUMNS, num_stages=STAGES):
        columns = start + tl.arange(0, COLUMNS)
        there = live[:, None] & (columns < WIDTH)[None, :]
        at = rows[:, None] * WIDTH + columns[None, :]
        g = _scaled_gradient(grad, weight, offset, rows, live, columns, WIDTH, h, h_stride, a, S, BLOCK)
        n = tl.load(x + at, mask=there, other=0.0).to(tl.float32) * scale
        dx = scale * (g - n * mean)
        if RESIDUAL:
            dx += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
        tl.store(grad + at, dx.to(grad.dtype.element_ty), mask=there)


def _tile(width: int) -> tuple[int, int, int]:
    """Columns, rows and warps of a program of whole rows."""
    block = power_above(width)
    rows = max(1, LEAST_TILE // block)
    return block, rows, min(MOST_WARPS, max(4, block * rows // NUMBERS_A_WARP))


def normalise(
    x: Tensor, weight: Tensor, *, eps: float, offset: float, plain: bool, quantize: bool
) -> tuple[Tensor | None, Tensor, Fp8Rows | None]:
    """y, r and the rows in FP8: as in onlay/kernels/normalise.py."""
    assert x.is_contiguous() and weight.is_contiguous()
    count, width = x.shape
    y = torch.empty_like(x) if plain else None
    r = torch.empty(count, dtype=torch.float32, device=x.device)
    rows = Fp8Rows(torch.empty_like(x, dtype=FP8), torch.empty_like(r)) if quantize else None
    if count:
        block, height, warps = _tile(width)
        launch: Any = _normalise[(triton.cdiv(count, height),)]
        launch(
            x, weight, eps, offset, y if plain else x, r, rows.numbers if rows else x, rows.scales if rows else r,
            count, width, BLOCK=block, ROWS=height, PLAIN=plain, QUANTIZE=quantize,
            LARGEST=LARGEST, LEAST_AMAX=LEAST_AMAX, num_warps=warps,
        )  # fmt: skip
    return y, r, rows


def normalise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, r: Tensor, *, offset: float, update: Update | None, residual: Tensor | None
) -> Tensor:
    """As in onlay/kernels/normalise.py; writes over `grad`."""
    assert grad.is_contiguous() and x.is_contiguous() and weight.is_contiguous()
    assert residual is None or residual.is_contiguous()
    count, width = x.shape
    if not count:
        return grad
    common = {"RESIDUAL": residual is not None}
    around = x if residual is None else residual
    if update is None:
        block, height, warps = _tile(width)
        launch: Any = _backward[(triton.cdiv(count, height),)]
        launch(grad, x, weight, r, offset, around, count, width, BLOCK=block, ROWS=height, num_warps=warps, **common)
        return grad
    h, stride, a, ranks = parts(x, update)
    height, across = next((rows, columns) for most, rows, columns in TILE_BY_RANK if most is None or ranks <= most)
    if multiplies_slowly(x):
        height, across = TILE_SLOW
    launch = _backward_updated[(triton.cdiv(count, height),)]
    launch(
        grad, x, weight, r, offset, around, h, stride, a, count, WIDTH=width, S=ranks, BLOCK=ranks_at_a_time(x, ranks),
        ROWS=height, COLUMNS=across, STAGES=STEPS_AHEAD, num_warps=max(4, height * across // TILE_A_WARP), **common,
    )  # fmt: skip
    return grad
